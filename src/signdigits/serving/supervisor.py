"""The supervisor of a server: keeps nginx and the worker processes alive, and follows the alias (blue/green)."""

import logging
import signal
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion

from signdigits.errors import UsageError
from signdigits.notify import notify
from signdigits.serving import metrics, nginx
from signdigits.serving.background import BackgroundThread
from signdigits.serving.options import ServeParameters
from signdigits.serving.processes import Process, adopt_orphans
from signdigits.serving.shadow import Shadow
from signdigits.serving.worker_pool import HealthCheckFailed, WorkerPool
from signdigits.tracking import registry, store

log = logging.getLogger(__name__)

TICK = 0.2  # seconds between two checks of the processes

# Tags of a version: its serving state, the reason and the time.
STATE, REASON, TIME = "serving_state", "serving_reason", "serving_time"
LIVE, RETIRED, REFUSED, WAITING = "live", "retired", "refused", "waiting"

MAX_FAILED_STARTS = 2  # failed starts of a version: the machine may have been at fault for the first
MAX_PAUSE = 60.0  # seconds between two attempts to start a version


def is_listening(parameters: ServeParameters) -> bool:
    try:
        with socket.create_connection((parameters.host, parameters.port), timeout=1):
            return True
    except OSError:
        return False


def _record_state(version: ModelVersion, state: str, reason: str = "") -> None:
    """Record the serving state on the version; only warn if the registry does not reply."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    facts = {REASON: reason[:5000], TIME: now, STATE: state}  # the state last: who sees it sees its reason
    try:
        for name, value in facts.items():
            mlflow.MlflowClient().set_model_version_tag(version.name, version.version, name, value)
    except Exception as error:
        log.warning(
            "version %s is %s, which could not be recorded in %s (%s)",
            version.version,
            state,
            store.store_address(),
            error,
        )


def _served_before(version: ModelVersion) -> list[ModelVersion]:
    """Return the other version that was live last, if any: it was not retired, only the server stopped."""
    versions = registry.list_versions(version.name)
    live = [other for other in versions if other.tags.get(STATE) == LIVE and other.version != version.version]
    return sorted(live, key=lambda other: other.tags.get(TIME, ""))[-1:]


class Supervisor:
    """Keeps nginx and a pool of workers alive, and switches to another pool when the alias moves (blue/green)."""

    def __init__(self, parameters: ServeParameters, nginx: str, home: Path) -> None:
        self.parameters = parameters
        self.home = home
        self.nginx_command = [nginx, "-p", str(home), "-c", str(home / "nginx.conf")]
        self.nginx_process: Process | None = None
        self.live: WorkerPool | None = None
        self.rejected = ""  # the version of the alias, if it was refused
        self.n_attempts = 0  # attempts to start the version of the alias
        self.n_failed_starts = 0  # attempts that failed although the artifacts were available
        self.next_start = 0.0  # earliest time of the next attempt
        self.last_warning = ""
        self.last_poll = 0.0
        self.registry_thread, self.notification_thread = BackgroundThread(), BackgroundThread()
        self.shadow = Shadow(parameters, home, BackgroundThread()) if parameters.shadow else None
        self.polling: Future[ModelVersion | None] | None = None

    def run(self, version: ModelVersion) -> None:
        adopt_orphans()
        started = time.monotonic()
        try:
            self.start(version)
            log.info("ready after %.1f s: %s", time.monotonic() - started, self.parameters.url)
            while True:
                self.supervise()
                self.poll_alias()
        except KeyboardInterrupt:
            log.info("stopping")
        finally:
            self.stop()

    def start(self, version: ModelVersion) -> None:
        """Start the version, or the previously served one if that fails, and then nginx."""
        for candidate in [version, *self.find_fallbacks(version)]:
            if self.switch_to(candidate):
                break
        else:
            raise UsageError(
                f"{self.parameters.alias}: version {version.version} cannot be served, and none was served before"
            )
        self.nginx_process = self.start_nginx()
        deadline = time.monotonic() + self.parameters.start_timeout
        while not is_listening(self.parameters):
            if not self.nginx_process.running or time.monotonic() > deadline:
                raise UsageError(f"nginx does not start: {self.nginx_process.exit_reason()}")
            time.sleep(TICK / 10)

    def find_fallbacks(self, version: ModelVersion) -> list[ModelVersion]:
        return _served_before(version)

    def start_nginx(self) -> Process:
        return Process("nginx", self.nginx_command)

    def supervise(self) -> None:
        """Wait for a moment, and restart what has exited."""
        time.sleep(TICK)
        if self.live:
            self.live.restart_dead_workers()
        if self.shadow and self.nginx_process:
            self.shadow.supervise()
        if self.nginx_process and not self.nginx_process.running:
            self.nginx_process.signal(signal.SIGKILL)  # its worker processes, which hold the port
            if self.nginx_process.has_exited():
                log.warning("nginx exited (%s): restarted", self.nginx_process.exit_reason())
                metrics.RESTARTS.labels("nginx").inc()
                self.nginx_process = self.start_nginx()

    def poll_alias(self) -> None:
        """Look up the alias every `poll_interval` seconds, and switch to its version.

        In a thread, because MLflow retries for minutes if the registry is down, and supervision must go on.
        """
        if self.polling is None:
            if time.monotonic() - self.last_poll >= self.parameters.poll_interval:
                self.polling = self.registry_thread.submit(self.find_version)
            return
        if not self.polling.done():
            return
        version, self.polling, self.last_poll = self.polling.result(), None, time.monotonic()
        assert self.live is not None
        if version is None or time.monotonic() < self.next_start:
            return
        metrics.IS_CURRENT.set(version.version == self.live.version.version)
        if str(version.version) == self.rejected:
            return
        self.rejected = ""
        if version.version != self.live.version.version:
            self.switch_to(version)

    def find_version(self) -> ModelVersion | None:
        """Return the version of the alias; None, with a warning, if the registry does not reply or the alias is gone."""
        try:
            version = registry.find_alias(self.parameters.model_name, self.parameters.alias)
            warning = "" if version else f"alias {self.parameters.alias} is gone"
        except Exception as error:  # of MLflow, a driver or the network; the next poll may succeed
            version, warning = None, f"{store.store_address()} does not reply ({str(error).splitlines()[0]})"
        if warning and warning != self.last_warning:
            log.warning("%s; still serving version %s", warning, self.live.version.version if self.live else "none")
        self.last_warning = warning
        return version

    def switch_to(self, version: ModelVersion) -> bool:
        """Start the version in the idle pool, check its health, and then send the requests to it."""
        log.info("starting version %s", version.version)
        self.n_attempts += 1
        folder = self.fetch_model(version)
        if folder is None:
            return False
        idle = "green" if self.live and self.live.name == "blue" else "blue"
        pool = WorkerPool(idle, version, folder, self.parameters, self.home)
        try:
            self.check_health(pool)
        except HealthCheckFailed as failure:
            self.drain(pool, seconds=0)
            self.reject(version, failure)
            return False
        except BaseException:
            self.drain(pool, seconds=0)
            raise
        self.n_attempts = self.n_failed_starts = 0
        previous, self.live = self.live, pool
        nginx.point_live(self.home, pool.name)
        nginx.write_page_settings(self.home, self.parameters, folder)
        self.report_live(version, previous)
        if previous:
            self.drain(previous, seconds=self.parameters.drain_timeout)
        return True

    def report_live(self, version: ModelVersion, previous: WorkerPool | None) -> None:
        metrics.VERSION.set(int(version.version))
        metrics.CREATED.set(version.creation_timestamp / 1000)
        metrics.IS_CURRENT.set(1)
        self.record(version, LIVE)
        if previous is None:
            log.info("version %s is live", version.version)
            return
        log.info("version %s is live; version %s stops", version.version, previous.version.version)
        metrics.PROMOTIONS.inc()
        self.notify(
            "promotion",
            f"version {version.version} of {version.name} replaces version {previous.version.version}",
            version,
        )
        self.record(previous.version, RETIRED, f"replaced by version {version.version}")

    def fetch_model(self, version: ModelVersion) -> Path | None:
        """Copy the version's model to this machine. If it cannot be reached, try again later, and return None.

        In the thread of the registry, because MLflow retries for minutes, and supervision must go on.
        """
        folder = nginx.model_folder(self.home, version.version)
        fetching = self.registry_thread.submit(registry.copy_model, version, folder)
        while not fetching.done():
            self.supervise()
        try:
            fetching.result()
        except Exception as error:  # of the store, its driver, the network or a disk
            reason = f"its model cannot be fetched ({str(error).strip() or type(error).__name__})"
            self.wait(version, f"{reason}; was the store or the project moved?")
            return None
        return folder

    def wait(self, version: ModelVersion, reason: str) -> None:
        """Try the version again after a pause, which grows."""
        pause = min(MAX_PAUSE, self.parameters.poll_interval * 2**self.n_attempts)
        self.next_start = time.monotonic() + pause
        log.warning("version %s is waiting: %s; next attempt in %.0f s", version.version, reason, pause)
        self.record(version, WAITING, reason)

    def reject(self, version: ModelVersion, failure: HealthCheckFailed) -> None:
        """Refuse a version for a wrong reply or a second failed start; else try it again."""
        self.n_failed_starts += 1
        if failure.may_pass and self.n_failed_starts < MAX_FAILED_STARTS:
            self.wait(version, str(failure))
            return
        log.warning("version %s is refused: %s", version.version, failure)
        metrics.REFUSALS.inc()
        self.notify("refusal", f"version {version.version} of {version.name} is refused: {failure}", version)
        self.record(version, REFUSED, str(failure))
        self.rejected, self.n_attempts, self.n_failed_starts = str(version.version), 0, 0

    def notify(self, event: str, text: str, version: ModelVersion) -> None:
        if self.parameters.notify:
            facts = {"model_name": version.name, "version": str(version.version)}
            self.notification_thread.submit(notify, self.parameters.notify, event, text, facts)

    def record(self, version: ModelVersion, state: str, reason: str = "") -> None:
        self.registry_thread.submit(_record_state, version, state, reason)

    def check_health(self, pool: WorkerPool) -> None:
        """Raise HealthCheckFailed unless the pool starts in time and replies correctly to its input example."""
        deadline = time.monotonic() + self.parameters.start_timeout
        while not pool.is_ready():
            if time.monotonic() > deadline:
                seconds = self.parameters.start_timeout
                raise HealthCheckFailed(f"it does not start within {seconds:g} seconds", may_pass=True)
            self.supervise()
        with ThreadPoolExecutor(1) as thread:  # supervision goes on during a slow reply
            check = thread.submit(pool.check_health)
            try:
                while not check.done():
                    self.supervise()
            except BaseException:
                pool.signal(signal.SIGKILL)  # or the thread would wait for the reply
                raise
            check.result()

    def drain(self, pool: WorkerPool, seconds: float) -> None:
        """Shut down a pool gracefully, and kill it after `seconds`.

        nginx sends a request that it is still reading, such as a slow upload, to the live pool.
        """
        pool.signal(signal.SIGTERM)  # uvicorn's signal for a graceful shutdown
        deadline = time.monotonic() + max(seconds, 2 * TICK)
        while not pool.have_exited() and time.monotonic() < deadline:
            self.supervise()
        pool.signal(signal.SIGKILL)
        while not pool.have_exited():
            self.supervise()
        pool.forget()

    def stop(self) -> None:
        """Shut down nginx gracefully, and then the workers."""
        pool, self.live = self.live, None
        proxy, self.nginx_process = self.nginx_process, None
        if proxy:
            proxy.signal(signal.SIGQUIT)  # nginx's signal for a graceful shutdown
            deadline = time.monotonic() + self.parameters.drain_timeout
            while not proxy.has_exited() and time.monotonic() < deadline:
                time.sleep(TICK / 4)
            proxy.signal(signal.SIGKILL)
        if self.shadow:
            self.shadow.stop()
        if pool:
            self.drain(pool, seconds=self.parameters.drain_timeout)


class Unsupervised(Supervisor):
    """nginx and the workers of one version, for a platform that restarts containers: an exit ends this process, too.

    It neither follows the alias nor writes to the registry, which need not be there.
    """

    def supervise(self) -> None:
        """Wait for a moment. Raises UsageError if nginx or a worker has exited."""
        time.sleep(TICK)
        workers = [worker.process for worker in self.live.workers] if self.live else []
        for process in filter(None, [self.nginx_process, *workers]):
            if not process.running:
                raise UsageError(f"{process.name} exited ({process.exit_reason()}); start the server again")

    def poll_alias(self) -> None:
        pass

    def find_fallbacks(self, version: ModelVersion) -> list[ModelVersion]:
        return []

    def wait(self, version: ModelVersion, reason: str) -> None:
        raise UsageError(f"version {version.version} cannot be served: {reason}")

    def reject(self, version: ModelVersion, failure: HealthCheckFailed) -> None:
        self.wait(version, str(failure))

    def record(self, version: ModelVersion, state: str, reason: str = "") -> None:
        pass
