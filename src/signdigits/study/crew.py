"""Who runs the trials: this process, one after the other, or workers that Ray starts here or on a cluster.

The search draws and judges trials in one process, and hands their ids to workers, which read what was drawn from the
study's storage. So there are never more trials than asked for, and a worker that dies takes one unfinished trial along.
"""

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import mlflow
import optuna
from optuna.storages import RDBStorage, fail_stale_trials

from signdigits import startup
from signdigits.cluster import asked, cluster, is_distributed
from signdigits.errors import SignDigitsError, StudyError
from signdigits.hyperparameters import DataParameters, Space, StudyParameters
from signdigits.photographs import sources
from signdigits.study import fetch, storage
from signdigits.study.outcome import FAILED, Outcome

if TYPE_CHECKING:  # a worker imports TensorFlow when it knows on how many threads
    from signdigits.study.trial import Task

log = logging.getLogger(__name__)


class Crew(Protocol):
    """Those who run trials."""

    def is_free(self) -> bool:
        """Whether somebody can begin with a trial now."""

    def start(self, trial: optuna.Trial) -> None:
        """Begin with a trial that has drawn its hyperparameters."""

    def wait(self) -> tuple[int, Outcome] | None:
        """The number of the next trial that ends, and how; or None, if something else has changed meanwhile."""


@contextlib.contextmanager
def of(task: "Task", study: optuna.Study, parameters: StudyParameters) -> Iterator[Crew]:
    """The crew that the parameters ask for. Raises ClusterError if it cannot be had."""
    if not is_distributed(parameters):
        yield Alone(task)
        return
    cpus = parameters.cpus_per_trial or max(1, (os.cpu_count() or 1) // parameters.workers)
    with cluster(parameters, cpus):
        if parameters.ray_address:
            fetch.publish(task.data, task.run_id)
        yield Workers(job(task, study, parameters, cpus), study, parameters)


def check(parameters: StudyParameters) -> None:
    """Raise StudyError, before anything is done, if workers could not use the stores together."""
    if not is_distributed(parameters):
        return
    if not storage.is_shared(parameters.storage):
        raise StudyError(
            f"storage={parameters.storage}, {asked(parameters)}: SQLite lets one process write at a time; give a PostgreSQL address "
            "(scripts/cluster up makes one), or workers=1"
        )
    if not mlflow.get_tracking_uri().startswith("http"):
        raise StudyError(
            f"{mlflow.get_tracking_uri()}, {asked(parameters)}: workers log to a tracking server; set MLFLOW_TRACKING_URI to its "
            "address (scripts/cluster up starts one), or give workers=1"
        )


def job(task: "Task", study: optuna.Study, parameters: StudyParameters, cpus: int) -> "Job":
    """What the workers need to know of the study."""
    given = task.data.parameters
    if given.data != sources.HANDWRITTEN_DIGITS:
        given = replace(given, data=str(task.data.dataset.folder.resolve()))
    return Job(
        study.study_name, task.run_id, mlflow.get_run(task.run_id).info.experiment_id, mlflow.get_tracking_uri(), given,
        task.data.split.digest, task.space, parameters.storage, task.objective, study.pruner, cpus,
    )  # fmt: skip


class Alone:
    """This process."""

    def __init__(self, task: "Task") -> None:
        self.task = task
        self.given: list[optuna.Trial] = []

    def is_free(self) -> bool:
        return not self.given

    def start(self, trial: optuna.Trial) -> None:
        self.given.append(trial)

    def wait(self) -> tuple[int, Outcome]:
        from signdigits.study.trial import run_trial

        trial = self.given.pop()
        return trial.number, run_trial(self.task, trial)


@dataclass(frozen=True)
class Job:
    """What a worker on another machine needs to know. No password is in it: each machine has its own means."""

    study_name: str
    run_id: str
    experiment_id: str
    tracking_uri: str
    data: DataParameters
    digest: str
    space: Space
    storage: str
    objective: str
    pruner: optuna.pruners.BasePruner
    cpus: int


class Workers:
    """Processes that Ray starts, each with its processors and its share of a GPU, and starts again when they die."""

    def __init__(
        self, job: Job, study: optuna.Study, parameters: StudyParameters, kind: "type[Worker] | None" = None
    ) -> None:
        import ray

        self.job, self.study = job, study
        self.needs = {"num_cpus": job.cpus, "num_gpus": parameters.gpus_per_trial}
        self.make = ray.remote(kind or Worker).options(**self.needs).remote
        self.coming: dict[Any, Any] = {}  # by what each promises: here, to be there
        self.free: list[Any] = []
        self.busy: dict[Any, tuple[Any, int]] = {}  # and here, how its trial ends
        self.listened = time.monotonic()
        for _ in range(parameters.workers):
            self.hire()

    def hire(self) -> None:
        worker = self.make(self.job)
        self.coming[worker.get_ready.remote()] = worker

    def is_free(self) -> bool:
        return bool(self.free)

    def start(self, trial: optuna.Trial) -> None:
        worker = self.free.pop()
        self.busy[worker.run.remote(trial._trial_id)] = worker, trial.number

    def wait(self) -> tuple[int, Outcome] | None:
        import ray

        if time.monotonic() - self.listened > storage.GRACE / 2:
            self.stop_silent()
            self.listened = time.monotonic()
        ended, _ = ray.wait([*self.coming, *self.busy], timeout=storage.GRACE / 2)
        if not ended:
            if not self.busy:
                log.info("waiting for workers: the cluster has no room yet for one that needs %s", self.needs)
            return None
        if ended[0] in self.coming:
            worker = self.coming.pop(ended[0])
            if self.get(ended[0]) is not None:
                self.free.append(worker)
            return None
        worker, number = self.busy.pop(ended[0])
        outcome = self.get(ended[0])
        if outcome is None:
            log.warning("the worker of trial %d died", number)
            return number, FAILED
        self.free.append(worker)
        return number, outcome

    def get(self, promise: Any) -> Any:
        """What a worker says, or None if it died; then another is on its way. Raises what it refused to do."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return ray.get(promise)
        except RayActorError:
            self.hire()
            return None
        except RayTaskError as error:
            if isinstance(error.cause, SignDigitsError):
                raise error.cause from None
            raise

    def stop_silent(self) -> None:
        """End the workers whose trials give no more signs of life, so that `wait` finds them dead."""
        import ray

        with storage.experimental():
            fail_stale_trials(self.study)
        trials = self.study.get_trials(deepcopy=False)
        for worker, number in self.busy.values():
            if trials[number].state.is_finished():
                ray.kill(worker)


class Worker:
    """A process that Ray starts."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def get_ready(self) -> bool:
        """Read the photographs and import TensorFlow. Raises DataError if the photographs here are not the study's."""
        return self.task is not None

    def run(self, trial_id: int) -> Outcome:
        """Run the trial that the storage knows by that id; by its number, it would have to read all the others."""
        task, one = self.task, optuna.Trial(self.study, trial_id)
        from signdigits.study.trial import run_trial

        with signs_of_life(self.storage, trial_id):
            return run_trial(task, one)

    @functools.cached_property
    def storage(self) -> RDBStorage:
        return storage.connect(self.job.storage)

    @functools.cached_property
    def study(self) -> optuna.Study:
        sampler = optuna.samplers.RandomSampler()  # nothing is drawn here
        return optuna.load_study(
            study_name=self.job.study_name, storage=self.storage, sampler=sampler, pruner=self.job.pruner
        )

    @functools.cached_property
    def task(self) -> "Task":
        job = self.job
        startup.set_up_mlflow()
        mlflow.set_tracking_uri(job.tracking_uri)
        mlflow.set_experiment(experiment_id=job.experiment_id)
        loaded = fetch.load(job.data, job.digest, job.run_id)
        startup.import_tensorflow(threads=job.cpus)
        from signdigits.study.trial import Task

        return Task(job.study_name, job.run_id, loaded, job.space, job.objective)


@contextlib.contextmanager
def signs_of_life(backend: RDBStorage, trial_id: int) -> Iterator[None]:
    """Note in the storage, every few seconds, that the trial is still at work."""
    done = threading.Event()

    def note() -> None:
        while not done.wait(storage.HEARTBEAT):
            backend.record_heartbeat(trial_id)

    backend.record_heartbeat(trial_id)
    thread = threading.Thread(target=note, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
