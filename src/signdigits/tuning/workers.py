"""Worker processes that run the trials of a search: on this machine, or as Ray actors on a cluster.

Local workers need no Ray: its temporary cluster takes 575 MB, and listens on all network interfaces.
"""

import contextlib
import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Collection
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import mlflow
import optuna
from optuna.trial import FrozenTrial
from tqdm import tqdm

from signdigits import startup
from signdigits.config import DataParameters, StudyParameters
from signdigits.data import lineage
from signdigits.tuning import storage
from signdigits.tuning.space import Space
from signdigits.tuning.study import FAILURE_REASON, Search, make_pruner, make_sampler, share_features

Result = tuple[str, int | None, str]  # of a call of a worker: its host, the number of the ended trial, and the error


@dataclass(frozen=True)
class WorkerConfig:
    """The configuration of a worker, perhaps on another machine. It holds no password; each machine has its own credentials."""

    study_name: str
    run_id: str
    tracking_uri: str
    data: DataParameters
    digest: str
    space: Space
    parameters: StudyParameters
    cpus: int


class LocalWorker:
    """A process of this machine that runs the methods of a TrialWorker: a pool of one process, which ends with this one."""

    died: type[Exception] = BrokenProcessPool

    def __init__(self, config: WorkerConfig, name: str, excluded: Collection[str]) -> None:
        self.name, self.host, self.started = name, platform.node(), 0.0
        context = multiprocessing.get_context("spawn")  # a fork would share TensorFlow's threads and the connections
        self.pool = ProcessPoolExecutor(1, context, initializer=_start_worker, initargs=(config, name))
        self.process = self.pool.submit(os.getpid)

    def call(self, method: str, *arguments: int) -> Future[Result]:
        try:
            return self.pool.submit(_call_worker, method, *arguments)
        except BrokenProcessPool as error:  # the process died since the last call
            failed = Future[Result]()
            failed.set_exception(error)
            return failed

    def kill(self) -> None:
        with contextlib.suppress(BrokenProcessPool, ProcessLookupError):
            os.kill(self.process.result(), signal.SIGKILL)


_worker: "TrialWorker"  # of a worker process


def _start_worker(config: WorkerConfig, name: str) -> None:
    """Make the TrialWorker of a worker process."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the search ends its workers
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = TrialWorker(config, name)


def _end_with_parent() -> None:
    """End this process when the search is killed, which would otherwise finish its trial and wait for another."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _call_worker(method: str, *arguments: int) -> Result:
    result: Result = getattr(_worker, method)(*arguments)
    return result


class RayWorker:
    """A Ray actor that runs the methods of a TrialWorker."""

    def __init__(self, config: WorkerConfig, name: str, excluded: Collection[str]) -> None:
        import ray

        self.name, self.host, self.started = name, "", 0.0  # Ray chooses the host
        self.died: type[Exception] = ray.exceptions.RayActorError
        options = {"num_cpus": config.cpus, "num_gpus": config.parameters.gpus_per_trial}
        hosts = {"label_selector": {"ray.io/node-id": f"!in({','.join(excluded)})"}} if excluded else {}
        self.actor = ray.remote(TrialWorker).options(**options, **hosts).remote(config, name)

    def call(self, method: str, *arguments: int) -> Future[Result]:
        future: Future[Result] = getattr(self.actor, method).remote(*arguments).future()
        return future

    def kill(self) -> None:
        import ray

        ray.kill(self.actor)


Worker = LocalWorker | RayWorker  # `started` is the start of its present trial, 0 before the first


class TrialWorker:
    """Runs trials in a worker process."""

    def __init__(self, config: WorkerConfig, name: str) -> None:
        self.config, self.name = config, name

    def prepare(self) -> Result:
        """Load the photographs and TensorFlow."""
        self.host = platform.node()
        if self.config.parameters.ray_address:
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
        return Search(study, config.run_id, share_features(data, config.space), config.space, config.parameters)

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
