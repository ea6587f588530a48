"""The time of a search to the result of forty full trials, against a plain Optuna loop and Keras Tuner's Hyperband.

All three search the notebook's space: `initial_learning_rate`, `decay_rate` and `epochs`, the last from 5 to 20, around the
notebook's own values (8 and 20). The clock of each starts with its first trial: TensorFlow is imported, and the photographs
are decoded, before. A trial of the plain loop counts with its last epoch; Hyperband also counts the best epoch. A seed
takes an hour.
"""

import math
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import keras
import mlflow
import mlflow.tensorflow
import optuna

from benchmarks.measure import Row, temporary_store
from signdigits import search
from signdigits.config import DataParameters, Hyperparameters, StudyParameters
from signdigits.data import loading
from signdigits.model import architecture, input_pipeline
from signdigits.tuning.space import Range, Space

SEEDS = (1337, 1338, 1339)
TRIALS = 40
HYPERBAND_ITERATIONS = 4  # about 150 epochs each: 1.2 times those of the forty trials in sum
TOLERANCE = 0.005  # accuracy below the best of the forty trials that still counts as found
EPOCHS = Range(5, 20)
SPACE = Space.of("notebook", epochs=EPOCHS)


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    seconds = [compare(loaded, seed) for seed in SEEDS]
    table = []
    for name, peer, target in (("plain", "a plain Optuna loop", 8.0), ("hyperband", "Keras Tuner's Hyperband", 3.0)):
        ratio = statistics.median(one[name] / one["ours"] for one in seconds)
        ours, theirs = (", ".join(f"{one[key]:.0f}" for one in seconds) for key in ("ours", name))
        what = f"time to within {100 * TOLERANCE:g} points of the best of {TRIALS} trials, median of {len(SEEDS)} seeds"
        table.append(Row(what, peer, ratio, target, True, f"{ours} s against {theirs} s"))
    return table


def compare(loaded: loading.Data, seed: int) -> dict[str, float]:
    """Run each until it is near the best of the plain loop's forty trials, and return its seconds; inf: it never was."""
    with temporary_store("search") as folder:
        ended = run_plain_loop(loaded, seed)
        target = max(accuracy for _, accuracy in ended) - TOLERANCE
        seconds = {
            "plain": next(second for second, accuracy in ended if accuracy >= target),
            "ours": run_search(loaded, seed, target, folder),
            "hyperband": run_hyperband(loaded, seed, target, folder),
        }
    print(f"seed {seed}: {target:.4f} reached after {seconds}", file=sys.stderr, flush=True)
    return seconds


def compile_plain(loaded: loading.Data, hyperparameters: Hyperparameters) -> keras.Model:
    """Return the notebook's network, new."""
    keras.utils.set_random_seed(hyperparameters.seed)
    network = architecture.build_network(loaded.image_shape, loaded.n_classes)
    steps = hyperparameters.epochs * input_pipeline.steps_per_epoch(loaded.training, hyperparameters.batch_size)
    architecture.compile_network(network, hyperparameters, steps)
    return network


def run_plain_loop(loaded: loading.Data, seed: int) -> list[tuple[float, float]]:
    """Run forty full trials with autologging's defaults; return the seconds and the accuracy at the end of each."""
    started, ended = time.perf_counter(), []

    def objective(trial: optuna.Trial) -> float:
        hyperparameters = replace(SPACE.suggest(trial), seed=seed)
        mlflow.tensorflow.autolog(disable=False)
        with mlflow.start_run(nested=True):
            history = compile_plain(loaded, hyperparameters).fit(
                loaded.training.x, loaded.training.y, batch_size=128, epochs=hyperparameters.epochs, verbose=0,
                validation_data=(loaded.validation.x, loaded.validation.y),
            )  # fmt: skip
        accuracy = float(history.history["val_accuracy"][-1])
        ended.append((time.perf_counter() - started, accuracy))
        return accuracy

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=TRIALS, show_progress_bar=sys.stderr.isatty())
    return ended


def run_search(loaded: loading.Data, seed: int, target: float, folder: str) -> float:
    """Run this project's search, one trial after the other, until one reaches the target."""
    parameters = StudyParameters(space="notebook", storage=f"sqlite:///{folder}/optuna.db")
    started = time.perf_counter()
    with search.open_study(loaded, Space.of("notebook", epochs=EPOCHS, seed=seed), parameters) as opened:
        for n_trials in range(1, 10 * TRIALS):
            search.run_missing_trials(replace(opened, parameters=replace(parameters, n_trials=n_trials)))
            complete = opened.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
            if max(trial.user_attrs["val_accuracy"] for trial in complete) >= target:  # it optimizes the Brier score
                break
        return time.perf_counter() - started


def run_hyperband(loaded: loading.Data, seed: int, target: float, folder: str) -> float:
    """Run Keras Tuner's Hyperband, without MLflow, until a trial reaches the target.

    It chooses the number of epochs itself, up to the largest of the range.
    """
    import keras_tuner

    class TargetReached(Exception):
        pass

    class Tuner(keras_tuner.Hyperband):
        def on_trial_end(self, trial: Any) -> None:
            super().on_trial_end(trial)
            if (trial.score or 0) >= target:
                raise TargetReached

    def build(choices: Any) -> keras.Model:
        ranges = {name: SPACE.ranges[name] for name in ("initial_learning_rate", "decay_rate")}
        suggested = {
            name: choices.Float(name, one.low, one.high, sampling="log" if one.log else "linear")
            for name, one in ranges.items()
        }
        return compile_plain(loaded, replace(SPACE.complete(suggested), seed=seed))

    mlflow.tensorflow.autolog(disable=True)
    tuner = Tuner(
        build, objective="val_accuracy", max_epochs=int(EPOCHS.high), hyperband_iterations=HYPERBAND_ITERATIONS,
        seed=seed, directory=folder, project_name="hyperband", overwrite=True,
    )  # fmt: skip
    started = time.perf_counter()
    try:
        tuner.search(
            loaded.training.x, loaded.training.y, batch_size=128, verbose=0,
            validation_data=(loaded.validation.x, loaded.validation.y),
        )  # fmt: skip
    except TargetReached:
        return time.perf_counter() - started
    return math.inf
