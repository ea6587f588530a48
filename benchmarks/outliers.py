"""Published outlier scores, compared: validation photographs against pictures of no hand.

The choice among them is made on synthetic pictures, which are drawn here, and on the share of corrupted validation photographs
that each refuses; the pictures that installed packages ship or draw (data/outlier_images.py) report on it.
"""

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, logsumexp
from sklearn.covariance import LedoitWolf

from benchmarks.measure import Row, temporary_store
from signdigits.config import DataParameters
from signdigits.data import loading
from signdigits.data.corruptions import CORRUPTIONS, corrupt_image
from signdigits.data.outlier_images import OUTLIER_IMAGES, make_outlier_images
from signdigits.evaluate import compute_auroc
from signdigits.model import input_pipeline, training
from signdigits.model.outliers import MAX_REFUSED, Detector
from signdigits.model.training import Fit
from signdigits.tracking import runs
from signdigits.tuning.space import Space

COUNT = 100  # synthetic pictures of each kind
SIDE = 100
REACH = 0.99  # AUROC

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # logits (n, classes) and features (n, features) to scores (n,)


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    space = Space.of("extended")
    hyperparameters = space.complete(space.baseline())
    with temporary_store("outliers"), runs.start_run("train", "train"):
        network = training.new_network(loaded.image_shape, loaded.n_classes, hyperparameters)
        fitted = training.fit_network(network, loaded.training, loaded.validation, hyperparameters)
    return compare_scores(fitted, loaded)


def compare_scores(fitted: Fit, loaded: loading.Data) -> list[Row]:
    """Two rows for each score: AUROC on synthetic pictures, by which one is chosen, and on others."""
    hands = outputs_of(loaded.validation, fitted)
    corrupted = outputs_of(corrupt(loaded.validation), fitted)
    synthetic = [picture for draw in SYNTHETIC.values() for picture in draw(np.random.default_rng(0))]
    others = [picture for kind in OUTLIER_IMAGES for picture in make_outlier_images(kind)]
    pictures = {
        "synthetic pictures": outputs_of(as_images(synthetic), fitted),
        "packages' pictures": outputs_of(as_images(others), fitted),
    }
    found = []
    for name, score in make_scores(fitted, loaded.training).items():
        inliers = score(*hands)
        threshold = np.quantile(inliers, 1 - MAX_REFUSED, method="higher")
        refused = (score(*corrupted) > threshold).mean()
        for kind, outputs in pictures.items():
            outliers = score(*outputs)
            auroc = compute_auroc(inliers, outliers)
            detail = (
                f"{(outliers > threshold).mean():.1%} of {len(outliers)} detected; "
                f"refused: 1 % of photographs, {refused:.1%} of corrupted ones"
            )
            found.append(Row(f"AUROC, {name}", f"validation photographs and {kind}", auroc, REACH, True, detail))
    return found


def make_scores(fitted: Fit, images: loading.Images) -> Mapping[str, Score]:
    """The scores by name; those that need training images are fitted."""
    detector = training.fit_detector(fitted, images)
    _, known = outputs_of(images, fitted)
    means = np.stack([known[images.y == label].mean(axis=0) for label in range(images.y.max() + 1)])
    covariance = LedoitWolf(assume_centered=True).fit(known - means[images.y])  # shrunk: some features hardly ever vary
    whitening = np.linalg.cholesky(covariance.precision_)
    n_hidden = fitted.network.layers[-2].output.shape[-1]  # the features begin with the last hidden layer

    def find_nearest(features: slice) -> Score:
        part = Detector.fit(detector.known[:, features])
        return lambda _, found: part.score(found[:, features])

    return {
        # Hendrycks and Gimpel, 2017, arXiv:1610.02136
        "maximum probability": lambda logits, features: -log_softmax(logits, axis=1).max(axis=1),
        # Liu, Wang, Owens and Li, 2020, arXiv:2010.03759
        "energy": lambda logits, features: -logsumexp(logits, axis=1),
        # Lee, Lee, Lee and Shin, 2018, arXiv:1807.03888
        "Mahalanobis distance": lambda logits, features: cdist(features @ whitening, means @ whitening).min(axis=1),
        # Sun, Ming, Zhu and Li, 2022, arXiv:2204.06507
        "nearest neighbour, last hidden layer": find_nearest(slice(n_hidden)),
        "nearest neighbour, mean of the last block": find_nearest(slice(n_hidden, None)),
        "nearest neighbour, both": lambda _, features: detector.score(features),
    }


def outputs_of(images: loading.Images, fitted: Fit) -> tuple[np.ndarray, np.ndarray]:
    return training.compute_outputs(fitted, input_pipeline.validation_batches(images, training.CHUNK))


def corrupt(images: loading.Images) -> loading.Images:
    """Return a third of the images under each corruption."""
    chosen = np.arange(0, len(images), 3)
    pictures = [Image.fromarray(pixels) for pixels in images.x[chosen]]
    found = [corrupt_image(picture, kind, seed) for kind in CORRUPTIONS for seed, picture in enumerate(pictures)]
    return loading.Images(
        np.stack([np.asarray(picture) for picture in found]), np.tile(images.y[chosen], len(CORRUPTIONS))
    )


def as_images(pictures: list[Image.Image]) -> loading.Images:
    x = np.stack([np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for picture in pictures])
    return loading.Images(x, np.zeros(len(x), np.int64))


def noise(random: np.random.Generator) -> list[Image.Image]:
    """Noise of several grain sizes, in colour."""
    grains = random.choice([1, 2, 5, 10, 25], COUNT)
    fields = [random.integers(0, 256, (SIDE // grain, SIDE // grain, 3), np.uint8) for grain in grains]
    return [Image.fromarray(field).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for field in fields]


def plain(random: np.random.Generator) -> list[Image.Image]:
    """A wall: one colour, brighter on one side, with a little noise."""
    walls = []
    for _ in range(COUNT):
        y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
        light = 1 + random.uniform(-0.5, 0.5) * x + random.uniform(-0.5, 0.5) * y
        wall = random.uniform(20, 235, 3) * light[..., np.newaxis] + random.normal(
            0, random.uniform(0, 8), (SIDE, SIDE, 3)
        )
        walls.append(Image.fromarray(np.clip(wall, 0, 255).astype(np.uint8)))
    return walls


def shapes(random: np.random.Generator) -> list[Image.Image]:
    """Ellipses, rectangles and lines before a plain colour, a little blurred."""
    pictures = []
    for _ in range(COUNT):
        picture = Image.new("RGB", (SIDE, SIDE), colour(random))
        draw = ImageDraw.Draw(picture)
        for _ in range(random.integers(1, 6)):
            (left, right), (top, bottom) = np.sort(random.uniform(-10, SIDE + 10, (2, 2)), axis=1)
            form = random.choice(["ellipse", "rectangle", "line"])
            width = {"width": int(random.integers(2, 15))} if form == "line" else {}
            getattr(draw, form)([left, top, right, bottom], fill=colour(random), **width)
        pictures.append(picture.filter(ImageFilter.GaussianBlur(random.uniform(0, 2))))
    return pictures


def colour(random: np.random.Generator) -> tuple[int, ...]:
    return tuple(map(int, random.integers(0, 256, 3)))


SYNTHETIC = {"noise": noise, "plain": plain, "shapes": shapes}
