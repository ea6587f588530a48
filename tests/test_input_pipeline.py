import itertools
from pathlib import Path

import numpy as np
import pytest

from signdigits.config import DataParameters
from signdigits.data import loading
from signdigits.model import input_pipeline
from signdigits.model.augmentation import Augmentation

from .conftest import SIZE

RANDOM = np.random.default_rng(0)
IMAGES = loading.Images(RANDOM.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8), np.arange(10) % 3)


@pytest.fixture
def stored(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> loading.Data:
    """The photographs, decoded into a file."""
    monkeypatch.chdir(tmp_path)
    return loading.load_data(DataParameters(data=str(photographs), image_size=SIZE, memory_budget=0))


def first(images: loading.Images, strength: float, seed: int, n: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first batches of four."""
    return [
        (x.numpy(), y.numpy())
        for x, y in itertools.islice(input_pipeline.training_batches(images, 4, Augmentation(strength), seed), n)
    ]


def test_epochs_are_reshuffled() -> None:
    found = first(IMAGES, 1.0, seed=0)
    assert [len(y) for _, y in found] == [4, 4, 2, 4, 4, 2]
    orders = [np.concatenate([y for _, y in found[start : start + 3]]) for start in (0, 3)]
    for order in orders:
        assert sorted(order) == sorted(IMAGES.y)
    assert orders[0].tolist() != orders[1].tolist()


def test_same_seed_same_batches() -> None:
    one, same, other = first(IMAGES, 1.0, 0), first(IMAGES, 1.0, 0), first(IMAGES, 1.0, 1)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(one, same, strict=True))
    assert not np.array_equal(one[0][0], other[0][0])


def test_images_keep_their_labels() -> None:
    assert isinstance(IMAGES.x, np.ndarray)
    labels = {image.tobytes(): label for image, label in zip(IMAGES.x, IMAGES.y, strict=True)}
    for strength in (0.0, 1e-9):
        for x, y in first(IMAGES, strength, 0):
            assert [labels[image.tobytes()] for image in x.round().astype(np.uint8)] == y.tolist()


def test_augmentation_differs_between_epochs() -> None:
    assert isinstance(IMAGES.x, np.ndarray)
    same = loading.Images(np.stack([IMAGES.x[0]] * 4), np.zeros(4, int))
    pictures = {image.tobytes() for x, _ in first(same, 1.0, 0, n=2) for image in x}
    assert len(pictures) == 8


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_disk_batches_equal_memory_batches(loaded: loading.Data, stored: loading.Data, strength: float) -> None:
    for (x, y), (a, b) in zip(first(stored.training, strength, 3), first(loaded.training, strength, 3), strict=True):
        np.testing.assert_array_equal(x, a)
        np.testing.assert_array_equal(y, b)


def test_validation_batches_keep_order(loaded: loading.Data, stored: loading.Data) -> None:
    fed = input_pipeline.validation_batches(stored.validation, 5)
    np.testing.assert_array_equal(np.concatenate([x.numpy() for x, _ in fed]), loaded.validation.x)
    np.testing.assert_array_equal(np.concatenate([y.numpy() for _, y in fed]), loaded.validation.y)


def test_chosen_validation_images_only() -> None:
    chosen = np.array([7, 2, 5])
    (x, y), *others = input_pipeline.validation_batches(IMAGES, 5, chosen=chosen)
    assert not others
    assert isinstance(IMAGES.x, np.ndarray)
    np.testing.assert_array_equal(x.numpy(), IMAGES.x[chosen])
    np.testing.assert_array_equal(y.numpy(), IMAGES.y[chosen])


def test_augmented_validation_is_the_same_each_time() -> None:
    fed = input_pipeline.validation_batches(IMAGES, 4, Augmentation(1.0))
    first_pass, second_pass = (np.concatenate([x.numpy() for x, _ in fed]) for _ in range(2))
    np.testing.assert_array_equal(first_pass, second_pass)
    assert isinstance(IMAGES.x, np.ndarray)
    assert (first_pass != IMAGES.x).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(np.concatenate([y.numpy() for _, y in fed]), IMAGES.y)
