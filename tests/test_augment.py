import numpy as np
import tensorflow as tf

from signdigits import augment

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)


def test_almost_no_strength_leaves_images_as_they_are() -> None:
    x = augment.augment(tf.constant(PIXELS), 1e-9, [0, 0]).numpy()
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x.round(), PIXELS)


def test_warps_differ_from_image_to_image_and_from_seed_to_seed() -> None:
    same = tf.constant(np.stack([PIXELS[0]] * 4))
    pictures = {image.tobytes() for step in range(2) for image in augment.augment(same, 1.0, [0, step]).numpy()}
    assert len(pictures) == 8


def test_nothing_is_mirrored_and_the_limits_hold() -> None:
    for matrix in augment.transforms(tf.constant(500), 100, 1.0, [0, 0]).numpy():
        a, b, x, c, d, y = matrix[:6]
        area = a * d - b * c
        assert np.exp(-2 * augment.ZOOM) - 1e-5 <= area <= np.exp(2 * augment.ZOOM) + 1e-5, "never negative: no mirror"
        assert abs(np.arctan2(c, a)) <= augment.ROTATION + 1e-5
        centre = np.array([a * 49.5 + b * 49.5 + x, c * 49.5 + d * 49.5 + y])
        assert np.abs(centre - 49.5).max() <= augment.SHIFT * 100 + 1e-3
