"""Compare recent predictions: with those of the test images (drift), or with those of a shadow (agreement).

Drift is measured by distances rather than p-values: with enough predictions a test finds every difference significant,
however small.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from signdigits.config import MonitorParameters


@dataclass(frozen=True)
class Drift:
    """The distance of each column, and the threshold at which it has drifted."""

    distances: Mapping[str, float]
    thresholds: Mapping[str, float]

    def __str__(self) -> str:
        names = ", ".join(self.drifted) or "none"
        return f"{len(self.drifted)} of {len(self.distances)} columns have drifted ({names})"

    @property
    def drifted(self) -> list[str]:
        return [name for name, distance in self.distances.items() if distance >= self.thresholds[name]]

    @property
    def share(self) -> float:
        """The fraction of the columns that have drifted."""
        return len(self.drifted) / len(self.distances)


FARTHEST = 10.0  # standard deviations beyond the reference that a value counts: a few odd photographs are no drift


def measure_drift(reference: pd.DataFrame, window: pd.DataFrame, parameters: MonitorParameters) -> Drift:
    """Compare two tables of the same columns: `label` is text, the others are numbers.

    A number's distance is Wasserstein's, in standard deviations of the reference; the label's is Jensen and Shannon's,
    from 0 (the same frequencies) to 1 (no label in common).
    """
    distances, thresholds = {}, {}
    for name in map(str, reference):
        if name == "label":
            distances[name] = _label_distance(reference[name], window[name])
            thresholds[name] = parameters.drift_labels
        else:
            spread = _measure_spread(reference[name])
            low, high = reference[name].min() - FARTHEST * spread, reference[name].max() + FARTHEST * spread
            distances[name] = float(wasserstein_distance(reference[name], window[name].clip(low, high))) / spread
            thresholds[name] = parameters.drift_distance
    return Drift(distances, thresholds)


def _measure_spread(column: pd.Series) -> float:
    """Return the standard deviation, or a twentieth of the mean for a column that hardly varies, such as a fixed size."""
    return max(float(column.std(ddof=0)), abs(float(column.mean())) / 20, 1e-3)


def _label_distance(reference: pd.Series, window: pd.Series) -> float:
    labels = sorted({*reference, *window})
    shares = [column.value_counts(normalize=True).reindex(labels, fill_value=0) for column in (reference, window)]
    return float(jensenshannon(*shares, base=2))


@dataclass(frozen=True)
class Agreement:
    """Predictions of two versions for the same photographs, a row each: the live version and its shadow.

    The columns `live` and `shadow` are their labels, `live_seconds` and `shadow_seconds` the times that the models took for
    the request.
    """

    versions: tuple[str, str]
    predictions: pd.DataFrame

    @property
    def share(self) -> float:
        """The fraction of the photographs to which both give the same label."""
        return float((self.predictions["live"] == self.predictions["shadow"]).mean())

    def count_disagreements(self) -> pd.DataFrame:
        """Return a row per label of the live version: photographs, and how many of them the shadow labels differently."""
        differs = self.predictions["live"] != self.predictions["shadow"]
        by_label = differs.groupby(self.predictions["live"])
        return pd.DataFrame({"photographs": by_label.size(), "disagreements": by_label.sum()})

    def latencies(self) -> dict[str, float]:
        """Return median and 99th percentile of both, in seconds."""
        seconds = self.predictions.drop_duplicates("request_id")
        return {
            f"{role}_latency_{name}": float(seconds[f"{role}_seconds"].quantile(quantile))
            for role in ("live", "shadow")
            for name, quantile in (("median", 0.5), ("p99", 0.99))
        }


def pair_predictions(records: Iterable[Mapping[str, Any]], live: str) -> Agreement | None:
    """Pair the predictions of version `live` with those of the other version that got copies of the most requests.

    `records` are entries of the prediction log. Returns None if no request was answered by two versions.
    """
    table = pd.DataFrame(
        {
            "request_id": record["request_id"],
            "row": record["row"],
            "version": record["version"],
            "label": max(record["probabilities"], key=record["probabilities"].__getitem__),
            "seconds": record["seconds"],
        }
        for record in records
        if record["request_id"]
    )
    if table.empty:
        return None
    columns = {"label": "live", "seconds": "live_seconds"}
    mine = table[table["version"] == live].drop(columns="version").rename(columns=columns)
    others = table[table["version"] != live].rename(columns={"label": "shadow", "seconds": "shadow_seconds"})
    pairs = mine.merge(others, on=["request_id", "row"])
    if pairs.empty:
        return None
    shadow = str(pairs["version"].mode()[0])
    return Agreement((live, shadow), pairs[pairs["version"] == shadow].drop(columns="version"))
