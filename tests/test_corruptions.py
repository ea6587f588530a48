import numpy as np
import pytest
from PIL import Image

from signdigits.data.corruptions import CORRUPTIONS, corrupt_image

# A bright square, off centre, on a dark gradient.
PIXELS = np.tile(np.arange(40, 140, dtype=np.uint8)[:, None, None], (1, 100, 3))
PIXELS[30:60, 20:60] = (230, 190, 160)
IMAGE = Image.fromarray(PIXELS)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_change_reproducibly(name: str) -> None:
    corrupted = corrupt_image(IMAGE, name, seed=3)
    assert (corrupted.size, corrupted.mode) == (IMAGE.size, "RGB")
    assert np.abs(np.asarray(corrupted).astype(int) - PIXELS).mean() > 0.5
    np.testing.assert_array_equal(np.asarray(corrupt_image(IMAGE, name, seed=3)), np.asarray(corrupted))


@pytest.mark.parametrize("name", ["rotated_30", "shifted", "noise", "motion_blur", "shadow", "background"])
def test_random_corruptions_depend_on_seed(name: str) -> None:
    pictures = {corrupt_image(IMAGE, name, seed).tobytes() for seed in range(8)}
    assert len(pictures) > 1


def hand(image: Image.Image) -> np.ndarray:
    """The pixels of the square: red is much more than blue."""
    pixels = np.asarray(image).astype(int)
    return pixels[..., 0] - pixels[..., 2] > 35


@pytest.mark.parametrize(("name", "share"), [("scaled_0.5", 0.25), ("scaled_0.7", 0.49), ("squeezed", 0.75)])
def test_scale_shrinks_the_hand(name: str, share: float) -> None:
    assert hand(corrupt_image(IMAGE, name, 0)).sum() / hand(IMAGE).sum() == pytest.approx(share, rel=0.1)


def test_rotation_keeps_the_area() -> None:
    rotated = hand(corrupt_image(IMAGE, "rotated_30", 0))
    assert rotated.sum() == pytest.approx(hand(IMAGE).sum(), rel=0.05)
    assert (rotated != hand(IMAGE)).any()


def test_brightness_is_a_factor() -> None:
    darker = np.asarray(corrupt_image(IMAGE, "brightness_0.25", 0)).astype(float)
    np.testing.assert_allclose(darker, PIXELS / 4, atol=1)


def test_other_hand_is_the_mirror_image() -> None:
    np.testing.assert_array_equal(np.asarray(corrupt_image(IMAGE, "mirrored", 0)), PIXELS[:, ::-1])
