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

BASE = "localhost/sign-digits-test-slim"  # kept for the next run: 45 s
NAME, IMAGE = "Sign Digits (test)", "sign-digits-test"  # the registered model, and what its image is called
BILL = PROJECT / "exported" / f"{IMAGE}-1.cdx.json"
INCLUDED = "--include=python3,python3-venv,ca-certificates,usr-is-merged"
# As in Debian's slim images: no documentation, and no perl, which mmdebstrap needs to merge /usr.
WITHOUT = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale")]
WITHOUT += ['--customize-hook=chroot "$1" apt-get purge --quiet=2 --yes usrmerge perl "^perl-modules" "^libperl5"']
# The way to this machine's package registry.
HOST_FILES = [path for path in ("/etc/pip.conf", "/etc/ssl/certs") if Path(path).exists()]
ENVIRONMENT = {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot", "BUILDER": "buildah"}

# Runs a command of the image as a platform does: process 1 of its own, a user without rights, nothing but /tmp to write to.
# Arguments: the image's root, then the command.
START = """
set -e
root=$1
shift
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
exec chroot --userspec=10001:10001 "$root" "$@"
"""


def run(*line: str, **environment: str) -> str:
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | ENVIRONMENT | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@dataclass(frozen=True)
class Container:
    """A container of the image with version 1 baked in, and the tracking server that the image was built from."""

    root: str
    image: Any  # its configuration
    tracking: str
    request: bytes

    @contextmanager
    def started(self, log: Path, *options: str, **environment: str) -> Iterator["Endpoint"]:
        """Run the server with more options of its command; end it as a platform does."""
        port = free_port()
        line = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            START,
            "sh",
            self.root,
            "env",
            "-i",
        ]
        line += [*self.image["Env"], *(f"{name}={value}" for name, value in environment.items())]
        line += [*self.image["Entrypoint"], "--host", "127.0.0.1", "--port", str(port), *options]
        with log.open("w") as file:
            process = subprocess.Popen(line, stdout=file, stderr=file)
        try:
            wait_until(lambda: "is live" in log.read_text() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            (server,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield Endpoint(process, int(server), port)
            os.kill(int(server), signal.SIGTERM)
            process.wait(90)
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Endpoint:
    process: subprocess.Popen[bytes]
    server: int  # process 1 of the container
    port: int

    def check_health(self, command: list[str]) -> int:
        """Return the exit code of a command in the container."""
        line = ["nsenter", f"--target={self.server}", "--mount", "--pid", "--root", "--wd", "env", "-i", *command]
        return subprocess.run(line).returncode

    def ask(self, method: str, target: str, body: bytes = b"") -> tuple[int, str, Any]:
        """Status, version and JSON of a reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, target, body, {"Content-Type": "application/json"} if body else {})
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply.status, reply.getheader("Model-Version", ""), json.loads(content) if body else content


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
                mlflow.register_model(uri, NAME)
            promote(1)
            yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def promote(version: int) -> None:
    mlflow.MlflowClient().set_registered_model_alias(NAME, "champion", str(version))


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
    build = [str(PROJECT / "scripts" / "image"), f"models:/{NAME}@champion", "--build-arg", f"BASE={BASE}", *volumes]
    output = run(*build, MLFLOW_TRACKING_URI=tracking)
    assert f"an image cannot be called '{NAME}': it is called {IMAGE}" in output
    assert output.endswith(f"built {IMAGE}:1")
    name = run("buildah", "from", "--pull-never", f"{IMAGE}:1")
    photograph = next(loaded.dataset.folder.rglob("*.JPG")).read_bytes()
    request = {"dataframe_records": [{"image": base64.b64encode(photograph).decode()}]}
    image = json.loads(run("buildah", "inspect", name))["Docker"]["config"]
    try:
        yield Container(run("buildah", "mount", name), image, tracking, json.dumps(request).encode())
    finally:
        run("buildah", "rm", name)
        run("buildah", "rmi", f"{IMAGE}:1")
        BILL.unlink(missing_ok=True)


def size(name: str) -> float:
    """Return the megabytes of an image."""
    return float(re.fullmatch(r"([0-9.]+) MB", run("buildah", "images", "--format", "{{.Size}}", name))[1])  # type: ignore[index]


def test_image_is_small(container: Container) -> None:
    assert size(f"{IMAGE}:1") < 450
    left = [
        path for folder in ("var/cache/apt", "var/lib/apt/lists") for path in Path(container.root, folder).rglob("*")
    ]
    assert not [path for path in left if path.is_file() and path.stat().st_size > 1000]
    packages = next(Path(container.root).glob("opt/sign-digits/lib/python3*/site-packages"))
    assert not list(packages.rglob("tests"))
    assert (packages / "pandas" / "__pycache__").is_dir()


def test_labels_tell_version_and_source(container: Container) -> None:
    labels = container.image["Labels"]
    assert labels["model.name"] == labels["org.opencontainers.image.title"] == NAME
    assert labels["model.version"] == labels["org.opencontainers.image.version"] == "1"
    assert re.fullmatch("[0-9a-f]{64}", labels["model.sha256"])
    commit = run("git", "-C", str(PROJECT), "rev-parse", "HEAD")
    assert labels["org.opencontainers.image.revision"].removesuffix("-dirty") == commit
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert "@" not in labels.get("org.opencontainers.image.source", "")


@pytest.mark.skipif(not Path(sys.executable).with_name("syft").exists(), reason="needs the extra .[deploy]")
def test_bill_of_materials_lists_packages(container: Container) -> None:
    bill = json.loads(BILL.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    listed = {part["purl"].partition("?")[0] for part in bill["components"] if "purl" in part}
    pins = re.findall(r"^([\w-]+)==(\S+)", (PROJECT / "deploy" / "requirements.txt").read_text(), re.MULTILINE)
    assert {f"pkg:pypi/{name}@{version}" for name, version in pins} <= listed
    assert any(purl.startswith("pkg:deb/debian/python3") for purl in listed)


def test_baked_version_needs_no_registry(container: Container, tmp_path: Path) -> None:
    with container.started(tmp_path / "log", MLFLOW_TRACKING_URI="http://127.0.0.1:9") as endpoint:
        status, version, reply = endpoint.ask("POST", "/invocations", container.request)
        assert (status, version) == (200, "1")
        assert reply["predictions"][0]["label"] in {"0", "1", "2"}
        assert [endpoint.ask("GET", path)[0] for path in ("/", "/ping", "/health")] == [200] * 3
        assert b"\nsigndigits_served_version 1.0\n" in endpoint.ask("GET", "/metrics")[2]
        assert endpoint.ask("GET", "/invocations")[0] == 405
        kind, *health = container.image["Healthcheck"]["Test"]
        assert kind == "CMD"
        assert endpoint.check_health([*container.image["Env"], *health]) == 0
        assert re.search(r"^Uid:\s+10001\s+10001", Path(f"/proc/{endpoint.server}/status").read_text(), re.MULTILINE)
        assert subprocess.run(["touch", f"/proc/{endpoint.server}/root/written"], capture_output=True).returncode
    assert endpoint.process.returncode == 0
    assert (tmp_path / "log").read_text().splitlines()[-1] == "stopped"


def test_image_follows_alias(container: Container, tmp_path: Path) -> None:
    following = ("--supervise", "true", "--model_uri", "", "--model_name", NAME, "--poll_interval", "0.2")
    with container.started(tmp_path / "log", *following, MLFLOW_TRACKING_URI=container.tracking) as endpoint:
        assert endpoint.ask("POST", "/invocations", container.request)[:2] == (200, "1")
        promote(2)
        wait_until(lambda: endpoint.ask("POST", "/invocations", container.request)[1] == "2")
