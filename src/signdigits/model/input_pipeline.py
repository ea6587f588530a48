"""The input pipeline of a training: shuffled, augmented batches that are ready before a step asks for them."""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from signdigits.data.loading import Images
from signdigits.model.augmentation import augment_batch

PREFETCH = 2  # batches


def training_batches(images: Images, batch_size: int, augmentation: float, seed: int) -> tf.data.Dataset:
    """Endless shuffled batches of (x, y): x of the shape of `images.x`, augmented if `augmentation` is not 0.

    An epoch has `steps_per_epoch` of them, the last one smaller if that does not come out even. The same seed gives the
    same batches, epoch by epoch.
    """
    read = _make_reader(images)

    def augmented(x: np.ndarray, step: np.int64) -> np.ndarray:
        return augment_batch(x, augmentation, [seed, int(step)])

    def batch(step: tf.Tensor, chosen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x, y = read(chosen)
        if not augmentation:
            return x, y
        return tf.ensure_shape(tf.numpy_function(augmented, [x, step], x.dtype, stateful=False), x.shape), y

    order = tf.data.Dataset.range(len(images)).shuffle(len(images), seed=seed).batch(batch_size)
    # Steps are numbered through all epochs, so that each augmentation has a seed of its own.
    return _prefetch_batches(order.repeat().enumerate().map(batch))


def validation_batches(images: Images, batch_size: int) -> tf.data.Dataset:
    """All images once, in their order, never augmented."""
    return _prefetch_batches(tf.data.Dataset.range(len(images)).batch(batch_size).map(_make_reader(images)))


def steps_per_epoch(images: Images, batch_size: int) -> int:
    return math.ceil(len(images) / batch_size)


def _prefetch_batches(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Read the next batches during a step.

    Without autotuning: on two cores tf.data left every other training with one of them, at half the speed.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.prefetch(PREFETCH).with_options(options)


def _make_reader(images: Images) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Return a function from image numbers to their (x, y). It copies no more than it is asked for."""

    def read(chosen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x = tf.numpy_function(images.x.__getitem__, [chosen], tf.as_dtype(images.x.dtype), stateful=False)
        return tf.ensure_shape(x, [None, *images.shape]), tf.gather(images.y, chosen)

    return read
