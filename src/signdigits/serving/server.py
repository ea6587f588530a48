"""The server: uvicorn's supervisor of processes with a thread that follows the registry, or one process alone."""

import contextlib
import functools
import logging
import socket
import threading
import time
from pathlib import Path

import uvicorn
from uvicorn.supervisors import Multiprocess

from signdigits.errors import UsageError
from signdigits.serving import handover, metrics
from signdigits.serving.app import create_app
from signdigits.serving.connections import Connection
from signdigits.serving.follower import Follower, describe_version, find_served, report_version
from signdigits.serving.options import LIVE, ServeParameters
from signdigits.serving.version import Version, VersionFailed
from signdigits.tracking import registry

log = logging.getLogger(__name__)

KEEP_ALIVE = 75  # seconds that an idle connection is kept; a proxy in front keeps its own shorter
SILENCE = 10  # seconds after which a process that does not answer its parent is replaced


def run_supervised(
    parameters: ServeParameters, home: Path, listening: socket.socket, former: socket.socket | None
) -> None:
    """Serve the version of the alias until interrupted; `former` is the server whose socket this is."""
    started = time.monotonic()

    def on_ready() -> None:
        log.info("ready after %.1f s: %s", time.monotonic() - started, parameters.url)
        if former:
            former.send(b".")
        handover.offer_socket(parameters.address, listening)

    Supervisor(_configure(parameters, home), listening, Follower(parameters, home, on_ready)).run()


def run_one(parameters: ServeParameters, home: Path, listening: socket.socket, former: socket.socket | None) -> None:
    """Serve one version in this process. Raises UsageError or ModelError if it cannot be served."""
    folder = home / "model"
    if parameters.model_uri:
        version = registry.download_version(parameters.model_uri, folder)
    else:
        version = find_served(parameters)
        registry.copy_model(version, folder)
    publication = describe_version(version, parameters.alias, folder)
    try:
        Version(publication)
    except VersionFailed as failure:
        raise UsageError(f"version {version.version} cannot be served: {failure}") from failure
    publication.write(home / LIVE)
    report_version(version)
    log.info("version %s is live: %s", version.version, parameters.url)
    if former:
        former.send(b".")
    handover.offer_socket(parameters.address, listening)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn repeats the signal that has stopped it
        uvicorn.Server(_configure(parameters, home)).run([listening])


def _configure(parameters: ServeParameters, home: Path) -> uvicorn.Config:
    return uvicorn.Config(
        functools.partial(create_app, parameters, home),
        factory=True,
        workers=parameters.processes,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,  # uvicorn's own would close the handlers of other loggers
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(parameters.trusted_proxy),
        forwarded_allow_ips=parameters.trusted_proxy,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=round(parameters.drain_timeout),
        timeout_worker_healthcheck=SILENCE,
        ssl_certfile=parameters.certificate or None,
        ssl_keyfile=parameters.key or None,
    )


class Supervisor(Multiprocess):
    """uvicorn's supervisor, which restarts what exits or hangs, and on SIGHUP replaces one process after the other."""

    def __init__(self, config: uvicorn.Config, listening: socket.socket, follower: Follower) -> None:
        super().__init__(config, [listening])
        self.follower = follower
        self.error: Exception | None = None
        self.last_start = time.monotonic()

    def run(self) -> None:
        threading.Thread(target=self.follow, daemon=True).start()
        super().run()
        if self.error:
            raise self.error

    def follow(self) -> None:
        try:
            self.follower.start()
        except Exception as error:  # of the registry, or no version can be served
            self.error = error
            self.should_exit.set()
            return
        self.follower.follow()

    def terminate_all(self) -> None:
        if self.follower.live:
            super().terminate_all()
            return
        for process in self.processes:  # uvicorn does not end one that waits for its first version
            process.kill()

    def restart_all(self) -> None:
        """Replace one process after the other, each when its successor answers, which may take as long as a start."""
        self.config.timeout_worker_healthcheck = round(self.follower.parameters.start_timeout)
        super().restart_all()

    def keep_subprocess_alive(self) -> None:
        """Restart what has exited, or does not answer; a process that starts cannot answer while it imports its modules."""
        starting = not all(self.follower.has_reported(process.pid) for process in self.processes)
        limit = self.follower.parameters.start_timeout
        if starting and time.monotonic() - self.last_start < limit:
            if all(process.process.is_alive() for process in self.processes):
                return
            self.config.timeout_worker_healthcheck = round(limit)
        else:
            self.config.timeout_worker_healthcheck = SILENCE
        before = [process.pid for process in self.processes]
        for process in self.processes:
            process.child_conn.close()  # its own end is open: if it is killed while it is asked, the wait ends at once
        super().keep_subprocess_alive()
        for pid, process in zip(before, self.processes, strict=False):
            if pid and pid != process.pid:
                log.warning("process %s exited or hung: restarted", pid)
                self.last_start = time.monotonic()
                metrics.RESTARTS.inc()
                metrics.forget_process(pid)
