"""What `fit` takes its images from: batches that are ready before the training asks for them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from signdigits.network import augment
from signdigits.photographs.data import Images
from signdigits.photographs.decoded import Stored

AHEAD = 2  # batches


def training(images: Images, batch_size: int, strength: float, seed: int) -> dict[str, Any]:
    """The arguments of `fit` for the images to train on, augmented with `strength`."""
    steps = math.ceil(len(images) / batch_size)
    if strength or isinstance(images.x, Stored):
        fed = {"x": shuffled(images, batch_size, strength, seed), "steps_per_epoch": steps}
    else:
        fed = {"x": as_keras(images, batch_size, steps)}
    # They come shuffled. Autologging would log a batch_size of None, and fail where the parameter stands already.
    return fed | {"shuffle": False, "batch_size": batch_size}


def validation(images: Images | None, batch_size: int) -> dict[str, Any]:
    """The arguments of `fit` for the images to validate on, if any; they are never augmented."""
    if images is None:
        return {}
    return {"validation_data": ahead(tf.data.Dataset.range(len(images)).batch(batch_size).map(reader(images)))}


def as_keras(images: Images, batch_size: int, steps: int) -> tf.data.Dataset:
    """The batches of one epoch that `fit` would make of the arrays themselves, the same images in the same order."""
    adapter = ArrayDataAdapter(images.x, images.y, batch_size=batch_size, shuffle=True)
    return ahead(adapter.get_tf_dataset().apply(tf.data.experimental.assert_cardinality(steps)))


def shuffled(images: Images, batch_size: int, strength: float, seed: int) -> tf.data.Dataset:
    """Shuffled batches of (x, y), without end: x of the shape of `images.x`, warped where `strength` is not 0.

    An epoch is ceil(len(images) / batch_size) of them, the last one smaller where that does not come out even.
    The same seed gives the same batches, epoch by epoch.
    """
    read = reader(images)

    def warped(x: np.ndarray, step: np.int64) -> np.ndarray:
        return augment.augment(x, strength, [seed, int(step)])

    def batch(step: tf.Tensor, chosen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x, y = read(chosen)
        if not strength:
            return x, y
        return tf.ensure_shape(tf.numpy_function(warped, [x, step], x.dtype, stateful=False), x.shape), y

    order = tf.data.Dataset.range(len(images)).shuffle(len(images), seed=seed).batch(batch_size)
    # Numbered through all epochs, so that each warp has a seed of its own.
    return ahead(order.repeat().enumerate().map(batch))


def ahead(batches: tf.data.Dataset) -> tf.data.Dataset:
    """The same, read while the batch before is trained on.

    Without tuning by tf.data: on two cores it left every other training with one of them, which took half as long again.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.prefetch(AHEAD).with_options(options)


def reader(images: Images) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """A function from the numbers of images to their (x, y). It copies no more than it is asked for."""

    def read(chosen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x = tf.numpy_function(images.x.__getitem__, [chosen], tf.as_dtype(images.x.dtype), stateful=False)
        return tf.ensure_shape(x, [None, *images.shape]), tf.gather(images.y, chosen)

    return read
