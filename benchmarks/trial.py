"""What a trial costs beyond its epochs, against a run with autologging as it is by default."""

import dataclasses
from collections.abc import Callable

import keras
import mlflow
import mlflow.tensorflow

from benchmarks.measure import Row, in_turns, temporary_store
from signdigits import data, model, search
from signdigits.hyperparameters import DataParameters, Hyperparameters, Space, StudyParameters

ROUNDS = 5
SHORT, LONG = 1, 3  # epochs: what a trial costs at none follows from the two


def rows(photographs: str) -> list[Row]:
    loaded = data.load(DataParameters(data=photographs))
    with temporary_store("trial") as folder:
        parameters = StudyParameters(space="notebook", pruner="none", storage=f"sqlite:///{folder}/optuna.db")
        with search.open_study(loaded, space(SHORT), parameters) as opened:
            ways = {f"ours {epochs}": trial(opened, epochs) for epochs in (SHORT, LONG)}
            ways |= {f"theirs {epochs}": default_run(loaded, epochs) for epochs in (SHORT, LONG)}
            seconds = in_turns(ways, ROUNDS)
    ours, theirs = (at_none(seconds[f"{who} {SHORT}"], seconds[f"{who} {LONG}"]) for who in ("ours", "theirs"))
    detail = f"{ours:.2f} s against {theirs:.2f} s"
    return [
        Row("a trial beyond its epochs", "a run with autolog's defaults", ours / theirs, 0.1, False, detail),
        Row("a trial beyond its epochs, in seconds", "", ours, 0.7, False, detail),
    ]


def at_none(short: float, long: float) -> float:
    """The time of a run of no epochs, from a straight line through two."""
    return short - (long - short) / (LONG - SHORT) * SHORT


def space(epochs: int) -> Space:
    return Space.of("notebook", epochs=epochs)


def trial(opened: search.Search, epochs: int) -> Callable[[], object]:
    chosen = dataclasses.replace(opened, space=space(epochs))
    return lambda: opened.study.optimize(lambda drawn: search.attempt(chosen, drawn), n_trials=1)


def default_run(loaded: data.Data, epochs: int) -> Callable[[], object]:
    """The same training as somebody writes it who turns autologging on and thinks no more of it."""

    def run() -> None:
        mlflow.tensorflow.autolog(disable=False)
        with mlflow.start_run(nested=True):
            keras.utils.set_random_seed(1337)
            network = model.build((100, 100, 3), 10, precision=model.resolve_precision("auto"))
            model.compile_network(network, Hyperparameters())
            network.fit(
                loaded.training.x, loaded.training.y, batch_size=128, epochs=epochs, verbose=0,
                validation_data=(loaded.validation.x, loaded.validation.y),
            )  # fmt: skip

    return run
