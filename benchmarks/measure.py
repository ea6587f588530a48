"""Rows of the table, alternating timing, and what several benchmarks share."""

import contextlib
import importlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import mlflow

from signdigits import startup


@dataclass(frozen=True)
class Row:
    """One line of the table: a result, what it is relative to, and its target."""

    what: str
    against: str
    result: float
    target: float
    at_least: bool
    detail: str

    @property
    def reached(self) -> bool:
        return self.result >= self.target if self.at_least else self.result <= self.target


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int, each: int = 1) -> dict[str, float]:
    """Return the median time of each way in seconds; in each round every way is called `each` times in a row.

    A disturbance of the machine thus affects all of them alike. The first round, which traces and allocates, does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            for _ in range(each):
                started = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[each:]) for name, seconds in times.items()}


@contextlib.contextmanager
def temporary_store(experiment: str) -> Iterator[str]:
    """Use a new MLflow store in a temporary folder, and yield the folder."""
    with TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.create_experiment(experiment, artifact_location=f"file://{folder}/artifacts")
        mlflow.set_experiment(experiment)
        yield folder


def measure_part(name: str, photographs: str) -> list[Row]:
    """Return the rows of one part, without the warnings that the libraries repeat in each epoch."""
    startup.configure_mlflow()
    startup.import_tensorflow()
    for library in ("mlflow", "absl", "tensorflow"):
        logging.getLogger(library).setLevel(logging.ERROR)
    rows: list[Row] = importlib.import_module(f"benchmarks.{name}").rows(photographs)
    return rows
