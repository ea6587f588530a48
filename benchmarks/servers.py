"""Models and servers to measure: `mlflow models serve`, `python -m signdigits serve`, and clients for both."""

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlflow
import psutil
from mlflow.models.model import ModelInfo

from signdigits.config import MODEL_NAME, Hyperparameters
from signdigits.data import loading
from signdigits.model import training
from signdigits.packaging import package
from signdigits.tracking import runs

T = TypeVar("T")
LONGEST = 300.0  # seconds that any step may take


def wait_until(condition: Callable[[], T | None], seconds: float = LONGEST) -> T:
    """Poll until `condition` holds, and return its value. Raises RuntimeError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {seconds} s")
        time.sleep(0.1)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int, target: str = "/ping") -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{target}", timeout=5):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def run_server(line: list[str], port: int, log: Path) -> Iterator[int]:
    """Run a server in a session of its own until it answers, and yield its process; end it with SIGTERM."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    with log.open("a") as file:
        process = subprocess.Popen(line, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        wait_until(lambda: answers(port) or process.poll() is not None)
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-2000:])
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@contextlib.contextmanager
def serve_with_mlflow(uri: str, folder: Path) -> Iterator[int]:
    """Run `mlflow models serve`, and yield its port."""
    port = free_port()
    line = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "--port", str(port)]
    with run_server(line, port, folder / f"mlflow-{port}.log"):
        yield port


@dataclass(frozen=True)
class Server:
    """`python -m signdigits serve`: the process of the supervisor, and the port."""

    process: int
    port: int

    def workers(self) -> dict[Path, int]:
        """Return the socket and the process of each worker."""
        workers = {}
        for child in psutil.Process(self.process).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = child.cmdline()
                if "signdigits.serving.worker" in line:
                    workers[Path(line[line.index("--uds") + 1])] = child.pid
        return workers

    def memory(self) -> int:
        """Return the resident memory of all child processes in bytes."""
        total = 0
        for child in psutil.Process(self.process).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                total += child.memory_info().rss
        return total


@contextlib.contextmanager
def serve(folder: Path, *options: str, port: int = 0) -> Iterator[Server]:
    """Run the server, on a free port unless one is given."""
    port = port or free_port()
    line = [sys.executable, "-m", "signdigits", "serve", "--port", str(port), *options]
    with run_server(line, port, folder / f"serve-{port}.log") as process:
        yield Server(process, port)


def log_untrained(loaded: loading.Data) -> ModelInfo:
    """Log the notebook's network with its initial weights, for measurements of speed."""
    with runs.start_run("train", "train"):
        network = training.new_network(loaded.training, loaded.n_classes, Hyperparameters())
        fitted = training.Fit(network, {}, Hyperparameters())
        calibration = training.calibrate_network(fitted, loaded.training, loaded.validation)
        return package.log_model(network, calibration, loaded, {})


def register_versions(loaded: loading.Data) -> None:
    """Register two versions of an untrained network, the first of them the champion."""
    for _ in range(2):
        mlflow.register_model(log_untrained(loaded).model_uri, MODEL_NAME)
    promote(1)


def promote(version: int, alias: str = "champion") -> None:
    mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, alias, str(version))


def read_photograph(loaded: loading.Data, index: int) -> bytes:
    """Return the file of a training photograph."""
    return loaded.dataset.read(loaded.dataset.photographs[loaded.split.training[index]])


def make_request(*photographs: bytes) -> dict[str, Any]:
    return {"dataframe_records": [{"image": base64.b64encode(content).decode()} for content in photographs]}


def make_client(port: int, request: dict[str, Any]) -> Callable[[], object]:
    """Return a function that sends `request` and waits for the reply, over one connection."""
    connection, body = http.client.HTTPConnection("127.0.0.1", port), json.dumps(request)

    def ask() -> object:
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        content = reply.read()
        if reply.status != 200:
            raise RuntimeError(content[:500])
        return content

    return ask
