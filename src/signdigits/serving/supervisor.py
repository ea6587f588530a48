"""The supervisor of a server: keeps nginx and the worker processes alive, and follows the alias (blue/green)."""

import logging
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.entities.model_registry import ModelVersion

from signdigits.errors import ServingError
from signdigits.serving import nginx
from signdigits.serving.options import ServeParameters
from signdigits.serving.processes import Process, adopt_orphans
from signdigits.serving.worker_pool import HealthCheckFailed, WorkerPool
from signdigits.tracking import registry, store

log = logging.getLogger(__name__)

Result = TypeVar("Result")

TICK = 0.2  # seconds between two checks of the processes

# Tags of a version: its serving state, the reason and the time.
STATE, REASON, TIME = "serving_state", "serving_reason", "serving_time"
LIVE, RETIRED, REFUSED = "live", "retired", "refused"


def server_url(parameters: ServeParameters) -> str:
    scheme = "https" if parameters.certificate else "http"
    return f"{scheme}://{nginx.bracket_ipv6(parameters.host)}:{parameters.port}"


def is_listening(parameters: ServeParameters) -> bool:
    try:
        with socket.create_connection((parameters.host, parameters.port), timeout=1):
            return True
    except OSError:
        return False


def _record_state(version: ModelVersion, state: str, reason: str = "") -> None:
    """Write on the version what became of it. A registry that does not answer keeps nobody from serving."""
    facts = {STATE: state, REASON: reason[:5000], TIME: datetime.now(UTC).isoformat(timespec="milliseconds")}
    try:
        for name, value in facts.items():
            mlflow.MlflowClient().set_model_version_tag(version.name, version.version, name, value)
    except Exception as error:
        log.warning(
            "version %s is %s, which could not be written to %s (%s)",
            version.version,
            state,
            store.store_address(),
            error,
        )


def _served_before(version: ModelVersion) -> list[ModelVersion]:
    """The other version that was live last, if one was: it was not retired, only the machine or the command ended."""
    found = mlflow.MlflowClient().search_model_versions(f"name = '{version.name}'")
    live = [other for other in found if other.tags.get(STATE) == LIVE and other.version != version.version]
    return sorted(live, key=lambda other: other.tags.get(TIME, ""))[-1:]


class Background:
    """A thread for calls that may wait for the registry; they are made in order, and nobody waits for its end."""

    def __init__(self) -> None:
        self.calls = queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]]()
        threading.Thread(target=self.work, daemon=True).start()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        future = Future[Result]()
        self.calls.put((future, function, arguments))
        return future

    def work(self) -> None:
        while True:
            future, function, arguments = self.calls.get()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)


class Supervisor:
    """Keeps a front and a pool of processes alive, and brings in another pool when the alias moves."""

    def __init__(self, parameters: ServeParameters, nginx: str, home: Path) -> None:
        self.parameters = parameters
        self.home = home
        self.nginx_command = [nginx, "-p", str(home), "-c", str(home / "nginx.conf")]
        self.nginx_process: Process | None = None
        self.live: WorkerPool | None = None
        self.refused = ""  # the version that the alias names, if it was turned away
        self.said = ""  # what was logged last of the registry
        self.looked = 0.0
        self.registry = Background()
        self.looking: Future[ModelVersion | None] | None = None

    def run(self, version: ModelVersion) -> None:
        adopt_orphans()
        started = time.monotonic()
        try:
            self.begin(version)
            log.info("ready after %.1f s: %s", time.monotonic() - started, server_url(self.parameters))
            while True:
                self.tick()
                self.look()
        except KeyboardInterrupt:
            log.info("stopping")
        finally:
            self.stop()

    def begin(self, version: ModelVersion) -> None:
        """Bring in the version, or the one that was served before if it is refused, and then open the port."""
        for candidate in [version, *_served_before(version)]:
            if self.bring_in(candidate):
                break
        else:
            raise ServingError(
                f"{self.parameters.alias}: version {version.version} cannot be served, and none was served before"
            )
        self.nginx_process = self.start_nginx()
        deadline = time.monotonic() + self.parameters.start_timeout
        while not is_listening(self.parameters):
            if not self.nginx_process.running or time.monotonic() > deadline:
                raise ServingError(f"nginx does not start: {self.nginx_process.exit_reason()}")
            time.sleep(TICK / 10)

    def start_nginx(self) -> Process:
        return Process("nginx", self.nginx_command)

    def tick(self) -> None:
        """Wait a moment, and start again what has ended."""
        time.sleep(TICK)
        if self.live:
            self.live.restart_dead_workers()
        if self.nginx_process and not self.nginx_process.running:
            self.nginx_process.signal(signal.SIGKILL)  # its workers, who hold the port
            if self.nginx_process.has_exited():
                log.warning("nginx ended (%s): started again", self.nginx_process.exit_reason())
                self.nginx_process = self.start_nginx()

    def look(self) -> None:
        """Ask the registry for the alias, every now and then, and follow it where it moved.

        The registry may be away, and MLflow asks it for minutes then: the processes are looked after meanwhile.
        """
        if self.looking is None:
            if time.monotonic() - self.looked >= self.parameters.poll_interval:
                self.looking = self.registry.submit(self.find_alias)
            return
        if not self.looking.done():
            return
        version, self.looking, self.looked = self.looking.result(), None, time.monotonic()
        assert self.live is not None
        if version is None or str(version.version) == self.refused:
            return
        self.refused = ""
        if version.version != self.live.version.version:
            self.bring_in(version)

    def find_alias(self) -> ModelVersion | None:
        """The version to serve; None, and a word about it, if the registry cannot say."""
        try:
            version = registry.find_alias(self.parameters.alias)
            said = "" if version else f"{self.parameters.alias} is no version's alias any more: left as it is"
        except Exception as error:  # whatever MLflow, a driver or the network have to say; the next look may succeed
            version, said = (
                None,
                f"{store.store_address()} does not answer ({str(error).splitlines()[0]}): left as it is",
            )
        if said and said != self.said:
            log.warning("%s", said)
        self.said = said
        return version

    def bring_in(self, version: ModelVersion) -> bool:
        """Start the version beside the one that is live, check it, and only then send the requests to it."""
        log.info("starting version %s", version.version)
        idle = "green" if self.live and self.live.name == "blue" else "blue"
        pool = WorkerPool(idle, version, self.parameters, self.home)
        try:
            self.examine(pool)
        except HealthCheckFailed as refusal:
            log.warning("version %s is not served: %s", version.version, refusal)
            self.registry.submit(_record_state, version, REFUSED, str(refusal))
            self.refused = str(version.version)
            self.end(pool, seconds=0)
            return False
        except BaseException:
            self.end(pool, seconds=0)
            raise
        before, self.live = self.live, pool
        nginx.point_live(self.home, pool.name)
        log.info("version %s is live%s", version.version, f"; version {before.version.version} ends" if before else "")
        self.registry.submit(_record_state, version, LIVE)
        if before:
            self.registry.submit(_record_state, before.version, RETIRED, f"version {version.version} follows it")
            self.end(before, seconds=self.parameters.drain_timeout)
        return True

    def examine(self, pool: WorkerPool) -> None:
        """Raise Refused unless the pool starts in time and answers its model's input example."""
        deadline = time.monotonic() + self.parameters.start_timeout
        while not pool.is_ready():
            if time.monotonic() > deadline:
                raise HealthCheckFailed(f"it does not start within {self.parameters.start_timeout:g} seconds")
            self.tick()
        with ThreadPoolExecutor(1) as thread:  # it may take its time, while others need to be looked after
            checking = thread.submit(pool.check_health)
            try:
                while not checking.done():
                    self.tick()
            except BaseException:
                pool.signal(signal.SIGKILL)  # or the thread would wait for its reply
                raise
            checking.result()

    def end(self, pool: WorkerPool, seconds: float) -> None:
        """Let the pool finish what it has begun, for so long at most, and end it.

        What nginx has begun to read for it, a slow upload say, nginx will bring to the pool that is live then.
        """
        pool.signal(signal.SIGTERM)  # uvicorn's word for "finish, then end"
        deadline = time.monotonic() + max(seconds, 2 * TICK)
        while not pool.have_exited() and time.monotonic() < deadline:
            self.tick()
        pool.signal(signal.SIGKILL)
        while not pool.have_exited():
            self.tick()

    def stop(self) -> None:
        """End the front, which finishes its requests, and then the processes that answer them."""
        live, self.live = self.live, None
        last, self.nginx_process = self.nginx_process, None
        if last:
            last.signal(signal.SIGQUIT)  # nginx's word for "finish, then end"
            deadline = time.monotonic() + self.parameters.drain_timeout
            while not last.has_exited() and time.monotonic() < deadline:
                time.sleep(TICK / 4)
            last.signal(signal.SIGKILL)
        if live:
            self.end(live, seconds=self.parameters.drain_timeout)
