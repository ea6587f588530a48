"""The follower of the registry, in the server's parent process: looks at the alias once for all processes.

A version goes live in four steps: its model is copied to this machine; a child process loads it and answers its input example;
the file that names the version to serve is replaced; every process has switched.
"""

import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion

from signdigits.errors import ModelError, SignDigitsError, UsageError
from signdigits.notify import notify
from signdigits.serving import metrics
from signdigits.serving.corrections import count_pending
from signdigits.serving.options import LIVE, PROCESSES, SHADOW, ServeParameters
from signdigits.serving.version import Publication, Version, VersionFailed
from signdigits.tracking import registry, store

log = logging.getLogger(__name__)

# Tags of a version: its serving state, the reason and the time.
STATE, REASON, TIME = "serving_state", "serving_reason", "serving_time"
SERVED, RETIRED, REFUSED, WAITING = "live", "retired", "refused", "waiting"

MAX_FAILED_STARTS = 2  # failed starts of a version: the machine may have been at fault for the first
MAX_PAUSE = 60.0  # seconds between two attempts to start a version
SHADOW_INTERVAL = 10.0  # seconds between two looks at the shadow's alias, which is in no hurry
TICK = 0.05  # seconds

# A child process is forked from one that has imported MLflow: it starts in a tenth of a second.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["signdigits.serving.version"])


class Follower:
    """Publishes the version of the alias to the processes that answer requests, and records its state in the registry.

    Raises ModelError if there is none, unless it waits for it.
    """

    def __init__(self, parameters: ServeParameters, home: Path, on_ready: Callable[[], None]) -> None:
        self.parameters, self.home, self.on_ready = parameters, home, on_ready
        self.first = find_served(parameters)
        self.live: ModelVersion | None = None
        self.shadow = ""  # version of the shadow
        self.rejected = ""  # the version of the alias, if it was refused
        self.attempts = self.failed_starts = 0  # of the version of the alias
        self.next_start = self.next_look = 0.0
        self.warnings: dict[str, str] = {}  # the last one about each alias

    def start(self) -> None:
        """Serve the version of the alias, or the previously served one if that fails. Raises UsageError."""
        if not any(map(self.switch_to, [self.first, *_served_before(self.first)])):
            raise UsageError(
                f"{self.parameters.alias}: version {self.first.version} cannot be served, and none was served before"
            )
        self.on_ready()

    def follow(self) -> None:
        """Look at the alias again and again."""
        while True:
            time.sleep(self.parameters.poll_interval)
            self.look()
            if self.parameters.shadow and time.monotonic() > self.next_look:
                self.next_look = time.monotonic() + SHADOW_INTERVAL
                self.look_at_shadow()
            if self.parameters.corrections:
                metrics.PENDING.set(count_pending(Path(self.parameters.corrections)))

    def look(self) -> None:
        assert self.live is not None
        version = self.find_version()
        if version is None or time.monotonic() < self.next_start:
            return
        metrics.IS_CURRENT.set(version.version == self.live.version)
        if str(version.version) == self.rejected:
            return
        self.rejected = ""
        if version.version != self.live.version:
            self.switch_to(version)

    def find_version(self) -> ModelVersion | None:
        """Return the version of the alias; None, with a warning, if the registry does not reply or the alias is gone."""
        assert self.live is not None
        try:
            version = registry.find_alias(self.parameters.model_name, self.parameters.alias)
            warning = "" if version else f"alias {self.parameters.alias} is gone"
        except Exception as error:  # of MLflow, a driver or the network; the next look may succeed
            version, warning = None, f"{store.store_address()} does not reply ({str(error).splitlines()[0]})"
        self.warn_once(self.parameters.alias, warning and f"{warning}; still serving version {self.live.version}")
        return version

    def look_at_shadow(self) -> None:
        """Publish the version of the shadow's alias. What goes wrong is only reported, once."""
        alias, warning = self.parameters.shadow, ""
        try:
            version = registry.find_alias(self.parameters.model_name, alias)
            if version is None:
                warning = f"{self.parameters.model_name} has no {alias} yet"
            elif str(version.version) != self.shadow:
                publication = self.describe(version, alias)
                registry.copy_model(version, Path(publication.folder))
                check_version(publication, self.parameters)
                publication.write(self.home / SHADOW)
                self.shadow = str(version.version)
                share = 100 * self.parameters.shadow_share
                log.info("version %s gets %.0f %% of the requests as a shadow", self.shadow, share)
        except Exception as error:
            warning = f"shadow {alias}: {str(error).splitlines()[0]}"
        self.warn_once(alias, warning)

    def warn_once(self, alias: str, warning: str) -> None:
        """Log a warning about an alias, unless it is the last one about it; an empty one says that all is well again."""
        if warning and warning != self.warnings.get(alias):
            log.warning("%s", warning)
        self.warnings[alias] = warning

    def switch_to(self, version: ModelVersion) -> bool:
        """Serve the version, and tell whether that succeeded."""
        log.info("starting version %s", version.version)
        self.attempts += 1
        publication = self.describe(version, self.parameters.alias)
        try:
            registry.copy_model(version, Path(publication.folder))
        except Exception as error:  # of the store, its driver, the network or a disk
            reason = f"its model cannot be fetched ({str(error).strip() or type(error).__name__})"
            self.wait(version, f"{reason}; was the store or the project moved?")
            return False
        previous = Publication.read(self.home / LIVE)
        try:
            check_version(publication, self.parameters)
            publication.write(self.home / LIVE)
            self.wait_for_processes(publication)
        except VersionFailed as failure:
            if previous:
                previous.write(self.home / LIVE)
            else:
                (self.home / LIVE).unlink(missing_ok=True)
            self.reject(version, failure)
            shutil.rmtree(publication.folder, ignore_errors=True)
            return False
        self.attempts = self.failed_starts = 0
        replaced, self.live = self.live, version
        self.report(version, replaced)
        if previous:
            shutil.rmtree(previous.folder, ignore_errors=True)
        return True

    def describe(self, version: ModelVersion, alias: str) -> Publication:
        return describe_version(version, alias, self.home / f"{alias}-{version.version}")

    def wait_for_processes(self, publication: Publication) -> None:
        """Wait until all processes serve the version. Raises VersionFailed if one does not."""
        deadline = time.monotonic() + self.parameters.start_timeout
        while time.monotonic() < deadline:
            states = {file: file.read_text() for file in (self.home / PROCESSES).glob("[0-9]*")}
            told = [state for file, state in states.items() if _is_alive(int(file.name))]
            if failed := next((state for state in told if state.startswith(f"{publication.version}: ")), ""):
                raise VersionFailed(failed.partition(": ")[2], may_pass=True)
            if told.count(publication.version) >= self.parameters.processes:
                return
            time.sleep(TICK)
        raise VersionFailed(f"it does not start within {self.parameters.start_timeout:g} seconds", may_pass=True)

    def has_reported(self, pid: int | None) -> bool:
        """Tell whether a process serves a version already."""
        return (self.home / PROCESSES / str(pid)).exists()

    def report(self, version: ModelVersion, replaced: ModelVersion | None) -> None:
        report_version(version)
        self.record(version, SERVED)
        if replaced is None:
            log.info("version %s is live", version.version)
            return
        log.info("version %s is live; version %s stops", version.version, replaced.version)
        metrics.PROMOTIONS.inc()
        self.notify(
            "promotion", f"version {version.version} of {version.name} replaces version {replaced.version}", version
        )
        self.record(replaced, RETIRED, f"replaced by version {version.version}")

    def wait(self, version: ModelVersion, reason: str) -> None:
        """Try the version again after a pause, which grows."""
        pause = min(MAX_PAUSE, self.parameters.poll_interval * 2**self.attempts)
        self.next_start = time.monotonic() + pause
        log.warning("version %s is waiting: %s; next attempt in %.0f s", version.version, reason, pause)
        self.record(version, WAITING, reason)

    def reject(self, version: ModelVersion, failure: VersionFailed) -> None:
        """Refuse a version for a wrong reply or a second failed start; else try it again."""
        self.failed_starts += 1
        if failure.may_pass and self.failed_starts < MAX_FAILED_STARTS:
            self.wait(version, str(failure))
            return
        log.warning("version %s is refused: %s", version.version, failure)
        metrics.REFUSALS.inc()
        self.notify("refusal", f"version {version.version} of {version.name} is refused: {failure}", version)
        self.record(version, REFUSED, str(failure))
        self.rejected, self.attempts, self.failed_starts = str(version.version), 0, 0

    def notify(self, event: str, text: str, version: ModelVersion) -> None:
        if self.parameters.notify:
            facts = {"model_name": version.name, "version": str(version.version)}
            arguments = (self.parameters.notify, event, text, facts)
            threading.Thread(target=notify, args=arguments, daemon=True).start()  # it may take a while

    def record(self, version: ModelVersion, state: str, reason: str = "") -> None:
        """Record the serving state on the version; only warn if the registry does not reply."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        facts = {REASON: reason[:5000], TIME: now, STATE: state}  # the state last: who sees it sees its reason
        try:
            for name, value in facts.items():
                mlflow.MlflowClient().set_model_version_tag(version.name, version.version, name, value)
        except Exception as error:
            address = store.store_address()
            log.warning(
                "version %s is %s, which could not be recorded in %s (%s)", version.version, state, address, error
            )


def find_served(parameters: ServeParameters) -> ModelVersion:
    """Return the version of the alias. Raises ModelError if there is none, unless the server waits for it."""
    version = registry.find_alias(parameters.model_name, parameters.alias)
    if version is None:
        missing = registry.missing_alias(parameters.model_name, parameters.alias)
        if not parameters.wait_for_version:
            raise ModelError(missing)
        log.info("waiting for a version: %s", missing)
    while version is None:
        time.sleep(parameters.poll_interval)
        version = registry.find_alias(parameters.model_name, parameters.alias)
    return version


def describe_version(version: ModelVersion, alias: str, folder: Path) -> Publication:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Publication(
        version.name, str(version.version), alias, str(folder), now, version.tags.get("test_accuracy", "")
    )


def report_version(version: ModelVersion) -> None:
    """Set the metrics of the served version."""
    metrics.VERSION.set(int(version.version))
    metrics.CREATED.set(version.creation_timestamp / 1000)
    metrics.IS_CURRENT.set(1)


def check_version(publication: Publication, parameters: ServeParameters) -> None:
    """Let a child process load a version and answer its input example. Raises VersionFailed, also if that ends the process."""
    receiver, sender = FORKSERVER.Pipe(duplex=False)
    process = FORKSERVER.Process(target=_try_version, args=(publication, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(parameters.start_timeout):
            raise VersionFailed(f"it does not start within {parameters.start_timeout:g} seconds", may_pass=True)
        reason, may_pass = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        raise VersionFailed(f"its process ended ({ended})", may_pass=True) from None
    finally:
        process.kill()
    if reason:
        raise VersionFailed(reason, may_pass=may_pass)


def _try_version(publication: Publication, sender: Connection) -> None:
    try:
        # MLflow's look at all installed packages takes most of the time; each process that answers warns once.
        Version(publication, suppress_warnings=True)
        sender.send(("", False))
    except SignDigitsError as error:
        sender.send((str(error), getattr(error, "may_pass", True)))


def _served_before(version: ModelVersion) -> list[ModelVersion]:
    """Return the other version that was live last, if any: it was not retired, only the server stopped."""
    versions = registry.list_versions(version.name)
    live = [other for other in versions if other.tags.get(STATE) == SERVED and other.version != version.version]
    return sorted(live, key=lambda other: other.tags.get(TIME, ""))[-1:]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
