"""The pictures that a run keeps. Every function returns a matplotlib figure, or one with its name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import optuna


def learning_curves(history: Mapping[str, Sequence[float]]) -> Figure:
    """Accuracy and loss by epoch, for training and, where there is any, validation."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for name, label in ((metric, "training"), (f"val_{metric}", "validation")):
            if name in history:
                axes.plot(range(1, len(history[name]) + 1), history[name], label=label)
        axes.set(title=metric.capitalize(), xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def photographs(images: Sequence[np.ndarray], titles: Sequence[str], title: str, columns: int = 3) -> Figure:
    """A grid of decoded photographs, each of shape (height, width, channels), under a title of its own."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images, titles, strict=False):
        # One channel is the inverted grayscale of the reader: gray_r shows it as the photograph looked.
        axes.imshow(image.squeeze(), cmap="gray_r" if image.shape[-1] == 1 else None)
        axes.set_title(caption, fontsize=9)
    return figure


def study(study: "optuna.Study", objective: str) -> Iterator[tuple[str, Figure]]:
    """What Optuna can draw of a study so far, each with its name; some pictures need two complete trials."""
    import optuna.visualization.matplotlib as draw
    from optuna.trial import TrialState

    matplotlib.use("agg")  # Optuna draws through pyplot, which would look for a screen
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    searched = {name for trial in complete for name, values in trial.distributions.items() if not values.single()}
    single = [("optimization_history", draw.plot_optimization_history)]
    several = [
        ("param_importances", draw.plot_param_importances),
        ("parallel_coordinate", draw.plot_parallel_coordinate),
        ("slice", draw.plot_slice),
    ]
    for name, function in single + (several if len(complete) > 1 and searched else []):
        yield name, as_figure(function(study, target_name=objective))
    yield "intermediate_values", as_figure(draw.plot_intermediate_values(study))


def as_figure(drawn: object) -> Figure:
    """The figure of the axes, or array of axes, that Optuna returns."""
    from matplotlib import pyplot

    axes = np.ravel(np.asarray(drawn, dtype=object))[0]
    figure = axes.get_figure()
    figure.set_size_inches(max(figure.get_size_inches()[0], 9), 5)
    pyplot.close(figure)  # pyplot keeps every figure it made until told otherwise
    return figure
