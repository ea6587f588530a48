"""How long a search takes to find what forty full trials find, against a plain Optuna loop and Keras Tuner's Hyperband.

All three search the notebook's space: `initial_learning_rate`, `decay_rate` and `epochs`. The clock of each starts with its
first trial: TensorFlow is imported, and the photographs are decoded, before.
"""

import contextlib
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import keras
import mlflow
import mlflow.tensorflow
import optuna

from benchmarks.measure import Row, temporary_store
from signdigits import data, model, search
from signdigits.hyperparameters import DataParameters, Hyperparameters, Space, StudyParameters

SEEDS = (1337, 1338, 1339)
TRIALS = 40
CLOSE = 0.005  # how near the best of the forty counts as found
SPACE = Space.of("notebook")


@dataclass(frozen=True)
class Ended:
    """A trial's end: seconds after the search began, and the validation accuracy of its last epoch."""

    seconds: float
    accuracy: float


def rows(photographs: str) -> list[Row]:
    loaded = data.load(DataParameters(data=photographs))
    found = [compare(loaded, seed) for seed in SEEDS]
    plain, hyperband = ([times[peer] / times["ours"] for times in found] for peer in ("plain", "hyperband"))
    shown = {name: ", ".join(f"{times[name]:.0f}" for times in found) + " s" for name in found[0]}
    seeds = f"{len(SEEDS)} seeds"
    return [
        Row(
            f"a search, until it is near the best of {TRIALS} trials, {seeds}", "a plain Optuna loop, autolog's defaults",
            statistics.median(plain), 4.0, True, f"{shown['ours']} against {shown['plain']}",
        ),
        Row(
            f"a search, until it is near the best of {TRIALS} trials, {seeds}", "Keras Tuner's Hyperband",
            statistics.median(hyperband), 1.0, True, f"{shown['ours']} against {shown['hyperband']}",
        ),
    ]  # fmt: skip


def compare(loaded: data.Data, seed: int) -> dict[str, float]:
    """Seconds until each has found what is near the best of the plain loop's forty trials."""
    with temporary_store("search") as folder:
        forty = plain_loop(loaded, seed)
        target = max(trial.accuracy for trial in forty) - CLOSE
        reached = next(trial.seconds for trial in forty if trial.accuracy >= target)
        times = {
            "plain": reached,
            "ours": ours(loaded, seed, target, folder),
            "hyperband": hyperband(loaded, seed, target, folder),
        }
    told = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items())
    print(f"seed {seed}: {target:.4f} reached after: {told}", file=sys.stderr, flush=True)
    return times


def plain_loop(loaded: data.Data, seed: int) -> list[Ended]:
    """Forty full trials as somebody writes them who turns autologging on and thinks no more of it."""
    mlflow.tensorflow.autolog(disable=False)
    started, ended = time.perf_counter(), []

    def objective(trial: optuna.Trial) -> float:
        drawn = SPACE.suggest(trial)
        with mlflow.start_run(nested=True):
            network = compiled(loaded, drawn, seed)
            history = network.fit(
                loaded.training.x, loaded.training.y, batch_size=128, epochs=drawn.epochs, verbose=0,
                validation_data=(loaded.validation.x, loaded.validation.y),
            ).history  # fmt: skip
        ended.append(Ended(time.perf_counter() - started, history["val_accuracy"][-1]))
        return ended[-1].accuracy

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=TRIALS)
    return ended


def ours(loaded: data.Data, seed: int, target: float, folder: str) -> float:
    """This project's search, one trial after the other, until one reaches the target."""
    storage = f"sqlite:///{folder}/optuna.db"
    started = time.perf_counter()
    with search.open_study(
        loaded, Space.of("notebook", seed=seed), StudyParameters(space="notebook", storage=storage)
    ) as opened:
        for n_trials in range(1, 10 * TRIALS):
            search.run_trials(replace(opened, parameters=replace(opened.parameters, n_trials=n_trials)))
            complete = opened.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
            if any((trial.value or 0) >= target for trial in complete):
                break
        return time.perf_counter() - started


def hyperband(loaded: data.Data, seed: int, target: float, folder: str) -> float:
    """Keras Tuner's Hyperband, without MLflow; it has its own idea of how long to train, up to as many epochs."""
    import keras_tuner

    class Enough(Exception):
        pass

    class Until(keras_tuner.Hyperband):
        def on_trial_end(self, trial: Any) -> None:
            super().on_trial_end(trial)
            if (trial.score or 0) >= target:
                raise Enough

    def build(choices: Any) -> keras.Model:
        ranges = {name: SPACE.ranges[name] for name in ("initial_learning_rate", "decay_rate")}
        drawn = {
            name: choices.Float(name, r.low, r.high, sampling="log" if r.log else "linear")
            for name, r in ranges.items()
        }
        return compiled(loaded, SPACE.complete(drawn), seed)

    mlflow.tensorflow.autolog(disable=True)
    tuner = Until(
        build, objective="val_accuracy", max_epochs=int(SPACE.ranges["epochs"].high), hyperband_iterations=10, seed=seed,
        directory=folder, project_name="hyperband", overwrite=True,
    )  # fmt: skip
    started = time.perf_counter()
    with contextlib.suppress(Enough):
        tuner.search(
            loaded.training.x, loaded.training.y, batch_size=128, verbose=0,
            validation_data=(loaded.validation.x, loaded.validation.y),
        )  # fmt: skip
    return time.perf_counter() - started


def compiled(loaded: data.Data, hyperparameters: Hyperparameters, seed: int) -> keras.Model:
    """The notebook's network in float32, new."""
    keras.utils.set_random_seed(seed)
    network = model.build(loaded.training.shape, len(loaded.dataset.class_names))
    model.compile_network(network, hyperparameters)
    return network
