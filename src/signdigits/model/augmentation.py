"""Augmentation: random rotation, shift and zoom of training images.

No mirror images: a mirrored photograph shows the other hand, and all students show the same one, palm to the camera and
thumb to the right.

Augmentation is part of the input pipeline and not of the saved network. It competes with the network for the CPU, and uses
OpenCV, whose warp takes a sixth of TensorFlow's time.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np

# Limits at strength 1; each value is uniform from -limit to +limit.
ROTATION = math.radians(20)
SHIFT = 0.12  # of the image's height and width
ZOOM = 0.2  # of the logarithm of the scale


def augment_batch(x: np.ndarray, strength: float, seed: Sequence[int]) -> np.ndarray:
    """Warp each square image of the batch `x`, of shape (n, size, size, channels), at random; keep the dtype.

    `seed` is a sequence of non-negative integers; the same seed gives the same result.
    """
    warped = np.empty_like(x)
    for image, to, matrix in zip(x, warped, random_transforms(len(x), x.shape[1], strength, seed), strict=True):
        warp_image(image, to, matrix)
    return warped


def random_transforms(n: int, size: int, strength: float, seed: Sequence[int]) -> np.ndarray:
    """Return `n` random affine maps about the centre, from output to input coordinates; of shape (n, 2, 3)."""
    turn, zoom, right, down = np.random.default_rng(seed).uniform(-strength, strength, (4, n))
    scale = np.exp(zoom * ZOOM)
    across, along = scale * np.cos(turn * ROTATION), scale * np.sin(turn * ROTATION)
    centre, far = (size - 1) / 2, SHIFT * size
    x = centre - across * centre + along * centre + right * far
    y = centre - along * centre - across * centre + down * far
    return np.stack([across, -along, x, along, across, y], axis=1).reshape(n, 2, 3)


def warp_image(image: np.ndarray, to: np.ndarray, matrix: np.ndarray) -> None:
    """Warp `image` into `to` (bilinear); pixels from outside repeat the border."""
    height, width, _ = image.shape
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(image, matrix, (width, height), dst=to, flags=flags, borderMode=cv2.BORDER_REPLICATE)
