"""Run the trials of a search: in this process, or on workers that Ray starts here or on a cluster."""

import functools
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import mlflow
import optuna
from optuna.storages import fail_stale_trials
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState

from signdigits import startup
from signdigits.config import DataParameters, StudyParameters
from signdigits.data import lineage, sources
from signdigits.errors import UsageError
from signdigits.ray_cluster import connect_ray, describe_cluster, is_distributed
from signdigits.tracking import runs
from signdigits.tuning import storage
from signdigits.tuning.space import Space, format_value
from signdigits.tuning.study import (
    FAILURE_REASON,
    FINISHED,
    Search,
    count_finished,
    make_pruner,
    make_sampler,
    retry_interrupted,
)

log = logging.getLogger(__name__)

MAX_FAILURES = 3  # consecutive: the cause is then the data, the settings or the host
CHECK_INTERVAL = storage.GRACE_PERIOD / 2  # seconds between two looks for silent workers


def run_trials(search: Search) -> None:
    """Run trials until the study has `n_trials` finished ones, or until the timeout."""
    study, n_trials = search.study, search.parameters.n_trials
    log.info("study %s: %d of %d trials are finished", study.study_name, count_finished(study), n_trials)
    if count_finished(study) < n_trials:
        run = _run_on_workers if is_distributed(search.parameters) else _run_locally
        run(search, Progress(search.parameters))
    if (finished := count_finished(study)) < n_trials:
        log.info("timeout after %d of %d trials; run the same command to continue", finished, n_trials)


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


class Progress:
    """An Optuna callback that logs a line for each trial, and counts the consecutive failures of each host."""

    def __init__(self, parameters: StudyParameters) -> None:
        self.parameters, self.started = parameters, time.monotonic()
        self.failures = Counter[str]()

    def __call__(self, study: optuna.Study, trial: FrozenTrial, host: str = "") -> None:
        """Raise UsageError if the trial failed because the study's run was deleted: every further trial would fail."""
        log.info("%s", self.line(study, trial))
        reason = trial.user_attrs.get(FAILURE_REASON)
        self.failures[host] = self.failures[host] + 1 if reason else 0
        if reason:
            log.warning("trial %d failed: %s", trial.number, reason)
            if runs.is_deleted(run_id := study.user_attrs["mlflow_run_id"]):
                raise runs.deleted_error(run_id)

    @property
    def is_time_up(self) -> bool:
        return bool(self.parameters.timeout) and time.monotonic() - self.started >= self.parameters.timeout

    def line(self, study: optuna.Study, trial: FrozenTrial) -> str:
        """Return a line with the trial's parameters and value, the best value and the time left."""
        metric, n_trials = self.parameters.metric, self.parameters.n_trials
        trials = study.get_trials(deepcopy=False, states=FINISHED)
        params = "  ".join(f"{name} {format_value(value)}" for name, value in trial.params.items())
        value = f"{trial.value:.4f}" if trial.value is not None else "-"
        try:
            best = f"best {study.best_value:.4f} (trial {study.best_trial.number})"
        except ValueError:
            best = "no best yet"
        left = self.seconds_left(trials)
        return (
            f"{len(trials)}/{n_trials}  trial {trial.number} {trial.state.name.lower()}: {metric} {value}  {params}  "
            f"{_trial_seconds(trial):.0f} s;  {best}, about {f'{left:.0f} s' if left < 90 else f'{left / 60:.0f} min'} of the search left"
        )

    def seconds_left(self, trials: list[FrozenTrial]) -> float:
        mean = sum(map(_trial_seconds, trials)) / max(len(trials), 1)
        left = mean * (self.parameters.n_trials - len(trials)) / self.parameters.workers
        if self.parameters.timeout:
            left = min(left, max(self.parameters.timeout - (time.monotonic() - self.started), 0))
        return left


def _trial_seconds(trial: FrozenTrial) -> float:
    return trial.duration.total_seconds() if trial.duration else 0.0


def _run_locally(search: Search, progress: Progress) -> None:
    """Run one trial after the other in this process. Raises UsageError after MAX_FAILURES consecutive failed trials."""
    from signdigits.tuning.objective import objective

    def limit_failures(study: optuna.Study, trial: FrozenTrial) -> None:
        if progress.failures[""] >= MAX_FAILURES:
            reason = trial.user_attrs[FAILURE_REASON]
            raise UsageError(
                f"study {study.study_name}: the last {MAX_FAILURES} trials failed; the last error: {reason}"
            )

    search.study.optimize(
        functools.partial(objective, search=search),
        timeout=search.parameters.timeout or None,
        catch=(Exception,),
        callbacks=[progress, MaxTrialsCallback(search.parameters.n_trials, states=FINISHED), limit_failures],
    )


def _run_on_workers(search: Search, progress: Progress) -> None:
    """Run `workers` trials at a time. Raises UsageError if Ray cannot be reached."""
    parameters, data = search.parameters, search.data.parameters
    cpus = parameters.cpus_per_trial or max(1, (os.cpu_count() or 1) // parameters.workers)
    with connect_ray(parameters, cpus):
        if parameters.ray_address:
            lineage.upload_photographs(search.data, search.run_id)
        if data.data != sources.HANDWRITTEN_DIGITS:
            data = replace(data, data=search.data.dataset.source)
        config = WorkerConfig(
            search.study.study_name, search.run_id, mlflow.get_tracking_uri(), data, search.data.split.digest, search.space,
            parameters, cpus,
        )  # fmt: skip
        TrialScheduler(search.study, config, progress).run()


@dataclass(frozen=True)
class WorkerConfig:
    """The configuration of a worker on another machine. It holds no password; each machine has its own credentials."""

    study_name: str
    run_id: str
    tracking_uri: str
    data: DataParameters
    digest: str
    space: Space
    parameters: StudyParameters
    cpus: int


@dataclass
class WorkerHandle:
    """A Ray actor, its name, its host once it is ready, and the start of its present trial."""

    name: str
    actor: Any
    host: str = ""
    started: float = 0.0


class TrialScheduler:
    """Runs one trial at a time on each worker, and never more than are missing.

    Replaces workers that die or fall silent, and excludes hosts with MAX_FAILURES consecutive failed trials. Ray's own
    restarts and its ActorPool bind a trial to its worker: it would wait forever if the worker's node is gone for good.
    """

    def __init__(self, study: optuna.Study, config: WorkerConfig, progress: Progress) -> None:
        import ray

        self.study, self.config, self.progress = study, config, progress
        self.resources = {"num_cpus": config.cpus, "num_gpus": config.parameters.gpus_per_trial}
        self.worker_class = ray.remote(TrialWorker)
        self.pending: dict[
            Any, WorkerHandle
        ] = {}  # workers that start or run a trial, by the Ray reference to the result
        self.idle: list[WorkerHandle] = []
        self.excluded: dict[str, str] = {}  # the reason, by host
        self.n_started = 0
        self.seed = int(config.space.fixed.get("seed", 0)) + len(study.get_trials(deepcopy=False))

    def run(self) -> None:
        """Keep the workers busy until no trial is missing. Raises UsageError if every host is excluded."""
        import ray
        from ray.exceptions import RayActorError

        for _ in range(self.config.parameters.workers):
            self.start_worker()
        checked = time.monotonic()
        while self.start_trials() or self.busy:
            if not self.pending:
                reason = list(self.excluded.values())[-1]
                raise UsageError(f"study {self.study.study_name}: no worker is left; the last error: {reason}")
            ended, _ = ray.wait(list(self.pending), timeout=CHECK_INTERVAL)
            if not ended and not self.busy:
                log.info("waiting for workers: the cluster has no free resources for %s", self.resources)
            for reference in ended:
                worker = self.pending.pop(reference)
                try:
                    worker.host, number, error = ray.get(reference)
                except RayActorError:
                    self.replace_worker(worker)
                else:
                    self.collect_result(worker, number, error)
            if time.monotonic() - checked > CHECK_INTERVAL:
                self.kill_silent_workers()
                checked = time.monotonic()

    @property
    def busy(self) -> list[WorkerHandle]:
        return [worker for worker in self.pending.values() if worker.host]

    def start_worker(self) -> None:
        """Start a worker on a host that is not excluded."""
        self.n_started += 1
        name = f"worker-{self.n_started}"
        hosts = {"label_selector": {"ray.io/node-id": f"!in({','.join(self.excluded)})"}} if self.excluded else {}
        worker = WorkerHandle(name, self.worker_class.options(**self.resources, **hosts).remote(self.config, name))
        self.pending[worker.actor.prepare.remote()] = worker

    def start_trials(self) -> bool:
        """Start trials on idle workers, as many as are missing; tell whether any was missing."""
        finished = count_finished(self.study)
        missing = self.config.parameters.n_trials - finished - len(self.busy)
        if missing <= 0 or (finished and self.progress.is_time_up):
            return False
        for worker in self.idle[:missing]:
            worker.started = time.monotonic()
            self.pending[worker.actor.run.remote(self.seed)] = worker
            self.seed += 1
        del self.idle[:missing]
        return True

    def collect_result(self, worker: WorkerHandle, number: int | None, error: str) -> None:
        """Give the worker another trial, unless its host fails too often: then all its workers end."""
        failures, host = self.progress.failures, worker.host
        if number is not None:
            self.progress(self.study, self.study.get_trials(deepcopy=False)[number], host)
        elif error:
            failures[host] = MAX_FAILURES
        if failures[host] >= MAX_FAILURES and host not in self.excluded:
            log.warning("host %s is excluded: %s", host, error)
            self.excluded[host] = error
            self.idle = [idle for idle in self.idle if idle.host != host]  # Ray ends an actor that nothing refers to
        if host not in self.excluded:
            self.idle.append(worker)

    def replace_worker(self, worker: WorkerHandle) -> None:
        """Retry the trial of a dead worker, and start another worker unless the host is excluded."""
        log.warning("%s died", worker.name)
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if trial.user_attrs.get("worker") == worker.name:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        retry_interrupted(self.study)
        if worker.host not in self.excluded:
            self.start_worker()

    def kill_silent_workers(self) -> None:
        """Kill the workers whose trials lost their heartbeat."""
        import ray

        fail_stale_trials(self.study)
        running = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        alive = {trial.user_attrs.get("worker") for trial in running}
        for worker in self.busy:
            if worker.name not in alive and time.monotonic() - worker.started > storage.GRACE_PERIOD:
                ray.kill(worker.actor)


Result = tuple[str, int | None, str]  # of a call of a worker: its host, the number of the ended trial, and the error


class TrialWorker:
    """A worker process that Ray starts."""

    def __init__(self, config: WorkerConfig, name: str) -> None:
        self.config, self.name = config, name

    def prepare(self) -> Result:
        """Load the photographs and TensorFlow."""
        import ray

        self.host = ray.get_runtime_context().get_node_id()
        try:
            self.search = self.load_search()
        except Exception as error:  # other photographs, an unreachable store, a full disk
            return self.host, None, f"{type(error).__name__}: {error}"
        return self.host, None, ""

    def load_search(self) -> Search:
        config = self.config
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.load_study(
            study_name=config.study_name,
            storage=storage.open_storage(config.parameters.storage),
            pruner=make_pruner(config.parameters.pruner),
        )
        startup.configure_mlflow()
        mlflow.set_tracking_uri(config.tracking_uri)
        mlflow.set_experiment(experiment_id=mlflow.get_run(config.run_id).info.experiment_id)
        data = lineage.load_study_data(config.data, config.digest, config.run_id)
        startup.import_tensorflow(threads=config.cpus)
        return Search(study, config.run_id, data, config.space, config.parameters)

    def run(self, seed: int) -> Result:
        """Run one trial, sampled with its own seed."""
        study, ended = self.search.study, list[FrozenTrial]()
        study.sampler = make_sampler(seed)
        study.optimize(
            self.objective, n_trials=1, catch=(Exception,), callbacks=[lambda study, trial: ended.append(trial)]
        )
        return self.host, ended[0].number, ended[0].user_attrs.get(FAILURE_REASON, "")

    def objective(self, trial: optuna.Trial) -> float:
        from signdigits.tuning.objective import objective

        trial.set_user_attr("worker", self.name)
        return objective(trial, self.search)
