"""Tell a photograph that resembles none of the training images: no hand, for example.

The outlier score is the distance to the nearest training image, in the features of the network at unit length: Sun, Ming, Zhu
and Li, "Out-of-distribution detection with deep nearest neighbors", 2022, arXiv:2204.06507, with one neighbour. docs/decisions.md
compares it with other published scores, and its features (architecture.with_features) with parts of them.

This file is packaged with each model, and therefore imports only NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

MAX_REFUSED = 0.01  # fraction of the validation images that the threshold marks as outliers
MAX_KNOWN = 5000  # training images whose features are kept
MAX_SPACED = 1000  # of these features, from which the spacing is measured
# Of a threshold and a spacing: copies of training images have none, and nothing may be divided by zero.
MIN_DISTANCE = 1e-6


@dataclass(frozen=True)
class Detector:
    """Features of training images at unit length, of shape (images, features), and the threshold."""

    known: np.ndarray
    threshold: float = 1.0  # distance at which the score is 1

    @classmethod
    def fit(cls, features: np.ndarray) -> Self:
        """Keep the features of training images, of shape (n, features)."""
        return cls(_unit_length(features))

    @classmethod
    def average(cls, detectors: Sequence["Detector"]) -> "Detector":
        """Return the detector of averaged networks, whose features are the mean of those of these detectors' networks.

        All know the same images in the same order. The threshold is the same multiple of the spacing as theirs, in the mean.
        """
        merged = cls.fit(np.mean([each.known for each in detectors], axis=0))
        multiple = np.mean([each.threshold / each.measure_spacing() for each in detectors])
        return merged.with_threshold(float(multiple) * merged.measure_spacing())

    def score(self, features: np.ndarray) -> np.ndarray:
        """Return the outlier scores, of shape (n,), of features of shape (n, features); above 1: an outlier."""
        return self._measure_distance(features) / self.threshold

    def find_threshold(self, features: np.ndarray) -> float:
        """Return the distance that MAX_REFUSED of these images exceed; they must not be training images."""
        return find_quantile(self._measure_distance(features))

    def measure_spacing(self) -> float:
        """Return the mean distance of the known features to the nearest other one.

        By it a threshold is carried to another network: networks differ in how closely they place the images of a class.
        """
        rows = np.arange(0, len(self.known), -(-len(self.known) // MAX_SPACED))
        cosines = self.known[rows] @ self.known.T
        cosines[np.arange(len(rows)), rows] = -1.0  # of each with itself
        return max(float(_to_distances(cosines.max(axis=1)).mean()), MIN_DISTANCE)

    def with_threshold(self, threshold: float) -> "Detector":
        return replace(self, threshold=threshold)

    def save(self, path: Path) -> None:
        np.savez(path, known=self.known, threshold=self.threshold)

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["known"], float(arrays["threshold"]))

    def _measure_distance(self, features: np.ndarray) -> np.ndarray:
        """Return the distances, 0 to 2, of shape (n,), to the nearest of the known features."""
        return _to_distances((_unit_length(features) @ self.known.T).max(axis=1))


def choose_known(n: int) -> np.ndarray:
    """Return the indices of those of `n` training images whose features are kept: all, or MAX_KNOWN that lie evenly among them."""
    return np.linspace(0, n - 1, min(n, MAX_KNOWN)).round().astype(int)


def find_quantile(distances: np.ndarray) -> float:
    """Return the distance that MAX_REFUSED of `distances` exceed."""
    return max(float(np.quantile(distances, 1 - MAX_REFUSED, method="higher")), MIN_DISTANCE)


def _to_distances(cosines: np.ndarray) -> np.ndarray:
    distances: np.ndarray = np.sqrt(np.maximum(2 - 2 * cosines, 0))
    return distances


def _unit_length(features: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit: np.ndarray = (features / np.maximum(lengths, 1e-9)).astype(np.float32)
    return unit
