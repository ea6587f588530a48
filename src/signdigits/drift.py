"""The drift of recent predictions from the test images, column by column.

Distances rather than p-values: with enough predictions a test finds every difference significant, however small.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from signdigits.config import MonitorParameters


@dataclass(frozen=True)
class Drift:
    """The distance of each column, and the threshold at which it has drifted."""

    distances: Mapping[str, float]
    thresholds: Mapping[str, float]

    @property
    def drifted(self) -> list[str]:
        return [name for name, distance in self.distances.items() if distance >= self.thresholds[name]]

    @property
    def share(self) -> float:
        """The fraction of the columns that have drifted."""
        return len(self.drifted) / len(self.distances)


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
            distances[name] = _number_distance(reference[name], window[name])
            thresholds[name] = parameters.drift_distance
    return Drift(distances, thresholds)


def _number_distance(reference: pd.Series, window: pd.Series) -> float:
    spread = max(float(reference.std(ddof=0)), 1e-3)  # a constant column drifts with any change, by a finite distance
    return float(wasserstein_distance(reference, window)) / spread


def _label_distance(reference: pd.Series, window: pd.Series) -> float:
    labels = sorted({*reference, *window})
    shares = [column.value_counts(normalize=True).reindex(labels, fill_value=0) for column in (reference, window)]
    return float(jensenshannon(*shares, base=2))
