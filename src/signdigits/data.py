"""A folder of class folders becomes labelled arrays for training and validation.

    python -m signdigits prepare --data FOLDER

Nothing here imports TensorFlow.
"""

from dataclasses import dataclass

import numpy as np

from signdigits import split
from signdigits.dataset import Dataset, scan
from signdigits.hyperparameters import DataParameters
from signdigits.images import decode
from signdigits.split import Split


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
    made = split.split(dataset, parameters.split)
    read = (read_images(dataset, part, parameters) for part in (made.training, made.validation))
    return Data(dataset, made, parameters, *read)


def read_images(dataset: Dataset, indices: np.ndarray, parameters: DataParameters) -> Images:
    """Decode the photographs at `indices`, in that order."""
    arrays = [
        decode(
            (dataset.folder / dataset.photographs[i].path).read_bytes(), parameters.image_size, parameters.color_mode
        )
        for i in indices
    ]
    return Images(np.stack(arrays), dataset.labels[indices])
