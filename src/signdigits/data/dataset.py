"""A folder of class folders, every photograph in it looked at once: what it shows, and what its file holds."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

import signdigits.files
import signdigits.threads
from signdigits.config import SourceParameters
from signdigits.data import sources
from signdigits.data.images import ImageError, open_image, read_file, read_orientation, to_array
from signdigits.errors import DataError, escape_undecodable

JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini")
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")


@dataclass(frozen=True, slots=True)
class Photograph:
    """One readable file: where it lies, what it shows, and what was found in it."""

    path: str  # relative to the data set's folder, with forward slashes
    label: int
    checksum: str  # SHA-256 of the file
    size: tuple[int, int]  # width and height in pixels, as stored
    mode: str  # Pillow's name for the pixel format
    orientation: int  # EXIF; 1 is upright


@dataclass(frozen=True)
class Dataset:
    """The photographs of a folder, in the order of class names and file names."""

    name: str
    folder: Path
    class_names: tuple[str, ...]
    photographs: tuple[Photograph, ...]
    unreadable: dict[str, str]  # path -> reason

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of each photograph, as an index into `class_names`; int64 of shape (n,)."""
        return np.array([photograph.label for photograph in self.photographs])

    @cached_property
    def digest(self) -> str:
        """What the folder holds, as 32 hexadecimal digits: the same paths and bytes give the same digest."""
        return signdigits.files.compute_digest(
            (photograph.path, photograph.checksum) for photograph in self.photographs
        )

    def read(self, photograph: Photograph) -> bytes:
        """The bytes of a photograph. Raises DataError if it is gone, or was changed since the folder was scanned."""
        path = self.folder / photograph.path
        try:
            content = read_file(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; put it back, then the same command continues") from error
        if hashlib.sha256(content).hexdigest() != photograph.checksum:
            raise DataError(f"{path}: changed since the folder was read; start again to use it as it is now")
        return content

    def part_digest(self, indices: np.ndarray) -> str:
        """The digest of some of the photographs."""
        return signdigits.files.compute_digest(
            (self.photographs[i].path, self.photographs[i].checksum) for i in indices
        )

    def counts(self) -> dict[str, int]:
        """Photographs in each class."""
        found = Counter(self.labels.tolist())
        return {name: found[label] for label, name in enumerate(self.class_names)}


def scan_dataset(parameters: SourceParameters) -> Dataset:
    """Open every file of every class folder and note what it holds.

    Class names are the sorted names of the folders. Hidden and junk files and folders (such as .DS_Store) are passed over.
    Raises DataError for a missing folder, fewer than two classes, an empty class, or an unreadable file
    (unless `skip_unreadable`, which lists it in the result instead).
    """
    folder = sources.resolve_source(parameters.data)
    try:
        dataset = _read_folder(folder, skip_unreadable=parameters.skip_unreadable)
    except OSError as error:  # a folder that may not be entered
        raise DataError(f"{error.filename or folder}: {error.strerror}; make it readable") from error
    if parameters.data == sources.SIGN_LANGUAGE_DIGITS and dataset.digest != sources.SIGN_LANGUAGE_DIGITS_DIGEST:
        raise DataError(f"{folder}: changed since it was downloaded; remove the folder to download it again")
    return dataset


def _read_folder(folder: Path, *, skip_unreadable: bool) -> Dataset:
    class_names = _find_classes(folder)
    files = [(path, label) for label, name in enumerate(class_names) for path in find_files(folder / name)]
    looked_at = signdigits.threads.map_in_threads(
        lambda file: _examine_file(file[0], file[0].relative_to(folder).as_posix(), file[1]), files, "reading"
    )
    photographs: list[Photograph] = []
    unreadable: dict[str, str] = {}
    for (path, _), found in zip(files, looked_at, strict=True):
        if isinstance(found, Photograph):
            photographs.append(found)
        elif skip_unreadable:
            unreadable[escape_undecodable(path.relative_to(folder).as_posix())] = str(found)
        else:
            raise DataError(f"{path}: {found}; remove it, or pass --skip_unreadable true") from found
    present = {photograph.label for photograph in photographs}
    for label, name in enumerate(class_names):
        if label not in present:
            raise DataError(f"{folder / name}: no photograph in this class folder; add some, or remove it")
    return Dataset(folder.resolve().name, folder, class_names, tuple(photographs), unreadable)


def _find_classes(folder: Path) -> tuple[str, ...]:
    """The sorted names of the class folders in `folder`."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder{_describe_relative(folder)}; pass --data a folder of class folders, or one of the names "
            f"{sources.HANDWRITTEN_DIGITS} and {sources.SIGN_LANGUAGE_DIGITS}"
        )
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_junk(entry)))
    if not names:
        raise DataError(f"{folder}: no class folder in it; put the photographs of each class into a folder of its own")
    if len(names) == 1:
        raise DataError(f"{folder}: only one class folder, {names[0]!r}; a classifier needs two or more")
    for name in names:
        if not _is_text(Path(name)):
            raise DataError(f"{folder / name}: the name is not UTF-8; rename it")
    _check_layout(folder, names)
    return names


def _describe_relative(folder: Path) -> str:
    """From where a relative path was looked for: `mlflow run` works in the project's folder."""
    return "" if folder.is_absolute() else f" in {Path.cwd()}, where `mlflow run` works too: an absolute path is sure"


def find_files(folder: Path) -> Iterator[Path]:
    """The files of a folder and the folders in it, in the order in which Keras lists them; junk is passed over.

    Links are followed once: a link to what lies in the folder anyway adds nothing.
    """
    whole = folder.resolve()
    for directory in _find_folders(folder):
        for path in sorted(directory.iterdir()):
            again = path.is_symlink() and path.exists() and path.resolve().is_relative_to(whole)
            if is_file(path) and not _is_junk(path) and not again:
                yield path


def _find_folders(folder: Path) -> list[Path]:
    """`folder` and the folders in it, each once, however many links lead to it."""
    found: dict[Path, Path] = {}
    waiting, links = [folder], list[Path]()
    while waiting or links:
        directory = waiting.pop() if waiting else links.pop(0)
        if directory.resolve() in found:
            continue
        found[directory.resolve()] = directory
        for entry in sorted(directory.iterdir()):
            if entry.is_dir() and not _is_junk(entry):
                (links if entry.is_symlink() else waiting).append(entry)
    return sorted(found.values(), key=str)


def _is_text(path: Path) -> bool:
    """Tell names that are UTF-8 from bytes of another encoding, which old archives hold."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


def is_file(path: Path) -> bool:
    """Whether there is a file, or a link that leads nowhere: that one is not to be passed over in silence."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _is_junk(path: Path) -> bool:
    """Hidden files and folders, and what systems and archivers leave beside photographs."""
    return path.name.startswith(".") or path.name in JUNK


def _check_layout(folder: Path, names: Sequence[str]) -> None:
    """Raise DataError if the class folders hold nothing but the same folders: train/CLASS and test/CLASS, say."""
    inside = []
    for name in names:
        entries = [entry for entry in (folder / name).iterdir() if not _is_junk(entry)]
        if not all(entry.is_dir() for entry in entries):
            return
        inside.append({entry.name for entry in entries})
    shared = set.intersection(*inside)
    if len(shared) > 1 and not all(name.lower() in SPLITS for name in shared):
        raise DataError(
            f"{folder}: {_join_names(names)} each hold the folders {_join_names(sorted(shared))}, which seem to be the classes; pass "
            f"--data {folder / names[0]}, or move the photographs of each class into one folder"
        )


def _join_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _examine_file(path: Path, relative: str, label: int) -> Photograph | ImageError:
    """Read one file to the array that the network would see, and note what it holds, or why that fails."""
    if not _is_text(path):
        return ImageError("its name, or its folder's, is not UTF-8; rename it")
    try:
        content = read_file(path)
        image = open_image(content)
        to_array(image, image_size=8, color_mode="rgb")  # what fails would otherwise fail in the last evaluation
    except OSError as error:
        return ImageError(f"cannot be read ({error.strerror})")
    except ImageError as error:
        return error
    checksum = hashlib.sha256(content).hexdigest()
    return Photograph(relative, label, checksum, image.size, image.mode, read_orientation(image))
