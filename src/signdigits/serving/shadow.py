"""The shadow: a worker with another version, which gets a copy of some requests; its replies are discarded."""

import logging
import shutil
import signal
import time
from concurrent.futures import Future
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion

from signdigits.serving.background import BackgroundThread
from signdigits.serving.nginx import SHADOW, socket_path
from signdigits.serving.options import ServeParameters
from signdigits.serving.processes import worker_command, worker_environment
from signdigits.serving.worker_pool import Worker
from signdigits.tracking import registry

log = logging.getLogger(__name__)

RETRY_INTERVAL = 10.0  # seconds between two looks at the alias: a shadow is in no hurry


class Shadow:
    """Follows the alias `shadow` with one worker process.

    The champion feels nothing of it: a copy of a request is answered at once and processed at a low priority, one that
    finds a full queue is dropped, and a version that does not start is only reported.
    """

    def __init__(self, parameters: ServeParameters, home: Path, thread: BackgroundThread) -> None:
        self.parameters, self.home, self.thread = parameters, home, thread
        self.worker: Worker | None = None
        self.version = ""
        self.next_look = 0.0
        self.fetching: Future[tuple[str, Path] | None] | None = None

    def supervise(self) -> None:
        """Look up the alias from time to time, and restart the worker if it has exited. Returns at once."""
        if self.worker:
            self.worker.restart_if_dead(self.parameters.timeout)
        if self.fetching is None and time.monotonic() > self.next_look:
            self.fetching = self.thread.submit(self.fetch_version, self.version)
        elif self.fetching is not None and self.fetching.done():
            fetching, self.fetching = self.fetching, None
            self.next_look = time.monotonic() + RETRY_INTERVAL
            if error := fetching.exception():
                log.warning("shadow %s: %s", self.parameters.shadow, error)
            elif fetched := fetching.result():
                self.replace(*fetched)

    def fetch_version(self, present: str) -> tuple[str, Path] | None:
        """Return the version of the alias and the folder of its model, unless it is `present`."""
        version: ModelVersion | None = registry.find_alias(self.parameters.model_name, self.parameters.shadow)
        if version is None or str(version.version) == present:
            return None
        folder = self.home / f"shadow-{version.version}"
        registry.copy_model(version, folder)
        return str(version.version), folder

    def replace(self, version: str, folder: Path) -> None:
        self.stop()
        log.info("version %s gets %.0f %% of the requests as a shadow", version, 100 * self.parameters.shadow_share)
        self.version, self.folder = version, folder
        command = [*worker_command(version, folder, self.parameters), "--shadow"]
        # Its requests are counted apart from those that clients wait for.
        environment = {**worker_environment(version), "PROMETHEUS_MULTIPROC_DIR": str(self.home / SHADOW)}
        self.worker = Worker(socket_path(self.home, SHADOW, 1), command, environment)

    def stop(self) -> None:
        if self.worker:
            self.worker.process.signal(signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.worker = None
