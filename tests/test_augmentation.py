import numpy as np
import pytest

from signdigits.model import augmentation
from signdigits.model.augmentation import Augmentation

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("x", [PIXELS, PIXELS[..., :1] / np.float32(255)], ids=["color", "grayscale"])
def test_zero_strength_changes_nothing(x: np.ndarray) -> None:
    warped = augmentation.augment_batch(x, Augmentation(1e-9), [0, 0])
    assert (warped.dtype, warped.shape) == (x.dtype, x.shape)
    np.testing.assert_allclose(warped, x, rtol=0, atol=1e-6)


def test_warp_follows_the_matrix() -> None:
    moved = np.empty_like(PIXELS[0])
    augmentation.warp_image(PIXELS[0], moved, np.array([[1.0, 0, 3], [0, 1, 0]]))  # pixel x was at x + 3
    np.testing.assert_array_equal(moved[:, :13], PIXELS[0][:, 3:])
    np.testing.assert_array_equal(moved[:, 13:], np.repeat(PIXELS[0][:, -1:], 3, axis=1), "the border is repeated")


def test_warps_depend_on_seed() -> None:
    same = np.stack([PIXELS[0]] * 4)
    pictures = {
        image.tobytes() for step in range(2) for image in augmentation.augment_batch(same, Augmentation(1.0), [0, step])
    }
    assert len(pictures) == 8


def test_warps_stay_within_limits() -> None:
    for (a, b, x), (c, d, y) in augmentation.random_transforms(500, 100, 1.0, [0, 0]):
        area = a * d - b * c
        closest, farthest = np.exp(2 * np.array(augmentation.ZOOM))
        assert closest - 1e-5 <= area <= farthest + 1e-5, "never negative: no mirror"
        assert abs(np.arctan2(c, a)) <= augmentation.ROTATION + 1e-5
        centre = np.array([a * 49.5 + b * 49.5 + x, c * 49.5 + d * 49.5 + y])
        assert np.abs(centre - 49.5).max() <= augmentation.SHIFT * 100 + 1e-3


def test_every_image_is_mirrored() -> None:
    mirrored = augmentation.augment_batch(PIXELS, Augmentation(horizontal_flip=1.0), [0, 0])
    np.testing.assert_array_equal(mirrored, PIXELS[:, :, ::-1])


def test_some_images_are_mirrored() -> None:
    same = np.stack([PIXELS[0]] * 200)
    mirrored = augmentation.augment_batch(same, Augmentation(horizontal_flip=0.3), [0, 0])
    assert 0.2 < (mirrored != same).any(axis=(1, 2, 3)).mean() < 0.4


def test_light_changes_within_limits() -> None:
    gray = np.full((300, 16, 16, 3), 100, np.uint8)
    means = augmentation.augment_batch(gray, Augmentation(photometric=1.0), [0, 0]).mean(axis=(1, 2, 3))
    low, high = (100 * np.exp(end) for end in augmentation.BRIGHTNESS)
    darkest = low * np.exp(augmentation.SHADOW[0])
    assert darkest < means.min() < 1.3 * low
    assert high * 0.8 < means.max() < 1.2 * high


def test_light_changes_grayscale_alike() -> None:
    colour = np.repeat(PIXELS[..., :1], 3, axis=-1)
    inverted = 1 - colour[..., :1] / np.float32(255)
    changed = augmentation.augment_batch(inverted, Augmentation(photometric=0.5), [0, 0])
    assert (changed.dtype, changed.shape) == (np.float32, inverted.shape)
    assert 0 <= changed.min() < changed.max() <= 1
    assert not np.allclose(changed, inverted)


def test_shadow_darkens_one_side() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        factors = augmentation._draw_shadow(50, 3, -1.0, random)
        assert factors.shape == (50, 50, 3)
        assert factors.max() == pytest.approx(1, abs=0.2)
        assert factors.min() == pytest.approx(np.exp(-1), abs=0.2)
