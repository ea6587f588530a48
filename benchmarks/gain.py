"""The gain of a search: the chosen trial against the first, a random one and the best value, on images that it never saw.

Ten small studies in each space, five on photographs and five on the embedded digits, of 32 pixels: each draws its own 400
training and 100 validation images from those that are not test images, and the rest judges. The trials that are compared are
fitted once more, on training and validation images. The picture goes into the README. Three quarters of an hour on two cores.

What is compared is the accuracy over the images, and in the extended space over a changed copy of each as well.
"""

import math
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product

import mlflow
import numpy as np
from matplotlib.figure import Figure

from benchmarks.measure import Row, temporary_store
from signdigits import search, startup
from signdigits.config import DataParameters, StudyParameters
from signdigits.data import loading
from signdigits.data.loading import Data, Images
from signdigits.tuning.choice import choose_trial
from signdigits.tuning.space import Space
from signdigits.tuning.study import Search, rank_trials

STUDIES = 5  # of each data set and space
TRIALS = 12
TRAINING, VALIDATION = 400, 100  # images
SIZE = 32  # pixels
BATCH_SIZES = {"notebook": 40, "extended": 10}  # an epoch has as many steps as with all 1,320 training photographs
NEW_SEED = 1  # of the fits that are compared: the luck of a trial does not count
PICTURE = "docs/gain.png"


@dataclass(frozen=True)
class Task:
    """A study: its photographs, search space and seed."""

    data: str
    space: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The values of a study's trials in their order, NaN if pruned, and the accuracy of some of them on unseen images."""

    task: Task
    values: list[float]
    chosen: int
    accuracy: dict[str, float]  # of the trials "chosen", "first", "random" and "best", the one with the best value

    def gain(self, over: str) -> float:
        """Return the accuracy of the chosen trial minus that of another, in points."""
        return 100 * (self.accuracy["chosen"] - self.accuracy[over])


def rows(photographs: str) -> list[Row]:
    tasks = [
        Task(data, space, seed)
        for space, seed, data in product(("notebook", "extended"), range(STUDIES), (photographs, "handwritten-digits"))
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1) as processes:
        outcomes = list(processes.map(run_study, tasks))
    plot_gain(outcomes).savefig(PICTURE, dpi=110)
    return [row for space in ("notebook", "extended") for row in compare(outcomes, space)]


def compare(outcomes: Sequence[Outcome], space: str) -> list[Row]:
    """Return the gains of the studies in a space, with the ends of their 95 % intervals, and how often the choice was worse."""
    chosen = [outcome for outcome in outcomes if outcome.task.space == space]
    table = []
    for over, name in (("first", "the first trial"), ("random", "a random trial"), ("best", "the best value")):
        gains = np.array([outcome.gain(over) for outcome in chosen])
        low, high = interval(gains)
        detail = f"{gains.mean():+.2f} points on unseen images, 95 % interval {low:+.2f} to {high:+.2f}, {len(gains)} studies"
        table.append(Row(f"space={space}, low end of the gain of the choice", name, low, 0.0, True, detail))
    worse = float(np.mean([outcome.gain("first") < 0 for outcome in chosen]))
    first = sum(outcome.chosen == 0 for outcome in chosen)
    detail = f"{first} of {len(chosen)} chose the first trial"
    table.append(Row(f"space={space}, studies whose choice is worse", "the first trial", worse, 0.1, False, detail))
    return table


def interval(gains: np.ndarray) -> tuple[float, float]:
    """Return the ends of the 95 % bootstrap interval of the mean."""
    samples = np.random.default_rng(0).choice(gains, (10_000, len(gains))).mean(axis=1)
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def run_study(task: Task) -> Outcome:
    """Run a study in a store of its own, and fit the trials that are compared once more."""
    startup.configure_mlflow()
    startup.import_tensorflow(threads=1)
    whole = loading.load_data(DataParameters(data=task.data, image_size=SIZE))
    random = np.random.default_rng(task.seed)
    data, unseen = draw_images(whole, random)
    with temporary_store("gain") as folder:
        space = Space.of(task.space, seed=task.seed, batch_size=BATCH_SIZES[task.space])
        parameters = StudyParameters(space=task.space, n_trials=TRIALS, storage=f"sqlite:///{folder}/optuna.db")
        opened = search.search(data, space, parameters)
        trials = opened.study.get_trials(deepcopy=False)
        chosen = choose_trial(opened.study, parameters.metric).trial.number
        complete = [trial.number for trial in rank_trials(opened.study)]
        fitted = {"chosen": chosen, "first": 0, "random": int(random.choice(complete)), "best": complete[0]}
        accuracy = {number: measure_accuracy(opened, number, unseen) for number in set(fitted.values())}
    values = [trial.value if trial.number in complete and trial.value is not None else math.nan for trial in trials]
    return Outcome(task, values, chosen, {name: accuracy[number] for name, number in fitted.items()})


def draw_images(whole: Data, random: np.random.Generator) -> tuple[Data, Images]:
    """Return a small data set of a study, and the images that it never sees; none of them is a test image."""
    order = random.permutation(len(whole.fitting))
    used, unseen = order[: TRAINING + VALIDATION], order[TRAINING + VALIDATION :]
    numbers = whole.split.fitting[used]
    split = replace(
        whole.split, training=numbers[:TRAINING], validation=numbers[TRAINING:], testing=whole.split.fitting[unseen]
    )
    return replace(whole, split=split, fitting=whole.fitting.part(used)), whole.fitting.part(unseen)


def measure_accuracy(opened: Search, number: int, unseen: Images) -> float:
    """Fit a trial's hyperparameters on training and validation images, with another seed, and return the accuracy on unseen ones."""
    from signdigits.model import input_pipeline, training

    data, space = opened.data, opened.space
    hyperparameters = replace(space.complete(opened.study.trials[number].params), seed=NEW_SEED)
    with mlflow.start_run():
        network = training.new_network(data, data.fitting, hyperparameters)
        fitted = training.fit_network(network, data.fitting, None, hyperparameters)
    flips = 0.5 if space.includes_mirror_images() else 0.0
    changes = [input_pipeline.NONE]
    if space.name == "extended":
        changes.append(replace(training.VALIDATION_AUGMENTATION, horizontal_flip=flips))
    correct = []
    for change in changes:
        logits, _ = training.compute_outputs(
            fitted, input_pipeline.validation_batches(unseen, input_pipeline.CHUNK, change)
        )
        correct.append((logits.argmax(axis=1) == unseen.y).mean())
    return float(np.mean(correct))


def plot_gain(outcomes: Sequence[Outcome]) -> Figure:
    """Plot the best value by trial of each study, and the gains of its choice."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    for line, space in zip(figure.subplots(2, 2, width_ratios=(3, 2)), ("notebook", "extended"), strict=True):
        chosen = [outcome for outcome in outcomes if outcome.task.space == space]
        by_trial, by_gain = line
        for outcome in chosen:
            best = np.fmin.accumulate(np.array(outcome.values))
            by_trial.plot(range(1, len(best) + 1), best / best[0], color="tab:blue", alpha=0.4)
            by_trial.plot(outcome.chosen + 1, outcome.values[outcome.chosen] / best[0], "o", color="tab:orange")
        by_trial.set(
            title=f"space={space}: best Brier score by trial, of the first", xlabel="trial", ylabel="share of the first"
        )
        for row, over in enumerate(("first", "random")):
            gains = np.array([outcome.gain(over) for outcome in chosen])
            low, high = interval(gains)
            jitter = row + np.linspace(-0.15, 0.15, len(gains))
            by_gain.plot(gains, jitter, "o", color="tab:orange", alpha=0.5, markersize=4)
            by_gain.errorbar(
                gains.mean(), row, xerr=[[gains.mean() - low], [high - gains.mean()]], fmt="D", color="black", capsize=4
            )
        by_gain.axvline(0, color="gray", linewidth=1)
        by_gain.set_yticks([0, 1], ["over the\nfirst trial", "over a\nrandom trial"])
        by_gain.set(
            title="gain of the choice, unseen images",
            xlabel="points of accuracy; mean and 95 % interval",
            ylim=(-0.5, 1.5),
        )
    return figure
