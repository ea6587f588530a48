import numpy as np
import pandas as pd
import pytest

from signdigits.config import MonitorParameters
from signdigits.drift import Drift, measure_drift


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


def test_labels_have_own_threshold() -> None:
    found = compare(table(400, seed=0), table(400, seed=1, label="7"))
    assert found.drifted == ["label"]
    assert 0.25 < found.distances["label"] <= 1


@pytest.mark.parametrize("seed", range(1, 11))
def test_similar_predictions_do_not_drift(seed: int) -> None:
    assert compare(table(412, seed=0), table(100, seed=seed)).drifted == []
