"""Plots, as matplotlib figures."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import optuna
    import pandas as pd

    from signdigits.drift import Drift

matplotlib.rcdefaults()  # not those of a matplotlibrc, which may ask for LaTeX or for fonts that are not there


def plot_learning_curves(history: Mapping[str, Sequence[float]]) -> Figure:
    """Plot the learning curves: accuracy and loss by epoch, for training and, if there is any, validation."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for name, label in ((metric, "training"), (f"val_{metric}", "validation")):
            if name in history:
                axes.plot(range(1, len(history[name]) + 1), history[name], label=label)
        axes.set(title=metric.capitalize(), xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def plot_photographs(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    title: str,
    columns: int = 3,
    maps: Sequence[np.ndarray] = (),
) -> Figure:
    """Plot a grid of decoded photographs, each of shape (height, width, channels), with a caption each.

    `maps` are occlusion maps, of shape (rows, columns): where the model looked, its photograph turns red.
    """
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * rows + 0.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images, titles, strict=False):
        # One channel is the inverted grayscale of the reader: gray_r shows it as the photograph looked.
        axes.imshow(image.squeeze(), cmap="gray_r" if image.shape[-1] == 1 else None)
        axes.set_title(caption, fontsize=9, parse_math=False)
    for axes, image, occlusion in zip(figure.axes, images, maps, strict=False):
        height, width, _ = image.shape
        opacity = 0.6 * np.clip(occlusion, 0, None) / max(occlusion.max(), 1e-6)
        red = np.full_like(occlusion, 0.83, dtype=float)  # of the colour map
        extent = (0, width, height, 0)
        axes.imshow(red, cmap="Reds", vmin=0, vmax=1, alpha=opacity, extent=extent, interpolation="bilinear")
    return figure


def plot_reliability(counts: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray, error: float) -> Figure:
    """Plot the reliability diagram: accuracy by mean confidence, and the number of images of each bin."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 1 / len(counts)
    centres = (np.arange(len(counts)) + 0.5) * width
    above.plot([0, 1], [0, 1], color="gray", linestyle="--", label="confidence = accuracy")
    above.bar(centres, np.nan_to_num(accuracy), width * 0.9, label="accuracy")
    above.plot(confidence, accuracy, "o", color="black", markersize=3, label="mean confidence of the bin")
    above.set(title=f"Expected calibration error {error:.4f}", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    above.legend(loc="upper left")
    below.bar(centres, counts, width * 0.9, color="gray")
    below.set(xlabel="confidence", ylabel="images", yscale="symlog")
    return figure


def plot_robustness(robustness: "pd.DataFrame") -> Figure:
    """Plot the accuracy under each corruption, and under `none`, a bar each with its confidence interval."""
    figure = Figure(figsize=(7, 0.3 * len(robustness) + 1), layout="constrained")
    axes = figure.subplots()
    accuracy = robustness["accuracy"]
    ends = np.clip([accuracy - robustness["accuracy_low"], robustness["accuracy_high"] - accuracy], 0, None)
    is_corrupted = robustness["corruption"] != "none"
    colours = np.where(is_corrupted, "tab:blue", "tab:gray")
    axes.barh(robustness["corruption"], accuracy, xerr=ends, color=colours, error_kw={"linewidth": 1})
    for row, value in enumerate(accuracy):
        axes.text(0.01, row, f"{value:.3f}", va="center", color="white", fontsize=8)
    mean = accuracy[is_corrupted].mean()
    axes.axvline(mean, color="black", linestyle="--", linewidth=1)
    axes.set(title=f"Test accuracy under corruptions; mean {mean:.4f} (dashed)", xlim=(0, 1))
    axes.invert_yaxis()
    return figure


def plot_drift(reference: "pd.DataFrame", window: "pd.DataFrame", found: "Drift", bins: int = 30) -> Figure:
    """Plot the distributions of each column in both tables; the title of a drifted column is bold."""
    rows = math.ceil(len(found.distances) / 3)
    figure = Figure(figsize=(12, 3 * rows), layout="constrained")
    for axes in figure.subplots(rows, 3, squeeze=False).flat:
        axes.axis("off")
    for axes, (name, distance) in zip(figure.axes, found.distances.items(), strict=False):
        axes.axis("on")
        both = {"test images": reference[name], "predictions": window[name]}
        if name == "label":
            labels = sorted(set(reference[name]) | set(window[name]))
            for offset, (part, column) in zip((-0.2, 0.2), both.items(), strict=True):
                shares = [(column == label).mean() for label in labels]
                axes.bar(np.arange(len(labels)) + offset, shares, 0.4, label=part)
            axes.set_xticks(range(len(labels)), labels, parse_math=False)
        else:
            values = np.concatenate(list(both.values()))
            low, high = values.min(), values.max()
            ends = np.linspace(low, max(high, low + 1e-6 * max(1, abs(low))), bins + 1)  # of a constant, too
            for part, column in both.items():
                axes.hist(column, ends.tolist(), weights=np.full(len(column), 1 / len(column)), alpha=0.6, label=part)
        axes.set_title(f"{name}: {distance:.3f}", fontweight="bold" if name in found.drifted else "normal")
    figure.axes[0].legend()
    figure.suptitle("Test images and recent predictions, with their distance; bold: drift")
    return figure


def plot_disagreements(predictions: "pd.DataFrame", versions: tuple[str, str]) -> Figure:
    """Plot how often each label of the live version (rows) is which label of its shadow (columns)."""
    from sklearn.metrics import ConfusionMatrixDisplay

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    labels = sorted({*predictions["live"], *predictions["shadow"]})
    ConfusionMatrixDisplay.from_predictions(
        predictions["live"], predictions["shadow"], labels=labels, cmap="Blues", colorbar=False, ax=axes
    )
    axes.set_xlabel(f"version {versions[1]}, the shadow")
    axes.set_ylabel(f"version {versions[0]}")
    axes.set_title("Photographs by the labels of both versions")
    return figure


def plot_study(study: "optuna.Study", metric: str) -> dict[str, Figure]:
    """Return Optuna's plots of a study by name; some need two complete trials."""
    import optuna.visualization.matplotlib as draw
    from matplotlib import pyplot
    from optuna.exceptions import ExperimentalWarning
    from optuna.trial import TrialState

    matplotlib.use("agg")  # Optuna draws through pyplot, which would look for a screen
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    searched = {name for trial in complete for name, values in trial.distributions.items() if not values.single()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # so is every matplotlib picture of Optuna's
        warnings.simplefilter("ignore", UserWarning)  # few trials make all importances equal: the picture shows it
        drawn: dict[str, object] = {
            "optimization_history": draw.plot_optimization_history(study, target_name=metric),
            "intermediate_values": draw.plot_intermediate_values(study),
        }
        if len(complete) > 1 and searched:
            drawn |= {
                "param_importances": draw.plot_param_importances(study, target_name=metric),
                "parallel_coordinate": draw.plot_parallel_coordinate(study, target_name=metric),
                "slice": draw.plot_slice(study, target_name=metric),
            }
    figures = {name: np.ravel(np.asarray(axes, dtype=object))[0].get_figure() for name, axes in drawn.items()}
    for figure in figures.values():
        figure.set_size_inches(max(figure.get_size_inches()[0], 9), 5)
        pyplot.close(figure)  # pyplot keeps every figure it made until told otherwise
    return figures
