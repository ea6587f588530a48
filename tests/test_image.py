"""The image, built on a Debian made by mmdebstrap, and started: a baked version, and one that follows the alias."""

import base64
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest

from signdigits.config import MODEL_NAME
from signdigits.data import loading
from signdigits.packaging import package
from signdigits.tracking import runs

from .conftest import PROJECT, answers, free_port, use_store, wait_until


def can_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.image,
    pytest.mark.skipif(
        not (shutil.which("buildah") and shutil.which("mmdebstrap")), reason="needs buildah and mmdebstrap"
    ),
    pytest.mark.skipif(not can_mount(), reason="buildah and mmdebstrap need root, and the right to mount"),
]

BASE = "localhost/sign-digits-test-base"  # kept for the next run: 45 s
IMAGE = "localhost/sign-digits-test"
INCLUDED = "--include=python3,python3-venv,ca-certificates"
WITHOUT = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale")]  # as in a slim image
# The way to this machine's package registry.
HOST_FILES = [path for path in ("/etc/pip.conf", "/etc/ssl/certs") if Path(path).exists()]
ENVIRONMENT = {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot", "BUILDER": "buildah", "IMAGE": IMAGE}


def run(*line: str, **environment: str) -> str:
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | ENVIRONMENT | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@dataclass(frozen=True)
class Container:
    """A container of the image with version 1 baked in, and the tracking server that the image was built from."""

    name: str
    tracking: str
    request: bytes

    @contextmanager
    def started(self, log: Path, *options: str, **environment: str) -> Iterator["Endpoint"]:
        """Run the server with more options of its command; end it as a platform does."""
        port = free_port()
        line = [*self.entrypoint(), "--host", "127.0.0.1", "--port", str(port), *options]
        variables = [part for name, value in environment.items() for part in ("--env", f"{name}={value}")]
        with log.open("w") as file:
            process = subprocess.Popen(
                ["buildah", "run", *variables, self.name, "--", *line],
                stdout=file, stderr=file, env=os.environ | ENVIRONMENT,
            )  # fmt: skip
        try:
            wait_until(lambda: "is live" in log.read_text() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield Endpoint(process, port)
        finally:
            for pid in server_pids(port):
                os.kill(pid, signal.SIGTERM)
            process.wait(90)

    def entrypoint(self) -> list[str]:
        line: list[str] = json.loads(run("buildah", "inspect", self.name))["OCIv1"]["config"]["Entrypoint"]
        return line


@dataclass(frozen=True)
class Endpoint:
    process: subprocess.Popen[bytes]
    port: int

    def ask(self, method: str, target: str, body: bytes = b"") -> tuple[int, str, Any]:
        """Status, version and JSON of a reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, target, body, {"Content-Type": "application/json"} if body else {})
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply.status, reply.getheader("Model-Version", ""), json.loads(content) if body else content


def server_pids(port: int) -> list[int]:
    """The servers that listen on `port`, below buildah's own processes."""
    lines = {path: path.read_bytes().split(b"\0") for path in Path("/proc").glob("[0-9]*/cmdline")}
    return [
        int(path.parts[2])
        for path, line in lines.items()
        if str(port).encode() in line and line[0].endswith(b"/python") and line[1:3] == [b"-m", b"signdigits"]
    ]


@pytest.fixture(scope="module")
def tracking(
    tmp_path_factory: pytest.TempPathFactory,
    empty_store: Path,
    loaded: loading.Data,
    model_files: Callable[[float], Path],
) -> Iterator[str]:
    """A tracking server with versions 1, the champion, and 2 of an untrained model."""
    folder = tmp_path_factory.mktemp("tracking")
    shutil.copy(empty_store, folder / "mlflow.db")
    port = free_port()
    line = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    line += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    with (folder / "server.log").open("w") as file:
        server = subprocess.Popen(
            line, stdout=file, stderr=file, cwd=folder, start_new_session=True,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(f"{url}/health") or server.poll() is not None)
        with use_store(folder), pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", url)
            mlflow.set_tracking_uri(url)
            mlflow.set_experiment("image")
            with runs.start_run("train", "train"):
                uri = package.log_files(model_files(1.0), loaded, {"temperature": 1.0}).model_uri
            for _ in range(2):
                mlflow.register_model(uri, MODEL_NAME)
            promote(1)
            yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def promote(version: int) -> None:
    mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, "champion", str(version))


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory, tracking: str, loaded: loading.Data) -> Iterator[Container]:
    if not run("buildah", "images", "--quiet", "--filter", f"reference={BASE}"):
        archive = tmp_path_factory.mktemp("base") / "base.tar"
        run("mmdebstrap", "--quiet", "--variant=minbase", INCLUDED, *WITHOUT, "bookworm", str(archive))
        empty = run("buildah", "from", "scratch")
        run("buildah", "add", empty, str(archive), "/")
        run("buildah", "commit", "--rm", "--quiet", empty, BASE)
        archive.unlink()
    volumes = [part for path in HOST_FILES for part in ("--volume", f"{path}:{path}:ro")]
    uri = f"models:/{MODEL_NAME}@champion"
    build = [str(PROJECT / "scripts" / "image"), uri, "--build-arg", f"BASE={BASE}", *volumes]
    assert run(*build, MLFLOW_TRACKING_URI=tracking).endswith(f"built {IMAGE}:1")
    name = run("buildah", "from", "--pull-never", f"{IMAGE}:1")
    photograph = next(loaded.dataset.folder.rglob("*.JPG")).read_bytes()
    request = {"dataframe_records": [{"image": base64.b64encode(photograph).decode()}]}
    try:
        yield Container(name, tracking, json.dumps(request).encode())
    finally:
        run("buildah", "rm", name)
        run("buildah", "rmi", f"{IMAGE}:1")


def test_image_is_small(container: Container) -> None:
    size = run("buildah", "images", "--format", "{{.Size}}", f"{IMAGE}:1")
    assert float(re.fullmatch(r"([0-9.]+) MB", size)[1]) < 600  # type: ignore[index]


def test_baked_version_needs_no_registry(container: Container, tmp_path: Path) -> None:
    with container.started(tmp_path / "log", MLFLOW_TRACKING_URI="http://127.0.0.1:9") as endpoint:
        status, version, reply = endpoint.ask("POST", "/invocations", container.request)
        assert (status, version) == (200, "1")
        assert reply["predictions"][0]["label"] in {"0", "1", "2"}
        assert [endpoint.ask("GET", path)[0] for path in ("/", "/ping", "/health")] == [200] * 3
        assert b"\nsigndigits_served_version 1.0\n" in endpoint.ask("GET", "/metrics")[2]
        assert endpoint.ask("GET", "/invocations")[0] == 405
        (server,) = server_pids(endpoint.port)
        assert re.search(r"^Uid:\s+10001\s+10001", Path(f"/proc/{server}/status").read_text(), re.MULTILINE)
    assert endpoint.process.returncode == 0
    assert (tmp_path / "log").read_text().splitlines()[-1] == "stopped"
    written = run("buildah", "run", "--user", "root", container.name, "--", "find", "/", "-xdev", "-user", "10001")
    assert all(path.startswith("/tmp") for path in written.splitlines()), (
        "or the root file system could not be read-only"
    )


def test_image_follows_alias(container: Container, tmp_path: Path) -> None:
    following = ("--supervise", "true", "--model_uri", "", "--poll_interval", "0.2")
    with container.started(tmp_path / "log", *following, MLFLOW_TRACKING_URI=container.tracking) as endpoint:
        assert endpoint.ask("POST", "/invocations", container.request)[:2] == (200, "1")
        promote(2)
        wait_until(lambda: endpoint.ask("POST", "/invocations", container.request)[1] == "2")
