"""Decode and preprocess a photograph, in the same way for training, evaluation and serving.

This file is packaged with each model, and therefore imports only Pillow, pillow-heif and NumPy.
"""

import functools
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

# Pillow's formats and their media types, for folders, endpoint, batch and page alike. Some phones write MPO files under the
# name .jpg: a JPEG followed by further pictures.
FORMATS = {
    "AVIF": "image/avif",
    "BMP": "image/bmp",
    "GIF": "image/gif",
    "HEIF": "image/heic",  # the format of iPhones
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "PNG": "image/png",
    "TIFF": "image/tiff",
    "WEBP": "image/webp",
}

# A photograph of 12,000 x 9,000 pixels passes; a decompression bomb, a small file that decodes to gigabytes, does not.
MAX_PIXELS = 120_000_000
MAX_BYTES = (
    40_000_000  # size of a file; as base64 text, 53 megabytes, it fits into the request body that `serve` allows
)

MAX_KEPT_PROFILE = 10_000  # bytes; Display P3 has 548, sRGB 3,144

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")  # ancillary chunks of a PNG that pixels depend on
MAX_CHUNKS, MAX_METADATA_CHUNKS = 10_000, 64  # of a PNG that are examined: encoders write far fewer

WHITE_IS_ZERO = 0  # TIFF 6.0, tag 262, PhotometricInterpretation


class ImageError(ValueError):
    """The bytes are not a usable image; the message gives the reason."""


class InterruptibleFile(io.BytesIO):
    """The bytes of an image; reading them fails once `is_cancelled()`, which ends a decoding that is under way."""

    def __init__(self, data: bytes, is_cancelled: Callable[[], bool]) -> None:
        super().__init__(data)
        self.is_cancelled = is_cancelled

    def read(self, size: int | None = -1) -> bytes:
        if self.is_cancelled():
            raise OSError("cancelled")
        return super().read(size)


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


def open_image(data: bytes, is_cancelled: Callable[[], bool] | None = None) -> Image.Image:
    """Read the header of the image in `data`; its pixels are not yet decoded, its EXIF orientation not yet applied.

    Decoding stops soon after `is_cancelled()` becomes true. Raises ImageError if there are more bytes than MAX_BYTES, if they are no image of one of the FORMATS, or if it has more
    pixels than MAX_PIXELS.
    """
    if len(data) > MAX_BYTES:
        raise ImageError(f"more than the {MAX_BYTES:,} bytes allowed")
    if "HEIF" not in Image.OPEN:
        pillow_heif.register_heif_opener()
    if data.startswith(PNG_SIGNATURE):
        data = _drop_unusable_chunks(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MAX_PIXELS is the limit here, and damaged metadata is ignored
            image = Image.open(InterruptibleFile(data, is_cancelled) if is_cancelled else io.BytesIO(data))
    except UnidentifiedImageError:
        raise ImageError("not an image") from None
    except Exception as error:  # Pillow raises many types for damaged files
        raise ImageError(f"not a readable image ({error})") from error
    if image.format not in FORMATS:
        raise ImageError(f"format {image.format} is not one of {', '.join(FORMATS)}")
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS:,} allowed")
    return image


def _drop_unusable_chunks(png: bytes) -> bytes:
    """Drop the metadata for which Pillow would refuse a PNG, such as 2 MB of compressed text: the pixels are fine.

    Each chunk is tried alone, behind the header, because Pillow reads some of them only after the pixels.
    """
    header, no_pixels = png[:33], b"\0\0\0\0IDAT"
    kept, start, position, n_tried = [], 0, len(PNG_SIGNATURE), 0
    for _ in range(MAX_CHUNKS):
        end = position + 12 + int.from_bytes(png[position : position + 4])
        kind = png[position + 4 : position + 8]
        if kind[:1].islower() and kind not in PIXEL_CHUNKS:
            n_tried += 1
            try:
                Image.open(io.BytesIO(header + png[position:end] + no_pixels), formats=["PNG"])
            except Exception:  # as in open_image
                kept.append(png[start:position])
                start = end
        if end >= len(png) or n_tried == MAX_METADATA_CHUNKS:
            break
        position = end
    return b"".join([*kept, png[start:]]) if kept else png


def count_pixels(image: Image.Image, image_size: int) -> int:
    """Return the number of pixels that `load_image` decodes of an opened image."""
    width, height = image.size
    if image.format not in ("JPEG", "MPO"):
        return width * height
    possible = min(image.size) // (2 * image_size)
    scale = max((scale for scale in (8, 4, 2) if scale <= possible), default=1)
    return math.ceil(width / scale) * math.ceil(height / scale)


def load_image(image: Image.Image, image_size: int) -> None:
    """Decode an opened image completely, for a resize to `image_size` pixels or less. Raises ImageError if it is damaged.

    A JPEG that is much larger is decoded at a half, a quarter or an eighth of its size (libjpeg's scaled decoding), but
    never to less than twice `image_size`: 12 megapixels take a ninth of the time.
    """
    try:
        image.draft(None, (2 * image_size, 2 * image_size))  # None: the mode stays
        image.load()
    except Exception as error:  # Pillow raises many types for damaged files
        raise ImageError(f"truncated or damaged ({error})") from error


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 (upright) to 8; 1 if it is missing or unreadable."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the pixels are fine: use them as stored
        return 1


def to_array(image: Image.Image, image_size: int, color_mode: str) -> np.ndarray:
    """Decode and resize `image` as `resize_image` does, and centre it on a square.

    The square is filled by repeating the border of an image that is not square: cropping could cut off the hand, and
    squeezing distorts it (docs/data.md has the accuracies).

    Returns, for color_mode "rgb", uint8 of shape (image_size, image_size, 3), 0 to 255; for "grayscale",
    float32 of shape (image_size, image_size, 1), inverted: 1 - x/255, 0 for white. The notebook's grayscale
    reader cut or repeated pixels to reach the size (`np.resize`); here they are resampled (bilinear over the
    area that a pixel covers), so that a larger photograph shows the whole hand. Raises ImageError if the pixels
    cannot be decoded or converted.
    """
    if color_mode == "rgb":
        return _pad_to_square(np.array(resize_image(image, image_size, "RGB")))
    gray = np.array(resize_image(image, image_size, "L"))
    return (1 - _pad_to_square(gray).astype(np.float32) / 255)[..., np.newaxis]


def resize_image(image: Image.Image, image_size: int, mode: str) -> Image.Image:
    """Decode `image` if it is not, turn it upright, resize it and convert it to sRGB; `mode` is "RGB", or "L" for gray.

    The longer side becomes `image_size`. Raises ImageError if the pixels cannot be decoded or converted.
    """
    load_image(image, image_size)
    try:
        transform = _find_transform(image)
        colours = "RGB" if transform else mode
        transposition = TRANSPOSITIONS.get(read_orientation(image))
        flat = _flatten_on_white(image if transposition is None else image.transpose(transposition))
        if flat.mode != "L":  # gray stays gray, with a third of the memory: resized, its channels are the same
            flat = flat.convert(colours)
        scale = image_size / max(flat.size)
        width, height = (max(1, round(scale * side)) for side in flat.size)
        resized = flat.resize((width, height), Image.Resampling.BILINEAR).convert(colours)
        return transform.apply(resized).convert(mode) if transform else resized
    except ImageError:
        raise
    except Exception as error:  # Pillow raises many types here too
        raise ImageError(f"cannot be converted ({error})") from error


def _pad_to_square(pixels: np.ndarray) -> np.ndarray:
    """Centre an image, of shape (height, width, ...), on a square, and repeat its border."""
    height, width = pixels.shape[:2]
    if height == width:
        return pixels
    missing = [max(height, width) - side for side in (height, width)]
    sides = [(count // 2, count - count // 2) for count in missing]
    return np.pad(pixels, [*sides, *[(0, 0)] * (pixels.ndim - 2)], "edge")


def _find_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """Return the transform to sRGB of a colour image with an ICC profile, such as a phone's Display P3; else None."""
    profile = image.info.get("icc_profile")
    if image.mode not in ("RGB", "RGBA") or not profile:
        return None
    # Clients could fill the memory with transforms of large profiles.
    build = build_transform if len(profile) <= MAX_KEPT_PROFILE else build_transform.__wrapped__
    return build(profile)


# To build one takes longer than to decode a small photograph, and the photographs of a camera share it.
@functools.lru_cache(maxsize=8)
def build_transform(icc_profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB; None if it is sRGB, or unusable."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        if "srgb" in ImageCms.getProfileDescription(profile).lower() or profile.profile.xcolor_space.strip() != "RGB":
            return None
        return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    except Exception:  # Pillow raises many types; the pixels are fine: use them as stored
        return None


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
