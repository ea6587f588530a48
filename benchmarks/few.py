"""The accuracy from few photographs of new signs: a head on a network that read others, training from nothing, landmarks.

A source network, the mean of three, is trained on five digits of two thirds of the signers; the other five digits of the other
third are the new signs. Of those, 5, 10 or 30 photographs a class are drawn five times, and the others judge: the photographs as
they are, and under the corruptions of `evaluate`. In both directions. MediaPipe's full landmarks have the same head. The picture
goes into docs/your-photographs.md. Last, how often the interval of folds holds the accuracy of the model that they stand for, in
200 draws of ten photographs with scikit-learn's logistic regression in place of the head. Half an hour on two cores.
"""

import statistics
import sys
import time
from dataclasses import dataclass, replace

import keras
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from benchmarks.measure import Row
from benchmarks.yardstick import LandmarkReader, download_models
from signdigits import startup
from signdigits.config import DataParameters, Hyperparameters
from signdigits.data import loading
from signdigits.data.corruptions import CORRUPTIONS, corrupt_image
from signdigits.data.loading import Features, Images
from signdigits.data.split import read_groups
from signdigits.model import architecture, input_pipeline, training, transfer
from signdigits.model.augmentation import Augmentation
from signdigits.promotion.comparison import fold_interval
from signdigits.tuning.space import Space

SEEDS = (1337, 1338, 1339)  # of the source's three networks
DIRECTIONS = {"0 to 4, then 5 to 9": range(5), "5 to 9, then 0 to 4": range(5, 10)}  # digits of the source
PHOTOGRAPHS = (5, 10, 30)  # of a class
DRAWS = 5
CLASSES = 5
INTERVALS = 200  # draws for the interval of folds
TARGETS = {5: 0.0, 10: 92.0, 30: 97.0}  # accuracy in %
PICTURE = "docs/few.png"


@dataclass(frozen=True)
class Reading:
    """The features of new signs in one way of reading: of each photograph and its changed copies, and of its corruptions."""

    features: Features
    corrupted: list[np.ndarray]


def rows(photographs: str) -> list[Row]:
    startup.import_tensorflow()
    whole = loading.load_data(DataParameters(data=photographs, split="grouped"))
    everything = Images(_read_pixels(whole), whole.dataset.labels)
    is_source = _draw_signers(read_groups(whole.dataset))
    accuracies: dict[tuple[str, int], list[tuple[float, float]]] = {}
    seconds, held = list[float](), list[bool]()
    for name, digits in DIRECTIONS.items():
        of_source = np.isin(everything.y, digits)
        source = train_source(everything.part(np.flatnonzero(of_source & is_source)), digits.start)
        new = everything.part(np.flatnonzero(~of_source & ~is_source))
        new = Images(new.x, new.y % CLASSES)
        ways = {"start_from": read_features(source, new), "landmarks": read_landmarks(new)}
        for count in PHOTOGRAPHS:
            for draw in range(DRAWS):
                chosen, others = draw_photographs(new.y, count, draw)
                for way, reading in ways.items():
                    started = time.perf_counter()
                    head = fit_head(reading.features.part(chosen))
                    if way == "start_from" and count == 10:
                        seconds.append(time.perf_counter() - started)
                    accuracies.setdefault((way, count), []).append(judge(head, reading, others))
                nothing = fit_from_nothing(new.part(chosen))
                right = predict(nothing, new.part(others).x[:]) == new.y[others]
                accuracies.setdefault(("from nothing", count), []).append((float(right.mean()), float("nan")))
            means = {
                way: np.mean(accuracies[way, count][-DRAWS:], axis=0).round(4) for way, n in accuracies if n == count
            }
            print(f"{name}, {count} photographs: {means}", file=sys.stderr, flush=True)
        held += [holds_accuracy(ways["start_from"].features, draw) for draw in range(INTERVALS // 2)]
    plot_accuracies(accuracies).savefig(PICTURE, dpi=110)
    return make_table(accuracies, seconds, held)


def make_table(
    accuracies: dict[tuple[str, int], list[tuple[float, float]]], seconds: list[float], held: list[bool]
) -> list[Row]:
    means = {key: 100 * np.mean(values, axis=0) for key, values in accuracies.items()}
    table = []
    for count in PHOTOGRAPHS:
        (clean, corrupted), (points, corrupted_points) = means["start_from", count], means["landmarks", count]
        nothing = means["from nothing", count][0]
        what = f"accuracy in % from {count} photographs of each of {CLASSES} new signs"
        table += [
            Row(what, f"from nothing {nothing:.1f}", clean, TARGETS[count], True, f"landmarks {points:.1f}"),
            Row(f"{what}: points ahead of landmarks", "landmarks", clean - points, -2.0, True, f"{points:.1f}"),
            Row(
                f"{what}, under the corruptions: points ahead", "landmarks", corrupted - corrupted_points, 5.0, True,
                f"{corrupted:.1f} against {corrupted_points:.1f}",
            ),
        ]  # fmt: skip
    table.append(Row("training of a head, 5 classes of 10, seconds", "", statistics.median(seconds), 5.0, False, ""))
    share = 100 * float(np.mean(held))
    table.append(Row("intervals of folds that hold the accuracy, %", f"{len(held)} draws", share, 93.0, True, ""))
    return table


def _read_pixels(whole: loading.Data) -> np.ndarray:
    """Return the pixels of all photographs, in their order."""
    pixels = loading.load_data(replace(whole.parameters, split="folds")).fitting.x
    return pixels[:] if isinstance(pixels, np.ndarray) else pixels[np.arange(len(whole.dataset.labels))]


def _draw_signers(groups: np.ndarray) -> np.ndarray:
    """Return for each photograph whether its signer is one of the two thirds from whom the source learns."""
    names = np.random.default_rng(0).permutation(np.unique(groups))
    return np.isin(groups, names[: 2 * len(names) // 3])


def draw_photographs(labels: np.ndarray, count: int, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of `count` photographs of each class, and those of the others."""
    random = np.random.default_rng(draw)
    chosen = np.concatenate([random.permutation(np.flatnonzero(labels == label))[:count] for label in range(CLASSES)])
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


def train_source(images: Images, first: int) -> keras.Model:
    """Return the mean of three networks of the extended space's first trial."""
    space = Space.of("extended")
    networks = []
    for seed in SEEDS:
        hyperparameters = replace(space.complete(space.baseline()), seed=seed)
        networks.append(_fit_network(Images(images.x, images.y - first), hyperparameters))
    return architecture.average_networks(networks)


def fit_from_nothing(images: Images) -> keras.Model:
    space = Space.of("extended")
    return _fit_network(images, space.complete(space.baseline()))


def _fit_network(images: Images, hyperparameters: Hyperparameters) -> keras.Model:
    precision = architecture.resolve_precision(hyperparameters.precision)
    keras.utils.set_random_seed(hyperparameters.seed)
    network = architecture.build_network(images.shape, CLASSES, hyperparameters, precision, for_training=True)
    return _fit(network, images, hyperparameters).in_float32()


def fit_head(features: Features) -> keras.Model:
    """Return a head of the transfer space's first trial, from features to logits."""
    space = Space.of("transfer")
    hyperparameters = space.complete(space.baseline())
    keras.utils.set_random_seed(hyperparameters.seed)
    return _fit(transfer.new_head(features.n_features, CLASSES, hyperparameters), features, hyperparameters).network


def _fit(network: keras.Model, images: Images, hyperparameters: Hyperparameters) -> training.Fit:
    steps = input_pipeline.steps_per_epoch(images, hyperparameters.batch_size)
    together = steps if isinstance(images, Features) else 1
    architecture.compile_network(network, hyperparameters, hyperparameters.epochs * steps, together)
    return training.fit_network(network, images, None, hyperparameters, is_logged=False)


def read_features(source: keras.Model, images: Images) -> Reading:
    """Return the features that the source's frozen network computes."""
    extractor = transfer.make_extractor(source)
    space = Space.of("transfer")
    features = transfer.compute_features(extractor, images, Augmentation.of(space.complete(space.baseline())))

    def read(pictures: list[Image.Image]) -> np.ndarray:
        pixels = np.stack([np.asarray(picture) for picture in pictures])
        return predict_values(extractor, pixels)

    return Reading(features, [read(pictures) for pictures in _corrupt(images)])


def read_landmarks(images: Images) -> Reading:
    """Return MediaPipe's landmarks, at unit length, as the features are."""
    reader = LandmarkReader(download_models()["full"])

    def read(pixels: np.ndarray) -> np.ndarray:
        points = np.stack([reader.read(Image.fromarray(picture)) for picture in pixels])
        return points / np.linalg.norm(points, axis=1, keepdims=True)

    space = Space.of("transfer")
    augmentation = Augmentation.of(space.complete(space.baseline()))
    everything = np.arange(len(images))
    copies = input_pipeline.validation_batches(
        images, input_pipeline.CHUNK, augmentation, np.tile(everything, transfer.COPIES)
    )
    changed = np.concatenate([x.numpy() for x, _ in copies])
    values = np.concatenate([read(images.x[:]), read(changed)]).astype(np.float32)
    x = values.reshape(-1, len(images), values.shape[1]).swapaxes(0, 1).copy()
    corrupted = [read(np.stack([np.asarray(p) for p in pictures])).astype(np.float32) for pictures in _corrupt(images)]
    return Reading(Features(x, images.y), corrupted)


def _corrupt(images: Images) -> list[list[Image.Image]]:
    pictures = [Image.fromarray(pixels) for pixels in images.x[:]]
    return [[corrupt_image(picture, name, seed) for seed, picture in enumerate(pictures)] for name in CORRUPTIONS]


def predict_values(network: keras.Model, x: np.ndarray) -> np.ndarray:
    chunks = range(0, len(x), input_pipeline.CHUNK)
    return np.concatenate([np.asarray(network(x[i : i + input_pipeline.CHUNK], training=False)) for i in chunks])


def predict(network: keras.Model, x: np.ndarray) -> np.ndarray:
    labels: np.ndarray = predict_values(network, x).argmax(axis=1)
    return labels


def judge(head: keras.Model, reading: Reading, others: np.ndarray) -> tuple[float, float]:
    """Return the accuracy of a head on the other photographs, and its mean over their corruptions."""
    labels = reading.features.y[others]
    clean = float((predict(head, reading.features.x[others, 0]) == labels).mean())
    corrupted = [float((predict(head, values[others]) == labels).mean()) for values in reading.corrupted]
    return clean, statistics.fmean(corrupted)


def holds_accuracy(features: Features, draw: int) -> bool:
    """Tell whether the interval of five folds of ten photographs holds the accuracy of the model of all ten."""
    chosen, others = draw_photographs(features.y, 10, 1000 + draw)
    x, y = features.x[:, 0], features.y
    model = LogisticRegression(C=10.0, max_iter=200)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    right = int((cross_val_predict(model, x[chosen], y[chosen], cv=folds) == y[chosen]).sum())
    low, high = fold_interval(right, len(chosen), 5)
    return bool(low <= model.fit(x[chosen], y[chosen]).score(x[others], y[others]) <= high)


def plot_accuracies(accuracies: dict[tuple[str, int], list[tuple[float, float]]]) -> Figure:
    """Plot the accuracy of each way by number of photographs: the mean, and the lowest and highest of the draws."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    labels = {
        "start_from": "start_from: a head on a network that reads other signs",
        "landmarks": "MediaPipe's landmarks, the same head",
        "from nothing": "trained from nothing",
    }
    for way, label in labels.items():
        values = [np.array(accuracies[way, count])[:, 0] for count in PHOTOGRAPHS]
        (line,) = axes.plot(PHOTOGRAPHS, [value.mean() for value in values], "o-", label=label)
        lows, highs = [value.min() for value in values], [value.max() for value in values]
        axes.fill_between(PHOTOGRAPHS, lows, highs, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="photographs of each of five new signs", ylabel="accuracy on others", ylim=(0, 1), xscale="log")
    axes.set_xticks(PHOTOGRAPHS, list(map(str, PHOTOGRAPHS)))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure
