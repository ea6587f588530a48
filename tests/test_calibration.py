import numpy as np
import pytest

from signdigits.model import calibration


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_temperature_corrects_overconfidence() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (20_000, 4))
    labels = np.array([random.choice(4, p=row) for row in softmax(logits)])
    assert calibration.fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert calibration.fit_temperature(2.5 * logits, labels) == pytest.approx(2.5, abs=0.08)
    sure, calm = (
        calibration.compute_reliability(softmax(2.5 * logits), labels),
        calibration.compute_reliability(softmax(logits), labels),
    )
    assert calm.error < 0.02 < 0.1 < sure.error


def test_perfect_predictions_keep_temperature_one() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (330, 10))
    assert calibration.fit_temperature(logits, logits.argmax(axis=1)) == 1


def test_temperature_can_be_undone() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (50, 4))
    cooled = softmax(logits / 2)
    np.testing.assert_allclose(calibration.at_temperature(cooled, 1 / 2), softmax(logits))
    assert calibration.at_temperature(np.array([[1.0, 0.0]]), 3).tolist() == [[1.0, 0.0]]


def test_calibration_error_is_mean_gap() -> None:
    """Ten answers of confidence 0.9, eight of them right; ten of 0.6, all of them wrong."""
    probabilities = np.array([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10)
    labels = np.array([0] * 8 + [1] * 2 + [1] * 10)
    found = calibration.compute_reliability(probabilities, labels)
    assert found.counts.sum() == 20
    assert found.error == pytest.approx((0.1 * 10 + 0.6 * 10) / 20)
