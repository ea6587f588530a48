"""The input pipeline (tf.data): shuffled, augmented and prefetched batches."""

import math
from collections.abc import Callable

import cv2
import numpy as np
import tensorflow as tf

from signdigits.data.loading import Features, Images
from signdigits.model.augmentation import Augmentation, augment_batch

PREFETCH = 2  # batches
CHUNK = 128  # images in a forward pass outside of `fit`: bounds the memory
NONE = Augmentation()


def training_batches(images: Images, batch_size: int, augmentation: Augmentation, seed: int) -> tf.data.Dataset:
    """Return endless shuffled batches of (x, y), x augmented.

    An epoch has `steps_per_epoch` batches; the last one may be smaller. The same seed gives the same batches.
    """
    n = count_versions(images)
    order = tf.data.Dataset.range(n).shuffle(n, seed=seed).batch(batch_size)
    # Steps are counted over all epochs, so that each batch has its own augmentation seed.
    return _read_batches(order.repeat(), images, augmentation, seed)


def validation_batches(
    images: Images, batch_size: int, augmentation: Augmentation = NONE, chosen: np.ndarray | None = None
) -> tf.data.Dataset:
    """Return all images, or those with the numbers `chosen`, once, in order, augmented in the same way each time."""
    numbers = np.arange(len(images)) if chosen is None else chosen
    if isinstance(images, Features):  # the n-th time that a photograph is chosen, its n-th copy
        versions = images.x.shape[1]
        copies = (1 + np.arange(len(numbers)) // len(images)) % versions if augmentation else 0
        numbers = numbers * versions + copies
    return _read_batches(tf.data.Dataset.from_tensor_slices(numbers).batch(batch_size), images, augmentation, seed=0)


def steps_per_epoch(images: Images, batch_size: int) -> int:
    return math.ceil(count_versions(images) / batch_size)


def count_versions(images: Images) -> int:
    """Return the number of images of an epoch; where features were computed, the changed copies are among them."""
    return len(images) * (images.x.shape[1] if isinstance(images, Features) else 1)


def _read_batches(numbers: tf.data.Dataset, images: Images, augmentation: Augmentation, seed: int) -> tf.data.Dataset:
    """Read, augment and prefetch the batches with these image numbers."""
    if isinstance(images, Features):
        copies = images.x.shape[1]
        # copied before
        flat = Images(images.x.reshape(-1, images.n_features), np.repeat(images.y, copies))
        return _prefetch_batches(numbers.map(_make_reader(flat)))
    read = _make_reader(images)
    # For images of this size, OpenCV's threads only take the cores from TensorFlow: a sixth of an epoch.
    cv2.setNumThreads(0)

    def augment(x: np.ndarray, step: np.int64) -> np.ndarray:
        return augment_batch(x, augmentation, [seed, int(step)])

    def batch(step: tf.Tensor, chosen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x, y = read(chosen)
        if not augmentation:
            return x, y
        return tf.ensure_shape(tf.numpy_function(augment, [x, step], x.dtype, stateful=False), x.shape), y

    return _prefetch_batches(numbers.enumerate().map(batch))


def _prefetch_batches(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Prefetch batches during a step.

    Without autotuning, with which tf.data on two cores left every other training one core, at half the speed.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.prefetch(PREFETCH).with_options(options)


def _make_reader(images: Images) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Return a function from image numbers to (x, y), which copies only these images."""

    def read(chosen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x = tf.numpy_function(images.x.__getitem__, [chosen], tf.as_dtype(images.x.dtype), stateful=False)
        return tf.ensure_shape(x, [None, *images.x.shape[1:]]), tf.gather(images.y, chosen)

    return read
