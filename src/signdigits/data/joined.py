"""Several folders of photographs as one, for `data=A,B`.

The photographs of the first are at their paths, those of the others in CLASS/+NAME/ with the name of their folder. The mark
tells which were added, also in the copy of a run (`log_data`): the split keeps those of the first in the parts they were in.
"""

import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from signdigits.data.folders import find_files, is_junk
from signdigits.errors import DataError
from signdigits.files import atomic_folder, compute_digest
from signdigits.threads import map_in_threads

log = logging.getLogger(__name__)

ADDED = "+"
GROUPS = "groups.csv"  # of the first folder, beside its class folders


def name_original(name: str) -> str:
    """Return the name of the first of the folders that a joined folder called `name` holds; of any other folder, `name`."""
    return name.partition(ADDED)[0]


def is_added(path: str) -> bool:
    """Tell whether a photograph, by its path in the data set, is of another folder than the first."""
    parts = path.split("/")
    return len(parts) > 2 and parts[1].startswith(ADDED)


def join_folders(folders: Sequence[Path], home: Path) -> Path:
    """Return a folder below `home` with the photographs of all folders, made on first use, and named by their digest.

    It holds copies: a file that is edited later does not change the photographs of a recorded run.

    Raises DataError if a folder is missing or has a class that the first has not, or if a file cannot be copied.
    """
    listed = list(_list_files(folders))
    checksums = map_in_threads(_compute_checksum, [source for _, source in listed], "joining")
    files = _select_files([(path, source, next(checksums)) for path, source in listed])
    digest = compute_digest((path, checksum) for path, (_, checksum) in files.items())
    target = home / digest / ADDED.join(folder.resolve().name for folder in folders)
    if not target.exists():
        log.info("joining %s in %s", ", ".join(map(str, folders)), target)
        with atomic_folder(target) as folder:
            for path, (source, _) in files.items():
                _copy_file(source, folder / path)
    return target


def _list_files(folders: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield each file of the class folders with its path in the joined folder, and the first folder's groups.csv."""
    first, *others = folders
    classes = _list_classes(first)
    for name in classes:
        yield from ((path.relative_to(first).as_posix(), path) for path in find_files(first / name))
    if (first / GROUPS).is_file():
        yield GROUPS, first / GROUPS
    for folder in others:
        for name in _list_classes(folder):
            if name not in classes:
                raise DataError(
                    f"{folder / name}: no class of {first}, which it is joined to; rename it, or add the class"
                )
            for path in find_files(folder / name):
                inner = path.relative_to(folder / name).as_posix()
                yield f"{name}/{ADDED}{folder.resolve().name}/{inner}", path


def _select_files(listed: Sequence[tuple[str, Path, str]]) -> dict[str, tuple[Path, str]]:
    """Return source and checksum of each path; of added files, only those that their class does not hold already.

    A copy could lie in another part of the split than its original (leakage). Raises DataError if two files have one path.
    """
    files: dict[str, tuple[Path, str]] = {}
    contents: set[tuple[str, str]] = set()
    for path, source, checksum in listed:
        content = (path.split("/")[0], checksum)
        if is_added(path) and content in contents:
            continue
        if path in files:
            raise DataError(f"{source}: {files[path][0]} would have the same path, {path}; rename one of their folders")
        files[path] = (source, checksum)
        contents.add(content)
    return files


def _list_classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; data=A,B joins existing folders or data sets, and a comma in a name is one between two"
        )
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_junk(entry))


def _compute_checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; restore or remove it") from error


def _copy_file(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be copied from {source} ({error.strerror}); free some space") from error
