"""A folder of class folders becomes labelled arrays, split into training, validation and test images.

    python -m signdigits prepare --data FOLDER

Nothing here imports TensorFlow.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from signdigits import sources
from signdigits.errors import DataError
from signdigits.hyperparameters import DataParameters, SourceParameters
from signdigits.images import ImageError, decode, open_image, orientation, to_array

# The notebook's seed and fraction: with them the test images are its 412 validation images. They are no
# parameters: runs can be compared only on the same images.
SPLIT_SEED = 1337
TEST_FRACTION = 0.2
VALIDATION_FRACTION = 0.2  # of what is not test


@dataclass(frozen=True)
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
        return sources.digest((photograph.path, photograph.checksum) for photograph in self.photographs)

    def part_digest(self, indices: np.ndarray) -> str:
        """The digest of some of the photographs."""
        return sources.digest((self.photographs[i].path, self.photographs[i].checksum) for i in indices)

    def counts(self) -> dict[str, int]:
        """Photographs in each class."""
        found = Counter(self.labels.tolist())
        return {name: found[label] for label, name in enumerate(self.class_names)}


@dataclass(frozen=True)
class Split:
    """Indices into a data set's photographs; no photograph is in two parts, and every one is in one."""

    training: np.ndarray
    validation: np.ndarray
    testing: np.ndarray

    @property
    def fitting(self) -> np.ndarray:
        """Training and validation together: everything but the test images."""
        return np.concatenate([self.training, self.validation])


@dataclass(frozen=True)
class Images:
    """Decoded photographs: `x` of shape (n, image_size, image_size, channels), `y` of shape (n,), int64."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Data:
    """What training and search work on. The test images are not decoded here: nothing before the last evaluation
    may look at them."""

    dataset: Dataset
    split: Split
    parameters: DataParameters
    training: Images
    validation: Images

    @property
    def fitting(self) -> Images:
        """Training and validation images together, for the refit."""
        return Images(
            np.concatenate([self.training.x, self.validation.x]), np.concatenate([self.training.y, self.validation.y])
        )


def load(parameters: DataParameters) -> Data:
    """Find, check and split the photographs, and decode those for training and validation.

    Raises DataError, naming the path, for anything that makes the folder unfit.
    """
    dataset = scan(parameters)
    split = split_photographs(dataset)
    read = (read_images(dataset, part, parameters) for part in (split.training, split.validation))
    return Data(dataset, split, parameters, *read)


def scan(parameters: SourceParameters) -> Dataset:
    """Open every file of every class folder and note what it holds.

    Class names are the sorted names of the folders. Hidden files and folders (such as .DS_Store) are passed over.
    Raises DataError for a missing folder, fewer than two classes, an empty class, or an unreadable file
    (unless `skip_unreadable`, which lists it in the result instead).
    """
    folder = sources.resolve(parameters.data)
    try:
        dataset = read_folder(folder, skip_unreadable=parameters.skip_unreadable)
    except OSError as error:  # a folder that may not be entered
        raise DataError(f"{error.filename or folder}: {error.strerror}; make it readable") from error
    if parameters.data == sources.SIGN_LANGUAGE_DIGITS and dataset.digest != sources.SIGN_LANGUAGE_DIGITS_DIGEST:
        raise DataError(f"{folder}: changed since it was downloaded; remove the folder to download it again")
    return dataset


def read_folder(folder: Path, *, skip_unreadable: bool) -> Dataset:
    photographs: list[Photograph] = []
    unreadable: dict[str, str] = {}
    class_names = find_classes(folder)
    for label, class_name in enumerate(class_names):
        before = len(photographs)
        for path in find_files(folder / class_name):
            relative = path.relative_to(folder).as_posix()
            try:
                photographs.append(examine(path, relative, label))
            except ImageError as error:
                if not skip_unreadable:
                    raise DataError(f"{path}: {error}; remove it, or pass --skip_unreadable true") from error
                unreadable[relative] = str(error)
        if len(photographs) == before:
            raise DataError(f"{folder / class_name}: no photograph in this class folder; add some, or remove it")
    return Dataset(folder.resolve().name, folder, class_names, tuple(photographs), unreadable)


def find_classes(folder: Path) -> tuple[str, ...]:
    """The sorted names of the class folders in `folder`."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; pass --data a folder of class folders, or one of the names "
            f"{sources.HANDWRITTEN_DIGITS} and {sources.SIGN_LANGUAGE_DIGITS}"
        )
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not hidden(entry)))
    if not names:
        raise DataError(f"{folder}: no class folder in it; put the photographs of each class into a folder of its own")
    if len(names) == 1:
        raise DataError(f"{folder}: only one class folder, {names[0]!r}; a classifier needs two or more")
    return names


def find_files(folder: Path) -> Iterator[Path]:
    """The files of one class folder and the folders in it, in the order in which Keras lists them."""
    inside = sorted({folder, *(path for path in folder.rglob("*") if path.is_dir())}, key=str)
    for directory in inside:
        yield from sorted(path for path in directory.iterdir() if is_file(path) and not hidden(path))


def is_file(path: Path) -> bool:
    """Whether there is a file, or a link that leads nowhere: that one is not to be passed over in silence."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def hidden(path: Path) -> bool:
    return path.name.startswith(".")


def examine(path: Path, relative: str, label: int) -> Photograph:
    """Read one file to the array that the network would see; raises ImageError where that fails."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from error
    image = open_image(content)
    to_array(image, image_size=8, color_mode="rgb")  # what fails would otherwise fail in the last evaluation
    checksum = hashlib.sha256(content).hexdigest()
    return Photograph(relative, label, checksum, image.size, image.mode, orientation(image))


def split_photographs(dataset: Dataset) -> Split:
    """Split as the notebook did, then once more.

    The test images are what Keras' `image_dataset_from_directory` calls the validation subset for seed 1337 and
    validation_split 0.2: the last fifth of a seeded shuffle of the sorted files. A fifth of the rest, drawn evenly
    from the classes, is for validation. Raises DataError if a class is missing from one of the three parts.
    """
    order = list(range(len(dataset.photographs)))
    np.random.RandomState(SPLIT_SEED).shuffle(order)
    n_test = int(TEST_FRACTION * len(order))
    rest, testing = np.array(order[: len(order) - n_test], int), np.array(order[len(order) - n_test :], int)
    labels = dataset.labels
    require_each_class(dataset, labels[rest], least=2, part="training and validation")
    require_each_class(dataset, labels[testing], least=1, part="test")
    try:
        training, validation = train_test_split(
            rest, test_size=VALIDATION_FRACTION, stratify=labels[rest], random_state=SPLIT_SEED
        )
    except ValueError as error:  # fewer validation images than classes
        raise DataError(f"{dataset.folder}: too few photographs to split ({error}); add more") from error
    require_each_class(dataset, labels[training], least=1, part="training")
    require_each_class(dataset, labels[validation], least=1, part="validation")
    return Split(training, validation, testing)


def require_each_class(dataset: Dataset, labels: np.ndarray, least: int, part: str) -> None:
    found = np.bincount(labels, minlength=len(dataset.class_names))
    for name, count in zip(dataset.class_names, found.tolist(), strict=True):
        if count < least:
            raise DataError(
                f"{dataset.folder / name}: too few photographs to split: {dataset.counts()[name]} in the class leave "
                f"{count} for {part}; add more, or remove the class"
            )


def read_images(dataset: Dataset, indices: np.ndarray, parameters: DataParameters) -> Images:
    """Decode the photographs at `indices`, in that order."""
    arrays = [
        decode(
            (dataset.folder / dataset.photographs[i].path).read_bytes(), parameters.image_size, parameters.color_mode
        )
        for i in indices
    ]
    return Images(np.stack(arrays), dataset.labels[indices])
