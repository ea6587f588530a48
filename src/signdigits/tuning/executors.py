"""Executors run the trials of a study: in this process, or on workers that Ray starts here or on a cluster."""

import functools
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlflow
import optuna
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState

from signdigits import startup
from signdigits.config import DataParameters, StudyParameters
from signdigits.data import sources
from signdigits.errors import StudyError
from signdigits.ray_cluster import connect_ray, describe_cluster, is_distributed
from signdigits.tracking import runs
from signdigits.tuning import dataset_transfer, storage
from signdigits.tuning.progress import SearchProgress
from signdigits.tuning.space import Space
from signdigits.tuning.study import FAILURE_REASON, FINISHED, count_finished, make_sampler, retry_interrupted

if TYPE_CHECKING:  # a worker imports TensorFlow when it knows on how many threads
    from signdigits.tuning.objective import TrialContext

log = logging.getLogger(__name__)

MAX_FAILURES = 3  # in a row: then the fault lies with the data, the settings or, of several, the host


def run_trials(study: optuna.Study, context: "TrialContext", parameters: StudyParameters) -> None:
    """Bring the study to `n_trials` finished trials, or run until its time is up."""
    progress = SearchProgress(parameters)
    log.info("study %s: %d of %d trials are finished", study.study_name, count_finished(study), parameters.n_trials)
    if count_finished(study) < parameters.n_trials:
        if is_distributed(parameters):
            _run_on_workers(study, context, parameters, progress)
        else:
            _run_here(study, context, parameters, progress)
    if (finished := count_finished(study)) < parameters.n_trials:
        log.info("time is up after %d of %d trials; the same command goes on", finished, parameters.n_trials)


def _run_here(
    study: optuna.Study, context: "TrialContext", parameters: StudyParameters, progress: SearchProgress
) -> None:
    """Run one trial after the other in this process."""
    from signdigits.tuning.objective import objective

    study.optimize(
        functools.partial(objective, context=context),
        timeout=parameters.timeout or None,
        catch=(Exception,),
        callbacks=[progress, MaxTrialsCallback(parameters.n_trials, states=FINISHED), FailureLimit()],
    )


class FailureLimit:
    """An Optuna callback. Raises StudyError after MAX_FAILURES failed trials in a row."""

    def __init__(self) -> None:
        self.failures = 0

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        reason = trial.user_attrs.get(FAILURE_REASON)
        self.failures = self.failures + 1 if reason else 0
        if reason:
            _refuse_deleted(study)
        if self.failures >= MAX_FAILURES:
            raise StudyError(f"study {study.study_name}: the last {MAX_FAILURES} trials failed, at last with {reason}")


def _refuse_deleted(study: optuna.Study) -> None:
    """Raise TrackingError if the study's run has been deleted: every further trial would fail for its sake."""
    if runs.is_deleted(run_id := study.user_attrs["mlflow_run_id"]):
        raise runs.deleted_error(run_id)


def _run_on_workers(
    study: optuna.Study, context: "TrialContext", parameters: StudyParameters, progress: SearchProgress
) -> None:
    """Run `workers` trials at a time. Raises ClusterError if Ray cannot be reached."""
    cpus = parameters.cpus_per_trial or max(1, (os.cpu_count() or 1) // parameters.workers)
    with connect_ray(parameters, cpus):
        if parameters.ray_address:
            dataset_transfer.upload_photographs(context.data, context.run_id)
        RayExecutor(worker_config(study, context, parameters, cpus), study, parameters).run(progress)


def check_stores(parameters: StudyParameters) -> None:
    """Raise StudyError, before anything is done, if workers could not use the stores together."""
    if not is_distributed(parameters):
        return
    if not storage.is_shared(parameters.storage):
        raise StudyError(
            f"storage={parameters.storage}, {describe_cluster(parameters)}: SQLite lets one process write at a time; give a PostgreSQL address "
            "(scripts/cluster up makes one), or workers=1"
        )
    if not mlflow.get_tracking_uri().startswith("http"):
        raise StudyError(
            f"{mlflow.get_tracking_uri()}, {describe_cluster(parameters)}: workers log to a tracking server; set MLFLOW_TRACKING_URI to its "
            "address (scripts/cluster up starts one), or give workers=1"
        )


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker on another machine needs to know. No password is in it: each machine has its own means."""

    study_name: str
    run_id: str
    experiment_id: str
    tracking_uri: str
    data: DataParameters
    digest: str
    space: Space
    storage: str
    metric: str
    pruner: optuna.pruners.BasePruner
    cpus: int


def worker_config(study: optuna.Study, context: "TrialContext", parameters: StudyParameters, cpus: int) -> WorkerConfig:
    data = context.data.parameters
    if data.data != sources.HANDWRITTEN_DIGITS:
        data = replace(data, data=str(context.data.dataset.folder.resolve()))
    experiment_id = mlflow.get_run(context.run_id).info.experiment_id
    return WorkerConfig(
        study.study_name, context.run_id, experiment_id, mlflow.get_tracking_uri(), data, context.data.split.digest,
        context.space, parameters.storage, context.metric, study.pruner, cpus,
    )  # fmt: skip


@dataclass
class WorkerHandle:
    """A worker as the executor sees it: its name, its Ray actor, its host once it is ready, and its present trial's start."""

    name: str
    actor: Any
    host: str = ""
    started: float = 0.0


class RayExecutor:
    """Workers that Ray starts, each with its processors and its share of a GPU, and replaces when they die.

    A worker runs one trial at a time, as `study.optimize(objective, n_trials=1)`; the executor hands out as many as are
    missing, so that there are never more than asked for. A host whose trials fail three times in a row is let go.
    """

    def __init__(
        self,
        config: WorkerConfig,
        study: optuna.Study,
        parameters: StudyParameters,
        kind: "type[TrialWorker] | None" = None,
    ) -> None:
        import ray

        self.config, self.study, self.parameters = config, study, parameters
        self.needs = {"num_cpus": config.cpus, "num_gpus": parameters.gpus_per_trial}
        self.make = ray.remote(kind or TrialWorker)
        self.coming: dict[Any, WorkerHandle] = {}  # by the promise to be ready
        self.free: list[WorkerHandle] = []
        self.busy: dict[Any, WorkerHandle] = {}  # by the promise of a trial's number
        self.failures = Counter[str]()  # in a row, by host
        self.reason = ""  # of the last failure
        self.hired = 0
        self.handed_out = len(study.get_trials(deepcopy=False))
        self.looked = time.monotonic()
        for _ in range(parameters.workers):
            self.start_worker()

    def run(self, progress: SearchProgress) -> None:
        """Keep the workers busy until nothing is missing. Raises StudyError if every host has been let go."""
        while True:
            while self.free and self.missing(progress) > 0:
                self.start_trial(self.free.pop())
            if not self.busy and self.missing(progress) <= 0:
                return
            if not (self.coming or self.busy or self.free):
                raise StudyError(
                    f"study {self.study.study_name}: no worker is left; the last failed with {self.reason}"
                )
            for number in self.wait():
                progress(self.study, self.study.get_trials(deepcopy=False)[number])

    def missing(self, progress: SearchProgress) -> int:
        finished = count_finished(self.study)
        if finished and progress.is_time_up:
            return 0
        return self.parameters.n_trials - finished - len(self.busy)

    def start_worker(self) -> None:
        """Ask for a worker, on any host that has not been let go."""
        gone = ",".join(host for host, failures in self.failures.items() if failures >= MAX_FAILURES)
        options = self.needs | ({"label_selector": {"ray.io/node-id": f"!in({gone})"}} if gone else {})
        self.hired += 1
        member = WorkerHandle(f"worker-{self.hired}", self.make.options(**options).remote(self.config))
        self.coming[member.actor.get_ready.remote()] = member

    def start_trial(self, member: WorkerHandle) -> None:
        member.started = time.monotonic()
        self.busy[member.actor.run.remote(self.handed_out, member.name)] = member
        self.handed_out += 1

    def wait(self) -> list[int]:
        """Wait until something changes, and return the number of the trial that has ended, if one has."""
        import ray

        if time.monotonic() - self.looked > storage.GRACE / 2:
            self.stop_silent()
            self.looked = time.monotonic()
        ended, _ = ray.wait([*self.coming, *self.busy], timeout=storage.GRACE / 2)
        if not ended:
            if not self.busy:
                log.info("waiting for workers: the cluster has no room yet for one that needs %s", self.needs)
            return []
        promise = ended[0]
        return self.welcome(promise) if promise in self.coming else self.collect(promise)

    def welcome(self, promise: Any) -> list[int]:
        import ray
        from ray.exceptions import RayActorError

        member = self.coming.pop(promise)
        try:
            member.host, error = ray.get(promise)
        except RayActorError:
            self.start_worker()
        else:
            if error:
                self.let_go(member.host, error)
            else:
                self.free.append(member)
        return []

    def collect(self, promise: Any) -> list[int]:
        import ray
        from ray.exceptions import RayActorError

        member = self.busy.pop(promise)
        try:
            number = ray.get(promise)
        except RayActorError:
            log.warning("%s died", member.name)
            self.fail_trials(member)
            self.start_worker()
            return []
        self.free.append(member)
        reason = self.study.get_trials(deepcopy=False)[number].user_attrs.get(FAILURE_REASON)
        self.failures[member.host] = self.failures[member.host] + 1 if reason else 0
        if reason:
            _refuse_deleted(self.study)
        if self.failures[member.host] >= MAX_FAILURES:
            self.let_go(member.host, reason)
        return [number]

    def let_go(self, host: str, reason: str) -> None:
        """End the workers of a host for good; what they are at goes back to the queue."""
        import ray

        log.warning("host %s is let go: %s", host, reason)
        self.failures[host], self.reason = MAX_FAILURES, reason
        for member in [member for member in [*self.free, *self.busy.values()] if member.host == host]:
            ray.kill(member.actor)
        self.free = [member for member in self.free if member.host != host]
        for promise in [promise for promise, member in self.busy.items() if member.host == host]:
            self.fail_trials(self.busy.pop(promise))

    def fail_trials(self, member: WorkerHandle) -> None:
        """Fail what a dead worker was at, so that it is tried again."""
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if trial.user_attrs.get("worker") == member.name:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        retry_interrupted(self.study)

    def stop_silent(self) -> None:
        """End the workers whose trials have lost their heartbeat, so that `wait` finds them dead."""
        import ray

        with storage.ignore_experimental_warnings():
            fail_stale_trials(self.study)
        running = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        alive = {trial.user_attrs.get("worker") for trial in running}
        for member in self.busy.values():
            if member.name not in alive and time.monotonic() - member.started > storage.GRACE:
                ray.kill(member.actor)


class TrialWorker:
    """A process that Ray starts."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config

    def get_ready(self) -> tuple[str, str]:
        """Read the photographs and import TensorFlow; return this host, and what is wrong with it, if anything is."""
        import ray

        host = ray.get_runtime_context().get_node_id()
        try:
            self.prepare()
        except Exception as error:  # photographs that are not the study's, a store that cannot be reached, no room
            return host, f"{type(error).__name__}: {error}"
        return host, ""

    def prepare(self) -> None:
        assert self.context is not None

    def run(self, number: int, name: str) -> int:
        """Run one trial, drawn from a random stream of its own, and return its number."""
        study, numbers = self.study, list[int]()
        study.sampler = make_sampler(int(self.config.space.fixed.get("seed", 0)) + number)
        study.optimize(
            functools.partial(self.objective, name=name), n_trials=1, catch=(Exception,),
            callbacks=[lambda study, trial: numbers.append(trial.number)],
        )  # fmt: skip
        return numbers[0]

    def objective(self, trial: optuna.Trial, name: str) -> float:
        from signdigits.tuning.objective import objective

        trial.set_user_attr("worker", name)
        return objective(trial, self.context)

    @functools.cached_property
    def study(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        backend: RDBStorage = storage.open_storage(self.config.storage)
        return optuna.load_study(study_name=self.config.study_name, storage=backend, pruner=self.config.pruner)

    @functools.cached_property
    def context(self) -> "TrialContext":
        config = self.config
        startup.configure_mlflow()
        mlflow.set_tracking_uri(config.tracking_uri)
        mlflow.set_experiment(experiment_id=config.experiment_id)
        data = dataset_transfer.load_study_data(config.data, config.digest, config.run_id)
        startup.import_tensorflow(threads=config.cpus)
        from signdigits.tuning.objective import TrialContext

        return TrialContext(config.study_name, config.run_id, data, config.space, config.metric)
