"""The accuracy of what a user might take instead: MediaPipe's hand landmarks and a logistic regression.

MediaPipe's two landmark models see the whole photograph. Its palm detector, which would crop the hand first, is left out: it
misses one in seven of these photographs, which the hand fills. As a refit, the regression is fitted on training and validation
images, and scored on the test images, clean and under the corruptions of `evaluate`; with the grouped split, these are of other
signers. The target is the accuracy of the champion of these photographs and this split, less LEAD; without one, 100.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities.model_registry import ModelVersion
from PIL import Image
from sklearn.linear_model import LogisticRegression

from benchmarks.measure import Row
from signdigits import startup
from signdigits.config import MODEL_NAME, SourceParameters
from signdigits.data import images
from signdigits.data.corruptions import CORRUPTIONS, corrupt_image
from signdigits.data.dataset import Dataset, scan_dataset
from signdigits.data.split import Split, split_dataset
from signdigits.tracking import registry, store

# The last release whose wheel has the models (Apache-2.0). It asks for NumPy 1: of its files only the models are used, which are
# the same for every version of Python and every platform.
PACKAGE = "mediapipe==0.10.21"
WHEEL = ("--no-deps", "--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28")
MODELS = ("lite", "full")  # full is MediaPipe's default
SPLITS = ("random", "grouped")
SIDE = 100  # pixels, as the network sees them
LEAD = 5.0  # points by which the champion should be better under the corruptions


def rows(photographs: str) -> list[Row]:
    dataset = scan_dataset(SourceParameters(data=photographs))
    store.connect_store()
    champion = registry.find_alias(MODEL_NAME, registry.CHAMPION)
    table = []
    for name, content in download_models().items():
        reader = LandmarkReader(content)
        seconds, points = read_photographs(reader, dataset)
        for split_name in SPLITS:
            parts = split_dataset(dataset, split_name)
            clean, corrupted = score(reader, points, dataset, parts)
            of_split = champion if champion and champion.tags.get("dataset_digest") == parts.digest else None
            where = f"{name} landmarks, {split_name} split, {1000 * seconds:.1f} ms a photograph"
            print(f"{where}: {clean:.4f}, {corrupted:.4f}", file=sys.stderr, flush=True)
            table += [
                compare("test accuracy in %", clean, of_split, "test_accuracy", 0.0, where),
                compare("the same over the corruptions", corrupted, of_split, "robust_accuracy", LEAD, where),
            ]
    return table


def compare(what: str, accuracy: float, champion: ModelVersion | None, tag: str, lead: float, where: str) -> Row:
    """Return a row with the accuracy, and how far the champion is ahead or behind."""
    if champion is None or tag not in champion.tags:
        return Row(what, "no champion of these photographs and this split", 100 * accuracy, 100.0, False, where)
    reached = 100 * float(champion.tags[tag])
    points = reached - 100 * accuracy
    detail = f"{where}; the champion is {abs(points):.2f} points {'ahead' if points >= 0 else 'behind'}"
    against = f"version {champion.version}, the champion: {reached:.2f}"
    return Row(what, against, 100 * accuracy, reached - lead, False, detail)


def download_models() -> dict[str, bytes]:
    """Return MediaPipe's landmark models, from the wheel that pip's registry has."""
    with tempfile.TemporaryDirectory() as folder:
        install = (sys.executable, "-m", "uv", "pip", "install", "--quiet", *WHEEL, "--target", folder, PACKAGE)
        subprocess.run(install, check=True)
        models = Path(folder, "mediapipe", "modules", "hand_landmark")
        return {name: Path(models, f"hand_landmark_{name}.tflite").read_bytes() for name in MODELS}


class LandmarkReader:
    """Reads the landmarks of a hand that fills the image."""

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert.interpreter import Interpreter

        with startup.filtered_stderr():
            self.interpreter: Any = Interpreter(model_content=content, num_threads=1)
            self.interpreter.allocate_tensors()
        self.input = self.interpreter.get_input_details()[0]
        # Three coordinates of each of 21 points, presence, handedness, and the points in metres.
        self.outputs = [output["index"] for output in self.interpreter.get_output_details()]

    def read(self, image: Image.Image) -> np.ndarray:
        """Return the normalized landmarks of an RGB image, of shape (63,)."""
        size = self.input["shape"][1:3].tolist()
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32) / 255
        self.interpreter.set_tensor(self.input["index"], pixels[np.newaxis])
        self.interpreter.invoke()
        points, _, handedness, _ = (self.interpreter.get_tensor(index) for index in self.outputs)
        return normalize_landmarks(points.reshape(-1, 3), mirrored=handedness.item() < 0.5)


def normalize_landmarks(points: np.ndarray, *, mirrored: bool) -> np.ndarray:
    """Return points, of shape (21, 3), as those of one hand, around 0 and with a standard deviation of 1; of shape (63,)."""
    centred = (points - points.mean(axis=0)) * (-1 if mirrored else 1, 1, 1)
    return (centred / centred[:, :2].std()).ravel()


def read_photographs(reader: LandmarkReader, dataset: Dataset) -> tuple[float, np.ndarray]:
    """Return the median CPU time of a photograph in seconds, and the landmarks of all, of shape (n, 63)."""
    seconds, points = [], []
    for photograph in dataset.photographs:
        content = dataset.read(photograph)
        started = time.process_time()
        points.append(reader.read(Image.fromarray(images.decode_image(content, SIDE, "rgb"))))
        seconds.append(time.process_time() - started)
    return statistics.median(seconds), np.stack(points)


def score(reader: LandmarkReader, points: np.ndarray, dataset: Dataset, parts: Split) -> tuple[float, float]:
    """Return the accuracy on the test images, and its mean over the corruptions, of scikit-learn's defaults."""
    labels = dataset.labels[parts.testing]
    classifier = LogisticRegression(max_iter=1000).fit(points[parts.fitting], dataset.labels[parts.fitting])
    contents = [dataset.read(dataset.photographs[i]) for i in parts.testing]
    pictures = [Image.fromarray(images.decode_image(content, SIDE, "rgb")) for content in contents]
    accuracies = []
    for name in CORRUPTIONS:
        corrupted = [reader.read(corrupt_image(picture, name, seed)) for seed, picture in enumerate(pictures)]
        accuracies.append(classifier.score(np.stack(corrupted), labels))
    return float(classifier.score(points[parts.testing], labels)), statistics.fmean(accuracies)
