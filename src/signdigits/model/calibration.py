"""Whether a model's probabilities can be believed, and one number that makes them so."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

BINS = 15  # as in Guo et al.


@dataclass(frozen=True)
class Reliability:
    """How sure and how right a model was, bin by bin of its confidence; arrays of shape (bins,), NaN in empty bins."""

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance between confidence and accuracy, 0 to 1."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float(np.nansum(gaps * self.counts) / self.counts.sum())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """What to divide logits of shape (n, classes) by, so that the labels become as likely as they can be.

    Above 1 the model was too sure. 1 if it reads all of them correctly: then any smaller number makes the labels likelier
    still, and nothing says how sure it may be. The images must not be those that it was trained on. Temperature scaling:
    Guo, Pleiss, Sun and Weinberger, 2017, arXiv:1706.04599.
    """
    if (logits.argmax(axis=1) == labels).all():
        return 1.0

    def mean_surprise(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]))

    return float(np.exp(minimize_scalar(mean_surprise, bounds=(-2.0, 2.0), method="bounded").x))


def at_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """The probabilities, of shape (n, classes), that logits divided by a further `temperature` would have given."""
    with np.errstate(divide="ignore"):
        scaled = np.log(probabilities) / temperature
    return np.exp(scaled - logsumexp(scaled, axis=1, keepdims=True))


def compute_reliability(probabilities: np.ndarray, labels: np.ndarray) -> Reliability:
    """Of probabilities of shape (n, classes) for labels of shape (n,), in `BINS` bins of equal width."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(bins, weights=values, minlength=BINS) / counts for values in (confidence, right)]
    return Reliability(counts, *means)
