"""The agreement of two versions that answered the same requests: the live version and its shadow."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Agreement:
    """Predictions of two versions for the same photographs, a row each.

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
        """Return a table with a row per label of the live version: photographs, and how many the shadow reads otherwise."""
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
        if record.get("request_id")
    )
    if table.empty:
        return None
    mine = table[table["version"] == live].drop(columns="version")
    pairs = mine.merge(table[table["version"] != live], on=["request_id", "row"], suffixes=("_live", "_shadow"))
    if pairs.empty:
        return None
    shadow = str(pairs["version"].mode()[0])
    pairs = pairs[pairs["version"] == shadow].rename(
        columns={
            "label_live": "live",
            "label_shadow": "shadow",
            "seconds_live": "live_seconds",
            "seconds_shadow": "shadow_seconds",
        }
    )
    return Agreement((live, shadow), pairs.drop(columns="version"))
