"""Corruptions of test images, for the robustness of a model: the other hand, bad light, a telephone's picture.

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019,
arXiv:1903.12261 (ImageNet-C): a fixed list of corruptions that no training uses, and the mean over them. What differs:
one strength each in place of five, the accuracy itself in place of a ratio to AlexNet's error, and corruptions of
photographed hands in place of weather. They are Pillow's and NumPy's, at fixed strengths; the augmentation of the training
(model/augmentation.py) is OpenCV's, at random strengths, so that no training is tuned to its own test.
"""

import io
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

Corruption = Callable[[Image.Image, np.random.Generator], Image.Image]


def corrupt_image(image: Image.Image, name: str, seed: int) -> Image.Image:
    """Apply the corruption called `name` to a square RGB image; the same seed gives the same result."""
    return CORRUPTIONS[name](image, np.random.default_rng(seed))


def _brightness(factor: float) -> Corruption:
    return lambda image, random: ImageEnhance.Brightness(image).enhance(factor)


def _contrast(factor: float) -> Corruption:
    return lambda image, random: ImageEnhance.Contrast(image).enhance(factor)


def _colour_cast(red: float, green: float, blue: float) -> Corruption:
    """Return a corruption that multiplies the channels, as a wrong white balance does."""
    return lambda image, random: _to_image(np.asarray(image) * np.array([red, green, blue]))


def _rotation(degrees: float) -> Corruption:
    """Return a rotation to the left or the right."""

    def rotate(image: Image.Image, random: np.random.Generator) -> Image.Image:
        return _move(image, angle=math.radians(degrees) * random.choice((-1, 1)))

    return rotate


def _scale(factor: float) -> Corruption:
    """Return a corruption that shows the hand at a fraction of its size."""
    return lambda image, random: _move(image, scale=factor)


def _shift(fraction: float) -> Corruption:
    """Return a shift by a fraction of the side, in a random direction; a part of the hand may be cropped."""

    def shift(image: Image.Image, random: np.random.Generator) -> Image.Image:
        direction = random.uniform(0, 2 * math.pi)
        return _move(image, right=fraction * math.cos(direction), down=fraction * math.sin(direction))

    return shift


def _move(
    image: Image.Image, *, angle: float = 0.0, scale: float = 1.0, right: float = 0.0, down: float = 0.0
) -> Image.Image:
    """Rotate, scale and shift about the centre (bicubic); the border is repeated outwards."""
    return _move_padded(_pad(image), angle, scale, right, down)


def _pad(image: Image.Image) -> Image.Image:
    """Repeat the border outwards, by the side of the image in each direction."""
    side = image.width
    return Image.fromarray(np.pad(np.asarray(image), ((side, side), (side, side), (0, 0)), "edge"))


def _move_padded(padded: Image.Image, angle: float, scale: float, right: float, down: float) -> Image.Image:
    """Rotate, scale and shift the middle of a padded image, and return it alone."""
    side = padded.width // 3
    across, along = math.cos(angle) / scale, math.sin(angle) / scale
    centre = side / 2
    x = centre * (3 - across - along) - right * side
    y = centre * (3 - across + along) - down * side
    matrix = (across, along, x, -along, across, y)  # from the result to the padded image
    return padded.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def _squeezed(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Squeeze a scene of 4:3 into the square: the border is repeated to both sides first."""
    extra = image.width // 6
    wide = Image.fromarray(np.pad(np.asarray(image), ((0, 0), (extra, extra), (0, 0)), "edge"))
    return wide.resize(image.size, Image.Resampling.BICUBIC)


def _noise(sigma: float) -> Corruption:
    """Return Gaussian noise of a standard deviation in gray levels."""
    return lambda image, random: _to_image(np.asarray(image) + random.normal(0, sigma, (*image.size[::-1], 3)))


def _blur(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Blur with a standard deviation of a 50th of the side: 2 of 100 pixels."""
    return image.filter(ImageFilter.GaussianBlur(image.width / 50))


def _motion_blur(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Average along a random direction over 8 % of the side."""
    direction, length = random.uniform(0, math.pi), 0.08
    padded = _pad(image)
    offsets = np.linspace(-length / 2, length / 2, 9)
    moved = [_move_padded(padded, 0.0, 1.0, o * math.cos(direction), o * math.sin(direction)) for o in offsets]
    return _to_image(np.mean([np.asarray(one) for one in moved], axis=0))


def _jpeg(quality: int) -> Corruption:
    def compress(image: Image.Image, random: np.random.Generator) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return compress


def _shadow(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Darken one side of a line near the centre to 40 %, with a soft edge of a tenth of the side."""
    direction, offset = random.uniform(0, 2 * math.pi), random.uniform(-0.15, 0.15)
    y, x = np.mgrid[0 : image.height, 0 : image.width] / image.width - 0.5
    side = x * math.cos(direction) + y * math.sin(direction) - offset
    light = 0.4 + 0.6 / (1 + np.exp(-side / 0.025))
    return _to_image(np.asarray(image) * light[..., np.newaxis])


def _background(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Tint what resembles the border of the image: the wall behind the hand gets another colour."""
    pixels = np.asarray(image, float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1, keepdims=True)
    wall = np.exp(-((distance / 40) ** 2))
    tint = random.uniform(0.5, 1.0, 3)
    return _to_image(pixels * (1 - wall) + pixels * tint * wall)


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "mirrored": lambda image, random: ImageOps.mirror(image),  # the other hand
        "brightness_0.5": _brightness(0.5),
        "brightness_0.25": _brightness(0.25),
        "brightness_1.5": _brightness(1.5),
        "contrast_0.5": _contrast(0.5),
        "warm_light": _colour_cast(1.05, 1.0, 0.75),
        "cold_light": _colour_cast(0.85, 1.0, 1.1),
        "gray": lambda image, random: ImageOps.grayscale(image).convert("RGB"),
        "shadow": _shadow,
        "rotated_15": _rotation(15),
        "rotated_30": _rotation(30),
        "scaled_0.7": _scale(0.7),
        "scaled_0.5": _scale(0.5),
        "shifted": _shift(0.15),
        "squeezed": _squeezed,
        "noise": _noise(25),
        "gaussian_blur": _blur,
        "motion_blur": _motion_blur,
        "jpeg_10": _jpeg(10),
        "background": _background,
    }
)
