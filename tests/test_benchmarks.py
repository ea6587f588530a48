"""The benchmarks, without assertions on times."""

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from benchmarks import search, serving, training, yardstick
from benchmarks.measure import in_turns

from signdigits.data import loading
from signdigits.tuning.space import Range

from .conftest import use_store


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


def test_search_ends_at_target(loaded: loading.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "EPOCHS", Range(1, 2))
    with use_store(tmp_path):
        mlflow.set_experiment("search")
        assert search.run_search(loaded, 1337, 0.0, str(tmp_path)) > 0


def test_model_that_does_nothing_is_served_without_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.pyfunc.save_model(tmp_path / "model", python_model=serving.NOTHING, pip_requirements=["mlflow"])
    reply = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(pd.DataFrame({"image": ["", ""]}))
    assert reply["label"].tolist() == ["0", "0"]
