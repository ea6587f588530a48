"""The benchmarks, without assertions on times."""

import pytest
from benchmarks import training
from benchmarks.__main__ import markdown
from benchmarks.measure import Row, in_turns

pytestmark = pytest.mark.slow


def test_rounds_are_interleaved() -> None:
    said: list[str] = []
    seconds = in_turns({"one": lambda: said.append("one"), "two": lambda: said.append("two")}, rounds=3)
    assert said == ["one", "two"] * 4
    assert set(seconds) == {"one", "two"}


def test_missed_targets_are_marked() -> None:
    table = markdown(
        [Row("a step", "another", 1.5, 2.0, True, "as measured"), Row("a start", "", 1.5, 2.0, False, "as measured")]
    )
    assert table.splitlines()[2:] == [
        "| a step | another | 1.50 | 2 or more (missed) | as measured |",
        "| a start |  | 1.50 | 2 or less | as measured |",
    ]


def test_operations_are_counted_per_layer() -> None:
    """By hand: 8.64, 23.04, 23.04, 2.36 and 0.003 million forwards; twice that backwards, but once for the first."""
    million = 8.64 + 23.04 + 23.04 + 2.359296 + 0.00256
    assert abs(training.operations(1) / 1e6 - (3 * million - 8.64)) < 0.01
