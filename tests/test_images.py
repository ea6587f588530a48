import io
import zlib

import numpy as np
import pytest
from PIL import Image

from signdigits.data.images import ImageError, decode_image, open_image, to_array


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def half_black(mode: str = "RGB", size: tuple[int, int] = (40, 40)) -> Image.Image:
    """White, with the upper half black."""
    image = Image.new("RGB", size, "white")
    image.paste("black", (0, 0, size[0], size[1] // 2))
    return image.convert(mode)


def test_rgb_is_uint8() -> None:
    array = decode_image(encode(half_black()), 20, "rgb")
    assert array.shape == (20, 20, 3)
    assert array.dtype == np.uint8
    assert array[0, 0].tolist() == [0, 0, 0]
    assert array[-1, 0].tolist() == [255, 255, 255]


def test_grayscale_is_inverted() -> None:
    image = Image.fromarray(np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5))
    array = decode_image(encode(image), 5, "grayscale")
    assert array.shape == (5, 5, 1)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array[..., 0], 1 - np.asarray(image) / 255, atol=1e-6)


def test_grayscale_is_resampled_not_cropped() -> None:
    array = decode_image(encode(half_black(size=(400, 400))), 20, "grayscale")
    notebook = 1 - np.resize(np.asarray(half_black("L", (400, 400))), (20, 20)) / 255
    assert array[0].min() == 1
    assert array[-1].max() == 0
    assert notebook.min() == 1, "np.resize keeps the first 400 pixels: the first row, all black"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = half_black()
    image.paste("red", (0, 0, 20, 20))
    turned = image.transpose(stored[orientation]) if orientation in stored else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encode(turned, exif=exif), 40, "rgb"), np.asarray(image))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "I;16", "YCbCr"])
@pytest.mark.parametrize(("color_mode", "channels"), [("rgb", 3), ("grayscale", 1)])
def test_pixel_modes_decode_alike(mode: str, color_mode: str, channels: int) -> None:
    image = half_black("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    array = to_array(image, 20, color_mode)
    assert array.shape == (20, 20, channels)
    dark, light = (0, 255) if color_mode == "rgb" else (1, 0)
    np.testing.assert_allclose(array[:9], dark, atol=2)
    np.testing.assert_allclose(array[11:], light, atol=2)


def test_transparency_becomes_white() -> None:
    assert decode_image(encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), 8, "rgb").min() == 255


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image"),
        (b"hello, this is text", "not an image"),
        (encode(half_black(), "JPEG")[:-100], "truncated or damaged"),
        (encode(half_black(), "PNG")[:60], "truncated or damaged"),
        (encode(half_black(), "PPM"), "format PPM is not one of"),
    ],
)
def test_unusable_bytes_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(content, 20, "rgb")


def test_large_images_are_refused_undecoded() -> None:
    with pytest.raises(ImageError, match=r"11000x11000 pixels are more than the 120,000,000 allowed"):
        open_image(encode(Image.new("1", (11_000, 11_000))))
    with pytest.raises(ImageError, match="not a readable image"):
        open_image(encode(Image.new("1", (20_000, 20_000))))


def test_damaged_metadata_is_ignored() -> None:
    whole = encode(half_black())
    chunk = b"eXIf" + b"junk that is no EXIF"
    exif = len(chunk[4:]).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    after_header = 33
    spoilt = whole[:after_header] + exif + whole[after_header:]
    np.testing.assert_array_equal(decode_image(spoilt, 40, "rgb"), decode_image(whole, 40, "rgb"))


def test_mpo_is_read_as_jpeg() -> None:
    several = encode(half_black(), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 40), "red")])
    assert Image.open(io.BytesIO(several)).format == "MPO"
    assert decode_image(several, 40, "rgb")[0].max() < 20


def gradient() -> np.ndarray:
    """Gray from 0 to 255, of shape (64, 64)."""
    return np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_gray_depths_decode_alike(bits: int, white_is_zero: bool) -> None:
    gray = gradient() if bits == 8 else gradient().astype(np.uint16) * 257
    photometric = {262: 0 if white_is_zero else 1}
    stored = np.iinfo(gray.dtype).max - gray if white_is_zero and bits == 16 else gray  # Pillow inverts 8 bits itself
    tiff = encode(Image.fromarray(stored), "TIFF", tiffinfo=photometric)
    np.testing.assert_array_equal(
        decode_image(tiff, 64, "rgb"), decode_image(encode(Image.fromarray(gradient())), 64, "rgb")
    )


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_gray_32_bit_is_refused(dtype: type) -> None:
    with pytest.raises(ImageError, match="32 bits per channel, with an unknown value of white"):
        decode_image(encode(Image.fromarray(gradient().astype(dtype)), "TIFF"), 16, "rgb")


@pytest.mark.parametrize("mode", ["1", "P", "PA", "LA", "CMYK", "YCbCr", "RGBA", "RGBX", "LAB"])
def test_every_mode_is_handled(mode: str) -> None:
    """Half black, half white, in every mode that TIFF keeps."""
    image = half_black().convert("RGBA").convert("LA") if mode in ("LA", "PA") else half_black()
    image = image.convert(mode) if mode not in ("LAB", "PA", "LA") else image
    array = to_array(image, 20, "rgb")
    assert array[:9].max() < 20
    assert array[11:].min() > 235
