"""One photograph, as bytes, becomes one array: the same way for training, evaluation and serving.

Imports Pillow and NumPy alone, so that the served model can carry this file along.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# What a folder of photographs may hold; the endpoint takes fewer (see served_model.py).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

# A photograph of 12,000 x 9,000 pixels passes; a small file that unfolds to gigabytes does not.
MAX_PIXELS = 120_000_000


class ImageError(ValueError):
    """The bytes are no image that can be used; the message says why."""


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in `data`, decoded to its last byte, its EXIF orientation not yet applied.

    Raises ImageError if the bytes are no image, another format than `formats`, more pixels than `max_pixels`
    (read from the header, before anything is decoded), or truncated.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` is the limit here
            image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ImageError("not an image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"not a readable image ({error})") from error
    if image.format not in formats:
        raise ImageError(f"format {image.format} is not one of {', '.join(formats)}")
    if image.width * image.height > max_pixels:
        raise ImageError(f"{image.width}x{image.height} pixels are more than the {max_pixels:,} allowed")
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"truncated or damaged ({error})") from error
    return image


def to_array(image: Image.Image, image_size: int, color_mode: str) -> np.ndarray:
    """`image` upright, converted and resized.

    Returns, for color_mode "rgb", uint8 of shape (image_size, image_size, 3), 0 to 255; for "grayscale",
    float32 of shape (image_size, image_size, 1), inverted: 1 - x/255, 0 for white. The notebook's grayscale
    reader cut or repeated pixels to reach the size (`np.resize`); here they are resampled (bilinear over the
    area that a pixel covers), so that a larger photograph shows the whole hand.
    """
    upright = on_white(ImageOps.exif_transpose(image))
    sized = upright.convert("RGB" if color_mode == "rgb" else "L").resize(
        (image_size, image_size), Image.Resampling.BILINEAR
    )
    if color_mode == "rgb":
        return np.array(sized)
    return (1 - np.asarray(sized, np.float32) / 255)[..., np.newaxis]


def on_white(image: Image.Image) -> Image.Image:
    """`image` in 8 bits a channel and opaque: 16-bit gray is scaled, not cut off; transparency turns white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def decode(data: bytes, image_size: int, color_mode: str) -> np.ndarray:
    """`to_array` of the image in `data`; raises ImageError as `open_image` does."""
    return to_array(open_image(data), image_size, color_mode)
