"""The worker processes of one version, each `mlflow models serve` at a Unix socket."""

import http.client
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion

from signdigits.packaging import prediction_log
from signdigits.serving import nginx
from signdigits.serving.options import ServeParameters
from signdigits.serving.processes import Process, Reply, send_request

log = logging.getLogger(__name__)

VERSION_HEADER = "Model-Version"
WARMUP_REQUESTS = 3  # per worker, before it goes live
PING_INTERVAL = 2.0  # seconds
MAX_BACKOFF = 30.0  # seconds between two starts of a worker that keeps exiting


class HealthCheckFailed(Exception):
    """A version cannot be served; the message gives the reason. `may_pass`: a retry may succeed."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


def server_command(version: ModelVersion, parameters: ServeParameters) -> list[str]:
    uri = f"models:/{version.name}/{version.version}"
    serve = ["mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "--timeout", str(parameters.timeout)]
    return [sys.executable, "-m", *serve]


def server_environment(version: ModelVersion) -> dict[str, str]:
    """Return the environment of a worker; uvicorn, which MLflow starts, reads its options from it.

    The worker itself adds the header with its version to its replies.
    """
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # MLflow looks for uvicorn in it
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        prediction_log.VERSION: str(version.version),  # a model does not know its own version
        "SIGN_DIGITS_ANSWERS": os.environ.get(prediction_log.FOLDER, ""),  # the name in versions logged by 0.1
        "UVICORN_HEADERS": f"{VERSION_HEADER}:{version.version}",
        "UVICORN_LOG_LEVEL": "warning",
        "UVICORN_ACCESS_LOG": "false",
        "UVICORN_TIMEOUT_KEEP_ALIVE": str(nginx.KEEP_ALIVE + 15),
    }


class Worker:
    """A worker process at a Unix socket, restarted when it exits."""

    def __init__(self, path: Path, command: list[str], environment: Mapping[str, str]) -> None:
        self.path = path
        self.command = command
        self.environment = {**environment, "UVICORN_UDS": str(path)}
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self.process = Process(self.path.stem, self.command, self.environment)
        self.starts += 1
        self.last_reply = self.last_ping = time.monotonic()

    def is_healthy(self) -> bool:
        self.last_ping = time.monotonic()
        try:
            healthy = send_request(self.path, "GET", "/ping", timeout=1).status == 200
        except (OSError, http.client.HTTPException):
            return False
        if healthy:
            self.last_reply = time.monotonic()
        return healthy

    def restart_if_dead(self, timeout: float) -> None:
        """Restart the process if it has exited, or kill it if it failed its health check for `timeout` seconds."""
        now = time.monotonic()
        if self.process.running:
            silent = now - self.last_ping > PING_INTERVAL and not self.is_healthy()
            if silent and now - self.last_reply > timeout:
                log.warning("%s has not replied for %.0f seconds: killed", self.path.stem, timeout)
                self.process.signal(signal.SIGKILL)
            return
        # Remaining descendants would remove the new process's socket when they exit.
        self.process.signal(signal.SIGKILL)
        if self.process.has_exited() and now - self.process.started >= self.backoff():
            log.warning("%s exited (%s): restarted", self.path.stem, self.process.exit_reason())
            self.start()

    def backoff(self) -> float:
        """Return the seconds between two starts: exponential backoff if the worker keeps exiting early."""
        if self.last_reply - self.process.started > MAX_BACKOFF:
            self.starts = 1
        return min(MAX_BACKOFF, 2.0**self.starts) if self.starts > 1 else 0


class WorkerPool:
    """The worker processes of one version."""

    def __init__(self, name: str, version: ModelVersion, parameters: ServeParameters, home: Path) -> None:
        self.name = name
        self.version = version
        self.parameters = parameters
        command, environment = server_command(version, parameters), server_environment(version)
        paths = [nginx.socket_path(home, name, number) for number in range(1, parameters.processes + 1)]
        self.workers = [Worker(path, command, environment) for path in paths]

    def is_ready(self) -> bool:
        """Tell whether all workers are healthy. Raises HealthCheckFailed if one has exited."""
        for worker in self.workers:
            if not worker.process.running:
                raise HealthCheckFailed(f"it does not start: {worker.process.exit_reason()}", may_pass=True)
        return all(worker.is_healthy() for worker in self.workers)

    def check_health(self) -> None:
        """Send the model's input example to each worker, which warms it up. Raises HealthCheckFailed for a wrong reply."""
        body, rows = _read_input_example(self.version)
        for worker in self.workers:
            for _ in range(WARMUP_REQUESTS):
                try:
                    reply = send_request(worker.path, "POST", "/invocations", body, self.parameters.timeout)
                except (OSError, http.client.HTTPException) as error:
                    raise HealthCheckFailed(f"it does not reply to its own input example ({error})") from error
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


def _read_input_example(version: ModelVersion) -> tuple[bytes, int]:
    """Return the version's input example as a request, and its number of rows. Raises HealthCheckFailed if it has none."""
    uri = f"models:/{version.name}/{version.version}/serving_input_example.json"
    try:
        text = mlflow.artifacts.load_text(uri)
        rows = len(json.loads(text)["dataframe_split"]["data"])
    except Exception as error:  # of the store, the network or the file
        raise HealthCheckFailed(f"it has no usable input example ({error})", may_pass=True) from error
    return text.encode(), rows


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
