"""Planted label errors: how many of them are among the first that `prepare --label_errors true` shows."""

from dataclasses import replace

import numpy as np

from benchmarks.measure import Row
from signdigits.config import SourceParameters
from signdigits.data import label_errors
from signdigits.data.dataset import Dataset, scan_dataset

SEEDS = range(100, 105)
PLANTED = 20
SHOWN = 40
REACH = 18


def rows(photographs: str) -> list[Row]:
    dataset = scan_dataset(SourceParameters(data=photographs))
    return [count_found(dataset, seed) for seed in SEEDS]


def count_found(dataset: Dataset, seed: int) -> Row:
    """The planted errors among the first SHOWN, and among those that cleanlab counts as errors."""
    planted = plant_errors(dataset, seed)
    table = label_errors.rank_labels(planted)
    wrong = [
        photograph.path
        for photograph, original in zip(planted.photographs, dataset.photographs, strict=True)
        if photograph.label != original.label
    ]
    found, issues = table.head(SHOWN)["path"].isin(wrong).sum(), table[table["issue"]]
    detail = f"{issues['path'].isin(wrong).sum()} of {PLANTED} among the {len(issues)} that cleanlab counts"
    return Row(f"planted label errors, seed {seed}", f"the first {SHOWN}", float(found), REACH, True, detail)


def plant_errors(dataset: Dataset, seed: int) -> Dataset:
    """The data set with another label, at random, on PLANTED photographs."""
    random, n_classes = np.random.default_rng(seed), len(dataset.class_names)
    photographs = list(dataset.photographs)
    for i in random.choice(len(photographs), PLANTED, replace=False).tolist():
        label = (photographs[i].label + int(random.integers(1, n_classes))) % n_classes
        photographs[i] = replace(photographs[i], label=label)
    return replace(dataset, photographs=tuple(photographs))
