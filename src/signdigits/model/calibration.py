"""Calibration: temperature scaling, and the expected calibration error."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from signdigits.model.outliers import Detector

BINS = 15  # as in Guo et al.


@dataclass(frozen=True)
class Calibration:
    """Temperature of the probabilities, and outlier detector, of a served model."""

    temperature: float
    detector: Detector


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: count, mean confidence and accuracy per bin; arrays of shape (bins,), NaN in empty bins."""

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance between confidence and accuracy, 0 to 1."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float(np.nansum(gaps * self.counts) / self.counts.sum())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that maximizes the likelihood of the labels for logits of shape (n, classes).

    Above 1 the model is overconfident. If all predictions are correct it is 1: the likelihood would grow without limit as
    the temperature falls. The images must not be training images. Temperature scaling: Guo, Pleiss, Sun and Weinberger,
    2017, arXiv:1706.04599.
    """
    if (logits.argmax(axis=1) == labels).all():
        return 1.0

    def negative_log_likelihood(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]))

    return float(np.exp(minimize_scalar(negative_log_likelihood, bounds=(-2.0, 2.0), method="bounded").x))


def at_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probabilities, of shape (n, classes), after dividing the logits by a further `temperature`."""
    with np.errstate(divide="ignore"):
        scaled = np.log(probabilities) / temperature
    return np.exp(scaled - logsumexp(scaled, axis=1, keepdims=True))


def compute_reliability(probabilities: np.ndarray, labels: np.ndarray) -> Reliability:
    """Compute the reliability of probabilities of shape (n, classes) for labels of shape (n,), in `BINS` equal bins."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(bins, weights=values, minlength=BINS) / counts for values in (confidence, right)]
    return Reliability(counts, *means)
