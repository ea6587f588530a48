"""Interference with files, stores and terminals: the rows of docs/what-happens-if.md."""

import dataclasses
import os
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from signdigits import cli, evaluate, register, search, train
from signdigits.config import (
    DataParameters,
    Hyperparameters,
    ModelParameters,
    NameParameters,
    StudyParameters,
    VersionParameters,
)
from signdigits.data import loading
from signdigits.errors import DataError, UsageError
from signdigits.model import training
from signdigits.tracking import registry, runs
from signdigits.tuning.space import Range, Space

from .conftest import command, settings_of_others, use_store, wait_until, write_photographs

pytestmark = pytest.mark.slow

SPACE = Space.of("notebook", epochs=Range(1, 2), batch_size=16)
STUDY = StudyParameters(n_trials=1, pruner="none", space="notebook")


def during_the_first_trial(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have somebody act on the stores when the first trial has been fitted."""
    fits, original = [], training.fit_network

    def fit(*arguments: object, **options: object) -> training.Fit:
        fitted = original(*arguments, **options)  # type: ignore[arg-type]
        fits.append(fitted)
        if len(fits) == 1:
            act()
        return fitted

    monkeypatch.setattr(training, "fit_network", fit)


def find_runs(role: str) -> list[mlflow.entities.Run]:
    return runs.search_runs(f"tags.role = '{role}'", run_view_type=mlflow.entities.ViewType.ALL)


@pytest.mark.parametrize("what", ["study", "experiment"])
def test_deleted_study_ends_search(
    store: str, loaded: loading.Data, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    seen = []

    def delete() -> None:
        seen.extend(find_runs("study"))
        if what == "study":
            mlflow.delete_run(seen[0].info.run_id)
        else:
            mlflow.delete_experiment(seen[0].info.experiment_id)

    during_the_first_trial(monkeypatch, delete)
    with pytest.raises(UsageError, match=r"was deleted.* restore it with `mlflow runs restore --run-id"):
        search.search(loaded, SPACE, STUDY)
    monkeypatch.undo()
    (study,) = seen
    if what == "study":
        mlflow.MlflowClient().restore_run(study.info.run_id)
    else:
        mlflow.MlflowClient().restore_experiment(study.info.experiment_id)
    again = search.search(loaded, SPACE, STUDY)
    assert again.run_id == study.info.run_id
    assert [trial.state.name for trial in again.study.trials].count("COMPLETE") == 1


def test_deleted_trial_fails_alone(store: str, loaded: loading.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    during_the_first_trial(monkeypatch, lambda: mlflow.delete_run(find_runs("trial")[-1].info.run_id))
    opened = search.search(loaded, SPACE, STUDY)
    assert [trial.state.name for trial in opened.study.trials] == ["FAIL", "COMPLETE"]


def test_lost_store_names_remedy(store: str, loaded: loading.Data, tmp_path: Path) -> None:
    search.search(loaded, SPACE, STUDY)
    with use_store(tmp_path / "..") as uri:
        mlflow.set_tracking_uri(f"{uri}.new")
        mlflow.set_experiment("tests")
        os.chdir(tmp_path)
        with pytest.raises(
            UsageError, match=r"Run with id=.* not found; .* begin anew: a search with another --study_name"
        ):
            search.search(loaded, SPACE, STUDY)
        with search.open_study(loaded, SPACE, dataclasses.replace(STUDY, study_name="anew")) as anew:
            assert runs.find_run(anew.run_id).data.tags["study"] == "anew"


def test_changed_photograph_is_named(store: str, tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bars")
    loaded = loading.load_data(DataParameters(data=str(folder), image_size=16))
    run_id = train.train(loaded, Hyperparameters(epochs=1))
    first = folder / loaded.dataset.photographs[loaded.split.testing[0]].path

    def check(message: str) -> None:
        with runs.start_run("evaluate", "evaluate"), pytest.raises(DataError, match=f"{first.name}: {message}"):
            evaluate.score_model(registry.find_model(run_id, ""), loaded.dataset, loaded.split)

    first.rename(tmp_path / "elsewhere.jpg")
    check("No such file.*restore it")
    Image.new("RGB", (24, 24)).save(first)
    check("has changed since the folder was scanned")


@pytest.mark.parametrize("statement", ["DROP TABLE runs", "ALTER TABLE runs RENAME TO _alembic_tmp_runs"])
def test_incomplete_store_is_reported(
    tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str], statement: str
) -> None:
    """A store as a start leaves it that is killed while MLflow creates its tables."""
    database = tmp_path / "killed.db"
    shutil.copy(empty_store, database)
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")  # an early step
        connection.execute(statement)
    connection.close()
    with use_store(tmp_path):
        mlflow.set_tracking_uri(f"sqlite:///{database}")
        assert cli.main(["show"]) == 2
    errors = capsys.readouterr().err
    assert "incomplete tables" in errors
    assert "remove the file" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.outage)])
def test_killed_start_leaves_no_partial_store(tmp_path: Path, number: int) -> None:
    environment = os.environ | {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    line = [sys.executable, "-m", "signdigits", "show"]
    first = subprocess.Popen(line, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: list(tmp_path.glob(".mlflow.db-*/mlflow.db")) or first.poll() is not None)
    first.send_signal(number)
    first.wait()
    done = command("show", cwd=tmp_path, env=environment)
    assert "no version is registered; run scripts/quickstart" in done.stderr


@pytest.mark.parametrize(
    ("start", "alive"),
    [("", True), ("its own", True), ("00000000-1", False), ("another-boot", False)],
)
def test_process_identity_includes_start(start: str, alive: bool) -> None:
    """In a container every command is process 1."""
    start = start.replace("its own", runs.process_start(os.getpid()))
    assert runs.is_alive(f"{platform.node()}:{os.getpid()}:{start}") == alive


def test_mlflow_settings_lose_nothing(store: str, photographs: Path, tmp_path: Path) -> None:
    settings = settings_of_others(tmp_path) | {
        "MLFLOW_ENABLE_ASYNC_LOGGING": "true",
        "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "30",
    }
    line = ["search", "--data", str(photographs), "--image_size", "16", "--space", "notebook", "--n_trials", "1"]
    done = command(*line, "--epochs", "3", env=settings)
    assert done.returncode == 0, done.stderr
    for run in find_runs("trial"):
        assert {"initial_learning_rate", "decay_rate", "epochs"} <= set(run.data.params)
        assert len(mlflow.MlflowClient().get_metric_history(run.info.run_id, "val_loss")) == 3


@pytest.mark.parametrize(("params", "steps"), [({"epochs": 3, "dropout": 0.5}, 1), ({"epochs": 3}, 2)])
def test_unrecorded_metrics_fail_the_run(store: str, params: dict[str, float], steps: int) -> None:
    with runs.start_run("train", "train"):
        mlflow.log_param("epochs", 3)
        mlflow.log_metric("val_accuracy", 0.5, step=0)
        with pytest.raises(UsageError, match=f"MLflow recorded 1 of {steps} values of val_accuracy"):
            runs.check_recorded(params, "val_accuracy", steps)


def test_closed_pipe_is_ignored(store: str, photographs: Path, tmp_path: Path) -> None:
    settings = settings_of_others(tmp_path)
    line = f"{sys.executable} -u -m signdigits prepare --data {photographs} --image_size 16 | true"
    done = subprocess.run(["bash", "-c", line], text=True, capture_output=True, timeout=120, env=settings)
    assert "Logging error" not in done.stderr
    assert "Traceback" not in done.stderr
    (run,) = find_runs("prepare")
    assert run.info.status == "FINISHED"
    assert "data/sample.png" in list_artifacts(run, "data")


@pytest.mark.parametrize("error", [RuntimeError("six\nfingers"), MlflowException("no such table")])
def test_unexpected_error_is_one_line(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(parameters: NameParameters) -> None:
        with runs.start_run("train", "train"):
            raise error

    monkeypatch.setattr(register, "show_champion", fail)
    assert cli.main(["show"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"signdigits show: {type(error).__name__}: ")
    assert f"/runs/{find_runs('train')[0].info.run_id}" in line
    file = Path(line.partition("the traceback is in ")[2].partition(";")[0])
    assert "Traceback" in file.read_text()
    file.unlink()


def test_class_names_stay_text(store: str, tmp_path: Path) -> None:
    """Names of files and classes, through report, mistakes, MLflow's evaluation, pictures and tables."""
    folder = write_photographs(tmp_path / "bars", classes=6)
    for number, name in enumerate(("None", "NA", "accuracy", "cheap$$", "under_$score^2$", "pipe|and`tick`")):
        (folder / str(number)).rename(folder / name)
        for path in (folder / name).iterdir():
            path.rename(path.with_stem(f"{path.stem}{name}"))
    assert cli.main(["prepare", "--data", str(folder), "--image_size", "16"]) == 0
    (report,) = find_runs("prepare")
    assert "data/sample.png" in list_artifacts(report, "data")
    loaded = loading.load_data(DataParameters(data=str(folder), image_size=16))
    for epochs, rate in ((1, 1e-7), (10, 3e-3)):
        run_id = train.train(loaded, Hyperparameters(epochs=epochs, initial_learning_rate=rate, batch_size=8))
        scores = evaluate.evaluate(loaded.parameters, ModelParameters(run_id=run_id))
        decision = register.register(ModelParameters(run_id=run_id), VersionParameters(significance_level=0.5))
    first, _ = find_runs("evaluate")
    assert {"test/worst_mistakes.png", "test/per_class.csv"} <= list_artifacts(first, "test")
    assert scores.test_accuracy == 1
    assert decision.comparison is not None
    table = decision.comparison.contingency_table
    assert table.both + table.challenger_only == scores.test_images


def list_artifacts(run: mlflow.entities.Run, folder: str) -> set[str]:
    return {item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id, folder)}


def test_every_format_is_accepted(store: str, tmp_path: Path) -> None:
    """The served model accepts every format of the data set."""
    folder = write_photographs(tmp_path / "bars")
    for number, suffix in enumerate((".webp", ".bmp", ".gif", ".tif", ".png")):
        for path in sorted((folder / "0").glob("*.JPG"))[: 4 if number < 4 else None]:
            Image.open(path).save(path.with_suffix(suffix))
            path.unlink()
    loaded = loading.load_data(DataParameters(data=str(folder), image_size=16))
    run_id = train.train(loaded, Hyperparameters(epochs=1))
    scores = evaluate.evaluate(loaded.parameters, ModelParameters(run_id=run_id))
    assert scores.test_images == len(loaded.split.testing)


def test_data_url_is_accepted(champion: str, photographs: Path) -> None:
    import base64

    text = base64.b64encode((photographs / "1" / "IMG_0000.JPG").read_bytes()).decode()
    served = mlflow.pyfunc.load_model("models:/sign-digits@champion")
    plain, url, named = (
        served.predict([{"image": image}])["label"][0]
        for image in (text, f"data:image/jpeg;base64,{text}", f"data:image/jpeg;name=a.jpg;base64,{text}")
    )
    assert plain == url == named
