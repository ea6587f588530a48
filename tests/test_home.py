"""The home folder, and a whole job that `mlflow run` starts from a git address, in a folder of its own."""

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlflow
import pytest

from signdigits import home
from signdigits.errors import TrackingError

from .conftest import PROJECT, free_port, use_store, wait_until, write_photographs


@pytest.fixture
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder, under a SQLite store in another, as `mlflow run` starts a command in a clone."""
    monkeypatch.delenv(home.HOME, raising=False)
    for name in ("clone", "elsewhere"):
        (tmp_path / name).mkdir()
    with use_store(tmp_path / "clone"):
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/elsewhere/mlflow.db")
        monkeypatch.setenv("MLFLOW_RUN_ID", "0")
        (tmp_path / "elsewhere" / "mlflow.db").touch()
        yield tmp_path


def test_home_is_folder_of_store(working: Path) -> None:
    home.enter_home()
    assert Path.cwd() == working / "elsewhere"


def test_direct_command_stays(working: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_RUN_ID")
    home.enter_home()
    assert Path.cwd() == working / "clone"


def test_environment_names_home(working: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(home.HOME, str(working / "new"))
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    home.enter_home()
    assert Path.cwd() == working / "new"
    assert mlflow.get_tracking_uri() == f"sqlite:///{working}/clone/mlflow.db", "the store does not move"


def test_relative_home_is_refused(working: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(home.HOME, "here")
    with pytest.raises(TrackingError, match="SIGN_DIGITS_HOME=here: must be an absolute path"):
        home.enter_home()


def test_relative_store_is_refused(working: Path) -> None:
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    with pytest.raises(TrackingError, match=r"write sqlite:////FOLDER/mlflow\.db"):
        home.enter_home()


def test_temporary_clone_is_refused(working: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    home.enter_home()
    assert Path.cwd() == working / "clone", "a checkout"
    monkeypatch.setattr(tempfile, "tempdir", str(working))
    os.chdir(tempfile.mkdtemp())
    with pytest.raises(TrackingError, match="set SIGN_DIGITS_HOME to a folder that keeps them"):
        home.enter_home()


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[str]:
    """Serve this working tree as a git repository on loopback, and yield its address."""
    served = tmp_path / "served" / "project"
    served.mkdir(parents=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for line in (
        ["cp", "-r", *(str(PROJECT / name) for name in ("MLproject", "conda.yaml", "requirements.txt", "src")), "."],
        ["git", "init", "--quiet", "."],
        ["git", "add", "."],
        ["git", *identity, "commit", "--quiet", "--message", "Everything"],
    ):
        subprocess.run(line, cwd=served, check=True)
    port = free_port()
    line = ["git", "daemon", "--export-all", f"--base-path={served.parent}", "--listen=127.0.0.1", f"--port={port}"]
    daemon = subprocess.Popen(line, start_new_session=True, stderr=subprocess.DEVNULL)
    url = f"git://127.0.0.1:{port}/project"
    try:
        wait_until(lambda: not subprocess.run(["git", "ls-remote", url], capture_output=True).returncode, seconds=30)
        yield url
    finally:
        os.killpg(daemon.pid, signal.SIGTERM)
        daemon.wait(30)


@pytest.mark.slow
def test_git_address_continues_after_kill(tmp_path: Path, repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts from an empty folder, in two clones: the second continues the first, which was killed in its second trial."""
    folder, clones = tmp_path / "folder", tmp_path / "clones"
    write_photographs(folder / "bars")
    clones.mkdir()
    monkeypatch.setenv("TMPDIR", str(clones))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "anywhere")
    values = {
        "data": "bars", "image_size": 16, "batch_size": 16, "space": "notebook", "n_trials": 2, "n_seeds": 1, "pruner": "none",
        "memory_budget": 0,
    }  # fmt: skip
    line = [sys.executable, "-m", "mlflow", "run", repository, "-e", "main", "--env-manager", "local"]
    line += [word for name, value in values.items() for word in ("-P", f"{name}={value}")]

    first = subprocess.Popen(line, cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL)
    wait_until(lambda: count_trials(folder) == {"COMPLETE": 1, "RUNNING": 1} or first.poll() is not None, seconds=300)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    cached = {path: path.stat().st_mtime_ns for path in (folder / "data").rglob("*.npy")}
    assert len(cached) == 1

    again = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db" in again.stdout
    assert count_trials(folder) == {"COMPLETE": 2, "FAIL": 1}
    assert {path: path.stat().st_mtime_ns for path in (folder / "data").rglob("*.npy")} == cached, "decoded once"
    assert {path.name for path in folder.iterdir()} == {"bars", "data", "mlflow.db", "mlruns", "optuna.db"}
    assert not [
        path for path in clones.rglob("*") if path.name in ("data", "optuna.db", "mlruns") and "src" not in path.parts
    ]
    with use_store(folder):
        runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
        roles = Counter(run.data.tags["role"] for run in runs)
        assert roles == {"study": 1, "resume": 1, "trial": 3, "refit": 1}
        assert mlflow.MlflowClient().get_model_version_by_alias("sign-digits", "champion").version == "1"


def count_trials(folder: Path) -> Counter[str]:
    """Return the number of trials by state; empty before there is a study."""
    try:
        with closing(sqlite3.connect(f"file:{folder}/optuna.db?mode=ro", uri=True)) as connection:
            return Counter(state for (state,) in connection.execute("SELECT state FROM trials"))
    except sqlite3.OperationalError:
        return Counter()
