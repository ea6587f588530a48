"""Tell a photograph that resembles none of the training images: no hand, for example.

The outlier score is the Mahalanobis distance from the nearest class mean, in the features of the last hidden layer: Lee, Lee,
Lee and Shin, "A simple unified framework for detecting out-of-distribution samples and adversarial attacks", 2018,
arXiv:1807.03888. The classes share one covariance, which is shrunk after Ledoit and Wolf, 2004, because some features
hardly ever vary.

This file is packaged with each model, and therefore imports only NumPy; the fit, which serving does without, also
scikit-learn.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

MAX_REFUSED = 0.01  # of the validation images: what lies above their quantile is an outlier


@dataclass(frozen=True)
class Detector:
    """Class means of shape (classes, features) after whitening, whitening of shape (features, features), and threshold."""

    means: np.ndarray
    whitening: np.ndarray
    threshold: float = 1.0  # distance at which the score is 1

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray) -> Self:
        """Fit means and covariance to training images: features of shape (n, features), labels of shape (n,)."""
        from sklearn.covariance import LedoitWolf

        means = np.stack([features[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
        within = LedoitWolf(assume_centered=True).fit(features - means[labels])
        whitening = np.linalg.cholesky(within.precision_)
        return cls((means @ whitening).astype(np.float32), whitening.astype(np.float32))

    def score(self, features: np.ndarray) -> np.ndarray:
        """Return the outlier scores, of shape (n,), of features of shape (n, features); above 1: an outlier."""
        return self._measure_distance(features) / self.threshold

    def _measure_distance(self, features: np.ndarray) -> np.ndarray:
        """Return the Mahalanobis distances, of shape (n,), from the nearest class mean."""
        offsets = (features @ self.whitening)[:, np.newaxis] - self.means
        distances: np.ndarray = np.linalg.norm(offsets, axis=2).min(axis=1)
        return distances

    def find_threshold(self, features: np.ndarray) -> float:
        """Return the distance that MAX_REFUSED of these images exceed; they must not be training images."""
        return float(np.quantile(self._measure_distance(features), 1 - MAX_REFUSED, method="higher"))

    def with_threshold(self, threshold: float) -> "Detector":
        return replace(self, threshold=threshold)

    def save(self, path: Path) -> None:
        np.savez(path, means=self.means, whitening=self.whitening, threshold=self.threshold)

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["means"], arrays["whitening"], float(arrays["threshold"]))
