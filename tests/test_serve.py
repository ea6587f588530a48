"""The supervisor with nginx and `mlflow models serve`: promotions, refusals and kills."""

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, DataType, Schema

from signdigits import cli, serve
from signdigits.config import MODEL_NAME
from signdigits.data import loading
from signdigits.packaging.reply import FIELDS
from signdigits.serving.options import ServeParameters
from signdigits.serving.supervisor import REASON, STATE, is_listening

from .conftest import free_port, log_untrained, serve_command, settings_of_others, store_like, wait_until
from .load import JSON, Load

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx")]

# Models that must not be served: one raises, one cannot be loaded by a server.
RAISES = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Raises(PythonModel):
    def predict(self, context, model_input, params=None):
        raise ValueError("six fingers")

set_model(Raises())
"""
DOES_NOT_START = """
import os
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class DoesNotStart(PythonModel):
    def load_context(self, context):
        if "SIGN_DIGITS_VERSION" in os.environ:
            import no_such_module

    def predict(self, context, model_input, params=None):
        return model_input

set_model(DoesNotStart())
"""


@dataclass(frozen=True)
class Registry:
    """A store with two versions that can be served, 1 and 2, and two that cannot, 3 and 4; and a photograph."""

    store: str
    folder: Path
    request: bytes


@pytest.fixture(scope="module")
def registry(
    tmp_path_factory: pytest.TempPathFactory, loaded: loading.Data, empty_store: Path, model_files: Callable[..., Path]
) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("serve")
    with store_like(empty_store, folder) as store:
        for _ in range(2):
            mlflow.register_model(log_untrained(model_files(1.0), loaded).model_uri, MODEL_NAME)
        for code in (RAISES, DOES_NOT_START):
            register_broken(folder, code)
        photograph = next(loaded.dataset.folder.rglob("*.JPG")).read_bytes()
        request = {"dataframe_records": [{"image": base64.b64encode(photograph).decode()}]}
        yield Registry(store, folder, json.dumps(request).encode())


def register_broken(folder: Path, code: str) -> None:
    (folder / "broken.py").write_text(code)
    signature = ModelSignature(inputs=Schema([ColSpec(DataType.string, "image")]))
    with mlflow.start_run():
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(folder / "broken.py"),
            signature=signature,
            input_example=pd.DataFrame({"image": ["five"]}),
            pip_requirements=["mlflow"],
        )
    mlflow.register_model(info.model_uri, MODEL_NAME)


def move(version: int) -> None:
    mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, "champion", str(version))


def tags(version: int) -> dict[str, str]:
    return dict(mlflow.MlflowClient().get_model_version(MODEL_NAME, str(version)).tags)


@dataclass
class Server:
    """`python -m signdigits serve` on a free port."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def ask(self, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of the reply to a POST."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/invocations", body, JSON if headers is None else headers)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, json.loads(content)

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def version(self, body: bytes) -> str:
        status, headers, reply = self.ask(body)
        assert status == 200, reply
        return headers["model-version"]

    def processes(self, name: str) -> list[int]:
        """The processes below the supervisor whose command line holds `name`."""
        return [pid for pid in descendants(self.process.pid) if name in command_line(pid)]


@contextmanager
def started(registry: Registry, log: Path, *options: str, **environment: str) -> Iterator[Server]:
    port = free_port()
    line = serve_command(port, "--poll_interval", "0.2", "--start_timeout", "600", *options)
    with log.open("w") as file:
        process = subprocess.Popen(
            line, stdout=file, stderr=file, cwd=registry.folder, env=os.environ | environment, start_new_session=True
        )
    server = Server(process, port, log)
    try:
        wait_until(lambda: "ready after" in server.said() or process.poll() is not None)
        assert process.poll() is None, server.said()
        yield server
    finally:
        process.terminate()
        process.wait(90)


@pytest.fixture(scope="module")
def server(registry: Registry) -> Iterator[Server]:
    move(1)
    with started(registry, registry.folder / "server.log", "--processes", "2") as found:
        yield found


@pytest.fixture
def first(server: Server, registry: Registry) -> Server:
    """The server, with version 1 live."""
    promote(server, registry, 1)
    return server


def promote(server: Server, registry: Registry, version: int) -> None:
    """Move the alias and wait until its version answers and the one before has ended."""
    move(version)
    wait_until(lambda: server.version(registry.request) == str(version))
    wait_until(lambda: len(server.processes("serving.worker")) == 2)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def descendants(pid: int) -> set[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":  # dead, only not asked for yet
            parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, waiting = set(), [pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)
    return found


def alive(pids: set[int]) -> set[int]:
    def lives(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return {pid for pid in pids if lives(pid)}


def statuses(load: Load) -> set[int]:
    """Those of all replies so far, with 0 for a connection that was refused or broken."""
    return {reply.status for reply in load.replies}


def test_shadow_gets_copies(registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    move(1)
    mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, "challenger", "2")
    shadow = ["--shadow", "challenger", "--shadow_share", "1"]
    with started(
        registry, tmp_path / "server.log", *shadow, SIGN_DIGITS_PREDICTION_LOG=str(tmp_path / "log")
    ) as server:
        wait_until(lambda: "version 2 gets 100 % of the requests" in server.said())

        def both_answered() -> bool:
            assert server.version(registry.request) == "1"
            lines = [json.loads(line) for file in tmp_path.glob("log/*") for line in file.read_text().splitlines()]
            return {line["version"] for line in lines} == {"1", "2"}

        wait_until(both_answered)
        for _ in range(3):
            server.version(registry.request)
        (worker,) = [pid for pid in server.processes("serving.worker") if "--shadow" in command_line(pid)]
        os.kill(worker, signal.SIGSTOP)  # nobody feels that
        asked = time.monotonic()
        assert server.version(registry.request) == "1"
        assert time.monotonic() - asked < 30
    options = ["--prediction_log", str(tmp_path / "log"), "--shadow", "true", "--min_predictions", "2"]
    assert cli.main(["monitor", *options]) == 0
    assert "version 1 and its shadow, version 2, agree on" in caplog.text


def test_killed_supervisor_leaves_no_orphans(registry: Registry, tmp_path: Path) -> None:
    move(2)
    with started(registry, tmp_path / "killed.log") as server:
        wait_until(lambda: tags(2).get(STATE) == "live")
        # nginx, its worker process (which a reload replaces), and ours
        wait_until(lambda: len(descendants(server.process.pid)) >= 3)
        below = descendants(server.process.pid)
        (master,) = server.processes("nginx: master")
        home = command_line(master).partition(" -p ")[2].split()[0]
        server.process.kill()
        wait_until(lambda: not alive(below))
        shutil.rmtree(home)  # nobody was left to do that
    move(3)
    with started(registry, tmp_path / "again.log") as server:
        assert server.version(registry.request) == "2"
        assert "version 3 is refused" in server.said()


def test_unsupervised_server_ends_with_worker(registry: Registry, tmp_path: Path) -> None:
    options = ("--supervise", "false", "--model_uri", f"models:/{MODEL_NAME}/2")
    with started(registry, tmp_path / "log", *options) as server:
        assert server.version(registry.request) == "2"
        (worker,) = server.processes("signdigits.serving.worker")
        os.kill(worker, signal.SIGKILL)
        assert server.process.wait(60) == 2
    assert "blue-1 exited (killed by signal 9); start the server again" in server.said()


def test_unsupervised_server_refuses_broken_version(registry: Registry) -> None:
    line = [sys.executable, "-m", "signdigits", "serve", "--supervise", "false", "--port", str(free_port())]
    failed = subprocess.run(
        [*line, "--model_uri", f"models:/{MODEL_NAME}/3"], cwd=registry.folder, capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert "version 3 cannot be served: it replies to its own input example with 500" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_model_is_served_without_nginx(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    move(1)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "env"):
        (programs / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(programs))
    assert cli.main(["serve", "--requests_per_second", "5"]) == 2
    assert "requests_per_second=5: needs nginx" in capsys.readouterr().err
    port = free_port()
    environment = settings_of_others(tmp_path)
    alone = subprocess.Popen(
        serve_command(port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=registry.folder, env=environment
    )
    try:
        wait_until(lambda: is_listening(ServeParameters(port=port)) or alone.poll() is not None)
        assert Server(alone, port, tmp_path / "none").version(registry.request) == "1"
    finally:
        alone.terminate()
        output, _ = alone.communicate(timeout=60)
    assert "nginx is not installed, or not in PATH" in output.decode()


def test_every_reply_names_version(first: Server, registry: Registry) -> None:
    status, headers, reply = first.ask(registry.request)
    assert (status, headers["model-version"]) == (200, "1")
    assert set(reply["predictions"][0]) == {field.name for field in FIELDS if field.is_required}
    assert first.ask(b'{"dataframe_records": [{"image": "?"}]}')[1]["model-version"] == "1"
    assert first.ask(b"[" * 100_000)[1]["model-version"] == "1"


@pytest.mark.parametrize(("version", "reason"), [(3, "six fingers"), (4, "No module named 'no_such_module'")])
def test_broken_version_is_refused(first: Server, registry: Registry, version: int, reason: str) -> None:
    with Load(first.port, registry.request) as load:
        move(version)
        wait_until(lambda: f"version {version} is refused" in first.said())
        wait_until(lambda: tags(version).get(STATE) == "refused")
        wait_until(lambda: len(first.processes("serving.worker")) == 2)
        time.sleep(2)
    assert reason in tags(version)[REASON]
    assert {reply.version for reply in load.replies} == {"1"}
    assert statuses(load) == {200}
    starts = 1 if version == 3 else 2  # one that does not start is retried once
    assert first.said().count(f"starting version {version}\n") == starts


def test_used_port_is_reported(first: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--port", str(first.port)]) == 2
    assert (
        f"127.0.0.1:{first.port}: Address already in use; stop the process that listens there"
        in capsys.readouterr().err
    )


def test_killed_worker_is_restarted(first: Server, registry: Registry) -> None:
    """Even while the registry does not reply: its database is locked, and MLflow waits."""
    victim = first.processes("serving.worker")[0]
    database = sqlite3.connect(registry.folder / "mlflow.db")
    with contextlib.closing(database) as locked, Load(first.port, registry.request) as load:
        locked.execute("BEGIN EXCLUSIVE")
        time.sleep(1)  # the next poll waits
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(set(first.processes("serving.worker")) - {victim}) == 2)
        wait_until(lambda: "does not reply" in first.said())
    assert statuses(load) == {200}


def test_killed_nginx_is_restarted(first: Server, registry: Registry) -> None:
    (master,) = first.processes("nginx: master")
    os.kill(master, signal.SIGKILL)
    wait_until(lambda: set(first.processes("nginx: master")) - {master})
    wait_until(lambda: is_listening(ServeParameters(port=first.port)))
    assert first.version(registry.request) == "1"


def test_promotion_and_rollback_fail_no_request(first: Server, registry: Registry) -> None:
    """Not even an upload that began before the promotion."""
    blank = 1000  # JSON may begin with spaces, sent one by one here, so that the client does not count as silent
    with Load(first.port, registry.request) as load, socket.create_connection(("127.0.0.1", first.port)) as slow:
        head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {blank + len(registry.request)}\r\n"
        slow.sendall(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode())
        promotion = threading.Thread(target=promote, args=(first, registry, 2))
        promotion.start()
        while promotion.is_alive():
            slow.sendall(b" ")
            blank -= 1
            promotion.join(1)
        assert versions_from_now(load) == {"2"}
        slow.sendall(b" " * blank + registry.request)
        reply = slow.makefile("rb").read()
        promote(first, registry, 1)
        assert versions_from_now(load) == {"1"}
    assert statuses(load) == {200}
    assert reply.startswith(b"HTTP/1.1 200 ")
    assert b"model-version: 2" in reply
    assert tags(2)[STATE] == "retired"
    assert tags(1)[STATE] == "live"


def versions_from_now(load: Load) -> set[str]:
    """Return the versions that answer the requests of the next second."""
    start = time.monotonic()
    time.sleep(1)
    return {reply.version for reply in load.replies.copy() if reply.sent > start}


def test_metrics_are_merged(first: Server, registry: Registry) -> None:
    for _ in range(20):  # to either process
        first.ask(registry.request)
    metrics = first.metrics()
    assert metrics['signdigits_requests_total{status="200"}'] >= 20
    assert metrics["signdigits_promotions_total"] >= 1
    assert metrics["signdigits_served_version"] == 1


def test_unreachable_model_is_waited_for(first: Server, registry: Registry) -> None:
    model_id = mlflow.MlflowClient().get_model_version(MODEL_NAME, "2").source.rpartition("/")[2]
    artifacts = Path(mlflow.get_logged_model(model_id).artifact_location)
    away = artifacts.rename(artifacts.with_name("away"))
    try:
        move(2)
        wait_until(lambda: tags(2).get(STATE) == "waiting")
        assert "its model cannot be fetched" in tags(2)[REASON]
        assert first.version(registry.request) == "1"
        assert first.metrics()["signdigits_served_version"] == 1
        assert first.metrics()["signdigits_alias_served"] == 0
    finally:
        away.rename(artifacts)
    wait_until(lambda: first.version(registry.request) == "2")
    wait_until(lambda: tags(2)[STATE] == "live")
    assert first.metrics()["signdigits_alias_served"] == 1


@pytest.mark.parametrize(("host", "within"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("::", False)])
def test_loopback_is_recognized(host: str, within: bool) -> None:
    assert serve.is_loopback(host) == within
