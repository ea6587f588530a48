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
from signdigits.errors import UsageError
from signdigits.ray_cluster import connect_ray, describe_cluster, is_distributed
from signdigits.tracking import runs
from signdigits.tuning import dataset_transfer, storage
from signdigits.tuning.progress import SearchProgress
from signdigits.tuning.space import Space
from signdigits.tuning.study import FAILURE_REASON, FINISHED, count_finished, make_sampler, retry_interrupted

if TYPE_CHECKING:  # a worker imports TensorFlow when it knows on how many threads
    from signdigits.tuning.objective import TrialContext

log = logging.getLogger(__name__)

MAX_FAILURES = 3  # consecutive: the cause is then the data, the settings or the host


def run_trials(study: optuna.Study, context: "TrialContext", parameters: StudyParameters) -> None:
    """Run trials until the study has `n_trials` finished ones, or until the timeout."""
    progress = SearchProgress(parameters)
    log.info("study %s: %d of %d trials are finished", study.study_name, count_finished(study), parameters.n_trials)
    if count_finished(study) < parameters.n_trials:
        if is_distributed(parameters):
            _run_on_workers(study, context, parameters, progress)
        else:
            _run_locally(study, context, parameters, progress)
    if (finished := count_finished(study)) < parameters.n_trials:
        log.info("timeout after %d of %d trials; run the same command to continue", finished, parameters.n_trials)


def _run_locally(
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
    """An Optuna callback that raises UsageError after MAX_FAILURES consecutive failed trials."""

    def __init__(self) -> None:
        self.failures = 0

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        reason = trial.user_attrs.get(FAILURE_REASON)
        self.failures = self.failures + 1 if reason else 0
        if reason:
            _check_not_deleted(study)
        if self.failures >= MAX_FAILURES:
            raise UsageError(
                f"study {study.study_name}: the last {MAX_FAILURES} trials failed; the last error: {reason}"
            )


def _check_not_deleted(study: optuna.Study) -> None:
    """Raise UsageError if the study's run was deleted: every further trial would fail."""
    if runs.is_deleted(run_id := study.user_attrs["mlflow_run_id"]):
        raise runs.deleted_error(run_id)


def _run_on_workers(
    study: optuna.Study, context: "TrialContext", parameters: StudyParameters, progress: SearchProgress
) -> None:
    """Run `workers` trials at a time. Raises UsageError if Ray cannot be reached."""
    cpus = parameters.cpus_per_trial or max(1, (os.cpu_count() or 1) // parameters.workers)
    with connect_ray(parameters, cpus):
        if parameters.ray_address:
            dataset_transfer.upload_photographs(context.data, context.run_id)
        RayExecutor(worker_config(study, context, parameters, cpus), study, parameters).run(progress)


def check_stores(parameters: StudyParameters) -> None:
    """Raise UsageError unless several workers can share the stores."""
    if not is_distributed(parameters):
        return
    if not storage.is_shared(parameters.storage):
        raise UsageError(
            f"storage={parameters.storage}, {describe_cluster(parameters)}: SQLite supports one writing process; pass a PostgreSQL URL "
            "(scripts/cluster up starts a server), or workers=1"
        )
    if not mlflow.get_tracking_uri().startswith("http"):
        raise UsageError(
            f"{mlflow.get_tracking_uri()}, {describe_cluster(parameters)}: workers log to a tracking server; set MLFLOW_TRACKING_URI to its "
            "URL (scripts/cluster up starts one), or pass workers=1"
        )


@dataclass(frozen=True)
class WorkerConfig:
    """The configuration of a worker on another machine. It holds no password; each machine has its own credentials."""

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
        data = replace(data, data=context.data.dataset.source)
    experiment_id = mlflow.get_run(context.run_id).info.experiment_id
    return WorkerConfig(
        study.study_name, context.run_id, experiment_id, mlflow.get_tracking_uri(), data, context.data.split.digest,
        context.space, parameters.storage, context.metric, study.pruner, cpus,
    )  # fmt: skip


@dataclass
class WorkerHandle:
    """A worker: its name, its Ray actor, its host once it is ready, and the start of its present trial."""

    name: str
    actor: Any
    host: str = ""
    started: float = 0.0


class RayExecutor:
    """Runs trials on Ray workers, each with its CPUs and its fraction of a GPU, and replaces workers that die.

    A worker runs one trial at a time, as `study.optimize(objective, n_trials=1)`, and never more than are missing. A host
    with MAX_FAILURES consecutive failed trials is excluded.
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
        self.resources = {"num_cpus": config.cpus, "num_gpus": parameters.gpus_per_trial}
        self.actor_class = ray.remote(kind or TrialWorker)
        self.starting: dict[Any, WorkerHandle] = {}  # by Ray reference to the start
        self.free: list[WorkerHandle] = []
        self.busy: dict[Any, WorkerHandle] = {}  # by Ray reference to the trial
        self.failures = Counter[str]()  # consecutive, by host
        self.reason = ""  # the last failure's
        self.n_started = 0
        self.n_dispatched = len(study.get_trials(deepcopy=False))
        self.checked = time.monotonic()
        for _ in range(parameters.workers):
            self.start_worker()

    def run(self, progress: SearchProgress) -> None:
        """Keep the workers busy until no trial is missing. Raises UsageError if every host is excluded."""
        while True:
            while self.free and self.missing(progress) > 0:
                self.start_trial(self.free.pop())
            if not self.busy and self.missing(progress) <= 0:
                return
            if not (self.starting or self.busy or self.free):
                raise UsageError(f"study {self.study.study_name}: no worker is left; the last error: {self.reason}")
            for number in self.wait():
                progress(self.study, self.study.get_trials(deepcopy=False)[number])

    def missing(self, progress: SearchProgress) -> int:
        finished = count_finished(self.study)
        if finished and progress.is_time_up:
            return 0
        return self.parameters.n_trials - finished - len(self.busy)

    def start_worker(self) -> None:
        """Start a worker on a host that is not excluded."""
        excluded = ",".join(host for host, failures in self.failures.items() if failures >= MAX_FAILURES)
        options = self.resources | ({"label_selector": {"ray.io/node-id": f"!in({excluded})"}} if excluded else {})
        self.n_started += 1
        worker = WorkerHandle(f"worker-{self.n_started}", self.actor_class.options(**options).remote(self.config))
        self.starting[worker.actor.get_ready.remote()] = worker

    def start_trial(self, worker: WorkerHandle) -> None:
        worker.started = time.monotonic()
        self.busy[worker.actor.run.remote(self.n_dispatched, worker.name)] = worker
        self.n_dispatched += 1

    def wait(self) -> list[int]:
        """Wait for a worker or a trial, and return the number of the ended trial, if any."""
        import ray

        if time.monotonic() - self.checked > storage.GRACE_PERIOD / 2:
            self.kill_silent_workers()
            self.checked = time.monotonic()
        ended, _ = ray.wait([*self.starting, *self.busy], timeout=storage.GRACE_PERIOD / 2)
        if not ended:
            if not self.busy:
                log.info("waiting for workers: the cluster has no free resources for %s", self.resources)
            return []
        reference = ended[0]
        return self.add_worker(reference) if reference in self.starting else self.collect_trial(reference)

    def add_worker(self, reference: Any) -> list[int]:
        import ray
        from ray.exceptions import RayActorError

        worker = self.starting.pop(reference)
        try:
            worker.host, error = ray.get(reference)
        except RayActorError:
            self.start_worker()
        else:
            if error:
                self.exclude_host(worker.host, error)
            else:
                self.free.append(worker)
        return []

    def collect_trial(self, reference: Any) -> list[int]:
        import ray
        from ray.exceptions import RayActorError

        worker = self.busy.pop(reference)
        try:
            number = ray.get(reference)
        except RayActorError:
            log.warning("%s died", worker.name)
            self.fail_trials(worker)
            self.start_worker()
            return []
        self.free.append(worker)
        reason = self.study.get_trials(deepcopy=False)[number].user_attrs.get(FAILURE_REASON)
        self.failures[worker.host] = self.failures[worker.host] + 1 if reason else 0
        if reason:
            _check_not_deleted(self.study)
        if self.failures[worker.host] >= MAX_FAILURES:
            self.exclude_host(worker.host, reason)
        return [number]

    def exclude_host(self, host: str, reason: str) -> None:
        """Exclude a host: kill its workers and enqueue their trials again."""
        import ray

        log.warning("host %s is excluded: %s", host, reason)
        self.failures[host], self.reason = MAX_FAILURES, reason
        for worker in [worker for worker in [*self.free, *self.busy.values()] if worker.host == host]:
            ray.kill(worker.actor)
        self.free = [worker for worker in self.free if worker.host != host]
        for reference in [reference for reference, worker in self.busy.items() if worker.host == host]:
            self.fail_trials(self.busy.pop(reference))

    def fail_trials(self, worker: WorkerHandle) -> None:
        """Mark the trial of a dead worker as failed, so that it is retried."""
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if trial.user_attrs.get("worker") == worker.name:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        retry_interrupted(self.study)

    def kill_silent_workers(self) -> None:
        """Kill the workers whose trials lost their heartbeat."""
        import ray

        with storage.ignore_experimental_warnings():
            fail_stale_trials(self.study)
        running = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        alive = {trial.user_attrs.get("worker") for trial in running}
        for worker in self.busy.values():
            if worker.name not in alive and time.monotonic() - worker.started > storage.GRACE_PERIOD:
                ray.kill(worker.actor)


class TrialWorker:
    """A worker process that Ray starts."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config

    def get_ready(self) -> tuple[str, str]:
        """Load the photographs and TensorFlow; return the host's id, and the error, if any."""
        import ray

        host = ray.get_runtime_context().get_node_id()
        try:
            self.prepare()
        except Exception as error:  # other photographs, an unreachable store, a full disk
            return host, f"{type(error).__name__}: {error}"
        return host, ""

    def prepare(self) -> None:
        assert self.context is not None

    def run(self, number: int, name: str) -> int:
        """Run one trial, sampled with its own seed, and return its number."""
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
