"""Data quality: near-duplicates across the split (data leakage), one photograph in two classes, outliers in size and colour,
small classes and class imbalance.

Findings are reported for people to judge; nothing is removed.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from signdigits import plots
from signdigits.data import images
from signdigits.data.dataset import Dataset
from signdigits.data.loading import Data

MAX_HASH_DISTANCE = 4  # differing bits, of 64, of near-duplicates
MIN_PHOTOGRAPHS = 10  # a class with fewer is a finding
MAX_Z_SCORE = 3.5  # modified z-score (Iglewicz and Hoaglin, 1993)
MAX_SIZE_RATIO = 2.0  # of height or width to the median of the class, or the reverse
MAX_IMBALANCE = 1.5  # ratio of the largest class to the smallest
WITHOUT_PICTURE = ("imbalance", "few")  # findings about a class
MAX_PICTURES = 12
MAX_PAIRS = 10_000_000  # pairs of hashes compared at once: 80 MB


@dataclass(frozen=True)
class Finding:
    """A finding about one photograph (`path`), or about two."""

    finding: str
    path: str
    detail: str
    part: str = ""
    other: str = ""
    other_part: str = ""


def find_issues(data: Data) -> pd.DataFrame:
    """Return a row per finding: its kind, its one or two photographs with their parts of the split, and the detail."""
    dataset, parts = data.dataset, part_names(data)
    hashes = np.array([photograph.perceptual_hash for photograph in dataset.photographs], np.uint64)
    colours = np.array([photograph.mean_colour for photograph in dataset.photographs])
    findings = [
        *_find_imbalance(dataset),
        *_find_small_classes(dataset),
        *_find_size_outliers(dataset, parts),
        *_find_colour_outliers(dataset, parts, colours),
        *_find_near_duplicates(dataset, parts, hashes),
        *_find_two_classes(dataset, parts, hashes),
    ]
    return pd.DataFrame(findings, columns=list(Finding.__dataclass_fields__))


def part_names(data: Data) -> np.ndarray:
    """Return the part of the split of each photograph; text, of shape (n,)."""
    names = np.empty(len(data.dataset.photographs), dtype=object)
    for part, indices in data.split.parts.items():
        names[indices] = part
    return names


def tabulate_files(data: Data) -> pd.DataFrame:
    """Return a row per photograph: path, class, part of the split, size, mode, orientation and checksum."""
    parts = part_names(data)
    rows = [
        {
            "path": photograph.path,
            "class": data.dataset.class_names[photograph.label],
            "part": part,
            "width": photograph.size[0],
            "height": photograph.size[1],
            "mode": photograph.mode,
            "orientation": photograph.orientation,
            "sha256": photograph.checksum,
        }
        for photograph, part in zip(data.dataset.photographs, parts, strict=True)
    ]
    return pd.DataFrame(rows)


def _find_imbalance(dataset: Dataset) -> Iterator[Finding]:
    counts = dataset.counts()
    largest, smallest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[largest] > MAX_IMBALANCE * counts[smallest]:
        detail = f"{counts[smallest]} photographs, but {counts[largest]} in class {largest}"
        yield Finding("imbalance", smallest, detail)


def _find_small_classes(dataset: Dataset) -> Iterator[Finding]:
    for name, count in dataset.counts().items():
        if count < MIN_PHOTOGRAPHS:
            yield Finding("few", name, f"{count} photographs, fewer than {MIN_PHOTOGRAPHS}")


def _find_size_outliers(dataset: Dataset, parts: np.ndarray) -> Iterator[Finding]:
    """Yield photographs whose size differs from the median of their class."""
    sizes = np.array([photograph.size for photograph in dataset.photographs], float)
    for label in range(len(dataset.class_names)):
        (members,) = np.nonzero(dataset.labels == label)
        median = np.median(sizes[members], axis=0)
        ratio = np.maximum(sizes[members] / median, median / sizes[members]).max(axis=1)
        for i in members[ratio > MAX_SIZE_RATIO]:
            detail = f"{sizes[i, 0]:.0f}x{sizes[i, 1]:.0f} pixels; its class {median[0]:.0f}x{median[1]:.0f}"
            yield Finding("size", dataset.photographs[i].path, detail, parts[i])


def _find_colour_outliers(dataset: Dataset, parts: np.ndarray, colours: np.ndarray) -> Iterator[Finding]:
    """Yield photographs whose mean colour is far from the median of their class, farthest first."""
    scores = np.zeros(len(colours))
    for label in range(len(dataset.class_names)):
        members = dataset.labels == label
        distance = np.abs(colours[members] - np.median(colours[members], axis=0))
        spread = np.maximum(np.median(distance, axis=0), 1e-9)
        scores[members] = (0.6745 * distance / spread).max(axis=1)
    for i in np.argsort(-scores):
        if scores[i] <= MAX_Z_SCORE:
            return
        red, green, blue = colours[i]
        detail = f"mean colour ({red:.0f}, {green:.0f}, {blue:.0f}); {scores[i]:.1f} spreads from its class"
        yield Finding("colour", dataset.photographs[i].path, detail, parts[i])


def _find_near_duplicates(dataset: Dataset, parts: np.ndarray, hashes: np.ndarray) -> Iterator[Finding]:
    """Yield photographs that look like one in another part of the split, each with its nearest, most similar first."""
    _, part_numbers = np.unique(parts.astype(str), return_inverse=True)
    for bits, i, j in _find_similar_pairs(hashes, part_numbers):
        path, other = dataset.photographs[i].path, dataset.photographs[j].path
        yield Finding("near-duplicate", path, f"{bits} of 64 bits differ", parts[i], other, parts[j])


def _find_two_classes(dataset: Dataset, parts: np.ndarray, hashes: np.ndarray) -> Iterator[Finding]:
    """Yield photographs that also lie in another class, whatever their parts of the split: one label is wrong."""
    for bits, i, j in _find_similar_pairs(hashes, dataset.labels):
        first, second = dataset.photographs[i], dataset.photographs[j]
        detail = "the same file" if first.checksum == second.checksum else f"{bits} of 64 bits differ"
        yield Finding("two classes", first.path, detail, parts[i], second.path, parts[j])


def _find_similar_pairs(hashes: np.ndarray, groups: np.ndarray) -> list[tuple[int, int, int]]:
    """Return the near-duplicates in different groups: the differing bits and two numbers each, most similar first."""
    pairs = set()
    chunk = max(1, MAX_PAIRS // len(hashes))
    for start in range(0, len(hashes), chunk):
        rows = slice(start, start + chunk)
        distances = np.bitwise_count(hashes[rows, None] ^ hashes)
        distances[groups[rows, None] == groups] = 64
        nearest = distances.argmin(axis=1)
        bits = distances[np.arange(len(nearest)), nearest]
        for row in np.flatnonzero(bits <= MAX_HASH_DISTANCE).tolist():
            first, second = sorted((start + row, int(nearest[row])))
            pairs.add((int(bits[row]), first, second))
    return sorted(pairs)


def plot_findings(data: Data, findings: pd.DataFrame) -> plots.Figure:
    """Plot the first findings of each kind; those about a class have no picture."""
    findings = findings.assign(caption=[textwrap.fill(detail, 34) for detail in findings["detail"]])
    kinds = findings[~findings["finding"].isin(WITHOUT_PICTURE)].groupby("finding", sort=False)
    captions: list[tuple[str, str]] = []
    for row in kinds.head(MAX_PICTURES // max(kinds.ngroups, 1)).to_dict("records"):
        captions.append((row["path"], f"{row['finding']}: {row['path']}\n{row['caption']}\n{row['part']}"))
        if row["other"]:
            captions.append((row["other"], f"looks like\n{row['other']}\n{row['other_part']}"))
    pictures = [images.decode_image(images.read_file(data.dataset.locate(path)), 150, "rgb") for path, _ in captions]
    return plots.plot_photographs(pictures, [caption for _, caption in captions], "Findings", columns=4)
