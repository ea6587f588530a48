"""The worker processes of one version, each with MLflow's scoring server at a Unix socket."""

import http.client
import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from signdigits.serving import metrics, nginx
from signdigits.serving.invocation import INPUT_EXAMPLE, INTERNAL, REQUEST_ID
from signdigits.serving.options import ServeParameters
from signdigits.serving.processes import Process, Reply, send_request, worker_command, worker_environment

log = logging.getLogger(__name__)

WARMUP_REQUESTS = 3  # per worker, before it goes live
HEALTH_INTERVAL, HEALTH_TIMEOUT = 2.0, 1.5  # seconds
MAX_BACKOFF = 30.0  # seconds between two starts of a worker that keeps exiting


class HealthCheckFailed(Exception):
    """A version cannot be served; the message gives the reason. `may_pass`: a retry may succeed."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class Worker:
    """A worker process at a Unix socket, restarted when it exits."""

    def __init__(self, path: Path, command: list[str], environment: Mapping[str, str]) -> None:
        self.path = path
        self.command = [*command, "--uds", str(path)]
        self.environment = environment
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self.process = Process(self.path.stem, self.command, self.environment)
        self.starts += 1
        self.last_reply = self.last_check = time.monotonic()

    def replies_to(self, target: str) -> bool:
        """Tell whether the process replies with 200 to /ping (it runs) or /health (its model answers)."""
        self.last_check = time.monotonic()
        try:
            replies = send_request(self.path, "GET", target, timeout=HEALTH_TIMEOUT).status == 200
        except (OSError, http.client.HTTPException):
            return False
        if replies:
            self.last_reply = time.monotonic()
        return replies

    def restart_if_dead(self, timeout: float) -> None:
        """Restart the process if it has exited, or kill it if it failed its health check for `timeout` seconds."""
        now = time.monotonic()
        if self.process.running:
            silent = now - self.last_check > HEALTH_INTERVAL and not self.replies_to("/health")
            if silent and now - self.last_reply > timeout:
                log.warning("%s has not been healthy for %.0f seconds: killed", self.path.stem, timeout)
                self.process.signal(signal.SIGKILL)
            return
        # Remaining descendants would remove the new process's socket when they exit.
        self.process.signal(signal.SIGKILL)
        if self.process.has_exited() and now - self.process.started >= self.backoff():
            log.warning("%s exited (%s): restarted", self.path.stem, self.process.exit_reason())
            metrics.forget_process(self.process.popen.pid)
            metrics.RESTARTS.labels("worker").inc()
            self.start()

    def backoff(self) -> float:
        """Return the seconds between two starts: exponential backoff if the worker keeps exiting early."""
        if self.last_reply - self.process.started > MAX_BACKOFF:
            self.starts = 1
        return min(MAX_BACKOFF, 2.0**self.starts) if self.starts > 1 else 0


class WorkerPool:
    """The worker processes of one version."""

    def __init__(self, name: str, version: ModelVersion, folder: Path, parameters: ServeParameters, home: Path) -> None:
        self.name = name
        self.version = version
        self.folder = folder  # of the model, on this machine: a worker starts without the registry
        self.parameters = parameters
        number = str(version.version)
        command, environment = worker_command(number, folder, parameters), worker_environment(number)
        paths = [nginx.socket_path(home, name, number) for number in range(1, parameters.processes + 1)]
        self.workers = [Worker(path, command, environment) for path in paths]

    def is_ready(self) -> bool:
        """Tell whether all workers run. Raises HealthCheckFailed if one has exited."""
        for worker in self.workers:
            if not worker.process.running:
                raise HealthCheckFailed(f"it does not start: {worker.process.exit_reason()}", may_pass=True)
        return all(worker.replies_to("/ping") for worker in self.workers)

    def check_health(self) -> None:
        """Send the model's input example to each worker, which warms it up. Raises HealthCheckFailed for a wrong reply."""
        body, rows = _read_input_example(self.folder)
        for worker in self.workers:
            for _ in range(WARMUP_REQUESTS):
                try:
                    reply = send_request(
                        worker.path, "POST", "/invocations", body, self.parameters.timeout, {REQUEST_ID: INTERNAL}
                    )
                except (OSError, http.client.HTTPException) as error:
                    reason = f"it does not reply to its own input example ({error})"
                    raise HealthCheckFailed(reason, may_pass=True) from error
                if problem := _find_problem(reply, rows):
                    raise HealthCheckFailed(f"it replies to its own input example with {problem}")

    def restart_dead_workers(self) -> None:
        for worker in self.workers:
            worker.restart_if_dead(self.parameters.timeout)

    def signal(self, number: signal.Signals) -> None:
        for worker in self.workers:
            worker.process.signal(number)

    def have_exited(self) -> bool:
        return all(worker.process.has_exited() for worker in self.workers)

    def forget(self) -> None:
        """Remove what a pool that has exited leaves: the copy of its model, and its processes' gauges."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for worker in self.workers:
            metrics.forget_process(worker.process.popen.pid)


def _read_input_example(folder: Path) -> tuple[bytes, int]:
    """Return the model's input example as a request, and its number of rows. Raises HealthCheckFailed if it has none."""
    try:
        content = (folder / INPUT_EXAMPLE).read_bytes()
        return content, len(json.loads(content)["dataframe_split"]["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HealthCheckFailed(f"it has no usable input example ({error!r})") from error


def _find_problem(reply: Reply, rows: int) -> str:
    """Return the problem of a reply to a request of `rows` rows; empty if there is none."""
    if reply.status != 200:
        return f"{reply.status}: {_parse_error(reply.content)}"
    try:
        predictions = json.loads(reply.content)["predictions"]
        if len(predictions) != rows:
            return f"{len(predictions)} predictions for {rows} rows"
        return next(filter(None, map(_find_problem_in_row, predictions)), "")
    except (ValueError, KeyError, TypeError) as error:
        return f"a reply without label, probability and probabilities ({error!r})"


def _parse_error(content: bytes) -> str:
    """Return the message of MLflow's error, and the last line of its stack trace."""
    try:
        error = json.loads(content)
        raised = error.get("stack_trace", "").strip().splitlines()[-1:]
        return " ".join([str(error["message"]), *raised])
    except (ValueError, KeyError, AttributeError):
        return content[:500].decode(errors="replace")


def _find_problem_in_row(row: Mapping[str, Any]) -> str:
    probabilities = row["probabilities"]
    if row["label"] not in probabilities:
        return f"the label {row['label']!r}, which is not one of its classes"
    if not math.isclose(sum(probabilities.values()), 1, abs_tol=1e-3):
        return f"probabilities that add up to {sum(probabilities.values()):.3f}"
    return ""
