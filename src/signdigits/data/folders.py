"""The walk through folders of photographs, for every command: without hidden and junk files, each file once."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from signdigits.data import images

# Left behind by Windows, macOS, archivers, and the storage systems of Synology, QNAP and NetApp; in lower case.
JUNK_NAMES = (
    "__macosx", "icon\r", "network trash folder", "temporary items", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini",
    "$recycle.bin", "system volume information", "lost+found", "picasa.ini", "@eadir", "@tmp", "@recycle", "@recently-snapshot",
    "@sharesnap", "#recycle", "#snapshot", "~snapshot", "thumbs.db:encryptable", "zbthumbnail.info",
)  # fmt: skip
# A folder of pictures that show no sign, beside a folder of class folders: a model should answer them as outliers.
NO_SIGN = "not-a-sign"
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst")


def is_junk(path: Path) -> bool:
    """Return whether a file or folder is hidden, or left behind by an operating system, an archiver or a storage system."""
    name = path.name.lower()
    return name.startswith((".", "~$")) or name in JUNK_NAMES


def list_entries(folder: Path) -> list[Path]:
    """Return the sorted files and folders in a folder, without junk."""
    return sorted(entry for entry in folder.iterdir() if not is_junk(entry))


def list_folders(folder: Path) -> list[Path]:
    """Return the sorted folders in a folder, without junk."""
    return [entry for entry in list_entries(folder) if entry.is_dir()]


def find_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, in the order in which Keras lists them, without junk.

    Of symbolic links, those to a file inside the folder are skipped, because it is listed anyway, and of several to the same
    file all but the first; a broken one is reported as unreadable. Pipes, sockets and devices are skipped.
    """
    root, linked = folder.resolve(), set[Path]()
    for directory in _walk(folder):
        for path in list_entries(directory):
            if path.is_symlink() and path.exists():
                target = path.resolve()
                if target in linked or target.is_relative_to(root):
                    continue
                linked.add(target)
            if path.is_file() or not path.exists():
                yield path


def count_junk(folder: Path) -> int:
    """Return the number of hidden and junk files and folders that `find_files` skips."""
    return sum(is_junk(entry) for directory in _walk(folder) for entry in directory.iterdir())


def _walk(folder: Path) -> list[Path]:
    """Return `folder` and its subfolders, each once, however many symbolic links lead to it; links upwards are skipped."""
    root = folder.resolve()
    folders: dict[Path, Path] = {}
    pending, links = [folder], list[Path]()
    while pending or links:
        directory = pending.pop() if pending else links.pop(0)
        target = directory.resolve()
        if target in folders or target in root.parents:
            continue
        folders[target] = directory
        for entry in list_folders(directory):
            (links if entry.is_symlink() else pending).append(entry)
    return sorted(folders.values(), key=str)


def describe_file(path: Path) -> str:
    """Return what a path that was given for a folder is, and what to do, as a part of a message; empty if that is unknown."""
    suffix = path.suffix.lower()
    if re.match(r"\w{2,}:/", str(path)):
        return "a URL; download it, and pass the folder"
    if not path.is_file():
        return ""
    if suffix in SPREADSHEETS:
        return "a spreadsheet; a table must be a CSV or Parquet file"
    if suffix in ARCHIVES:
        return "an archive; unpack it, and pass the folder"
    with contextlib.suppress(images.ImageError):
        images.open_image(images.read_file(path))
        return "a single photograph; pass the folder that it lies in"
    return ""
