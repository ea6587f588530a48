"""A data set: folders of class folders with photographs."""

import hashlib
import itertools
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.contrib.concurrent import thread_map

from signdigits.config import SourceParameters
from signdigits.data import sources
from signdigits.data.cache import PhotographCache
from signdigits.data.folders import describe_file, find_files, list_entries, list_folders
from signdigits.data.images import ImageError, load_image, open_image, read_file, read_orientation, to_array
from signdigits.data.names import Names, normalize_text, suggest_file
from signdigits.errors import DataError, escape_undecodable
from signdigits.files import compute_digest

HASHED_SIZE = 100  # pixels; side of the image behind the perceptual hash and the mean colour
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")


@dataclass(frozen=True, slots=True)
class Photograph:
    """A readable photograph: its path, its label and the properties of its file."""

    path: str  # path in the data set, with forward slashes
    label: int
    checksum: str  # SHA-256 of the file
    size: tuple[int, int]  # width and height in pixels, as stored
    mode: str  # Pillow's name for the pixel format
    orientation: int  # EXIF; 1 is upright
    perceptual_hash: int  # pHash, 64 bits; similar images differ in few of them
    mean_colour: tuple[float, float, float]  # red, green and blue, 0 to 255

    @property
    def is_added(self) -> bool:
        """Tell whether the photograph is of another folder than the first."""
        parts = self.path.split("/")
        return len(parts) > 2 and parts[1].startswith(sources.ADDED)


@dataclass(frozen=True)
class Dataset:
    """The photographs of a folder, sorted by class name and file name; of `data=A,B`, those of several folders.

    A photograph of the first folder keeps its path; one that another folder adds has CLASS/+NAME/ before its own, with the name
    of that folder. The mark stays in the copy of a run (`log_data`), and the split keeps those of the first in their parts.
    """

    name: str
    folders: tuple[Path, ...]
    class_names: tuple[str, ...]
    photographs: tuple[Photograph, ...]
    unreadable: dict[str, str]  # path -> reason
    added: dict[str, Path]  # path -> file, of the other folders

    @property
    def folder(self) -> Path:
        """The folder, or the first."""
        return self.folders[0]

    @property
    def source(self) -> str:
        """The folders as a value of `data`, from any working directory."""
        return ",".join(str(folder.resolve()) for folder in self.folders)

    @property
    def origin(self) -> str:
        """The name of the folder, or the first."""
        return sources.name_original(self.name)

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of each photograph, an index into `class_names`; int64 of shape (n,)."""
        return np.array([photograph.label for photograph in self.photographs])

    @cached_property
    def digest(self) -> str:
        """A digest of paths and contents, as 32 hexadecimal digits."""
        return compute_digest((photograph.path, photograph.checksum) for photograph in self.photographs)

    def read(self, photograph: Photograph) -> bytes:
        """Return the bytes of a photograph. Raises DataError if it is missing or has changed since the folder was scanned."""
        path = self.locate(photograph.path)
        try:
            content = read_file(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; restore it, then run the same command to continue") from error
        if hashlib.sha256(content).hexdigest() != photograph.checksum:
            raise DataError(
                f"{path}: has changed since the folder was scanned; run the command again to use the new content"
            )
        return content

    def locate(self, path: str) -> Path:
        """Return the file of a photograph."""
        return self.added.get(path, self.folder / path)

    def part_digest(self, indices: np.ndarray) -> str:
        """Return the digest of some of the photographs."""
        return compute_digest((self.photographs[i].path, self.photographs[i].checksum) for i in indices)

    def counts(self) -> dict[str, int]:
        """Return the number of photographs of each class."""
        counts = Counter(self.labels.tolist())
        return {name: counts[label] for label, name in enumerate(self.class_names)}


def scan_dataset(parameters: SourceParameters) -> Dataset:
    """Scan the folders that `parameters.data` names, with a cache of RGB pixels, as `scan_folders` does."""
    return scan_folders(sources.resolve_source(parameters.data), parameters, PhotographCache(HASHED_SIZE, "rgb"))


def scan_folders(folders: Sequence[Path], parameters: SourceParameters, cache: PhotographCache) -> Dataset:
    """Read every file of every class folder, once, and decode each photograph that the cache does not hold.

    `folders` are those that `resolve_source` returned for `parameters.data`.
    Class names are the sorted names of the first's folders. Hidden and junk files and folders (such as .DS_Store) are skipped.
    Raises DataError for a missing folder, no class folders, an empty class, a class that the first folder has not, or
    an unreadable file (unless `skip_unreadable`, which lists it in the result instead).
    """
    try:
        dataset = _read_folders(folders, parameters, cache)
    except OSError as error:  # a folder that may not be entered
        raise DataError(f"{error.filename or folders[0]}: {error.strerror}; make it readable") from error
    if parameters.data == sources.SIGN_LANGUAGE_DIGITS and dataset.digest != sources.SIGN_LANGUAGE_DIGITS_DIGEST:
        raise DataError(f"{dataset.folder}: has changed since the download; remove the folder to download it again")
    return dataset


def _read_folders(folders: Sequence[Path], parameters: SourceParameters, cache: PhotographCache) -> Dataset:
    class_names = _find_classes(folders)
    files = list(_list_files(folders, class_names))
    results = thread_map(
        lambda listed: _examine_file(listed, cache), files, max_workers=os.cpu_count(), desc="reading", disable=None
    )
    photographs: dict[str, Photograph] = {}
    added: dict[str, Path] = {}
    unreadable: dict[str, str] = {}
    contents: set[tuple[int, str]] = set()
    for (path, label, file), result in zip(files, results, strict=True):
        if isinstance(result, ImageError):
            if not parameters.skip_unreadable:
                raise DataError(f"{file}: {result}; remove it, or pass --skip_unreadable true") from result
            unreadable[escape_undecodable(path)] = str(result)
            continue
        if result.is_added and (label, result.checksum) in contents:
            continue  # a copy could lie in another part of the split than its original (leakage)
        if path in photographs:
            raise DataError(
                f"{file}: {added.get(path, folders[0] / path)} would have the same path, {path}; rename one of their folders"
            )
        photographs[path] = result
        contents.add((label, result.checksum))
        if file != folders[0] / path:
            added[path] = file
    labels = {photograph.label for photograph in photographs.values()}
    for label, name in enumerate(class_names):
        if label not in labels:
            raise DataError(f"{folders[0] / name}: no photographs in this class folder; add some, or remove it")
    ordered = sorted(photographs.values(), key=lambda found: (found.label, *posixpath.split(found.path)))
    joined_name = sources.ADDED.join(folder.resolve().name for folder in folders)
    return Dataset(joined_name, tuple(folders), class_names, tuple(ordered), unreadable, added)


def _list_files(folders: Sequence[Path], class_names: Sequence[str]) -> Iterator[tuple[str, int, Path]]:
    """Yield the path in the data set, the label and the file of each photograph."""
    first, *others = folders
    for label, class_name in enumerate(class_names):
        yield from ((path.relative_to(first).as_posix(), label, path) for path in find_files(first / class_name))
    names = Names(class_names)
    for class_folder in (class_folder for folder in others for class_folder in list_folders(folder)):
        name = names.find(class_folder.name)
        if not name:
            raise DataError(
                f"{class_folder}: no class of {first}, which it is joined to{names.suggest(class_folder.name)}; rename it, or add "
                "the class"
            )
        for path in find_files(class_folder):
            inner = path.relative_to(class_folder).as_posix()
            yield f"{name}/{sources.ADDED}{class_folder.parent.resolve().name}/{inner}", class_names.index(name), path


def _find_classes(folders: Sequence[Path]) -> tuple[str, ...]:
    """Return the sorted names of the class folders in the first folder, after a check of all."""
    for folder in folders:
        if not folder.is_dir():
            message = f"{folder}: {describe_file(folder) or ('not a folder' if folder.exists() else 'no such folder')}"
            if not folder.exists():
                if not folder.is_absolute():
                    message += f" in {Path.cwd()}, nor where the command was started; an absolute path is safer"
                message += suggest_file(folder)
            if len(folders) > 1:
                message += "; data=A,B joins existing folders or data sets, and a comma in a name is one between two"
            raise DataError(
                f"{message}; pass --data a folder of class folders, or one of the names {sources.HANDWRITTEN_DIGITS} and "
                f"{sources.SIGN_LANGUAGE_DIGITS}"
            )
    folder = folders[0]
    names = tuple(entry.name for entry in list_folders(folder))
    if not names:
        raise DataError(
            f"{folder}: no class folders; put the photographs of each class into a folder named after the class"
        )
    for name in names:
        if not _is_utf8(Path(name)):
            raise DataError(f"{folder / name}: the name is not UTF-8; rename it")
    for name, alike in itertools.combinations(names, 2):
        if normalize_text(name) == normalize_text(alike):
            raise DataError(f"{folder}: the names {name!a} and {alike!a} look the same; make them one class")
    _check_layout(folder, names)
    return names


def _is_utf8(path: Path) -> bool:
    """Return whether a path is UTF-8; old archives hold names in other encodings."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


def _check_layout(folder: Path, names: Sequence[str]) -> None:
    """Raise DataError if the class folders contain only the same subfolders, as in train/CLASS and test/CLASS."""
    subfolders = []
    for name in names:
        entries = list_entries(folder / name)
        if not all(entry.is_dir() for entry in entries):
            return
        subfolders.append({entry.name for entry in entries})
    shared = set.intersection(*subfolders)
    if len(shared) > 1 and not all(name.lower() in SPLIT_NAMES for name in shared):
        raise DataError(
            f"{folder}: {_join_names(names)} all contain {_join_names(sorted(shared))}, which look like the classes; pass "
            f"--data {folder / names[0]}, or move the photographs of each class into one folder"
        )


def _join_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _examine_file(listed: tuple[str, int, Path], cache: PhotographCache) -> Photograph | ImageError:
    """Read a file that `_list_files` lists, and return its properties, from the cache if it was decoded before; or the error."""
    path, label, file = listed
    if not _is_utf8(file):
        return ImageError("the name of the file or its folder is not UTF-8; rename it")
    try:
        content = read_file(file)
        checksum = hashlib.sha256(content).hexdigest()
        properties = cache.read_properties(checksum) or _decode_photograph(content, checksum, cache)
    except OSError as error:
        return ImageError(f"cannot be read ({error.strerror})")
    except ImageError as error:
        return error
    width, height = properties.pop("size")
    red, green, blue = properties.pop("mean_colour")
    return Photograph(path, label, checksum, (width, height), mean_colour=(red, green, blue), **properties)


def _decode_photograph(content: bytes, checksum: str, cache: PhotographCache) -> dict[str, Any]:
    """Return the properties of a photograph, and keep it in the cache. Raises ImageError if it cannot be preprocessed."""
    image = open_image(content)
    size = image.size
    load_image(image, max(HASHED_SIZE, cache.image_size))
    rgb = to_array(image, HASHED_SIZE, "rgb")
    properties = {
        "size": size,
        "mode": image.mode,
        "orientation": read_orientation(image),
        "perceptual_hash": _hash_image(rgb),
        "mean_colour": rgb.mean(axis=(0, 1)).tolist(),
    }
    same = (cache.image_size, cache.color_mode) == (HASHED_SIZE, "rgb")
    cache.write(checksum, properties, rgb if same else to_array(image, cache.image_size, cache.color_mode))
    return properties


def _hash_image(rgb: np.ndarray) -> int:
    """Return the pHash of an image, from the lowest frequencies of its cosine transform."""
    import imagehash  # takes half a second, and batch prediction does not need it

    bits = imagehash.phash(Image.fromarray(rgb)).hash
    return int(np.packbits(bits).view(">u8")[0])
