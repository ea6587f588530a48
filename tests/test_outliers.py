from pathlib import Path

import numpy as np
import pytest

from signdigits.data.outlier_images import COUNT, OUTLIER_IMAGES, make_outlier_images
from signdigits.model.outliers import Detector


def draw(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Features around three means, ten times as wide in the first of eight directions; the last never varies."""
    labels = random.integers(0, 3, n)
    spread = np.array([10, 1, 1, 1, 1, 1, 1, 0])
    return 20 * np.eye(8)[labels + 1] + spread * random.standard_normal((n, 8)), labels


@pytest.fixture(scope="module")
def detector() -> Detector:
    random = np.random.default_rng(0)
    fitted = Detector.fit(*draw(random, 3000))
    return fitted.with_threshold(fitted.find_threshold(draw(random, 3000)[0]))


def test_one_percent_of_inliers_is_refused(detector: Detector) -> None:
    scores = detector.score(draw(np.random.default_rng(1), 20_000)[0])
    assert (scores > 1).mean() == pytest.approx(0.01, abs=0.004)


def test_distance_counts_in_standard_deviations(detector: Detector) -> None:
    """The same offset is far in a direction that seldom varies, and near in one that varies much."""
    mean = 20 * np.eye(8)[1]
    wide, narrow = detector.score(np.array([mean + 10 * np.eye(8)[0], mean + 10 * np.eye(8)[5]]))
    assert wide < 1 < narrow


def test_between_two_classes_is_outlier(detector: Detector) -> None:
    assert detector.score(np.array([10 * np.eye(8)[1] + 10 * np.eye(8)[2]])) > 1


def test_threshold_refuses_at_most_one_percent_of_few(detector: Detector) -> None:
    features = draw(np.random.default_rng(2), 20)[0]
    assert not (detector.with_threshold(detector.find_threshold(features)).score(features) > 1).any()


def test_saved_detector_scores_alike(detector: Detector, tmp_path: Path) -> None:
    detector.save(tmp_path / "detector.npz")
    features = draw(np.random.default_rng(3), 50)[0]
    np.testing.assert_array_equal(Detector.load(tmp_path / "detector.npz").score(features), detector.score(features))


@pytest.mark.parametrize("kind", OUTLIER_IMAGES)
def test_outlier_images_are_the_same_each_time(kind: str) -> None:
    first, second = make_outlier_images(kind), make_outlier_images(kind)
    assert len(first) == COUNT
    assert {(image.mode, image.size) for image in first} == {("RGB", (200, 200))}
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]
    assert len({image.tobytes() for image in first}) > COUNT / 2
