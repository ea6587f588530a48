"""The agreement of a version with its shadow."""

from typing import Any

import pytest

from signdigits.agreement import pair_predictions


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


@pytest.mark.parametrize("records", [[], [entry("a", "1", "5")], [entry("a", "2", "5")], [{"version": "1"}]])
def test_unpaired_predictions_give_nothing(records: list[dict[str, Any]]) -> None:
    assert pair_predictions(records, "1") is None
