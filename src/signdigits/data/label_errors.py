"""Label errors: photographs whose label is doubtful, by confident learning (Northcutt, Jiang and Chuang, 2021, JAIR 70).

Each photograph gets its probabilities from a classifier that was fitted without it (cross-validation): support vector machines
on histograms of oriented gradients (Dalal and Triggs, 2005), which take seconds where networks take minutes.
"""

import textwrap

import cv2
import numpy as np
import pandas as pd
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from tqdm.contrib.concurrent import thread_map

from signdigits import plots
from signdigits.data import images
from signdigits.data.dataset import Dataset, Photograph

FOLDS = 5
SEED = 1337  # seed of the cross-validation
SIDE = 64  # pixels
CELL = 8  # pixels
BINS = 9  # directions, of 180 degrees
MAX_PICTURES = 40


def rank_labels(dataset: Dataset) -> pd.DataFrame:
    """Return a row per photograph, the most doubtful label first.

    The columns are its path, its class, the class that the others suggest, cleanlab's label quality score (0 to 1, low is
    doubtful), and `issue`: cleanlab counts it as an error.
    """
    features = thread_map(
        lambda photograph: _describe_shapes(dataset, photograph), dataset.photographs, desc="labels", disable=None
    )
    probabilities = _predict_out_of_fold(np.stack(features), dataset.labels)
    names = np.array(dataset.class_names)
    table = pd.DataFrame(
        {
            "path": [photograph.path for photograph in dataset.photographs],
            "class": names[dataset.labels],
            "suggested": names[probabilities.argmax(axis=1)],
            "score": get_label_quality_scores(dataset.labels, probabilities, method="normalized_margin"),
            "issue": find_label_issues(dataset.labels, probabilities, n_jobs=1),
        }
    )
    return table.sort_values("score", kind="stable", ignore_index=True)


def _describe_shapes(dataset: Dataset, photograph: Photograph) -> np.ndarray:
    """Return the square roots of a photograph's histograms of gradient directions, of shape (8 * 8 * BINS,).

    A Gaussian weighs the pixels around the centre of a cell, so that a hand that is shifted a little changes little.
    """
    gray = images.decode_image(dataset.read(photograph), SIDE, "grayscale")[..., 0]
    dy, dx = np.gradient(cv2.GaussianBlur(gray, (0, 0), 1))
    direction = np.arctan2(dy, dx)[..., np.newaxis] % np.pi * BINS / np.pi
    distance = np.abs(direction - np.arange(BINS))
    shares = np.clip(1 - np.minimum(distance, BINS - distance), 0, None)  # of the two nearest directions
    strength = np.hypot(dx, dy)[..., np.newaxis] * shares
    histograms = cv2.GaussianBlur(strength, (0, 0), CELL / 2)[CELL // 2 :: CELL, CELL // 2 :: CELL]
    return np.sqrt(histograms / max(histograms.mean(), 1e-9)).ravel()


def _predict_out_of_fold(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the probabilities of each photograph's classes, of shape (n, classes), by classifiers fitted on other folds.

    One machine per class: its margins grade doubt, where the votes of a multi-class SVC saturate.
    """
    folds = StratifiedKFold(min(FOLDS, np.bincount(labels).min()), shuffle=True, random_state=SEED)
    classifier = make_pipeline(PCA(0.95, random_state=SEED), OneVsRestClassifier(SVC(C=3)))
    margins = cross_val_predict(classifier, features, labels, cv=folds, method="decision_function")
    if margins.ndim == 1:  # two classes
        margins = np.stack([-margins, margins], axis=1)
    return np.asarray(softmax(margins, axis=1))


def plot_labels(dataset: Dataset, table: pd.DataFrame) -> plots.Figure:
    """Plot the photographs with the most doubtful labels, the worst first."""
    rows = table.head(MAX_PICTURES).to_dict("records")
    pictures = [images.decode_image(images.read_file(dataset.locate(row["path"])), 120, "rgb") for row in rows]
    captions = []
    for row in rows:
        doubt = "" if row["suggested"] == row["class"] else f", or {row['suggested']}?"
        captions.append(f"{row['class']}{doubt}\n{textwrap.fill(row['path'], 20)}")
    return plots.plot_photographs(pictures, captions, "Doubtful labels", columns=8)
