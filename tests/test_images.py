import io
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Event

import numpy as np
import pillow_heif
import pytest
from PIL import ExifTags, Image, ImageCms

from signdigits.data import images
from signdigits.data.images import ImageError, count_pixels, decode_image, load_image, open_image, read_file, to_array

pillow_heif.register_heif_opener()


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


def test_limits_of_a_file(tmp_path: Path) -> None:
    """40 million bytes and 120 million pixels are allowed; of a larger file no more is read than shows that it is."""
    with pytest.raises(ImageError, match="not an image"):
        open_image(bytes(40_000_000))
    large = tmp_path / "large.jpg"
    with large.open("wb") as file:
        file.truncate(41_000_000)
    content = read_file(large)
    assert len(content) == 40_000_001
    with pytest.raises(ImageError, match="more than the 40,000,000 bytes allowed"):
        open_image(content)
    assert open_image(encode(Image.new("1", (12_000, 10_000)))).size == (12_000, 10_000)


@pytest.mark.parametrize("format_", ["AVIF", "BMP", "GIF", "HEIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_every_format_can_be_interrupted(format_: str) -> None:
    """A server can interrupt every decoding; one that is not interrupted gives the same."""
    content = encode(half_black(), format_)
    image = open_image(content, Event().is_set)
    np.testing.assert_array_equal(to_array(image, 20, "rgb"), decode_image(content, 20, "rgb"))


def test_cancelled_decoding_stops() -> None:
    cancelled = Event()
    content = encode(half_black(size=(400, 400)), "JPEG")
    load_image(open_image(content, cancelled.is_set), 20)
    image = open_image(content, cancelled.is_set)
    cancelled.set()
    with pytest.raises(ImageError, match="cancelled"):
        load_image(image, 20)
    with pytest.raises(ImageError, match="cancelled"):
        open_image(content, cancelled.is_set)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


TWO_MEGABYTES = zlib.compress(b"x" * 2_000_000)
DAMAGED_METADATA = [
    chunk(b"eXIf", b"junk that is no EXIF"),
    chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + TWO_MEGABYTES),
    chunk(b"zTXt", b"Comment\0\0" + TWO_MEGABYTES),
    chunk(b"iCCP", b"profile\0\0" + TWO_MEGABYTES),
    chunk(b"iCCP", b"profile\0\7of an unknown compression"),
    chunk(b"pHYs", b"short"),
    chunk(b"tEXt", b"Comment\0with a wrong checksum")[:-1] + b"?",
]


@pytest.mark.parametrize("damaged", DAMAGED_METADATA)
@pytest.mark.parametrize("position", [33, -12])
def test_damaged_metadata_is_ignored(damaged: bytes, position: int) -> None:
    """It lies behind the header, or behind the pixels; the orientation beside it is applied."""
    picture = half_black()
    picture.paste("red", (0, 0, 10, 40))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    whole = encode(picture, exif=b"" if damaged[4:8] == b"eXIf" else exif)
    spoilt = whole[:position] + damaged + whole[position:]
    np.testing.assert_array_equal(decode_image(spoilt, 40, "rgb"), decode_image(whole, 40, "rgb"))


def test_metadata_is_examined_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode(half_black())
    monkeypatch.setattr(images, "MAX_METADATA_CHUNKS", 2)
    for count, match in ((2, None), (3, "not a readable image")):
        spoilt = whole[:33] + count * chunk(b"pHYs", b"short") + whole[33:]
        with pytest.raises(ImageError, match=match) if match else nullcontext():
            decode_image(spoilt, 8, "rgb")


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


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr"])
def test_detail_is_averaged_in_every_mode(mode: str) -> None:
    """Resizing numbers of a palette would mix colours that are not beside each other."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)).convert(mode)
    np.testing.assert_array_equal(to_array(noise, 20, "rgb"), to_array(noise.convert("RGB"), 20, "rgb"))


def test_transparency_outside_the_palette_is_refused() -> None:
    image = half_black("P")
    image.info["transparency"] = bytes(300)
    with pytest.raises(ImageError, match="cannot be converted"):
        to_array(image, 20, "rgb")


@pytest.mark.parametrize("format_", ["AVIF", "HEIF", "JPEG", "WEBP"])
def test_phone_formats_decode_alike(format_: str) -> None:
    smooth = Image.fromarray(np.stack([gradient(), gradient().T, gradient()[::-1, ::-1]], axis=-1))
    content = encode(smooth, format_, quality=95)
    assert open_image(content).format == format_
    np.testing.assert_allclose(decode_image(content, 64, "rgb"), np.asarray(smooth).astype(int), atol=12)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["HEIF", "AVIF", "WEBP"])
def test_phone_formats_are_turned_upright(orientation: int, format_: str) -> None:
    """A photograph of which the upper left quarter is red, stored as a phone held in this way stores it."""
    image = Image.new("RGB", (64, 64), "blue")
    image.paste("red", (0, 0, 32, 32))
    stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that undo the orientations
    turned = image.transpose(Image.Transpose(stored[orientation])) if orientation in stored else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = decode_image(encode(turned, format_, exif=exif.tobytes(), quality=95), 64, "rgb")
    assert array[:24, :24, 0].min() > 200
    assert array[40:, :, 2].min() > 200
    assert array[:, 40:, 2].min() > 200


def test_large_jpeg_is_decoded_at_a_fraction() -> None:
    """Noise, blurred to the detail of a photograph, of 3,000x2,000 pixels."""
    random = np.random.default_rng(0)
    detailed = Image.fromarray(random.integers(0, 256, (200, 300, 3), dtype=np.uint8)).resize((3000, 2000))
    content = encode(detailed, "JPEG", quality=95)
    image = open_image(content)
    load_image(image, 100)
    assert image.size == (375, 250), "an eighth, and still twice 100 pixels"
    whole = Image.open(io.BytesIO(content)).resize((100, 67), Image.Resampling.BILINEAR)
    difference = np.abs(to_array(image, 100, "rgb")[16:83].astype(int) - np.asarray(whole))
    assert difference.mean() < 1


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    "size", [(199, 300), (200, 401), (400, 401), (801, 1203), (1603, 1700), (3000, 5001), (500, 3000), (3000, 500)]
)
def test_pixels_are_counted_before_decoding(size: tuple[int, int], format_: str) -> None:
    image = open_image(encode(Image.new("RGB", size), format_))
    count = count_pixels(image, 100)
    load_image(image, 100)
    assert count == image.width * image.height


@pytest.mark.parametrize("size", [100, 199])
def test_small_jpeg_is_decoded_whole(size: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))
    content = encode(image, "JPEG", quality=95)
    plain = Image.open(io.BytesIO(content)).resize((100, 100), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode_image(content, 100, "rgb"), np.asarray(plain))


def wide_gamut_profile() -> bytes:
    """A profile of other primaries than sRGB's: Pillow makes only sRGB, LAB and XYZ; here red and green change places."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(int.from_bytes(data[128:132], "big"))}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    data[red + 4 : red + 12], data[green + 4 : green + 12] = data[green + 4 : green + 12], data[red + 4 : red + 12]
    return bytes(data).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be")).replace(b"sRGB", b"test")


@pytest.mark.parametrize("color_mode", ["rgb", "grayscale"])
def test_wide_gamut_becomes_srgb(color_mode: str) -> None:
    stored, seen = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 200, 0))
    array = decode_image(encode(stored, icc_profile=wide_gamut_profile()), 8, color_mode)
    np.testing.assert_allclose(array, to_array(seen, 8, color_mode), atol=3 if color_mode == "rgb" else 0.02)


def test_threads_share_the_transform_of_a_profile() -> None:
    random = np.random.default_rng(0)
    stored = [Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)) for _ in range(50)]
    photographs = [encode(image, icc_profile=wide_gamut_profile()) for image in stored]
    alone = [decode_image(photograph, 8, "rgb") for photograph in photographs]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda photograph: decode_image(photograph, 8, "rgb"), 4 * photographs))
    np.testing.assert_array_equal(together, 4 * alone)


@pytest.mark.parametrize("length", [548, images.MAX_KEPT_PROFILE + 1])
def test_large_profiles_are_not_kept(length: int) -> None:
    images.build_transform.cache_clear()
    decode_image(encode(half_black(), icc_profile=b"x" * length), 8, "rgb")
    assert images.build_transform.cache_info().currsize == (length <= images.MAX_KEPT_PROFILE)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
WIDE = wide_gamut_profile()


@pytest.mark.parametrize(
    "profile",
    [b"no profile", SRGB, WIDE[:200], WIDE.replace(b"rXYZ", b"zzzz"), WIDE.replace(b"rTRC", b"zzzz")]
    + [WIDE.replace(b"RGB XYZ ", space) for space in (b"\xff\xffB XYZ ", b"RGB \xff\xffZ ", b"GRAYXYZ ")],
)
def test_srgb_and_broken_profiles_change_nothing(profile: bytes) -> None:
    plain = decode_image(encode(half_black()), 20, "rgb")
    np.testing.assert_array_equal(decode_image(encode(half_black(), icc_profile=profile), 20, "rgb"), plain)


@pytest.mark.parametrize("color_mode", ["rgb", "grayscale"])
@pytest.mark.parametrize("size", [(40, 30), (30, 40), (400, 3), (1, 900)])
def test_photograph_is_centred_on_a_square(size: tuple[int, int], color_mode: str) -> None:
    """A gradient from 50 to 200 from left to right, and the border repeated above and below or at the sides."""
    width, height = size
    gradient = np.linspace(50, 200, width).round().astype(np.uint8)[np.newaxis, :, np.newaxis]
    content = encode(Image.fromarray(np.broadcast_to(gradient, (height, width, 3)).copy()), "PNG")
    pixels = decode_image(content, 20, color_mode)[..., 0]
    assert pixels.shape == (20, 20)
    np.testing.assert_array_equal(pixels, np.tile(pixels[10], (20, 1)), "each row is the same")
    inside = max(1, round(20 * width / max(size)))
    left = (20 - inside) // 2
    assert len(np.unique(pixels[10, : left + 1])) == len(np.unique(pixels[10, left + inside - 1 :])) == 1
    assert (np.diff(pixels[10, left : left + inside]) != 0).all()


def test_thin_photograph_is_one_line() -> None:
    stripes = np.repeat(np.array([[0], [120], [240]], np.uint8), 400, axis=1)
    array = to_array(Image.fromarray(stripes), 20, "rgb")
    np.testing.assert_array_equal(array, np.full((20, 20, 3), 120))


def test_rotated_photograph_is_centred_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8))
    upright = encode(stored.transpose(Image.Transpose.ROTATE_270), "PNG")
    expected = decode_image(upright, 60, "rgb")
    np.testing.assert_array_equal(decode_image(encode(stored, "PNG", exif=exif), 60, "rgb"), expected)
    np.testing.assert_array_equal(expected[:, :15], np.repeat(expected[:, 15:16], 15, axis=1))
