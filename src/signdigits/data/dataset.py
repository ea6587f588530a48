"""A data set: a folder of class folders with photographs."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from signdigits.config import SourceParameters
from signdigits.data import joined, sources
from signdigits.data.cache import PhotographCache
from signdigits.data.folders import find_files, is_junk
from signdigits.data.images import ImageError, load_image, open_image, read_file, read_orientation, to_array
from signdigits.errors import DataError, escape_undecodable
from signdigits.files import compute_digest
from signdigits.threads import map_in_threads

HASHED_SIZE = 100  # pixels; side of the image behind the perceptual hash and the mean colour
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")


@dataclass(frozen=True, slots=True)
class Photograph:
    """A readable photograph: its path, its label and the properties of its file."""

    path: str  # relative to the data set's folder, with forward slashes
    label: int
    checksum: str  # SHA-256 of the file
    size: tuple[int, int]  # width and height in pixels, as stored
    mode: str  # Pillow's name for the pixel format
    orientation: int  # EXIF; 1 is upright
    perceptual_hash: int  # pHash, 64 bits; similar images differ in few of them
    mean_colour: tuple[float, float, float]  # red, green and blue, 0 to 255


@dataclass(frozen=True)
class Dataset:
    """The photographs of a folder, sorted by class name and file name."""

    name: str
    folder: Path
    class_names: tuple[str, ...]
    photographs: tuple[Photograph, ...]
    unreadable: dict[str, str]  # path -> reason

    @property
    def origin(self) -> str:
        """The name of the folder; of a joined one, that of the first."""
        return joined.name_original(self.name)

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
        path = self.folder / photograph.path
        try:
            content = read_file(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; restore it, then run the same command to continue") from error
        if hashlib.sha256(content).hexdigest() != photograph.checksum:
            raise DataError(
                f"{path}: has changed since the folder was scanned; run the command again to use the new content"
            )
        return content

    def part_digest(self, indices: np.ndarray) -> str:
        """Return the digest of some of the photographs."""
        return compute_digest((self.photographs[i].path, self.photographs[i].checksum) for i in indices)

    def counts(self) -> dict[str, int]:
        """Return the number of photographs of each class."""
        counts = Counter(self.labels.tolist())
        return {name: counts[label] for label, name in enumerate(self.class_names)}


def scan_dataset(parameters: SourceParameters) -> Dataset:
    """Scan the folder that `parameters.data` names, with a cache of RGB pixels, as `scan_folder` does."""
    return scan_folder(sources.resolve_source(parameters.data), parameters, PhotographCache(HASHED_SIZE, "rgb"))


def scan_folder(folder: Path, parameters: SourceParameters, cache: PhotographCache) -> Dataset:
    """Read every file of every class folder, once, and decode each photograph that the cache does not hold.

    `folder` is the one that `resolve_source` returned for `parameters.data`.
    Class names are the sorted names of the folders. Hidden and junk files and folders (such as .DS_Store) are skipped.
    Raises DataError for a missing folder, fewer than two classes, an empty class, or an unreadable file
    (unless `skip_unreadable`, which lists it in the result instead).
    """
    try:
        dataset = _read_folder(folder, parameters, cache)
    except OSError as error:  # a folder that may not be entered
        raise DataError(f"{error.filename or folder}: {error.strerror}; make it readable") from error
    if parameters.data == sources.SIGN_LANGUAGE_DIGITS and dataset.digest != sources.SIGN_LANGUAGE_DIGITS_DIGEST:
        raise DataError(f"{folder}: has changed since the download; remove the folder to download it again")
    return dataset


def _read_folder(folder: Path, parameters: SourceParameters, cache: PhotographCache) -> Dataset:
    class_names = _find_classes(folder)
    files = [(path, label) for label, name in enumerate(class_names) for path in find_files(folder / name)]
    results = map_in_threads(lambda file: _examine_file(*file, folder, cache), files, "reading")
    photographs: list[Photograph] = []
    unreadable: dict[str, str] = {}
    for (path, _), result in zip(files, results, strict=True):
        if not isinstance(result, ImageError):
            photographs.append(result)
        elif parameters.skip_unreadable:
            unreadable[escape_undecodable(path.relative_to(folder).as_posix())] = str(result)
        else:
            raise DataError(f"{path}: {result}; remove it, or pass --skip_unreadable true") from result
    labels = {photograph.label for photograph in photographs}
    for label, name in enumerate(class_names):
        if label not in labels:
            raise DataError(f"{folder / name}: no photographs in this class folder; add some, or remove it")
    return Dataset(folder.resolve().name, folder, class_names, tuple(photographs), unreadable)


def _find_classes(folder: Path) -> tuple[str, ...]:
    """Return the sorted names of the class folders in `folder`."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder{_describe_relative(folder)}; pass --data a folder of class folders, or one of the names "
            f"{sources.HANDWRITTEN_DIGITS} and {sources.SIGN_LANGUAGE_DIGITS}"
        )
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_junk(entry)))
    if not names:
        raise DataError(
            f"{folder}: no class folders; put the photographs of each class into a folder named after the class"
        )
    if len(names) == 1:
        raise DataError(f"{folder}: only one class folder, {names[0]!r}; a classifier needs two or more")
    for name in names:
        if not _is_utf8(Path(name)):
            raise DataError(f"{folder / name}: the name is not UTF-8; rename it")
    _check_layout(folder, names)
    return names


def _describe_relative(folder: Path) -> str:
    """Return the working directory that a relative path refers to: with `mlflow run`, the project's folder."""
    return (
        ""
        if folder.is_absolute()
        else f" in {Path.cwd()}, the working directory of `mlflow run`; an absolute path is safer"
    )


def _is_utf8(path: Path) -> bool:
    """Return whether a path is UTF-8; old archives hold names in other encodings."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


def _check_layout(folder: Path, names: Sequence[str]) -> None:
    """Raise DataError if the class folders contain only the same subfolders, as in train/CLASS and test/CLASS."""
    subfolders = []
    for name in names:
        entries = [entry for entry in (folder / name).iterdir() if not is_junk(entry)]
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


def _examine_file(path: Path, label: int, folder: Path, cache: PhotographCache) -> Photograph | ImageError:
    """Read one file, and return its properties, from the cache if it was decoded before; or the error."""
    if not _is_utf8(path):
        return ImageError("the name of the file or its folder is not UTF-8; rename it")
    try:
        content = read_file(path)
        checksum = hashlib.sha256(content).hexdigest()
        properties = cache.read_properties(checksum) or _decode_photograph(content, checksum, cache)
    except OSError as error:
        return ImageError(f"cannot be read ({error.strerror})")
    except ImageError as error:
        return error
    width, height = properties.pop("size")
    red, green, blue = properties.pop("mean_colour")
    return Photograph(
        path.relative_to(folder).as_posix(),
        label,
        checksum,
        (width, height),
        mean_colour=(red, green, blue),
        **properties,
    )


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
