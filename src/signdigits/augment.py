"""Photographs that are turned, shifted and zoomed at random.

No mirror images: a mirrored photograph shows the other hand. It would sign the same digit, but these students all show
the same hand (its palm to the camera, its thumb to the right), so that there is no photograph to test the other one on.

This is part of how images are fed, not of the network: what is saved and served does not contain it.
"""

import math

import tensorflow as tf

# At strength 1; each is drawn evenly from -limit to +limit for every photograph.
ROTATION = math.radians(20)
SHIFT = 0.12  # of the image's height and width
ZOOM = 0.2  # of the logarithm of the scale


def augment(x: tf.Tensor, strength: float, seed: list[int | tf.Tensor]) -> tf.Tensor:
    """Each square image of the batch `x`, of shape (n, size, size, channels), warped in its own way; float32.

    `seed` are two integers: the same give the same.
    """
    return warp(tf.cast(x, tf.float32), transforms(tf.shape(x)[0], int(x.shape[1]), strength, seed))


def transforms(n: tf.Tensor, size: int, strength: float, seed: list[int | tf.Tensor]) -> tf.Tensor:
    """`n` random affine transforms about the centre of a square image, as TensorFlow takes them; float32 of (n, 8)."""
    turn, zoom, right, down = tf.unstack(tf.random.stateless_uniform([4, n], seed, -strength, strength))
    scale = tf.exp(zoom * ZOOM)
    across, along = scale * tf.cos(turn * ROTATION), scale * tf.sin(turn * ROTATION)
    centre, far, none = (size - 1) / 2, SHIFT * size, tf.zeros_like(turn)
    x = centre - across * centre + along * centre + right * far
    y = centre - along * centre - across * centre + down * far
    return tf.stack([across, -along, x, along, across, y, none, none], axis=1)


def warp(x: tf.Tensor, transforms: tf.Tensor) -> tf.Tensor:
    """The whole batch in one affine warp (bilinear); what comes in from outside repeats the border."""
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=x,
        transforms=transforms,
        output_shape=tf.shape(x)[1:3],
        interpolation="BILINEAR",
        fill_mode="NEAREST",
        fill_value=0.0,
    )
