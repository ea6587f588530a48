"""Throughput of a distributed search with sleeping trials, on a running `scripts/cluster`.

    scripts/cluster up && source <(scripts/cluster env) && scripts/benchmark coordination

The trials ask, open their nested run, report, log a metric, and tell, as real ones do; in between they sleep.
"""

import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState, create_trial

from benchmarks.measure import Row
from benchmarks.sleeper import SECONDS, Sleeper
from signdigits import ray_cluster, search
from signdigits.config import DataParameters, StudyParameters
from signdigits.data import loading
from signdigits.tracking import runs
from signdigits.tuning import executors
from signdigits.tuning.progress import SearchProgress
from signdigits.tuning.space import Space
from signdigits.tuning.study import STARTUP_TRIALS, make_sampler

WORKERS = (1, 8, 32, 64)
EACH = 10  # trials for each worker
ASKED = 5  # times that drawing a trial is timed
CROWD = 1000  # trials that run, as on a thousand workers, beside which it is timed too


@dataclass(frozen=True)
class Carried:
    """What so many workers did together."""

    workers: int
    trials: int
    filling: float  # seconds until every worker had its first
    rate: float  # trials a second
    processor: dict[str, float]  # seconds of it, by part of the cluster
    asking: float  # seconds to draw a trial beside those that run, the median

    @property
    def share(self) -> float:
        """Of the trials that could be done if nothing but the sleep took any time."""
        return self.rate * SECONDS / self.workers

    @property
    def cost(self) -> float:
        """Seconds of a worker's time that a trial takes beyond its sleep."""
        return self.workers / self.rate - SECONDS

    def __str__(self) -> str:
        used = ", ".join(f"{part} {seconds / self.trials * 1e3:.0f}" for part, seconds in self.processor.items())
        return (
            f"{self.rate:.2f} trials a second; {self.cost:.2f} s of a worker's time a trial; all at work after {self.filling:.1f} s; "
            f"{self.asking * 1e3:.0f} ms to draw a trial; processor time a trial in ms: {used}"
        )


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    carried = [measure(loaded, workers) for workers in WORKERS]
    print(f"drawing a trial beside {CROWD} that run: {crowded(loaded):.2f} s", file=sys.stderr, flush=True)
    return [
        Row("what the engine costs a trial, in seconds", "a trial that only sleeps", carried[0].cost, 0.3, False,
            "run, parameters, metric, Optuna and Ray together, one worker"),
        *(
            Row(f"{one.workers} workers whose trials sleep {SECONDS:.0f} s", "no coordination at all", one.share, 0.9, True,
                str(one))
            for one in carried
        ),
    ]  # fmt: skip


def measure(loaded: loading.Data, workers: int) -> Carried:
    """A study of sleeping trials. The first of each worker starts its process, and does not count."""
    parameters = sleeping(workers)
    with (
        search.open_study(loaded, Space.of("notebook"), parameters) as opened,
        ray_cluster.connect_ray(parameters, cpus=0),
    ):
        config = executors.worker_config(opened.study, opened.context, parameters, cpus=0)
        executor = executors.RayExecutor(config, opened.study, parameters, kind=Sleeper)
        executor.run(SearchProgress(parameters))
        trials = EACH * workers
        before = processor_seconds()
        executor.parameters = replace(parameters, n_trials=workers + trials)
        executor.run(SearchProgress(executor.parameters))
        used = {part: after - before[part] for part, after in processor_seconds().items()}
        filling, rate = pace([trial.datetime_start for trial in opened.study.trials[workers:]], workers)
        asking = drawing(opened, workers)
    done = Carried(workers, trials, filling, rate, used, asking)
    print(f"{workers} workers: {done}", file=sys.stderr, flush=True)
    return done


def sleeping(workers: int) -> StudyParameters:
    """A new study on the running cluster, whose first trials are one for each worker."""
    runs.open_experiment("benchmark")
    return StudyParameters(
        space="notebook", storage=os.environ["STORAGE"], study_name=f"sleeping-{workers}-{int(time.time())}",
        workers=workers, pruner="none", ray_address=os.environ["RAY_ADDRESS"], n_trials=workers,
    )  # fmt: skip


def crowded(loaded: loading.Data) -> float:
    """Seconds to draw a trial beside `CROWD` that run, of a study with as many complete ones as the sampler waits for."""
    with search.open_study(loaded, Space.of("notebook"), sleeping(CROWD)) as opened:
        complete = like_the_first(opened, value=0.5)
        for _ in range(STARTUP_TRIALS):
            opened.study.add_trial(complete)
        return drawing(opened, CROWD)


def pace(starts: list[datetime | None], workers: int) -> tuple[float, float]:
    """Seconds until every worker had its first trial, and trials a second: the slope of the line through the starts.

    How long the whole takes says less of how fast trials are handed out: at the end, workers wait for the last trial.
    """
    seconds = sorted(start.timestamp() for start in starts if start)
    return seconds[workers - 1] - seconds[0], statistics.linear_regression(seconds, range(len(seconds))).slope


def processor_seconds() -> dict[str, float]:
    """What each part of the cluster has computed so far, all its processes together, and what this one has.

    The rest of the machine is Ray with its workers, where nothing else runs.
    """
    home = Path(os.environ["CLUSTER_HOME"])
    machine = psutil.cpu_times()
    used = {"driver": sum(psutil.Process().cpu_times()[:2])}
    for part in ("postgres", "mlflow", "proxy"):
        root = psutil.Process(int((home / f"{part}.pid").read_text()))
        living = [sum(process.cpu_times()[:2]) for process in (root, *root.children(recursive=True))]
        used[part] = sum(living) + sum(root.cpu_times()[2:4])  # and of those that have ended
    return used | {"workers and Ray": machine.user + machine.system - sum(used.values())}


def drawing(opened: search.Search, running: int) -> float:
    """Seconds to draw a trial beside so many that run, the median. All are given back."""
    study, first = opened.study, len(opened.study.trials)
    at_work = like_the_first(opened, state=TrialState.RUNNING)
    for _ in range(running):
        study.add_trial(at_work)
    seconds = []
    for number in range(ASKED):
        started = time.perf_counter()
        study.sampler = make_sampler(first + number)
        opened.context.space.suggest(study.ask())
        seconds.append(time.perf_counter() - started)
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
    return statistics.median(seconds)


def like_the_first(opened: search.Search, **ended: Any) -> FrozenTrial:
    """A trial that drew what a study begins with."""
    space, asked = opened.context.space, optuna.create_study().ask()
    space.suggest(asked)
    return create_trial(params=space.baseline(), distributions=asked.distributions, **ended)
