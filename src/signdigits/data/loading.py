"""Load a folder of class folders as labelled arrays for training and validation, without TensorFlow."""

import logging
from dataclasses import dataclass, replace

import numpy as np

from signdigits.config import DataParameters
from signdigits.data.cache import FOLDER, DiskArray, PhotographCache
from signdigits.data.dataset import Dataset, scan_folders
from signdigits.data.sources import default_image_size, resolve_source
from signdigits.data.split import Split, split_dataset
from signdigits.data.start import Start, find_start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """Decoded photographs: `x` of shape (n, image_size, image_size, channels), `y` of shape (n,), int64."""

    x: np.ndarray | DiskArray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        _, height, width, channels = self.x.shape
        return height, width, channels

    def part(self, chosen: slice | np.ndarray) -> "Images":
        """Return some of the images; those of a slice are a view."""
        x = self.x.part(chosen) if isinstance(self.x, DiskArray) else self.x[chosen]
        return Images(x, self.y[chosen])


@dataclass(frozen=True)
class Features(Images):
    """The features that a frozen network computes of photographs, in place of their pixels.

    `x` has the shape (n, 1 + COPIES, features): those of each photograph, then those of changed copies of it.
    """

    x: np.ndarray

    @property
    def n_features(self) -> int:
        return int(self.x.shape[-1])

    def part(self, chosen: slice | np.ndarray) -> "Features":
        return Features(self.x[chosen], self.y[chosen])


@dataclass(frozen=True)
class Data:
    """The data of a training or a search: `fitting` holds the training images, then the validation images.

    The test images are left out: only the final evaluation uses them, which rules out data leakage.
    """

    dataset: Dataset
    split: Split
    parameters: DataParameters
    fitting: Images
    start: Start | None = None  # the model that trainings start from

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.start.image_shape if self.start else self.fitting.shape

    @property
    def image_size(self) -> int:
        """Height and width of an image, in pixels."""
        return self.image_shape[0]

    @property
    def n_classes(self) -> int:
        return len(self.dataset.class_names)

    @property
    def training(self) -> Images:
        return self.fitting.part(slice(len(self.split.training)))

    @property
    def validation(self) -> Images:
        return self.fitting.part(slice(len(self.split.training), None))

    def folds(self) -> "list[Data]":
        """Return the data of each fold: its photographs for validation, and those of the other folds for training."""
        everything = np.arange(len(self.fitting))  # with folds, in the order of the photographs
        folds = []
        for held in self.split.folds:
            rest = np.setdiff1d(everything, held)
            parts = replace(self.split, training=rest, validation=held, testing=held, folds=())
            folds.append(replace(self, split=parts, fitting=self.fitting.part(np.concatenate([rest, held]))))
        return folds


def load_data(parameters: DataParameters) -> Data:
    """Scan and split the photographs, and decode those for training and validation.

    Raises DataError, naming the path, if the folder cannot be used.
    """
    start = find_start(parameters.start_from) if parameters.start_from else None
    parameters = start.adapt(parameters) if start else parameters
    folders = resolve_source(parameters.data)
    cache = PhotographCache(parameters.image_size or default_image_size(folders[0]), parameters.color_mode)
    dataset = scan_folders(folders, parameters, cache)
    pixels = DiskArray(cache, np.array([photograph.checksum for photograph in dataset.photographs]))
    split = split_dataset(dataset, parameters.split, has_start=start is not None)
    fitting = Images(pixels, dataset.labels).part(split.fitting)
    if fitting.x.nbytes > parameters.memory_budget * 1e6:
        log.info("reading the decoded photographs from %s, beyond %d MB", FOLDER, parameters.memory_budget)
    else:
        fitting = Images(fitting.x[:], fitting.y)
    return Data(dataset, split, parameters, fitting, start)
