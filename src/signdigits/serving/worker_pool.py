"""The processes that answer for one version: `mlflow models serve`, as often as asked for."""

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
WARMING = 3  # times that every process is asked before it counts
PING_EVERY = 2.0  # seconds
LONGEST_PAUSE = 30.0  # seconds between two starts of a process that keeps ending


class HealthCheckFailed(Exception):
    """A version that must not be served; the message says why."""


def server_command(version: ModelVersion, parameters: ServeParameters) -> list[str]:
    uri = f"models:/{version.name}/{version.version}"
    serve = ["mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "--timeout", str(parameters.timeout)]
    return [sys.executable, "-m", *serve]


def server_environment(version: ModelVersion) -> dict[str, str]:
    """What MLflow passes on to uvicorn, which reads its options from the environment too.

    The process itself says which version it is: whoever passes its replies on cannot say anything else.
    """
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # where MLflow looks for uvicorn
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
    """One place in a pool: a socket, and the process that listens there, started again when it ends."""

    def __init__(self, path: Path, line: list[str], settings: Mapping[str, str]) -> None:
        self.path = path
        self.line = line
        self.settings = {**settings, "UVICORN_UDS": str(path)}
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self.process = Process(self.path.stem, self.line, self.settings)
        self.starts += 1
        self.answered = self.asked = time.monotonic()

    def is_healthy(self) -> bool:
        self.asked = time.monotonic()
        try:
            found = send_request(self.path, "GET", "/ping", timeout=1).status == 200
        except (OSError, http.client.HTTPException):
            return False
        if found:
            self.answered = time.monotonic()
        return found

    def restart_if_dead(self, silence: float) -> None:
        """Start the process again if it ended, or if it did not answer for `silence` seconds."""
        now = time.monotonic()
        if self.process.running:
            silent = now - self.asked > PING_EVERY and not self.is_healthy()
            if silent and now - self.answered > silence:
                log.warning("%s does not answer for %.0f seconds: ended", self.path.stem, silence)
                self.process.signal(signal.SIGKILL)
            return
        # What is left of it would take the new one's socket along when it ends.
        self.process.signal(signal.SIGKILL)
        if self.process.has_exited() and now - self.process.started >= self.pause():
            log.warning("%s ended (%s): started again", self.path.stem, self.process.exit_reason())
            self.start()

    def pause(self) -> float:
        """Seconds from one start to the next: none at first, more if it keeps ending soon after it answers."""
        if self.answered - self.process.started > LONGEST_PAUSE:
            self.starts = 1
        return min(LONGEST_PAUSE, 2.0**self.starts) if self.starts > 1 else 0


class WorkerPool:
    """The processes of one version."""

    def __init__(self, name: str, version: ModelVersion, parameters: ServeParameters, home: Path) -> None:
        self.name = name
        self.version = version
        self.parameters = parameters
        line, settings = server_command(version, parameters), server_environment(version)
        paths = [nginx.socket_path(home, name, number) for number in range(1, parameters.processes + 1)]
        self.workers = [Worker(path, line, settings) for path in paths]

    def is_ready(self) -> bool:
        """Whether every process answers. Raises Refused if one has ended instead."""
        for member in self.workers:
            if not member.process.running:
                raise HealthCheckFailed(f"it does not start: {member.process.exit_reason()}")
        return all(member.is_healthy() for member in self.workers)

    def check_health(self) -> None:
        """Ask every process for the model's own input example, which warms it. Raises Refused unless it is answered."""
        body, rows = _read_input_example(self.version)
        for member in self.workers:
            for _ in range(WARMING):
                try:
                    reply = send_request(member.path, "POST", "/invocations", body, self.parameters.timeout)
                except (OSError, http.client.HTTPException) as error:
                    raise HealthCheckFailed(f"it does not answer its own input example ({error})") from error
                if fault := _find_problem(reply, rows):
                    raise HealthCheckFailed(f"it answers its own input example with {fault}")

    def restart_dead_workers(self) -> None:
        for member in self.workers:
            member.restart_if_dead(self.parameters.timeout)

    def signal(self, number: signal.Signals) -> None:
        for member in self.workers:
            member.process.signal(number)

    def have_exited(self) -> bool:
        return all(member.process.has_exited() for member in self.workers)


def _read_input_example(version: ModelVersion) -> tuple[bytes, int]:
    """The version's own input example, as a request, and its number of rows. Raises Refused if it has none."""
    uri = f"models:/{version.name}/{version.version}/serving_input_example.json"
    try:
        text = mlflow.artifacts.load_text(uri)
        rows = len(json.loads(text)["dataframe_split"]["data"])
    except Exception as error:  # whatever the store, the network or the file have to say
        raise HealthCheckFailed(f"it has no input example that it could be checked with ({error})") from error
    return text.encode(), rows


def _find_problem(reply: Reply, rows: int) -> str:
    """What is wrong with a reply to so many rows; nothing, if it is right."""
    if reply.status != 200:
        return f"{reply.status}: {_parse_error(reply.content)}"
    try:
        predictions = json.loads(reply.content)["predictions"]
        if len(predictions) != rows:
            return f"{len(predictions)} predictions for {rows} rows"
        return next(filter(None, map(_find_problem_in_row, predictions)), "")
    except (ValueError, KeyError, TypeError) as error:
        return f"another form than label, probability and probabilities ({error!r})"


def _parse_error(content: bytes) -> str:
    """What MLflow's error says, and what the model raised, without the way there."""
    try:
        error = json.loads(content)
        raised = error.get("stack_trace", "").strip().splitlines()[-1:]
        return " ".join([str(error["message"]), *raised])
    except (ValueError, KeyError, AttributeError):
        return content[:500].decode(errors="replace")


def _find_problem_in_row(row: Mapping[str, Any]) -> str:
    probabilities = row["probabilities"]
    if row["label"] not in probabilities:
        return f"the label {row['label']!r}, which is none of its classes"
    if not math.isclose(sum(probabilities.values()), 1, abs_tol=1e-3):
        return f"probabilities that add up to {sum(probabilities.values()):.3f}"
    return ""
