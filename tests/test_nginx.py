"""nginx in front of one worker, with different configurations."""

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest

from signdigits.config import MODEL_NAME
from signdigits.data import loading
from signdigits.errors import UsageError
from signdigits.packaging.reply import FIELDS
from signdigits.serving import nginx, supervisor
from signdigits.serving.options import ServeParameters
from signdigits.serving.processes import Process
from signdigits.serving.worker_pool import WorkerPool
from signdigits.tracking import registry

from .conftest import free_port, store_like, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx")]

JSON = {"Content-Type": "application/json"}
SECRET = "Open-Sesame.0123456789"


@dataclass(frozen=True)
class Front:
    port: int

    def ask(self, method: str, target: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers and content of a reply; JSON is read."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, target, body, named)
            reply = connection.getresponse()
            content = reply.read()
            return reply.status, reply.headers, json.loads(content) if content.startswith(b"{") else content

    def post(self, body: bytes, **headers: str) -> tuple[int, Any, Any]:
        return self.ask("POST", "/invocations", body, **{"Content_Type": "application/json", **headers})


@dataclass(frozen=True)
class Model:
    """A pool with one process that answers for version 1, in a home that the link leads to it in."""

    home: Path
    pool: WorkerPool
    request: bytes
    photograph: Path

    @contextmanager
    def behind(self, parameters: ServeParameters | None = None) -> Iterator[Front]:
        """nginx before it."""
        chosen = replace(parameters or ServeParameters(), port=free_port())
        token = nginx.read_token(chosen.token_file) if chosen.token_file else ""
        (self.home / "nginx.conf").write_text(nginx.render_configuration(chosen, self.home, token))
        front = Process("nginx", ["nginx", "-p", str(self.home), "-c", str(self.home / "nginx.conf")])
        try:
            wait_until(lambda: supervisor.is_listening(chosen) or not front.running)
            assert front.running, front.exit_reason()
            yield Front(chosen.port)
        finally:
            front.signal(signal.SIGTERM)
            wait_until(front.has_exited)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, loaded: loading.Data, champion_store: Path) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("front")
    with store_like(champion_store, folder), tempfile.TemporaryDirectory() as home:
        version = mlflow.MlflowClient().get_model_version_by_alias(MODEL_NAME, registry.CHAMPION)
        nginx.make_home(Path(home))
        copy = Path(mlflow.artifacts.download_artifacts(version.source, dst_path=str(folder)))
        answering = WorkerPool("blue", version, copy, ServeParameters(), Path(home))
        try:
            wait_until(answering.is_ready)
            answering.check_health()
            nginx.point_live(Path(home), "blue")
            photograph = next(loaded.dataset.folder.rglob("*.JPG"))
            rows = [{"image": base64.b64encode(photograph.read_bytes()).decode()}]
            request = json.dumps({"dataframe_records": rows}).encode()
            yield Model(Path(home), answering, request, photograph)
        finally:
            answering.signal(signal.SIGTERM)
            wait_until(answering.have_exited)


@pytest.fixture(scope="module")
def plain(model: Model) -> Iterator[Front]:
    with model.behind() as found:
        yield found


@pytest.fixture
def token(tmp_path: Path) -> str:
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    return str(file)


def test_reply_names_version(plain: Front, model: Model) -> None:
    status, headers, reply = plain.post(model.request)
    assert status == 200
    assert headers["Model-Version"] == "1"
    assert set(reply["predictions"][0]) == {field.name for field in FIELDS if field.is_required}


@pytest.mark.parametrize("target", ["/ping", "/health", "/version"])
def test_mlflow_errors_pass_through(plain: Front, target: str) -> None:
    status, headers, content = plain.ask("GET", target)
    assert (status, headers["Model-Version"]) == (200, "1")
    if target == "/version":
        assert content == mlflow.__version__.encode()


def test_page_headers_restrict_browser(plain: Front) -> None:
    status, headers, content = plain.ask("GET", "/")
    assert status == 200
    assert content == (nginx.PAGE / "index.html").read_bytes()
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert not any("http" in sources or "unsafe" in sources or "*" in sources for sources in policy.values())
    assert headers["Permissions-Policy"].startswith("camera=(self)")
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("method", "target", "body", "headers", "status", "message"),
    [
        ("GET", "/nothing", None, {}, 404, "send photographs to /invocations"),
        ("GET", "/.errors/413", None, {}, 404, "send photographs to /invocations"),
        ("GET", "/../../etc/passwd", None, {}, 400, "malformed HTTP"),
        ("GET", "/invocations", None, {}, 405, "with POST"),
        ("POST", "/", b"five", {}, 405, "with POST"),
        ("POST", "/invocations", b"five", {}, 415, "not JSON"),
        ("POST", "/invocations", b"image\n?", {"Content_Type": "text/csv"}, 415, "application/json"),
        ("POST", "/invocations", b"[", JSON, 400, "valid JSON"),
        ("POST", "/invocations", b"[" * 100_000, JSON, 400, "nested too deeply"),
        ("POST", "/invocations", b'{"a": ' + b"9" * 5000 + b"}", JSON, 400, "too many digits"),
        ("POST", "/invocations", b'{"dataframe_records": [{"image": "?"}]}', JSON, 400, "row 0: not base64"),
        ("POST", "/invocations", b"{}", JSON | {"Transfer-Encoding": "x"}, 400, "unknown Transfer-Encoding"),
        ("GET", "/", None, {"Range": "bytes=9999999-"}, 416, "range not satisfiable"),
        ("GET", "/ping", None, {"X": "a" * 9000}, 431, "headers are too large"),
        ("GET", "/" + "a" * 9000, None, {}, 414, "URL is too long"),
    ],
)  # fmt: skip
def test_errors_are_json(
    plain: Front, method: str, target: str, body: bytes | None, headers: dict[str, str], status: int, message: str
) -> None:
    named = {name.replace("-", "_"): value for name, value in headers.items()}
    found, _, reply = plain.ask(method, target, body, **named)
    assert found == status, reply
    assert {"error_code", "message"} <= set(reply)
    assert message in reply["message"]
    assert "stack_trace" not in reply
    assert "Traceback" not in json.dumps(reply)


def test_client_headers_are_dropped(plain: Front, model: Model) -> None:
    """MLflow refuses parameters of the content type, and answers none with a stack trace: the front sends its own."""
    assert plain.post(model.request, Content_Type="Application/JSON; charset=UTF-8")[0] == 200
    assert plain.post(model.request, Content_Encoding="gzip", Connection="close, x", Host="?")[0] in (200, 400)


def test_large_body_is_refused_early(model: Model) -> None:
    with model.behind(ServeParameters(max_body_mb=1)) as found:
        status, _, reply = found.post(b" " * 1_100_000)
        assert (status, reply["error_code"]) == (413, "BAD_REQUEST")
        assert "larger than 1 MB; send fewer or smaller photographs" in reply["message"]
        assert found.post(b" " * 900_000 + model.request)[0] == 200


def test_bearer_token_is_required(model: Model, token: str) -> None:
    with model.behind(ServeParameters(token_file=token)) as found:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {SECRET.lower()}"}):
            status, headers, reply = found.post(model.request, **given)
            assert (status, headers["WWW-Authenticate"], reply["error_code"]) == (401, "Bearer", "UNAUTHENTICATED")
        assert found.ask("GET", "/version")[0] == found.ask("GET", "/metrics")[0] == 401
        assert found.ask("GET", "/ping")[0] == found.ask("GET", "/")[0] == 200
        assert found.post(model.request, Authorization=f"Bearer {SECRET}")[0] == 200


def test_scripts_ask_sends_token(model: Model, token: str) -> None:
    with model.behind(ServeParameters(token_file=token)) as found:
        line = [sys.executable, "-m", "signdigits.serving.client", str(model.photograph)]
        line += ["--url", f"http://127.0.0.1:{found.port}"]
        ways: list[tuple[list[str], dict[str, str]]] = [
            ([], {}),
            (["--token_file", token], {}),
            ([], {"SIGN_DIGITS_TOKEN": SECRET}),
        ]
        for (options, environment), code in zip(ways, (2, 0, 0), strict=True):
            asked = subprocess.run([*line, *options], capture_output=True, text=True, env=os.environ | environment)
            assert asked.returncode == code, asked.stderr
            assert ("missing or wrong token" in asked.stderr) == (code == 2)


def test_rate_limit_returns_429(model: Model) -> None:
    with model.behind(ServeParameters(requests_per_second=1, burst=3)) as found:
        replies = [found.post(model.request) for _ in range(12)]
        assert [status for status, _, _ in replies[:4]] == [200] * 4
        status, headers, reply = next(reply for reply in replies if reply[0] != 200)
        assert (status, headers["Retry-After"], reply["error_code"]) == (429, "1", "REQUEST_LIMIT_EXCEEDED")
        assert all(found.ask("GET", "/")[0] == 200 for _ in range(12)), "the page is more than one file"


@pytest.mark.parametrize(
    "sent", [b"POST /invoc", b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"]
)
def test_silent_client_is_disconnected(model: Model, sent: bytes) -> None:
    sent = sent.replace(b"Host: x\r\n", b"Host: x\r\nContent-Type: application/json\r\n")
    with model.behind(ServeParameters(client_timeout=1)) as found:
        with socket.create_connection(("127.0.0.1", found.port), timeout=30) as slow:
            slow.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                assert b" 200 " not in slow.recv(1000)
        assert found.post(model.request)[0] == 200


def test_connection_limit_returns_429(model: Model) -> None:
    with model.behind(ServeParameters(connections_per_client=1)) as found:
        head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(model.request)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", found.port), timeout=30) as first:
            first.sendall(head.encode())
            wait_until(lambda: found.post(model.request)[0] == 429)
            first.sendall(model.request)
            assert b" 200 " in first.recv(100)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A certificate for localhost, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    files = {"certificate": str(folder / "certificate.pem"), "key": str(folder / "key.pem")}
    line = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    line += ["-keyout", files["key"], "-out", files["certificate"], "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*line, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    return files


def test_https_with_certificate(model: Model, certificate: dict[str, str]) -> None:
    with model.behind(ServeParameters(**certificate)) as proxy:  # type: ignore[arg-type]
        trusted = ssl.create_default_context(cafile=certificate["certificate"])
        with contextlib.closing(http.client.HTTPSConnection("localhost", proxy.port, context=trusted)) as connection:
            connection.request("POST", "/invocations", model.request, JSON)
            assert connection.getresponse().status == 200
        status, _, reply = proxy.post(model.request)
        assert (status, reply["message"]) == (400, "plain HTTP sent to an HTTPS port; use https://")


def test_access_log_omits_token(model: Model, token: str, tmp_path: Path) -> None:
    log = tmp_path / "access log"
    with model.behind(ServeParameters(access_log=str(log), token_file=token)) as found:
        found.post(model.request, Authorization=f"Bearer {SECRET}")
        found.ask("GET", "/nothing")
    answered, missed = log.read_text().splitlines()
    assert '"POST /invocations HTTP/1.1" 200' in answered
    assert answered.endswith("version=1")
    assert '"GET /nothing HTTP/1.1" 404' in missed
    assert SECRET not in log.read_text()


def test_hung_worker_is_restarted(model: Model) -> None:
    (member,) = model.pool.workers
    with model.behind(ServeParameters(timeout=2)) as found:
        assert found.post(model.request)[0] == 200
        member.process.signal(signal.SIGSTOP)
        status, _, reply = found.post(model.request)
        assert (status, reply["error_code"]) == (504, "DEADLINE_EXCEEDED")
        stopped = member.process
        while member.process is stopped:
            member.restart_if_dead(timeout=3)
            time.sleep(0.1)
        status, headers, reply = found.post(model.request)
        assert (status, headers["Retry-After"], reply["error_code"]) == (503, "1", "TEMPORARILY_UNAVAILABLE")
        wait_until(lambda: found.post(model.request)[0] == 200)


def test_live_link_moves_atomically(tmp_path: Path) -> None:
    nginx.make_home(tmp_path)
    assert (tmp_path / "live").readlink().name == nginx.NO_POOL
    for name in nginx.POOLS:
        nginx.point_live(tmp_path, name)
        assert (tmp_path / "live").resolve() == (tmp_path / name).resolve()


@pytest.mark.parametrize(("names", "digits"), [(["0", "9"], True), (["0", "10"], False), (["fist", "palm"], False)])
def test_page_knows_whether_classes_are_digits(tmp_path: Path, names: list[str], digits: bool) -> None:
    nginx.make_home(tmp_path)
    (tmp_path / "model" / "artifacts").mkdir(parents=True)
    (tmp_path / "model" / nginx.SETTINGS).write_text(json.dumps({"class_names": names}))
    nginx.write_page_settings(tmp_path, ServeParameters(corrections="corrections"), tmp_path / "model")
    settings = json.loads((tmp_path / "page" / "settings.json").read_text())
    assert (settings["reads_digits"], settings["takes_corrections"]) == (digits, True)


@pytest.mark.parametrize("text", ["", "short", "with a space in it, and long", "x" * 600])
def test_weak_token_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(UsageError, match=r"16 or more letters.*secrets.token_hex"):
        nginx.read_token(str(tmp_path / "token"))
    with pytest.raises(UsageError, match="cannot be read"):
        nginx.read_token(str(tmp_path / "missing"))


def test_certificate_needs_key() -> None:
    with pytest.raises(UsageError, match="give both, or neither"):
        ServeParameters(certificate="certificate.pem")


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("limits", [{}, {"requests_per_second": 5, "burst": 0}, {"connections_per_client": 2}])
@pytest.mark.parametrize(
    "others",
    [
        {},
        {"access_log": "/dev/null", "processes": 3, "max_body_mb": 1},
        {"host": "::1"},
        {"shadow": "challenger", "corrections": "corrections"},
    ],
)
@pytest.mark.parametrize("secret", ["", SECRET])
def test_nginx_accepts_configuration(
    certificate: dict[str, str], tmp_path: Path, tls: bool, limits: Any, others: Any, secret: str
) -> None:
    tls_options: Any = certificate if tls else {}
    options = ServeParameters(port=free_port(), **limits, **others, **tls_options)
    nginx.make_home(tmp_path)
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(nginx.render_configuration(options, tmp_path, secret))
    line = ["nginx", "-t", "-p", str(tmp_path), "-c", str(configuration)]
    checked = subprocess.run(line, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "warn" not in checked.stderr
