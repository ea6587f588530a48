"""Trials per hour of two local workers against one, on a running `scripts/cluster`.

    scripts/cluster up && source <(scripts/cluster env) && scripts/benchmark workers

The same trainings of the notebook's network in each study, all of the same length.
"""

import os
import sys
import time
from dataclasses import replace

from benchmarks.measure import Row
from signdigits import ray_cluster, search
from signdigits.config import DataParameters, StudyParameters
from signdigits.data import loading
from signdigits.tracking import runs
from signdigits.tuning import executors
from signdigits.tuning.progress import SearchProgress
from signdigits.tuning.space import Space

EPOCHS = 8  # the notebook's second and third run
TRIALS = 6  # after a first one of each worker, which imports TensorFlow and traces
# Workers, processors of each. Two with two have more than this machine of two has.
CREWS = ((1, 2), (2, 1), (2, 2))


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    hourly = {(workers, cpus): trials_an_hour(loaded, workers, cpus) for workers, cpus in CREWS}
    alone = hourly[CREWS[0]]
    return [
        Row(
            f"trials an hour of {workers} local workers, cpus_per_trial={cpus}", "one worker", hourly[workers, cpus] / alone,
            1.0, True, f"{hourly[workers, cpus]:.0f} against {alone:.0f} trials of {EPOCHS} epochs",
        )
        for workers, cpus in CREWS[1:]
    ]  # fmt: skip


def trials_an_hour(loaded: loading.Data, workers: int, cpus: int) -> float:
    name = f"workers-{workers}-{cpus}-{int(time.time())}"
    parameters = StudyParameters(
        space="notebook", storage=os.environ["STORAGE"], study_name=name, workers=workers, cpus_per_trial=cpus,
        pruner="none", n_trials=workers,
    )  # fmt: skip
    runs.open_experiment("benchmark")
    space = Space.of("notebook", epochs=EPOCHS)
    with search.open_study(loaded, space, parameters) as opened, ray_cluster.connect_ray(parameters, cpus):
        config = executors.worker_config(opened.study, opened.context, parameters, cpus)
        executor = executors.RayExecutor(config, opened.study, parameters)
        executor.run(SearchProgress(parameters))
        started = time.perf_counter()
        executor.parameters = replace(parameters, n_trials=workers + TRIALS)
        executor.run(SearchProgress(executor.parameters))
        hourly = TRIALS / (time.perf_counter() - started) * 3600
    print(f"{workers} workers of {cpus} processors: {hourly:.0f} trials an hour", file=sys.stderr, flush=True)
    return hourly
