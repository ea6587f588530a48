from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from signdigits.config import MonitorParameters
from signdigits.measures import drift

from .test_monitor import pytestmark  # noqa: F401  # skipped likewise where evidently is not installed


def table(rows: int, seed: int, shift: float = 0.0, label: str = "") -> pd.DataFrame:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, rows).astype(str)
    return pd.DataFrame({"brightness": random.normal(0.5 + shift, 0.1, rows), "label": label or labels})


def compare(reference: pd.DataFrame, window: pd.DataFrame, folder: Path) -> drift.Drift:
    return drift.measure_drift(reference, window, MonitorParameters(), folder / "report.html")


def test_a_shift_is_measured_in_standard_deviations_of_the_reference(tmp_path: Path) -> None:
    reference = table(2000, seed=0)
    found = compare(reference, reference.assign(brightness=reference["brightness"] + 0.2), tmp_path)
    assert found.distances["brightness"] == pytest.approx(0.2 / reference["brightness"].std(ddof=0))
    assert found.distances["label"] == 0
    assert (found.drifted, found.share) == (["brightness"], 0.5)
    assert (tmp_path / "report.html").stat().st_size > 100_000


def test_labels_drift_by_their_own_limit(tmp_path: Path) -> None:
    found = compare(table(400, seed=0), table(400, seed=1, label="7"), tmp_path)
    assert found.drifted == ["label"]
    assert 0.25 < found.distances["label"] <= 1


@pytest.mark.parametrize("seed", range(1, 11))
def test_a_hundred_answers_of_the_same_kind_do_not_count_as_drifted(tmp_path: Path, seed: int) -> None:
    assert compare(table(412, seed=0), table(100, seed=seed), tmp_path).drifted == []
