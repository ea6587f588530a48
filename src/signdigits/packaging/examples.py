"""The examples of a model: a typical training photograph of each class, which the page shows.

Each is a JPEG file of the photograph, upright, at most MAX_SIDE pixels wide and high and MAX_BYTES long, without the metadata of its
file, such as place and time. It is typical: of the training images, the nearest to the mean of its class, in the features of the
outlier detector.
"""

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from signdigits.config import DATA_SETS
from signdigits.data import images, sources
from signdigits.data.loading import Data
from signdigits.model import architecture, outliers
from signdigits.model.calibration import Calibration

if TYPE_CHECKING:
    import keras

MAX_SIDE = 256
MAX_BYTES = 20_000
QUALITIES = (90, 80, 65, 45, 20)  # of JPEG; the first with at most MAX_BYTES, or the last
CANDIDATES = 20  # the nearest of a class, of which the first that the model reads is taken


def is_public(data: Data) -> bool:
    """Return whether the photographs are of a named data set, or joined to one: their licences let anybody show them."""
    own = np.flatnonzero([not photograph.is_added for photograph in data.dataset.photographs])
    is_named = sources.split_source(data.parameters.data)[0] in DATA_SETS
    return is_named or data.dataset.part_digest(own) == sources.SIGN_LANGUAGE_DIGITS_DIGEST


def choose_examples(network: "keras.Model", calibration: Calibration, data: Data) -> dict[int, bytes]:
    """Return the JPEG file of an example by label, for a network that was fitted on `data.fitting`.

    The network reads each example right, and not as an outlier; a class without such a photograph has none. Photographs that
    another folder adds (`data=A,B`), such as visitors' corrections, are not shown. Raises DataError if a file has changed.
    """
    known = data.split.fitting[outliers.choose_known(len(data.split.fitting))]
    photographs = [data.dataset.photographs[index] for index in known]
    usable = np.isin(known, data.split.training) & [not photograph.is_added for photograph in photographs]
    labels = np.where(usable, data.dataset.labels[known], -1)
    features = calibration.detector.known[: len(known)]  # behind them are those of mirror images
    answering = architecture.with_features(network)
    examples = {}
    for label in np.unique(labels[usable]).tolist():
        rows = np.flatnonzero(labels == label)
        nearest = rows[np.argsort(features[rows] @ -features[rows].mean(axis=0), kind="stable")]
        for row in nearest[:CANDIDATES]:
            example = _encode_example(data.dataset.read(photographs[row]))
            pixels = images.decode_image(example, data.image_size, data.parameters.color_mode).astype(np.float32)
            logits, own = np.split(np.asarray(answering(pixels[np.newaxis], training=False))[0], [data.n_classes])
            if logits.argmax() == label and calibration.detector.score(own[np.newaxis])[0] <= 1:
                examples[label] = example
                break
    return examples


def _encode_example(content: bytes) -> bytes:
    """Return a photograph as the JPEG file of an example; a small one keeps its size."""
    image = images.open_image(content)
    picture = images.resize_image(image, min(MAX_SIDE, max(image.size)), "RGB")
    bare = Image.fromarray(np.asarray(picture))  # without comments and profiles, which Pillow would write
    for quality in QUALITIES:
        file = io.BytesIO()
        bare.save(file, "JPEG", quality=quality)
        if file.tell() <= MAX_BYTES:
            break
    return file.getvalue()
