"""The server and its processes: promotions, refusals, kills and restarts."""

import base64
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, DataType, Schema

from signdigits import cli, serve
from signdigits.config import MODEL_NAME
from signdigits.data import loading
from signdigits.packaging.reply import FIELDS
from signdigits.serving.follower import REASON, STATE, find_served
from signdigits.serving.options import ServeParameters

from .conftest import (
    PROJECT,
    answers,
    free_port,
    log_untrained,
    serve_command,
    settings_of_others,
    store_like,
    wait_until,
)
from .endpoint import Endpoint, descendants, is_alive, serving_endpoint
from .load import Load

pytestmark = pytest.mark.slow

# Models that must not be served: one raises, one cannot be loaded by a server, one ends the process that it is loaded in.
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
CRASHES = """
import os
import signal
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Crashes(PythonModel):
    def load_context(self, context):
        if "SIGN_DIGITS_VERSION" in os.environ:
            os.kill(os.getpid(), signal.SIGSEGV)

    def predict(self, context, model_input, params=None):
        return model_input

set_model(Crashes())
"""


@dataclass(frozen=True)
class Registry:
    """A store with two versions that can be served, 1 and 2, and three that cannot, 3 to 5; and a photograph."""

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
        for code in (RAISES, DOES_NOT_START, CRASHES):
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


@pytest.fixture(scope="module")
def server(registry: Registry) -> Iterator[Endpoint]:
    move(1)
    with serving_endpoint(registry.folder / "server.log", "--processes", "2", cwd=registry.folder) as found:
        yield found


@pytest.fixture
def first(server: Endpoint, registry: Registry) -> Endpoint:
    """The server, with version 1 live."""
    promote(server, registry, 1)
    return server


def promote(server: Endpoint, registry: Registry, version: int) -> None:
    """Move the alias and wait until its version answers from both processes."""
    move(version)
    wait_until(lambda: {server.version(registry.request) for _ in range(8)} == {str(version)})


def statuses(load: Load) -> set[int]:
    """Those of all replies so far, with 0 for a connection that was refused or broken."""
    return {reply.status for reply in load.replies}


def test_shadow_gets_copies(registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    move(1)
    client = mlflow.MlflowClient()
    client.delete_registered_model_alias(MODEL_NAME, "challenger")
    options = ["--shadow", "challenger", "--shadow_share", "1"]
    log = tmp_path / "log"
    with serving_endpoint(
        tmp_path / "server.log", *options, cwd=registry.folder, SIGN_DIGITS_PREDICTION_LOG=str(log)
    ) as server:
        wait_until(lambda: "sign-digits has no challenger yet" in server.said())
        client.set_registered_model_alias(MODEL_NAME, "challenger", "2")
        wait_until(lambda: "version 2 gets 100 % of the requests" in server.said())

        def both_answered() -> bool:
            assert server.version(registry.request) == "1"
            lines = [json.loads(line) for file in log.glob("*") for line in file.read_text().splitlines()]
            return {line["version"] for line in lines} == {"1", "2"}

        wait_until(both_answered)
        for _ in range(3):
            server.version(registry.request)
        time.sleep(1)  # the shadow is slower
        written = len("".join(file.read_text() for file in log.glob("*")).splitlines())
        assert server.post(registry.request, Live_Frame="1")[0] == 200
        time.sleep(1)
        assert len("".join(file.read_text() for file in log.glob("*")).splitlines()) == written, "a visitor's camera"
        metrics = server.metrics()
        assert 1 <= metrics["signdigits_shadow_agreements_total"] <= metrics["signdigits_shadow_rows_total"]
        assert server.said().count("has no challenger yet") == 1
    options = ["--prediction_log", str(log), "--shadow", "true", "--min_predictions", "2"]
    assert cli.main(["monitor", *options]) == 0
    assert "version 1 and its shadow, version 2, agree on" in caplog.text


def test_killed_parent_leaves_no_orphans(registry: Registry, tmp_path: Path) -> None:
    move(2)
    with serving_endpoint(tmp_path / "killed.log", cwd=registry.folder) as server:
        wait_until(lambda: tags(2).get(STATE) == "live")
        below = descendants(server.process.pid)
        server.process.kill()
        wait_until(lambda: not any(map(is_alive, below)))
    move(3)
    temporary = tmp_path / ("batch-system-" * 8)
    temporary.mkdir()
    others = settings_of_others(tmp_path) | {"TMPDIR": str(temporary)}
    with serving_endpoint(tmp_path / "again.log", cwd=registry.folder, **others) as server:
        assert server.version(registry.request) == "2"
        assert "version 3 is refused" in server.said()


def test_one_version_is_served_without_registry(registry: Registry, tmp_path: Path) -> None:
    source = mlflow.artifacts.download_artifacts(f"models:/{MODEL_NAME}/2", dst_path=str(tmp_path / "model"))
    options = ["--supervise", "false", "--model_uri", source]
    with serving_endpoint(tmp_path / "log", *options, MLFLOW_TRACKING_URI="sqlite:////nowhere/mlflow.db") as server:
        assert server.version(registry.request) == "2"
        assert server.ask("GET", "/model")[2]["version"] == "2"
        assert descendants(server.process.pid) == set(), "one process"


def test_broken_version_is_not_served_alone(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"models:/{MODEL_NAME}/3"
    assert cli.main(["serve", "--supervise", "false", "--port", str(free_port()), "--model_uri", uri]) == 2
    assert "version 3 cannot be served: it answers its own input example with" in capsys.readouterr().err


def test_every_reply_names_version(first: Endpoint, registry: Registry) -> None:
    status, headers, reply = first.post(registry.request)
    assert (status, headers["Model-Version"]) == (200, "1")
    assert set(reply["predictions"][0]) == {field.name for field in FIELDS if field.is_required}
    assert first.post(b'{"dataframe_records": [{"image": "?"}]}')[1]["Model-Version"] == "1"
    assert first.post(b"[" * 100_000)[1]["Model-Version"] == "1"
    known = first.ask("GET", "/model")[2]
    assert (known["version"], known["alias"], known["classes"]) == ("1", "champion", ["0", "1", "2"])


@pytest.mark.parametrize(
    ("version", "reason"),
    [(3, "six fingers"), (4, "No module named 'no_such_module'"), (5, "its process ended (killed by signal 11)")],
)
def test_broken_version_is_refused(first: Endpoint, registry: Registry, version: int, reason: str) -> None:
    workers = first.workers()
    with Load(first.port, registry.request) as load:
        move(version)
        wait_until(lambda: f"version {version} is refused" in first.said())
        wait_until(lambda: tags(version).get(STATE) == "refused")
        time.sleep(1)
    assert reason in tags(version)[REASON]
    assert {reply.version for reply in load.replies} == {"1"}
    assert statuses(load) == {200}
    starts = 1 if version == 3 else 2  # one that does not start is tried once more
    assert first.said().count(f"starting version {version}\n") == starts
    assert first.workers() == workers


def test_server_waits_for_first_version(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    parameters = ServeParameters(alias="staging", wait_for_version=True, poll_interval=0.05)
    found: list[str] = []
    waiting = threading.Thread(target=lambda: found.append(str(find_served(parameters).version)), daemon=True)
    with caplog.at_level(logging.INFO, "signdigits"):
        waiting.start()
        wait_until(lambda: "waiting for a version: sign-digits has no staging" in caplog.text)
        mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, "staging", "2")
        waiting.join(60)
    assert found == ["2"]
    assert len(caplog.records) == 1
    mlflow.MlflowClient().delete_registered_model_alias(MODEL_NAME, "staging")


def test_used_port_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}: Address already in use; stop the process that listens there" in capsys.readouterr().err


def test_killed_process_is_restarted(first: Endpoint, registry: Registry) -> None:
    """Even while the registry does not reply: its database is locked, and MLflow waits."""
    victim, other = first.workers()
    database = sqlite3.connect(registry.folder / "mlflow.db")
    with contextlib.closing(database) as locked, Load(first.port, registry.request) as load:
        locked.execute("BEGIN EXCLUSIVE")
        time.sleep(1)  # the next look waits
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(set(first.workers()) - {victim}) == 2)
        wait_until(lambda: "does not reply" in first.said())
    broken = [reply for reply in load.replies if reply.status != 200]
    assert len(broken) <= 4, "none but those that the process was working on"
    assert first.metrics()["signdigits_restarts_total"] >= 1
    assert other in first.workers()


def test_hung_process_is_replaced(registry: Registry, tmp_path: Path) -> None:
    move(1)
    with serving_endpoint(tmp_path / "log", cwd=registry.folder) as server:
        (victim,) = server.workers()
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda: server.workers() and victim not in server.workers())
        assert server.version(registry.request) == "1"


def test_hangup_reads_token_and_certificate_anew(registry: Registry, tmp_path: Path) -> None:
    move(1)
    token = tmp_path / "token"
    token.write_text("first-token-0123456789")
    with serving_endpoint(tmp_path / "log", "--token_file", str(token), cwd=registry.folder) as server:

        def status(secret: str) -> int:
            return server.post(registry.request, Authorization=f"Bearer {secret}")[0]

        assert (status("first-token-0123456789"), status("other-token-0123456789")) == (200, 401)
        token.write_text("other-token-0123456789")
        server.process.send_signal(signal.SIGHUP)
        seen = set()

        def is_known() -> bool:
            seen.add(status("other-token-0123456789"))
            return 200 in seen

        wait_until(is_known)
        assert seen <= {200, 401}, "no connection is refused"
        wait_until(lambda: {status("first-token-0123456789") for _ in range(4)} == {401})


def test_new_server_takes_over(registry: Registry, tmp_path: Path) -> None:
    move(1)
    with serving_endpoint(tmp_path / "old", cwd=registry.folder) as old:
        line = serve_command(old.port, "--max_body_mb", "32")
        with Load(old.port, registry.request) as load, (tmp_path / "new").open("w") as file:
            new = subprocess.Popen(line, stdout=file, stderr=file, cwd=registry.folder)
            try:
                assert old.process.wait(120) == 0
                time.sleep(1)
            finally:
                load.ended.set()
                new.terminate()
        assert "in place of the server that runs there" in (tmp_path / "new").read_text()
        assert statuses(load) <= {200, 0}
        assert sum(reply.status == 0 for reply in load.replies[:-4]) <= 4
        assert new.wait(60) == 0


@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx")
def test_nginx_in_front_repeats_and_limits(first: Endpoint, registry: Registry, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "access.log"
    text = (PROJECT / "deploy" / "nginx.conf").read_text()
    for given, own in (
        ("listen 8080", f"listen 127.0.0.1:{port}"), ("127.0.0.1:5001", f"127.0.0.1:{first.port}"),
        ("/run/sign-digits-nginx.pid", f"{tmp_path}/pid"), ("/dev/stdout", str(log)), ("worker_processes auto", "daemon off"),
    ):  # fmt: skip
        assert given in text
        text = text.replace(given, own)
    unlimited = re.sub(
        "rate=5r/s|connections 16", lambda found: {"r": "rate=900r/s"}.get(found[0][0], "connections 99"), text
    )
    for name, written in (("unlimited", unlimited), ("limited", text)):
        (tmp_path / name).write_text(written)
        with subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", str(tmp_path / name)]) as nginx:
            try:
                wait_until(lambda: answers(f"http://127.0.0.1:{port}/ping"))
                if name == "unlimited":
                    with Load(port, registry.request) as load:
                        time.sleep(1)
                        os.kill(first.workers()[0], signal.SIGKILL)
                        wait_until(lambda: len(first.workers()) == 2)
                    assert statuses(load) == {200}
                else:
                    front = replace(first, port=port)
                    replies = [front.post(registry.request) for _ in range(40)]
                    assert {status for status, _, _ in replies} == {200, 429}
                    _, headers, reply = next(reply for reply in replies if reply[0] == 429)
                    assert (headers["Retry-After"], reply["error_code"]) == ("1", "REQUEST_LIMIT_EXCEEDED")
                    assert all(front.ask("GET", "/")[0] == 200 for _ in range(12)), "the page is more than one file"
            finally:
                nginx.terminate()
    answered = json.loads(log.read_text().splitlines()[-1])
    assert (answered["status"], answered["version"]) == (200, "1")


def test_promotion_and_rollback_fail_no_request(first: Endpoint, registry: Registry) -> None:
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
    wait_until(lambda: tags(1)[STATE] == "live")
    assert tags(2)[STATE] == "retired"


def versions_from_now(load: Load) -> set[str]:
    """Return the versions that answer the requests of the next second."""
    start = time.monotonic()
    time.sleep(1)
    return {reply.version for reply in load.replies.copy() if reply.sent > start}


def test_metrics_are_merged(first: Endpoint, registry: Registry) -> None:
    promote(first, registry, 2)
    before = first.metrics()
    for _ in range(20):  # to either process
        first.post(registry.request)
    metrics = first.metrics()
    assert metrics['signdigits_requests_total{status="200"}'] - before['signdigits_requests_total{status="200"}'] == 20
    assert metrics["signdigits_promotions_total"] >= 1
    assert metrics["signdigits_served_version"] == 2


def test_unreachable_model_is_waited_for(first: Endpoint, registry: Registry) -> None:
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
    wait_until(lambda: {first.version(registry.request) for _ in range(8)} == {"2"})
    wait_until(lambda: tags(2)[STATE] == "live")
    wait_until(lambda: first.metrics()["signdigits_alias_served"] == 1)


@pytest.mark.parametrize(("host", "within"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("::", False)])
def test_loopback_is_recognized(host: str, within: bool) -> None:
    assert serve.is_loopback(host) == within
