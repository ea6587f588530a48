"""Decode and preprocess a photograph, in the same way for training, evaluation and serving.

This file is packaged with each model, and therefore imports only Pillow and NumPy.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Pillow's formats and their media types, for folders, endpoint, batch and page alike. Some phones write MPO files under the
# name .jpg: a JPEG followed by further pictures.
FORMATS = {
    "BMP": "image/bmp",
    "GIF": "image/gif",
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "PNG": "image/png",
    "TIFF": "image/tiff",
    "WEBP": "image/webp",
}

# A photograph of 12,000 x 9,000 pixels passes; a decompression bomb, a small file that decodes to gigabytes, does not.
MAX_PIXELS = 120_000_000
MAX_BYTES = 40_000_000  # of a file; as base64 text, 53 megabytes, it fits into the request body that `serve` allows

WHITE_IS_ZERO = 0  # TIFF 6.0, tag 262, PhotometricInterpretation


class ImageError(ValueError):
    """The bytes are not a usable image; the message gives the reason."""


# The transposition that turns an image upright, by its EXIF orientation (Exif 2.3, tag 274).
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_file(path: Path) -> bytes:
    """Return the bytes of a file, at most MAX_BYTES + 1, which `open_image` rejects. Raises OSError."""
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def open_image(data: bytes) -> Image.Image:
    """Decode the image in `data` completely; its EXIF orientation is not yet applied.

    Raises ImageError if there are more bytes than MAX_BYTES, if they are no image of one of the FORMATS, if it has more
    pixels than MAX_PIXELS (read from the header, before anything is decoded), or if it is truncated.
    """
    if len(data) > MAX_BYTES:
        raise ImageError(f"more than the {MAX_BYTES:,} bytes allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the limit here
            image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ImageError("not an image") from None
    except Exception as error:  # Pillow raises many types for damaged files
        raise ImageError(f"not a readable image ({error})") from error
    if image.format not in FORMATS:
        raise ImageError(f"format {image.format} is not one of {', '.join(FORMATS)}")
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS:,} allowed")
    try:
        image.load()
    except Exception as error:
        raise ImageError(f"truncated or damaged ({error})") from error
    return image


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 (upright) to 8; 1 if it is missing or unreadable."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the pixels are fine: use them as stored
        return 1


def to_array(image: Image.Image, image_size: int, color_mode: str) -> np.ndarray:
    """Turn `image` upright, convert it and resize it.

    Returns, for color_mode "rgb", uint8 of shape (image_size, image_size, 3), 0 to 255; for "grayscale",
    float32 of shape (image_size, image_size, 1), inverted: 1 - x/255, 0 for white. The notebook's grayscale
    reader cut or repeated pixels to reach the size (`np.resize`); here they are resampled (bilinear over the
    area that a pixel covers), so that a larger photograph shows the whole hand. Raises ImageError if the pixels
    cannot be converted.
    """
    try:
        resized = (
            _flatten_on_white(_apply_orientation(image))
            .convert("RGB" if color_mode == "rgb" else "L")
            .resize((image_size, image_size), Image.Resampling.BILINEAR)
        )
    except ImageError:
        raise
    except Exception as error:  # Pillow raises many types here too
        raise ImageError(f"cannot be converted ({error})") from error
    if color_mode == "rgb":
        return np.array(resized)
    return (1 - np.asarray(resized, np.float32) / 255)[..., np.newaxis]


def _apply_orientation(image: Image.Image) -> Image.Image:
    transposition = TRANSPOSITIONS.get(read_orientation(image))
    return image if transposition is None else image.transpose(transposition)


def _flatten_on_white(image: Image.Image) -> Image.Image:
    """Convert `image` to 8 bits per channel without transparency: 16-bit gray is scaled, transparent pixels become white.

    Raises ImageError for 32 bits per channel, integer or float: the value of white is unknown.
    """
    if image.mode in ("F", "I"):
        raise ImageError("32 bits per channel, with an unknown value of white; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        gray = (np.asarray(image) / 257).astype(np.uint8)
        # Pillow inverts white-is-zero TIFFs with 8 bits per channel, but not with 16.
        inverted = getattr(image, "tag_v2", {}).get(262) == WHITE_IS_ZERO
        return Image.fromarray(255 - gray if inverted else gray)
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)


def decode_image(data: bytes, image_size: int, color_mode: str) -> np.ndarray:
    """Return `to_array` of the image in `data`. Raises ImageError."""
    return to_array(open_image(data), image_size, color_mode)
