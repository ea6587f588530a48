"""Drift from the test images, and agreement of a version with its shadow."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from signdigits.config import MonitorParameters
from signdigits.drift import Drift, measure_drift, pair_predictions


def table(rows: int, seed: int, shift: float = 0.0, label: str = "") -> pd.DataFrame:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, rows).astype(str)
    return pd.DataFrame({"brightness": random.normal(0.5 + shift, 0.1, rows), "label": label or labels})


def compare(reference: pd.DataFrame, window: pd.DataFrame) -> Drift:
    return measure_drift(reference, window, MonitorParameters())


def test_shift_is_in_standard_deviations() -> None:
    reference = table(2000, seed=0)
    found = compare(reference, reference.assign(brightness=reference["brightness"] + 0.2))
    assert found.distances["brightness"] == pytest.approx(0.2 / reference["brightness"].std(ddof=0))
    assert found.distances["label"] == 0
    assert (found.drifted, found.share) == (["brightness"], 0.5)


def test_constant_column_drifts_with_many_photographs_only() -> None:
    reference = table(400, seed=0).assign(size=100.0)
    sizes = np.full(1000, 100.0)
    sizes[:3] = 4000
    assert compare(reference, table(1000, seed=1).assign(size=sizes)).drifted == []
    assert compare(reference, table(1000, seed=1).assign(size=200.0)).drifted == ["size"]


def test_labels_have_own_threshold() -> None:
    found = compare(table(400, seed=0), table(400, seed=1, label="7"))
    assert found.drifted == ["label"]
    assert 0.25 < found.distances["label"] <= 1


@pytest.mark.parametrize("seed", range(1, 11))
def test_similar_predictions_do_not_drift(seed: int) -> None:
    assert compare(table(412, seed=0), table(100, seed=seed)).drifted == []


def entry(request_id: str, version: str, label: str, row: int = 0, seconds: float = 0.01) -> dict[str, Any]:
    probabilities = {"5": 0.1, "6": 0.1, label: 0.8}
    return {
        "request_id": request_id,
        "version": version,
        "row": row,
        "probabilities": probabilities,
        "seconds": seconds,
    }


def test_predictions_are_paired() -> None:
    records = [
        entry("a", "1", "5"), entry("a", "1", "6", row=1), entry("a", "2", "5", seconds=0.03), entry("a", "2", "5", row=1),
        entry("b", "1", "5"), entry("b", "2", "5"), entry("c", "1", "5"), entry("d", "3", "5"), entry("", "2", "5"),
    ]  # fmt: skip
    found = pair_predictions(records, "1")
    assert found is not None
    assert found.versions == ("1", "2")
    assert len(found.predictions) == 3
    assert found.share == pytest.approx(2 / 3)
    assert found.count_disagreements().to_dict("index") == {
        "5": {"photographs": 2, "disagreements": 0},
        "6": {"photographs": 1, "disagreements": 1},
    }
    latencies = found.latencies()
    assert latencies["live_latency_median"] == pytest.approx(0.01)
    assert latencies["shadow_latency_median"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    "records", [[], [entry("a", "1", "5")], [entry("a", "2", "5")], [entry("", "1", "5"), entry("", "2", "5")]]
)
def test_unpaired_predictions_give_nothing(records: list[dict[str, Any]]) -> None:
    assert pair_predictions(records, "1") is None
