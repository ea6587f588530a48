"""Run the trials of a search: in this process, in others of this machine, or on a Ray cluster."""

import functools
import logging
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace

import joblib
import mlflow
import optuna
from optuna.storages import fail_stale_trials
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState

from signdigits.config import StudyParameters
from signdigits.data import lineage, sources
from signdigits.errors import UsageError
from signdigits.ray_cluster import connect_ray, describe_cluster, is_distributed
from signdigits.tracking import runs
from signdigits.tuning import storage
from signdigits.tuning.space import format_value
from signdigits.tuning.study import (
    FAILURE_REASON,
    FINISHED,
    Search,
    count_finished,
    retry_interrupted,
)
from signdigits.tuning.workers import LocalWorker, RayWorker, Result, Worker, WorkerConfig

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


def count_workers(parameters: StudyParameters) -> StudyParameters:
    """Return the parameters with the number of workers in place of `auto`.

    Each worker has one CPU, with which it trains most images a second and CPU. A third of the trials may run at a time:
    the sampler learns from the others. A GPU is one worker's, which is this process.
    """
    if parameters.workers:
        return parameters
    if parameters.ray_address:
        raise UsageError(
            f"workers=auto, ray_address={parameters.ray_address}: pass the number of workers of the cluster"
        )
    import tensorflow as tf

    cpus = joblib.cpu_count() // max(parameters.cpus_per_trial, 1)  # of the container, where it has fewer
    workers = max(1, min(cpus, parameters.n_trials // 3))
    if tf.config.list_physical_devices("GPU") or storage.is_in_memory(parameters.storage):
        workers = 1
    return replace(parameters, workers=workers)


def check_stores(parameters: StudyParameters) -> None:
    """Raise UsageError unless the workers can share the stores: on one machine files, on several only servers."""
    cluster = describe_cluster(parameters)
    if is_distributed(parameters) and storage.is_in_memory(parameters.storage):
        raise UsageError(
            f"storage={parameters.storage}, {cluster}: in one process's memory; name a file, or pass workers=1"
        )
    if not parameters.ray_address:
        return
    if not storage.is_server(parameters.storage):
        raise UsageError(
            f"storage={parameters.storage}, {cluster}: other machines cannot share a SQLite file; pass a PostgreSQL URL "
            "(scripts/cluster up starts a server), or leave out ray_address"
        )
    if not mlflow.get_tracking_uri().startswith("http"):
        raise UsageError(
            f"{mlflow.get_tracking_uri()}, {cluster}: workers on other machines log to a tracking server; set "
            "MLFLOW_TRACKING_URI to its URL (scripts/cluster up starts one), or leave out ray_address"
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
        shown = {name: trial.user_attrs[name] for name in ("val_accuracy", metric) if name in trial.user_attrs}
        scores = "  ".join(f"{name} {value:.4f}" for name, value in shown.items()) or "-"
        try:
            best = f"best {study.best_value:.4f} (trial {study.best_trial.number})"
        except ValueError:
            best = "no best yet"
        left = self.seconds_left(trials)
        return (
            f"{len(trials)}/{n_trials}  trial {trial.number} {trial.state.name.lower()}: {scores}  {params}  "
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
    """Run `workers` trials at a time. Raises UsageError if the Ray cluster cannot be reached."""
    parameters, data = search.parameters, search.data.parameters
    cpus = parameters.cpus_per_trial or max(1, joblib.cpu_count() // parameters.workers)
    if data.data != sources.HANDWRITTEN_DIGITS:
        data = replace(data, data=search.data.dataset.source)
    config = WorkerConfig(
        search.study.study_name, search.run_id, mlflow.get_tracking_uri(), data, search.data.split.digest, search.space,
        parameters, cpus,
    )  # fmt: skip
    if not parameters.ray_address:
        log.info("starting %d workers with %d CPUs each", parameters.workers, cpus)
        TrialScheduler(search.study, config, progress, LocalWorker).run()
        return
    with connect_ray(parameters, cpus):
        lineage.upload_photographs(search.data, search.run_id)
        TrialScheduler(search.study, config, progress, RayWorker).run()


class TrialScheduler:
    """Runs one trial at a time on each worker, and never more than are missing.

    Replaces workers that die or fall silent, and excludes hosts with MAX_FAILURES consecutive failed trials. Ray's own
    restarts and its ActorPool bind a trial to its worker: it would wait forever if the worker's node is gone for good.
    """

    def __init__(
        self, study: optuna.Study, config: WorkerConfig, progress: Progress, worker_class: type[Worker]
    ) -> None:
        self.study, self.config, self.progress, self.worker_class = study, config, progress, worker_class
        self.pending: dict[Future[Result], Worker] = {}  # workers that start or run a trial
        self.idle: list[Worker] = []
        self.excluded: dict[str, str] = {}  # the reason, by host
        self.n_started = 0
        self.seed = int(config.space.fixed.get("seed", 0)) + len(study.get_trials(deepcopy=False))

    def run(self) -> None:
        """Keep the workers busy until no trial is missing. Raises UsageError if every host is excluded."""
        try:
            self.run_missing_trials()
        finally:
            for worker in [*self.pending.values(), *self.idle]:
                worker.kill()

    def run_missing_trials(self) -> None:
        """Start the workers, and give each another trial when its last one has ended."""
        missing = self.config.parameters.n_trials - count_finished(self.study)
        for _ in range(min(self.config.parameters.workers, missing)):
            self.start_worker()
        checked = time.monotonic()
        while self.start_trials() or self.busy:
            if not self.pending:
                reason = list(self.excluded.values())[-1]
                raise UsageError(f"study {self.study.study_name}: no worker is left; the last error: {reason}")
            ended, _ = wait(self.pending, timeout=CHECK_INTERVAL, return_when=FIRST_COMPLETED)
            if not ended and not self.busy and self.config.parameters.ray_address:
                log.info("waiting for workers: the cluster has no free resources, or they are still starting")
            for future in ended:
                worker = self.pending.pop(future)
                try:
                    worker.host, number, error = future.result()
                except worker.died:
                    self.replace_worker(worker)
                else:
                    self.collect_result(worker, number, error)
            if time.monotonic() - checked > CHECK_INTERVAL:
                self.kill_silent_workers()
                checked = time.monotonic()

    @property
    def busy(self) -> list[Worker]:
        return [worker for worker in self.pending.values() if worker.started]

    def start_worker(self) -> None:
        """Start a worker on a host that is not excluded."""
        self.n_started += 1
        worker = self.worker_class(self.config, f"worker-{self.n_started}", self.excluded)
        self.pending[worker.call("prepare")] = worker

    def start_trials(self) -> bool:
        """Start trials on idle workers, as many as are missing; tell whether any was missing."""
        finished = count_finished(self.study)
        missing = self.config.parameters.n_trials - finished - len(self.busy)
        if missing <= 0 or (finished and self.progress.is_time_up):
            return False
        for worker in self.idle[:missing]:
            worker.started = time.monotonic()
            self.pending[worker.call("run", self.seed)] = worker
            self.seed += 1
        del self.idle[:missing]
        return True

    def collect_result(self, worker: Worker, number: int | None, error: str) -> None:
        """Give the worker another trial, unless its host fails too often: then all its workers end."""
        failures, host = self.progress.failures, worker.host
        if number is not None:
            self.progress(self.study, self.study.get_trials(deepcopy=False)[number], host)
        elif error:
            failures[host] = MAX_FAILURES
        if failures[host] >= MAX_FAILURES and host not in self.excluded:
            log.warning("host %s is excluded: %s", host, error)
            self.excluded[host] = error
            for idle in [idle for idle in self.idle if idle.host == host]:
                idle.kill()
                self.idle.remove(idle)
        if host in self.excluded:
            worker.kill()
        else:
            self.idle.append(worker)

    def replace_worker(self, worker: Worker) -> None:
        """Retry the trial of a dead worker, and start another worker unless the host is excluded."""
        log.warning("%s died", worker.name)
        if worker.host and not worker.started:
            self.progress.failures[worker.host] += 1
            if self.progress.failures[worker.host] >= MAX_FAILURES:
                self.excluded[worker.host] = f"{worker.name} died while it started"
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if trial.user_attrs.get("worker") == worker.name:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        retry_interrupted(self.study)
        if worker.host not in self.excluded:
            self.start_worker()

    def kill_silent_workers(self) -> None:
        """Kill the workers whose trials lost their heartbeat."""
        fail_stale_trials(self.study)
        running = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        alive = {trial.user_attrs.get("worker") for trial in running}
        for worker in self.busy:
            if worker.name not in alive and time.monotonic() - worker.started > storage.GRACE_PERIOD:
                worker.kill()
