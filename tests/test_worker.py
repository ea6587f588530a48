"""A worker process: its queue, deadlines, errors, health and metrics."""

import contextlib
import json
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, DataType, Schema

from signdigits.serving import admission
from signdigits.serving.options import ServeParameters
from signdigits.serving.processes import Process, send_request, worker_command, worker_environment

from .conftest import wait_until

pytestmark = pytest.mark.slow

# A model without photographs: it sleeps, fails, or tells how long its request has been cancelled.
MODEL = """
import time
from contextvars import ContextVar
from pathlib import Path

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Sleeper(PythonModel):
    def load_context(self, context):
        self.request = ContextVar("request", default=None)

    def predict(self, context, model_input, params=None):
        word = str(model_input["image"][0])
        if word == "fail":
            raise ValueError("six fingers")
        if word == "sleep":
            time.sleep(20)
        if word.startswith("/"):
            request = self.request.get()
            if request.cancelled.wait(30):
                Path(word).write_text(request.id)
        labels = ["5"] * len(model_input)
        return pd.DataFrame({"label": labels, "is_outlier": [word == "noise"] * len(labels)})

set_model(Sleeper())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved model."""
    place = tmp_path_factory.mktemp("worker")
    (place / "sleeper.py").write_text(MODEL)
    mlflow.pyfunc.save_model(
        place / "model",
        python_model=str(place / "sleeper.py"),
        signature=ModelSignature(inputs=Schema([ColSpec(DataType.string, "image")])),
        input_example=pd.DataFrame({"image": ["five"]}),
        pip_requirements=["mlflow"],
    )
    return place / "model"


@contextmanager
def working(folder: Path, socket_path: Path, **parameters: int) -> Iterator[Path]:
    """Run a worker process; yield its socket."""
    command = worker_command("3", folder, ServeParameters(**parameters))  # type: ignore[arg-type]
    process = Process("worker", [*command, "--uds", str(socket_path)], worker_environment("3"))
    try:
        wait_until(lambda: accepts(socket_path) or not process.running)
        assert process.running, process.exit_reason()
        yield socket_path
    finally:
        process.signal(signal.SIGKILL)
        wait_until(process.has_exited)


def accepts(path: Path) -> bool:
    """Tell whether a server listens at the socket, which exists before that."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with working(folder, tmp_path_factory.mktemp("shared") / "socket") as found:
        yield found


def post(path: Path, body: bytes) -> tuple[int, bytes]:
    reply = send_request(path, "POST", "/invocations", body)
    return reply.status, reply.content


def records(*images: Any) -> bytes:
    return json.dumps({"dataframe_records": [{"image": image} for image in images]}).encode()


def open_request(path: Path, body: bytes, length: int) -> socket.socket:
    """Send the head of a request, and as much of its body as is given."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(str(path))
    head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Request-ID: seven\r\n"
    client.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
    return client


def hostile_bodies() -> list[bytes]:
    secret = random.Random(0).randbytes(1_500_000).hex().encode()
    text = secret.decode()
    return [
        random.Random(1).randbytes(2_000_000),
        secret,
        b'"' + secret,
        b'{"dataframe_records": ' + secret,
        json.dumps({text: 1}).encode(),
        json.dumps({"dataframe_records": [{text: 1}]}).encode(),
        json.dumps({"dataframe_records": [{"image": {text: 1}}]}).encode(),
        json.dumps({"dataframe_split": {"columns": [text], "data": [[text]]}}).encode(),
        json.dumps({"dataframe_split": text}).encode(),
        json.dumps({"inputs": text}).encode(),
        json.dumps({"instances": [{text: text}]}).encode(),
        json.dumps({"dataframe_records": [{"image": "five"}], "params": {text: text}}).encode(),
        json.dumps({"messages": text, "dataframe_records": []}).encode(),
    ]


@pytest.mark.parametrize("body", hostile_bodies(), ids=lambda body: repr(body[:40]))
def test_error_repeats_no_body(shared: Path, body: bytes) -> None:
    status, content = post(shared, body)
    assert len(content) <= 8192
    assert body[len(body) // 2 :][:1100] not in content
    if status != 200:
        assert 400 <= status < 500
        assert set(json.loads(content)) == {"error_code", "message"}


def test_failure_of_model_is_500(shared: Path) -> None:
    status, content = post(shared, records("fail"))
    assert (status, json.loads(content)["error_code"]) == (500, "INTERNAL_ERROR")
    assert "ValueError: six fingers" in json.loads(content)["message"]


def test_too_many_rows_are_not_parsed(shared: Path) -> None:
    status, content = post(shared, b'{"dataframe_records": [' + b"{}," * 2_000_000 + b"{}]}")
    assert (status, json.loads(content)["error_code"]) == (413, "BAD_REQUEST")


def test_lost_client_cancels_request(shared: Path, tmp_path: Path) -> None:
    body = records(str(tmp_path / "cancelled"))
    client = open_request(shared, body, len(body))
    time.sleep(0.5)
    client.close()
    wait_until((tmp_path / "cancelled").exists)
    wait_until(lambda: (tmp_path / "cancelled").read_text() == "seven")


def test_metrics_count_rows(shared: Path) -> None:
    before = read_metrics(shared)
    assert post(shared, records("five", "five"))[0] == 200
    assert post(shared, records("noise"))[0] == 200
    assert post(shared, b"{")[0] == 400
    after = read_metrics(shared)
    added = {name: value - before.get(name, 0) for name, value in after.items()}
    assert added["signdigits_rows_total"] == 3
    assert added['signdigits_predictions_total{label="5"}'] == 2
    assert added["signdigits_outliers_total"] == 1
    assert added['signdigits_requests_total{status="200"}'] == 2
    assert added['signdigits_requests_total{status="400"}'] == 1
    assert added["signdigits_request_duration_seconds_count"] == 3
    assert after["signdigits_waiting_requests"] == 0


def read_metrics(path: Path) -> dict[str, float]:
    lines = send_request(path, "GET", "/metrics").content.decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_small_request_passes_large_one(shared: Path) -> None:
    body = records("five")
    with contextlib.ExitStack() as clients:
        for _ in range(admission.SMALL_REQUESTS):  # large, and without their bodies
            clients.enter_context(open_request(shared, b"", admission.LARGE_BODY + 1))
        assert post(shared, body)[0] == 200


def test_stuck_model_is_unhealthy(folder: Path, tmp_path: Path) -> None:
    with working(folder, tmp_path / "socket", timeout=1, max_waiting=8) as path:
        assert send_request(path, "GET", "/health").status == 200
        body = records("sleep")
        for _ in range(12):  # each ends after a second, and its thread does not
            status, content = post(path, body)
            assert (status, json.loads(content)["error_code"]) == (504, "DEADLINE_EXCEEDED")
            if send_request(path, "GET", "/health", timeout=5).status == 503:
                break
        else:
            pytest.fail("it stays healthy")
        assert send_request(path, "GET", "/ping").status == 200


def test_full_queue_returns_503(folder: Path, tmp_path: Path) -> None:
    with working(folder, tmp_path / "socket", max_waiting=2) as path, contextlib.ExitStack() as clients:
        body = records("five")
        for _ in range(admission.SMALL_REQUESTS + 2):  # these have sent no body yet
            clients.enter_context(open_request(path, b"", len(body)))
        wait_until(lambda: read_metrics(path)["signdigits_waiting_requests"] == 2)
        reply = send_request(path, "POST", "/invocations", body)
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert json.loads(reply.content)["error_code"] == "TEMPORARILY_UNAVAILABLE"
