"""The application of a process: its limits, queue, deadlines, errors, health, metrics and page."""

import contextlib
import gzip
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from signdigits import cli
from signdigits.errors import UsageError
from signdigits.serving import admission
from signdigits.serving.app import PAGE
from signdigits.serving.connections import MAX_HEAD
from signdigits.serving.options import ServeParameters, read_token

from .conftest import free_port, wait_until
from .endpoint import Endpoint, serving_endpoint
from .load import JSON

pytestmark = pytest.mark.slow

SECRET = "Open-Sesame.0123456789"

# A model without photographs: it sleeps, fails, refuses, or tells how long its request has been cancelled.
MODEL = """
import time
from contextvars import ContextVar
from pathlib import Path

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Sleeper(PythonModel):
    def load_context(self, context):
        self.request = ContextVar("request", default=None)
        self.class_names = ["5"]

    def predict(self, context, model_input, params=None):
        word = str(model_input["image"].iloc[0])
        if word == "fail":
            raise ValueError("six fingers")
        if word == "refuse":
            raise MlflowException("row 0: six fingers", error_code=1000)
        if word == "sleep":
            time.sleep(20)
        if word.startswith("/"):
            request = self.request.get()
            if request.cancelled.wait(30):
                Path(word).write_text(request.id)
        n = len(model_input)
        return pd.DataFrame({"label": ["5"] * n, "probabilities": [{"5": 1.0}] * n, "is_outlier": [word == "noise"] * n})

set_model(Sleeper())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved model."""
    place = tmp_path_factory.mktemp("app")
    (place / "sleeper.py").write_text(MODEL)
    mlflow.pyfunc.save_model(
        place / "model",
        python_model=str(place / "sleeper.py"),
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.string, "image")]),
            params=ParamSchema([ParamSpec("explain", DataType.boolean, False)]),
        ),
        input_example=pd.DataFrame({"image": ["five"]}),
        pip_requirements=["mlflow"],
    )
    return place / "model"


@contextmanager
def answering(folder: Path, log: Path, **parameters: Any) -> Iterator[Endpoint]:
    """Serve the model in `folder` in one process."""
    options = [text for name, value in parameters.items() for text in (f"--{name}", str(value))]
    with serving_endpoint(log, "--supervise", "false", "--model_uri", str(folder), *options) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    place = tmp_path_factory.mktemp("shared")
    with answering(folder, place / "log", client_timeout=1, max_body_mb=8, access_log=place / "access.log") as found:
        yield found


def records(*images: Any) -> bytes:
    return json.dumps({"dataframe_records": [{"image": image} for image in images]}).encode()


FIVE = records("five")


def open_request(endpoint: Endpoint, body: bytes, length: int) -> socket.socket:
    """Send the head of a request, and as much of its body as is given."""
    client = socket.create_connection(("127.0.0.1", endpoint.port), timeout=30)
    head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
    return client


def hostile_bodies() -> dict[str, bytes]:
    """Return a body for each kind of MLflow's errors, with a secret in it."""
    long = SECRET * 60_000
    return {
        "bytes": b"\xff\xfe" + SECRET.encode() * 10,
        "text": SECRET.encode(),
        "one bad byte": b'{"dataframe_records": [{"image": "' + SECRET.encode() + b'\xff"}]}',
        "open string": b'"' + long.encode(),
        "open table": b'{"dataframe_records": ' + SECRET.encode(),
        "list": json.dumps([SECRET]).encode(),
        "number": b"1" * 5000,
        "other field": json.dumps({SECRET: 1}).encode(),
        "two fields": json.dumps({"inputs": SECRET, "instances": SECRET}).encode(),
        "other column": json.dumps({"dataframe_records": [{SECRET: SECRET}]}).encode(),
        "other type": json.dumps({"dataframe_records": [{"image": {SECRET: 1}}]}).encode(),
        "split": json.dumps({"dataframe_split": {"columns": [SECRET], "data": [[SECRET]]}}).encode(),
        "ragged split": json.dumps({"dataframe_split": {"columns": ["image"], "data": [[SECRET, SECRET]]}}).encode(),
        "split of text": json.dumps({"dataframe_split": SECRET}).encode(),
        "inputs": json.dumps({"inputs": SECRET}).encode(),
        "instances": json.dumps({"instances": [{SECRET: SECRET}]}).encode(),
        "other param": json.dumps({"dataframe_records": [{"image": "five"}], "params": {SECRET: SECRET}}).encode(),
        "wrong param": json.dumps({"dataframe_records": [{"image": "five"}], "params": {"explain": SECRET}}).encode(),
        "params of text": json.dumps({"dataframe_records": [{"image": "five"}], "params": SECRET}).encode(),
        "messages": json.dumps({"messages": SECRET, "dataframe_records": []}).encode(),
        "long": json.dumps({"dataframe_records": [{long: 1}]}).encode(),
        "nested": b'{"a": ' + b"[" * 90_000 + SECRET.encode(),
    }


@pytest.mark.parametrize("kind", hostile_bodies())
def test_error_repeats_nothing(shared: Endpoint, kind: str) -> None:
    status, headers, reply = shared.post(hostile_bodies()[kind])
    if status != 200:  # a param that the model does not know is ignored by MLflow
        assert 400 <= status < 500
        assert set(reply) == {"error_code", "message"}
    assert SECRET[:12] not in json.dumps(reply)
    assert len(json.dumps(reply)) <= 1000
    assert headers["Model-Version"] == "0"


@pytest.mark.parametrize(
    ("method", "target", "body", "headers", "status", "message"),
    [
        ("GET", "/nothing", None, {}, 404, "send photographs to /invocations"),
        ("GET", "/../../etc/passwd", None, {}, 404, "send photographs to /invocations"),
        ("GET", "/invocations", None, {}, 405, "with POST"),
        ("POST", "/", b"five", {}, 405, "with POST"),
        ("POST", "/corrections", FIVE, JSON, 404, "not found"),  # off by default
        ("POST", "/invocations", b"five", {}, 415, "not JSON"),
        ("POST", "/invocations", b"image\n?", {"Content-Type": "text/csv"}, 415, "application/json"),
        ("POST", "/invocations", gzip.compress(FIVE, mtime=0), JSON | {"Content-Encoding": "gzip"}, 415, "uncompressed"),
        ("POST", "/invocations", b"[", JSON, 400, "no table in JSON"),
        ("POST", "/invocations", records("refuse"), JSON, 400, "row 0: six fingers"),
        ("POST", "/invocations", records("fail"), JSON, 500, "the model failed (ValueError)"),
        ("POST", "/invocations", b'{"dataframe_records": [{"photo": "five"}]}', JSON, 400, "the column image"),
        ("POST", "/invocations", b'{"dataframe_records": [' + b"{}," * 100_000 + b"{}]}", JSON, 413, "one table"),
        ("POST", "/invocations", b" " * 7_000_000 + FIVE, JSON, 413, "one table"),
        ("POST", "/invocations", b"a" * 8_000_001, JSON, 413, "larger than 8 MB; send fewer or smaller photographs"),
        ("POST", "/invocations", iter([b"a" * 1_000_000] * 9), JSON, 413, "larger than 8 MB"),
    ],
)  # fmt: skip
def test_errors_are_json(
    shared: Endpoint, method: str, target: str, body: Any, headers: dict[str, str], status: int, message: str
) -> None:
    found, _, reply = shared.ask(method, target, body, headers)
    assert found == status, reply
    assert set(reply) == {"error_code", "message"}
    assert message in reply["message"]


@pytest.mark.parametrize("target", ["/ping", "/health", "/version", "/model", "/metrics", "/"])
def test_head_is_get(shared: Endpoint, target: str) -> None:
    status, headers, content = shared.ask("GET", target)
    assert (status, headers["Model-Version"]) == (200, "0")
    assert content
    status, headers, content = shared.ask("HEAD", target)
    assert (status, content) == (200, b"")


def test_page_headers_restrict_browser(shared: Endpoint) -> None:
    status, headers, content = shared.ask("GET", "/")
    assert status == 200
    assert content == (PAGE / "index.html").read_bytes()
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert not any("http" in sources or "unsafe" in sources or "*" in sources for sources in policy.values())
    assert headers["Permissions-Policy"].startswith("camera=(self)")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert shared.ask("GET", "/", headers={"If-None-Match": headers["ETag"]})[0] == 304
    assert shared.ask("GET", "/page.js", headers={"Accept-Encoding": "gzip"})[1]["Content-Encoding"] == "gzip"
    settings = shared.ask("GET", "/settings.json")[2]
    assert (settings["reads_hands"], settings["takes_corrections"], settings["needs_token"]) == (True, False, False)
    assert (settings["classes"], settings["examples"]) == (1, {})
    assert shared.ask("GET", "/examples/0")[0] == 404


def test_content_type_may_name_charset(shared: Endpoint) -> None:
    assert shared.post(FIVE, Content_Type="Application/JSON; charset=UTF-8")[0] == 200


def test_lost_client_cancels_request(shared: Endpoint, tmp_path: Path) -> None:
    body = records(str(tmp_path / "cancelled"))
    client = open_request(shared, body, len(body))
    time.sleep(0.5)
    client.close()
    wait_until((tmp_path / "cancelled").exists)
    wait_until(lambda: len((tmp_path / "cancelled").read_text()) == 32)  # the id of the request


def test_metrics_count_rows(shared: Endpoint) -> None:
    before = shared.metrics()
    assert shared.post(records("five", "five"))[0] == 200
    assert shared.post(records("noise"))[0] == 200
    assert shared.post(b"{")[0] == 400
    after = shared.metrics()
    added = {name: value - before.get(name, 0) for name, value in after.items()}
    assert added["signdigits_rows_total"] == 3
    assert added['signdigits_predictions_total{label="5"}'] == 2
    assert added["signdigits_outliers_total"] == 1
    assert added['signdigits_requests_total{status="200"}'] == 2
    assert added['signdigits_requests_total{status="400"}'] == 1
    assert added['signdigits_request_duration_seconds_count{version="0"}'] == 3
    assert after["signdigits_waiting_requests"] == 0


def test_counters_exist_from_start(folder: Path, tmp_path: Path) -> None:
    with answering(folder, tmp_path / "log") as found:
        metrics = found.metrics()
    for name in ('requests_total{status="200"}', 'predictions_total{label="5"}', "rows_total", "refusals_total"):
        assert metrics[f"signdigits_{name}"] == 0, "the server's own questions do not count"


def test_access_log_is_json(shared: Endpoint) -> None:
    log = shared.log.with_name("access.log")
    before = len(log.read_text().splitlines())
    _, headers, _ = shared.post(FIVE, Authorization=f"Bearer {SECRET}")
    shared.ask("GET", "/nothing?secret")
    answered, missed = map(
        json.loads,
        wait_until(lambda: log.read_text().splitlines()[before:][1:] and log.read_text().splitlines()[before:]),
    )
    assert (answered["path"], answered["status"], answered["version"]) == ("/invocations", 200, "0")
    assert answered["id"] == headers["X-Request-ID"]
    assert (missed["path"], missed["status"]) == ("/nothing", 404)
    assert SECRET not in log.read_text()


def test_slow_bodies_hold_nobody_up(shared: Endpoint) -> None:
    with contextlib.ExitStack() as clients:
        slow = [clients.enter_context(open_request(shared, b"{", 1000)) for _ in range(60)]
        started = time.monotonic()
        assert shared.post(FIVE)[0] == 200
        assert time.monotonic() - started < 30
        assert b" 408 " in slow[0].recv(1000)


def test_unfinished_bodies_exclude_nobody(shared: Endpoint) -> None:
    """Two clients hold as many bytes as a process takes; the larger of the bodies makes room."""
    with contextlib.ExitStack() as clients:
        first, _ = [clients.enter_context(open_request(shared, b"a" * 7_999_999, 8_000_000)) for _ in range(2)]
        assert shared.post(FIVE)[0] == 200
        assert b" 503 " in first.recv(1000)


@pytest.mark.parametrize("sent", [b"", b"POST /invoc", b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\nGET /pi"])
def test_silent_client_is_disconnected(shared: Endpoint, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=30) as slow:
        slow.sendall(sent)
        while slow.recv(1000):
            pass


def test_endless_head_is_cut_off(shared: Endpoint) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=30) as client:
        client.sendall(b"GET /ping HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            client.sendall(b"X: " + b"a" * 2 * MAX_HEAD + b"\r\n")
            assert client.recv(1000) == b""


def test_stuck_model_ends_process(folder: Path, tmp_path: Path) -> None:
    """After it has said that it is unhealthy; whoever has started it starts it again."""
    with answering(folder, tmp_path / "log", timeout=2, max_waiting=8) as found:
        assert found.ask("GET", "/health")[0] == 200
        with contextlib.ExitStack() as clients:

            def has_ended() -> bool:
                """Ask for more: a request that has timed out leaves its thread asleep, and the next one takes another."""
                with contextlib.suppress(OSError):
                    for _ in range(admission.SMALL_REQUESTS):
                        clients.enter_context(open_request(found, records("sleep"), len(records("sleep"))))
                return found.process.poll() == 1

            wait_until(has_ended, interval=1)
    assert "version 0 has not answered for 2 seconds: exiting" in found.said()


def test_full_queue_returns_503(folder: Path, tmp_path: Path) -> None:
    with answering(folder, tmp_path / "log", max_waiting=2) as found, contextlib.ExitStack() as clients:
        body = records("sleep")
        for _ in range(admission.SMALL_REQUESTS + 2):
            clients.enter_context(open_request(found, body, len(body)))
        wait_until(lambda: found.metrics()["signdigits_waiting_requests"] == 2)
        status, headers, reply = found.post(FIVE)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert reply["error_code"] == "TEMPORARILY_UNAVAILABLE"
        large = json.dumps({"dataframe_records": [{"image": "a" * admission.LARGE_BODY}]}).encode()
        found.process.kill()
        assert len(large) > admission.LARGE_BODY


def test_large_requests_leave_small_ones_a_turn(shared: Endpoint) -> None:
    large = records("sleep", "a" * admission.LARGE_BODY)
    with contextlib.ExitStack() as clients:
        for _ in range(admission.SMALL_REQUESTS):
            clients.enter_context(open_request(shared, large, len(large)))
        assert shared.post(FIVE)[0] == 200


@pytest.fixture
def token(tmp_path: Path) -> str:
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    return str(file)


def test_bearer_token_is_required(folder: Path, tmp_path: Path, token: str) -> None:
    with answering(folder, tmp_path / "log", token_file=token, corrections=tmp_path / "kept") as found:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {SECRET.lower()}"}):
            status, headers, reply = found.post(FIVE, **given)
            assert (status, headers["WWW-Authenticate"], reply["error_code"]) == (401, "Bearer", "UNAUTHENTICATED")
            assert found.ask("POST", "/corrections", b"{}", JSON | given)[0] == 401
        assert {found.ask("GET", f"/{name}")[0] for name in ("version", "metrics", "model")} == {401}
        assert {found.ask("GET", target)[0] for target in ("/ping", "/health", "/", "/settings.json")} == {200}
        assert found.post(FIVE, Authorization=f"bearer {SECRET}")[0] == 200
        photograph = tmp_path / "five.jpg"
        photograph.write_bytes(b"five")
        line = [sys.executable, "-m", "signdigits.serving.client", str(photograph), "--url", found.url]
        asked = subprocess.run(line, capture_output=True, text=True)
        assert (asked.returncode, "missing or wrong token" in asked.stderr) == (2, True)
        for options, environment in ((["--token_file", token], {}), ([], {"SIGN_DIGITS_TOKEN": SECRET})):
            asked = subprocess.run([*line, *options], capture_output=True, text=True, env=os.environ | environment)
            assert "missing or wrong token" not in asked.stderr


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A certificate for localhost, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    place = tmp_path_factory.mktemp("tls")
    files = {"certificate": str(place / "certificate.pem"), "key": str(place / "key.pem")}
    line = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    line += ["-keyout", files["key"], "-out", files["certificate"], "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*line, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    return files


def test_https_with_certificate(folder: Path, tmp_path: Path, certificate: dict[str, str]) -> None:
    with answering(folder, tmp_path / "log", **certificate) as found:
        trusted = ssl.create_default_context(cafile=certificate["certificate"])
        with contextlib.closing(http.client.HTTPSConnection("localhost", found.port, context=trusted)) as connection:
            connection.request("POST", "/invocations", FIVE, JSON)
            assert connection.getresponse().status == 200


def test_wrong_pair_is_refused_at_once(certificate: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "serve",
        "--port",
        str(free_port()),
        "--certificate",
        certificate["key"],
        "--key",
        certificate["certificate"],
    ]
    assert cli.main(line) == 2
    assert "give the PEM files of one pair" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "short", "with a space in it, and long", "x" * 600])
def test_weak_token_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(UsageError, match=r"16 or more letters.*secrets.token_hex"):
        read_token(str(tmp_path / "token"))
    with pytest.raises(UsageError, match="cannot be read"):
        read_token(str(tmp_path / "missing"))


def test_certificate_needs_key() -> None:
    with pytest.raises(UsageError, match="give both, or neither"):
        ServeParameters(certificate="certificate.pem")
