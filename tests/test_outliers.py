from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from signdigits.data.outlier_images import COUNT, OUTLIER_IMAGES, make_outlier_images
from signdigits.model.outliers import Detector


def draw(random: np.random.Generator, n: int) -> np.ndarray:
    """Features in three directions of eight, of any length, with a little noise."""
    directions = np.eye(8)[random.integers(0, 3, n)] + 0.1 * random.standard_normal((n, 8))
    return random.uniform(1, 20, (n, 1)) * directions


@pytest.fixture(scope="module")
def detector() -> Detector:
    random = np.random.default_rng(0)
    fitted = Detector.fit(draw(random, 3000))
    return fitted.with_threshold(fitted.find_threshold(draw(random, 3000)))


def test_one_percent_of_inliers_is_refused(detector: Detector) -> None:
    scores = detector.score(draw(np.random.default_rng(1), 20_000))
    assert (scores > 1).mean() == pytest.approx(0.01, abs=0.004)


def test_score_depends_on_direction_only(detector: Detector) -> None:
    """The length of the features follows the light and the contrast of a photograph."""
    features = draw(np.random.default_rng(2), 50)
    np.testing.assert_allclose(detector.score(features), detector.score(100 * features), rtol=1e-3)


@pytest.mark.parametrize("features", [np.eye(8)[0] + np.eye(8)[1], np.eye(8)[5], -np.eye(8)[0], np.zeros(8)])
def test_other_directions_are_outliers(detector: Detector, features: np.ndarray) -> None:
    assert detector.score(features[np.newaxis]) > 1


def test_score_is_the_distance_to_the_nearest_image() -> None:
    known, features = np.random.default_rng(3).standard_normal((2, 30, 8))
    distances = NearestNeighbors(n_neighbors=1).fit(normalize(known)).kneighbors(normalize(features))[0][:, 0]
    np.testing.assert_allclose(Detector.fit(known).score(features), distances, rtol=1e-5)


def test_threshold_of_copies_is_positive() -> None:
    features = draw(np.random.default_rng(4), 20)
    detector = Detector.fit(features)
    assert np.isfinite(detector.with_threshold(detector.find_threshold(features)).score(features)).all()


def test_threshold_refuses_at_most_one_percent_of_few(detector: Detector) -> None:
    features = draw(np.random.default_rng(2), 20)
    assert not (detector.with_threshold(detector.find_threshold(features)).score(features) > 1).any()


def test_spacing_is_the_distance_to_the_nearest_other() -> None:
    known = np.random.default_rng(5).standard_normal((30, 8))
    distances = NearestNeighbors(n_neighbors=1).fit(normalize(known)).kneighbors()[0]
    assert Detector.fit(known).measure_spacing() == pytest.approx(distances.mean(), rel=1e-5)
    assert 0 < Detector.fit(np.ones((3, 8))).measure_spacing() < 1e-2, "of copies"


def test_average_keeps_threshold_in_units_of_spacing(detector: Detector) -> None:
    same = Detector.average([detector, detector])
    np.testing.assert_allclose(same.known, detector.known, atol=1e-6)
    assert same.threshold == pytest.approx(detector.threshold, rel=1e-4)
    mirrored = Detector.fit(detector.known[:, ::-1]).with_threshold(detector.threshold)
    mean = Detector.average([detector, mirrored])
    multiple = detector.threshold / detector.measure_spacing()
    assert mean.threshold == pytest.approx(multiple * mean.measure_spacing(), rel=1e-3)


def test_saved_detector_scores_alike(detector: Detector, tmp_path: Path) -> None:
    detector.save(tmp_path / "detector.npz")
    features = draw(np.random.default_rng(3), 50)
    np.testing.assert_array_equal(Detector.load(tmp_path / "detector.npz").score(features), detector.score(features))


@pytest.mark.parametrize("kind", OUTLIER_IMAGES)
def test_outlier_images_are_the_same_each_time(kind: str) -> None:
    first, second = make_outlier_images(kind), OUTLIER_IMAGES[kind](np.random.default_rng(0))
    assert len(first) == COUNT
    assert {(image.mode, image.size) for image in first} == {("RGB", (200, 200))}
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]
    assert len({image.tobytes() for image in first}) > COUNT / 2
