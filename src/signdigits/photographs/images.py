"""One photograph, as bytes, becomes one array: the same way for training, evaluation and serving.

Imports Pillow and NumPy alone, so that the served model can carry this file along.
"""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# What a folder of photographs may hold; the endpoint takes fewer (see served_model.py). MPO is what some telephones
# write under the name .jpg: a JPEG with further pictures behind it.
FORMATS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")

# A photograph of 12,000 x 9,000 pixels passes; a small file that unfolds to gigabytes does not.
MAX_PIXELS = 120_000_000


class ImageError(ValueError):
    """The bytes are no image that can be used; the message says why."""


# What sets an image upright, by its EXIF orientation (Exif 2.3, tag 274).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        raise ImageError(f"not a readable image ({error})") from error
    if image.format not in formats:
        raise ImageError(f"format {image.format} is not one of {', '.join(formats)}")
    if image.width * image.height > max_pixels:
        raise ImageError(f"{image.width}x{image.height} pixels are more than the {max_pixels:,} allowed")
    try:
        image.load()
    except Exception as error:
        raise ImageError(f"truncated or damaged ({error})") from error
    return image


def orientation(image: Image.Image) -> int:
    """The image's EXIF orientation, 1 (upright) to 8; 1 where it has none, or none that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the picture itself is whole: it is shown as it was stored
        return 1


def to_array(image: Image.Image, image_size: int, color_mode: str) -> np.ndarray:
    """`image` upright, converted and resized.

    Returns, for color_mode "rgb", uint8 of shape (image_size, image_size, 3), 0 to 255; for "grayscale",
    float32 of shape (image_size, image_size, 1), inverted: 1 - x/255, 0 for white. The notebook's grayscale
    reader cut or repeated pixels to reach the size (`np.resize`); here they are resampled (bilinear over the
    area that a pixel covers), so that a larger photograph shows the whole hand. Raises ImageError if the pixels
    cannot be converted.
    """
    try:
        sized = (
            on_white(upright(image))
            .convert("RGB" if color_mode == "rgb" else "L")
            .resize((image_size, image_size), Image.Resampling.BILINEAR)
        )
    except Exception as error:  # again whatever Pillow raises
        raise ImageError(f"cannot be converted ({error})") from error
    if color_mode == "rgb":
        return np.array(sized)
    return (1 - np.asarray(sized, np.float32) / 255)[..., np.newaxis]


def upright(image: Image.Image) -> Image.Image:
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def on_white(image: Image.Image) -> Image.Image:
    """`image` in 8 bits a channel and opaque: 16-bit gray is scaled, not cut off; transparency turns white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def decode(
    data: bytes, image_size: int, color_mode: str, formats: tuple[str, ...] = FORMATS, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """`to_array` of the image in `data`; raises ImageError as they do."""
    return to_array(open_image(data, formats, max_pixels), image_size, color_mode)
