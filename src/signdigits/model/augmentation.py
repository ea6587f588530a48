"""Photographs that are turned, shifted and zoomed at random.

No mirror images: a mirrored photograph shows the other hand. It would sign the same digit, but these students all show
the same hand (its palm to the camera, its thumb to the right), so that there is no photograph to test the other one on.

This is part of how images are fed, not of the network: what is saved and served does not contain it. The network keeps
both processors busy meanwhile, so that it must cost little: OpenCV's warp takes a sixth of TensorFlow's time.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np

# At strength 1; each is drawn evenly from -limit to +limit for every photograph.
ROTATION = math.radians(20)
SHIFT = 0.12  # of the image's height and width
ZOOM = 0.2  # of the logarithm of the scale


def augment_batch(x: np.ndarray, strength: float, seed: Sequence[int]) -> np.ndarray:
    """Each square image of the batch `x`, of shape (n, size, size, channels), warped in its own way; of the same type.

    `seed` are integers of 0 or more: the same give the same.
    """
    warped = np.empty_like(x)
    for image, to, matrix in zip(x, warped, random_transforms(len(x), x.shape[1], strength, seed), strict=True):
        warp_image(image, to, matrix)
    return warped


def random_transforms(n: int, size: int, strength: float, seed: Sequence[int]) -> np.ndarray:
    """`n` random affine maps about the centre of a square image, from where a pixel is to where it was; (n, 2, 3)."""
    turn, zoom, right, down = np.random.default_rng(seed).uniform(-strength, strength, (4, n))
    scale = np.exp(zoom * ZOOM)
    across, along = scale * np.cos(turn * ROTATION), scale * np.sin(turn * ROTATION)
    centre, far = (size - 1) / 2, SHIFT * size
    x = centre - across * centre + along * centre + right * far
    y = centre - along * centre - across * centre + down * far
    return np.stack([across, -along, x, along, across, y], axis=1).reshape(n, 2, 3)


def warp_image(image: np.ndarray, to: np.ndarray, matrix: np.ndarray) -> None:
    """Write `image` into `to`, warped (bilinear); what comes in from outside repeats the border."""
    height, width, _ = image.shape
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(image, matrix, (width, height), dst=to, flags=flags, borderMode=cv2.BORDER_REPLICATE)
