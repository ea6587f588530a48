"""Augmentation: random geometry (rotation, shift, scale, mirror image) and light of training images.

A mirrored photograph of one hand is a photograph of the other, which signs the same digit.

Augmentation is part of the input pipeline and not of the saved network. It competes with the network for the CPU, and uses
OpenCV, whose warp takes a sixth of TensorFlow's time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from signdigits.config import Hyperparameters

# Limits at strength 1; each value is uniform between them.
ROTATION = math.radians(20)
SHIFT = 0.12  # fraction of the image's height and width
ZOOM = (-0.15, 0.45)  # logarithm of the scale: the hand at 1.16 to 0.64 times its size
BRIGHTNESS = (-1.2, 0.4)  # logarithm of the factor
CONTRAST = (-0.6, 0.2)  # logarithm of the factor about the mean
CAST = 0.15  # logarithm of the factor of each channel: white balance
NOISE = 20  # standard deviation in gray levels, of every second image
SATURATION = (0.0, 1.0)  # factor of the color, of every third image; 0: gray
BLUR = 0.018  # standard deviation in sides of the image, of every third image
SHADOW = (-1.2, 0.0)  # logarithm of the factor on one side of a line, of every third image
SHADOW_EDGE = (0.05, 0.6)  # width of the shadow's edge in sides of the image
NOISE_FIELDS = 4  # drawn for each batch; drawing one for each image would take longer than everything else


@dataclass(frozen=True)
class Augmentation:
    """Strengths of the random changes; 0: none."""

    geometric: float = 0.0
    horizontal_flip: float = 0.0  # probability of a mirror image
    photometric: float = 0.0

    @classmethod
    def of(cls, hyperparameters: Hyperparameters) -> "Augmentation":
        return cls(hyperparameters.augmentation, hyperparameters.horizontal_flip, hyperparameters.photometric)

    def __bool__(self) -> bool:
        return any((self.geometric, self.horizontal_flip, self.photometric))


def augment_batch(x: np.ndarray, augmentation: Augmentation, seed: Sequence[int]) -> np.ndarray:
    """Change each square image of the batch `x`, of shape (n, size, size, channels), at random; keep the dtype.

    `seed` is a sequence of non-negative integers; the same seed gives the same result.
    """
    changed = np.empty_like(x)
    matrices = random_transforms(len(x), x.shape[1], augmentation.geometric, seed)
    random = np.random.default_rng([*seed, 1])
    flipped = random.random(len(x)) < augmentation.horizontal_flip
    matrices[flipped] = mirror_transforms(matrices[flipped], x.shape[1])
    for image, to, matrix in zip(x, changed, matrices, strict=True):
        warp_image(image, to, matrix)
    if augmentation.photometric:
        _change_light(changed, augmentation.photometric, random)
    return changed


def random_transforms(n: int, size: int, strength: float, seed: Sequence[int]) -> np.ndarray:
    """Return `n` random affine maps about the centre, from output to input coordinates; of shape (n, 2, 3)."""
    turn, zoom, right, down = np.random.default_rng(seed).uniform(-strength, strength, (4, n))
    closest, farthest = ZOOM
    scale = np.exp(strength * (closest + farthest) / 2 + zoom * (farthest - closest) / 2)
    across, along = scale * np.cos(turn * ROTATION), scale * np.sin(turn * ROTATION)
    centre, far = (size - 1) / 2, SHIFT * size
    x = centre - across * centre + along * centre + right * far
    y = centre - along * centre - across * centre + down * far
    return np.stack([across, -along, x, along, across, y], axis=1).reshape(n, 2, 3)


def mirror_transforms(matrices: np.ndarray, size: int) -> np.ndarray:
    """Return affine maps, of shape (n, 2, 3), whose outputs are the mirror images of those of `matrices`."""
    mirror = np.array([[-1.0, 0, size - 1], [0, 1, 0], [0, 0, 1]])
    mirrored: np.ndarray = matrices @ mirror
    return mirrored


def warp_image(image: np.ndarray, to: np.ndarray, matrix: np.ndarray) -> None:
    """Warp `image` into `to` (bilinear); pixels from outside repeat the border."""
    height, width, _ = image.shape
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(image, matrix, (width, height), dst=to, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _change_light(x: np.ndarray, strength: float, random: np.random.Generator) -> None:
    """Change brightness, contrast, white balance, saturation, shadow, noise and blur of each image of `x`, in place.

    In 256 levels also where `x` is grayscale (0 to 1, inverted).
    """
    n, size, _, channels = x.shape
    brightness = np.exp(strength * random.uniform(*BRIGHTNESS, size=(n,)))
    contrast = np.exp(strength * random.uniform(*CONTRAST, size=(n,)))
    cast = np.exp(strength * random.uniform(-CAST, CAST, size=(n, channels)))
    gray = min(strength, 1) * (1 - random.uniform(*SATURATION, size=(n,))) * (random.random(n) < 1 / 3)
    shadow = strength * random.uniform(*SHADOW, size=(n,)) * (random.random(n) < 1 / 3)
    noise = strength * random.uniform(0, NOISE, size=(n,)) * (random.random(n) < 1 / 2)
    blur = strength * random.uniform(0, BLUR, size=(n,)) * size * (random.random(n) < 1 / 3)
    fields = random.standard_normal((NOISE_FIELDS, size, size, channels), np.float32)
    chosen = random.integers(0, NOISE_FIELDS, size=(n,))
    levels = np.arange(256)[:, np.newaxis]
    for i, image in enumerate(x):
        seen = image if image.dtype == np.uint8 else np.rint(255 * (1 - image)).astype(np.uint8)
        mean = cv2.mean(seen)[:channels]
        curves = ((levels - mean) * contrast[i] + mean) * brightness[i] * cast[i]
        seen = cv2.LUT(seen, np.clip(np.rint(curves), 0, 255).astype(np.uint8)[:, np.newaxis])
        if gray[i] > 0 and channels == 3:
            seen = cv2.transform(seen, (1 - gray[i]) * np.eye(3) + gray[i] / 3)
        if shadow[i] < 0:
            seen = cv2.multiply(seen, _draw_shadow(size, channels, shadow[i], random), dtype=cv2.CV_8U)
        if blur[i] > 0:
            seen = cv2.GaussianBlur(seen, (0, 0), blur[i])
        if noise[i] > 0:
            seen = cv2.add(seen, fields[chosen[i]] * np.float32(noise[i]), dtype=cv2.CV_8U)
        seen = seen.reshape(image.shape)
        x[i] = seen if image.dtype == np.uint8 else 1 - seen / np.float32(255)


def _draw_shadow(size: int, channels: int, depth: float, random: np.random.Generator) -> np.ndarray:
    """Return factors, of shape (size, size, channels), that fall to exp(depth) across a random line through the image."""
    direction, offset, edge = random.uniform(0, 2 * math.pi), random.uniform(-0.3, 0.3), random.uniform(*SHADOW_EDGE)
    across = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    distance = across * math.cos(direction) + across[:, np.newaxis] * math.sin(direction) - offset
    factors = np.exp(depth * np.clip(0.5 + distance / edge, 0, 1))
    return cv2.merge([factors] * channels)
