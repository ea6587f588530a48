"""The overhead of a trial beyond its epochs, against a run with default autologging."""

import dataclasses
import functools
from collections.abc import Callable

from benchmarks import plain
from benchmarks.measure import Row, in_turns, temporary_store
from signdigits import search
from signdigits.config import DataParameters, Hyperparameters, StudyParameters
from signdigits.data import loading
from signdigits.model import architecture
from signdigits.tuning.objective import objective
from signdigits.tuning.space import Space

ROUNDS = 5
SHORT, LONG = 1, 3  # epochs: what a trial costs at none follows from the two


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    with temporary_store("trial") as folder:
        parameters = StudyParameters(space="notebook", pruner="none", storage=f"sqlite:///{folder}/optuna.db")
        with search.open_study(loaded, space(SHORT), parameters) as opened:
            ways = {f"ours {epochs}": ours(opened, epochs) for epochs in (SHORT, LONG)}
            ways |= {f"theirs {epochs}": theirs(loaded, epochs) for epochs in (SHORT, LONG)}
            seconds = in_turns(ways, ROUNDS)
    our, their = (at_none(seconds[f"{who} {SHORT}"], seconds[f"{who} {LONG}"]) for who in ("ours", "theirs"))
    detail = f"{our:.2f} s against {their:.2f} s"
    return [
        Row("a trial beyond its epochs", "a run with autolog's defaults", our / their, 0.1, False, detail),
        Row("a trial beyond its epochs, in seconds", "", our, 2.0, False, detail),
    ]


def at_none(short: float, long: float) -> float:
    """The time of a run of no epochs, from a straight line through two."""
    return short - (long - short) / (LONG - SHORT) * SHORT


def space(epochs: int) -> Space:
    return Space.of("notebook", epochs=epochs)


def ours(opened: search.Search, epochs: int) -> Callable[[], object]:
    context = dataclasses.replace(opened.context, space=space(epochs))
    return lambda: opened.study.optimize(functools.partial(objective, context=context), n_trials=1)


def theirs(loaded: loading.Data, epochs: int) -> Callable[[], object]:
    return lambda: plain.run(loaded, Hyperparameters(epochs=epochs), architecture.resolve_precision("auto"))
