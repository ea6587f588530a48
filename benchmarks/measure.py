"""Time two implementations in turns, and compare them."""

import contextlib
import importlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TypeVar

import mlflow

from signdigits import startup

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of the table: a ratio, what it is a ratio of, and what it should reach."""

    what: str
    against: str
    result: float
    reach: float
    at_least: bool
    detail: str

    @property
    def reached(self) -> bool:
        return self.result >= self.reach if self.at_least else self.result <= self.reach


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int, each: int = 1) -> dict[str, float]:
    """The median time of each way, in seconds, over `rounds` rounds in which each has its turn, `each` times in a row.

    What disturbs the machine disturbs all of them alike. The first round, which traces and allocates, does not count.
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
    """A folder with an MLflow store of its own, active, that is gone afterwards; yields the folder."""
    with TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.create_experiment(experiment, artifact_location=f"file://{folder}/artifacts")
        mlflow.set_experiment(experiment)
        yield folder


def part(name: str, photographs: str) -> list[Row]:
    """The rows of one part, without what the peers would say meanwhile: a warning an epoch, for thousands of epochs."""
    startup.configure_mlflow()
    startup.import_tensorflow()
    for peer in ("mlflow", "absl", "tensorflow"):
        logging.getLogger(peer).setLevel(logging.ERROR)
    rows: list[Row] = importlib.import_module(f"benchmarks.{name}").rows(photographs)
    return rows


def until(condition: Callable[[], T | None], seconds: float) -> T:
    """Poll until `condition` holds, and return its value. Raises RuntimeError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {seconds} s")
        time.sleep(0.1)
    return found
