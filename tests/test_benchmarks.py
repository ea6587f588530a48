"""The benchmarks, without assertions on times."""

import numpy as np
from benchmarks import training, yardstick
from benchmarks.measure import in_turns


def test_rounds_are_interleaved() -> None:
    calls: list[str] = []
    seconds = in_turns({"one": lambda: calls.append("one"), "two": lambda: calls.append("two")}, rounds=3)
    assert calls == ["one", "two"] * 4
    assert set(seconds) == {"one", "two"}


def test_operations_are_counted_per_layer() -> None:
    """By hand: 8.64, 23.04, 23.04, 2.36 and 0.003 million forwards; twice that backwards, but once for the first."""
    million = 8.64 + 23.04 + 23.04 + 2.359296 + 0.00256
    assert abs(training.count_operations(1) / 1e6 - (3 * million - 8.64)) < 0.01


def test_landmarks_are_normalized() -> None:
    """Neither the place and the size of the hand, nor which of the two it is, changes the normalized landmarks."""
    points = np.random.default_rng(0).normal(100, 20, (21, 3))
    expected = yardstick.normalize_landmarks(points, mirrored=False)
    np.testing.assert_allclose(yardstick.normalize_landmarks(2 * points + 5, mirrored=False), expected)
    np.testing.assert_allclose(yardstick.normalize_landmarks(points * (-1, 1, 1), mirrored=True), expected)
