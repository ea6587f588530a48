import itertools

import numpy as np
import tensorflow as tf

from signdigits import augment
from signdigits.data import Images

RANDOM = np.random.default_rng(0)
IMAGES = Images(RANDOM.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8), np.arange(10) % 3)


def first(strength: float, seed: int, batches: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    """The batches of two epochs, of 4, 4 and 2 images each."""
    found = itertools.islice(augment.batches(IMAGES, 4, strength, seed), batches)
    return [(x.numpy(), y.numpy()) for x, y in found]


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    found = first(1.0, seed=0)
    assert [len(y) for _, y in found] == [4, 4, 2, 4, 4, 2]
    orders = [np.concatenate([y for _, y in found[start : start + 3]]) for start in (0, 3)]
    for order in orders:
        assert sorted(order) == sorted(IMAGES.y)
    assert orders[0].tolist() != orders[1].tolist()


def test_the_same_seed_gives_the_same_batches() -> None:
    one, same, other = first(1.0, 0), first(1.0, 0), first(1.0, 1)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(one, same, strict=True))
    assert not np.array_equal(one[0][0], other[0][0])


def test_images_keep_their_labels_and_almost_no_strength_leaves_them_as_they_are() -> None:
    labels = {image.tobytes(): label for image, label in zip(IMAGES.x, IMAGES.y, strict=True)}
    for x, y in first(1e-9, 0):
        assert x.dtype == np.float32
        assert [labels[image.tobytes()] for image in x.round().astype(np.uint8)] == y.tolist()


def test_warps_differ_from_image_to_image_and_from_epoch_to_epoch() -> None:
    same = Images(np.stack([IMAGES.x[0]] * 4), np.zeros(4, int))
    found = [x.numpy() for x, _ in itertools.islice(augment.batches(same, 4, 1.0, 0), 2)]
    pictures = {image.tobytes() for x in found for image in x}
    assert len(pictures) == 8


def test_nothing_is_mirrored_and_the_limits_hold() -> None:
    for matrix in augment.transforms(tf.constant(500), 100, 1.0, [0, 0]).numpy():
        a, b, x, c, d, y = matrix[:6]
        area = a * d - b * c
        assert np.exp(-2 * augment.ZOOM) - 1e-5 <= area <= np.exp(2 * augment.ZOOM) + 1e-5, "never negative: no mirror"
        assert abs(np.arctan2(c, a)) <= augment.ROTATION + 1e-5
        centre = np.array([a * 49.5 + b * 49.5 + x, c * 49.5 + d * 49.5 + y])
        assert np.abs(centre - 49.5).max() <= augment.SHIFT * 100 + 1e-3
