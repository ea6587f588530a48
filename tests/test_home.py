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
import pandas as pd
import pytest

from signdigits import home
from signdigits.config import MODEL_NAME, SERVED_MODEL, PredictParameters, SourceParameters
from signdigits.errors import UsageError
from signdigits.tracking import urls

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


def test_inputs_are_found_where_the_command_started(working: Path) -> None:
    """Under `mlflow run` the project's folder, then the home; outputs belong to the home."""
    start = Path.cwd()
    for folder in ("photographs", "more", "handwritten-digits"):
        Path(folder).mkdir()
    home.enter_home()
    given = [
        SourceParameters(data="photographs"),
        SourceParameters(data="handwritten-digits,more,elsewhere"),
        PredictParameters(images="photographs", output="more"),
    ]
    joined, several, batch = home.find_inputs(given, start)
    assert joined.data == f"{working}/clone/photographs"
    assert several.data == f"handwritten-digits,{working}/clone/more,elsewhere"
    assert (batch.images, batch.output) == (f"{working}/clone/photographs", "more")
    assert home.find_inputs(given, Path.cwd()) == given


def test_scripts_are_those_of_the_checkout(working: Path) -> None:
    home.enter_home()
    store = f"MLFLOW_TRACKING_URI=sqlite:///{working}/elsewhere/mlflow.db"
    assert urls.script_command("serve") == f"{store} {PROJECT}/scripts/serve"
    os.chdir(PROJECT)
    assert urls.script_command("serve") == "scripts/serve"


def test_environment_names_home(working: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(home.HOME, str(working / "new"))
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    home.enter_home()
    assert Path.cwd() == working / "new"
    assert mlflow.get_tracking_uri() == f"sqlite:///{working}/clone/mlflow.db", "the store does not move"


def test_relative_home_is_refused(working: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(home.HOME, "here")
    with pytest.raises(UsageError, match="SIGN_DIGITS_HOME=here: must be an absolute path"):
        home.enter_home()


def test_relative_store_is_refused(working: Path) -> None:
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    with pytest.raises(UsageError, match=r"write sqlite:////FOLDER/mlflow\.db"):
        home.enter_home()


def test_temporary_clone_is_refused(working: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    home.enter_home()
    assert Path.cwd() == working / "clone", "a checkout"
    monkeypatch.setattr(tempfile, "tempdir", str(working))
    os.chdir(tempfile.mkdtemp())
    with pytest.raises(UsageError, match="set SIGN_DIGITS_HOME to a folder that keeps them"):
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
        wait_until(lambda: not subprocess.run(["git", "ls-remote", url], capture_output=True).returncode)
        yield url
    finally:
        os.killpg(daemon.pid, signal.SIGTERM)
        daemon.wait(30)


@pytest.mark.slow
def test_git_address_continues_after_kill(tmp_path: Path, repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts from an empty folder, in two clones: the second continues the first, killed in its second trial."""
    folder, clones = tmp_path / "folder", tmp_path / "clones"
    write_photographs(folder / "bars")
    clones.mkdir()
    monkeypatch.setenv("TMPDIR", str(clones))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "anywhere")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)  # of an earlier test's set_experiment
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    values = {
        "data": "bars", "image_size": 16, "batch_size": 8, "epochs": "6:8", "initial_learning_rate": "1e-3:5e-3", "n_trials": 2,
        "space": "notebook", "n_seeds": 1, "memory_budget": 0,
    }  # fmt: skip
    line = [sys.executable, "-m", "mlflow", "run", repository, "-e", "main", "--env-manager", "local"]
    line += [word for name, value in values.items() for word in ("-P", f"{name}={value}")]

    first = subprocess.Popen(line, cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL)
    wait_until(lambda: count_trials(folder)["RUNNING"] == 1 and count_trials(folder).total() == 2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    cached = {path: path.stat().st_mtime_ns for path in (folder / "data").rglob("*") if path.is_file()}
    assert len(cached) == 60

    again = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "test accuracy" in again.stdout
    assert "oneDNN" not in again.stderr
    assert f"mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db" in again.stdout
    assert count_trials(folder) == {"COMPLETE": 2, "FAIL": 1}
    assert all(path.stat().st_mtime_ns == written for path, written in cached.items()), "each is decoded once"
    kept = {path.name for path in folder.iterdir() if path.suffix != ".lock"}
    assert kept == {"bars", "data", "mlflow.db", "mlruns", "optuna.db"}
    assert not {"data", "mlflow.db", "mlruns", "optuna.db"} & {path.name for path in clones.glob("*/*")}
    with use_store(folder):
        check_recorded_job()
        photograph = (folder / "bars" / "1" / "IMG_0007.JPG").read_bytes()
        reply = mlflow.pyfunc.load_model(SERVED_MODEL).predict(pd.DataFrame({"image": [photograph]}))
        assert reply["label"].tolist() == ["1"]


def check_recorded_job() -> None:
    """Assert the runs of the two starts, and the tags of the champion."""
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    roles = Counter(run.data.tags["role"] for run in runs if run.info.status == "FINISHED")
    assert roles == {"study": 1, "trial": 2, "refit": 1, "resume": 1}
    by_role = {run.data.tags["role"]: run for run in runs}
    assert by_role["resume"].data.metrics == {"trials_added": 1}
    for run in runs:
        if run.data.tags["role"] in ("trial", "refit") and run.info.status == "FINISHED":
            assert run.data.tags["mlflow.parentRunId"] == by_role["study"].info.run_id
            assert float(run.data.params["initial_learning_rate"]) > 0
            assert {"decay_rate", "epochs"} <= set(run.data.params)
    champion = mlflow.MlflowClient().get_model_version_by_alias(MODEL_NAME, "champion")
    evaluated = {"val_accuracy", "test_accuracy", "test_images"}
    assert {"study", "trial", "dataset_digest", "split", "git_commit", *evaluated} <= set(champion.tags)
    assert str(champion.version) == "1"
    card = mlflow.artifacts.load_text(f"runs:/{by_role['study'].info.run_id}/MODEL_CARD.md")
    assert card == champion.description
    assert "mlflow run . -e main --env-manager local -P data=" in card
    assert "-P epochs=6:8" in card


def count_trials(folder: Path) -> Counter[str]:
    """Return the number of trials by state; empty before there is a study."""
    try:
        with closing(sqlite3.connect(f"file:{folder}/optuna.db?mode=ro", uri=True)) as connection:
            return Counter(state for (state,) in connection.execute("SELECT state FROM trials"))
    except sqlite3.OperationalError:
        return Counter()
