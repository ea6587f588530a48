"""The benchmarks, without assertions on times."""

from benchmarks import training
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
