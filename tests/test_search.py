import contextlib
import dataclasses
import io
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import pandas as pd
import pytest
from mlflow.entities import Run
from optuna.testing.pruners import DeterministicPruner
from optuna.trial import FrozenTrial, TrialState

from signdigits import search
from signdigits.config import StudyParameters
from signdigits.data import loading
from signdigits.errors import UsageError
from signdigits.model import training
from signdigits.tracking import runs
from signdigits.tuning import choice, storage, study
from signdigits.tuning.space import Range, Space

from .conftest import copy_stores, store_like, use_store, wait_until

pytestmark = pytest.mark.slow

SPACE = Space.of("notebook", epochs=Range(1, 3), batch_size=16)
EXTENDED = Space.of("extended", epochs=Range(1, 2), batch_size=Range(8, 16), conv_blocks=2, filters=Range(8, 9))
ONE = StudyParameters(n_trials=1, pruner="none", space="notebook")
SIX = dataclasses.replace(ONE, n_trials=6)


@pytest.fixture(scope="module")
def finished_study(
    tmp_path_factory: pytest.TempPathFactory, loaded: loading.Data, empty_store: Path
) -> tuple[Path, search.Search]:
    """A study of six trials, and the folder of its stores."""
    folder = tmp_path_factory.mktemp("study")
    with store_like(empty_store, folder):
        return folder, search.search(loaded, SPACE, SIX)


@pytest.fixture
def finished(finished_study: tuple[Path, search.Search]) -> Iterator[search.Search]:
    """A finished study in its stores, for tests that only read them."""
    folder, opened = finished_study
    with use_store(folder):
        yield opened


@pytest.fixture
def copied(finished_study: tuple[Path, search.Search], tmp_path: Path) -> Iterator[search.Search]:
    """The finished study, while its stores are copies that the test may change."""
    folder, opened = finished_study
    with copy_stores(folder, tmp_path):
        yield opened


def trials(opened: search.Search) -> list[Run]:
    return runs.nested_runs(opened.run_id, "trial")


def chosen(opened: search.Search) -> FrozenTrial:
    return choice.choose_trial(opened.study, opened.parameters.metric).trial


def artifacts(run_id: str, folder: str) -> set[str]:
    return {item.path for item in mlflow.MlflowClient().list_artifacts(run_id, folder)}


def test_trials_are_nested_runs(finished: search.Search) -> None:
    check_trials(finished, SPACE, [f"trial-{number:03d}" for number in range(6)])


def test_extended_trials_are_nested_runs(store: str, loaded: loading.Data) -> None:
    """By default their value is robust_brier, which counts changed copies; the notebook's space does without them."""
    opened = search.search(loaded, EXTENDED, StudyParameters(n_trials=2, pruner="none", space="extended"))
    check_trials(opened, EXTENDED, ["trial-000", "trial-001"])
    run_id = chosen(opened).user_attrs["mlflow_run_id"]
    scores = pd.read_csv(io.StringIO(mlflow.artifacts.load_text(f"runs:/{run_id}/{choice.SCORES}")))
    assert list(scores.columns) == ["path", "class", "accuracy", "loss", "brier"]
    assert chosen(opened).value == pytest.approx(scores["brier"].mean(), abs=1e-5)
    metrics = mlflow.get_run(run_id).data.metrics
    assert metrics["robust_accuracy"] == pytest.approx(scores["accuracy"].mean(), abs=1e-5)
    copies = 2 * training.COPIES * scores["accuracy"]  # that are right; the image counts as eight of them
    np.testing.assert_allclose(copies, np.rint(copies), atol=1e-4)
    assert round(metrics["val_accuracy"] * len(loaded.validation)) <= (copies >= training.COPIES).sum()


def check_trials(opened: search.Search, space: Space, names: list[str]) -> None:
    runs = trials(opened)
    assert [run.info.run_name for run in runs] == names
    for trial, run in zip(opened.study.trials, runs, strict=True):
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == opened.run_id
        assert run.data.tags["trial_state"] == "COMPLETE"
        assert run.data.metrics["trial"] == trial.number, "an axis for MLflow's charts"
        assert {name: float(run.data.params[name]) for name in space.ranges} == pytest.approx(trial.params)
        assert run.data.metrics[opened.parameters.metric] == pytest.approx(trial.value)
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "val_accuracy")
        assert len(history) == trial.params["epochs"]


def test_study_run_has_best_trial(finished: search.Search) -> None:
    run = mlflow.get_run(finished.run_id)
    best = chosen(finished)
    assert best.value == best.user_attrs["val_brier"]
    assert "robust_brier" not in trials(finished)[best.number].data.metrics
    assert run.info.status == "FINISHED"
    assert run.data.metrics["best_trial"] == best.number
    assert run.data.metrics["best_val_brier"] == pytest.approx(best.value)
    assert run.data.metrics["best_initial_learning_rate"] == pytest.approx(best.params["initial_learning_rate"])
    assert run.data.metrics["trials_complete"] == 6
    assert run.data.tags["choice"] == choice.choose_trial(finished.study, "val_brier").reason
    assert run.data.tags["best_run_id"] == trials(finished)[best.number].info.run_id
    assert "A study on" in run.data.tags["mlflow.note.content"]
    pictures = ("optimization_history", "param_importances", "parallel_coordinate", "slice", "intermediate_values")
    assert artifacts(finished.run_id, "study") == {f"study/{name}.png" for name in pictures} | {
        "study/trials.csv",
        "study/space.json",
    }


def test_epochs_are_searched(finished: search.Search) -> None:
    drawn = [trial.params["epochs"] for trial in finished.study.trials]
    assert len(set(drawn)) >= 3
    assert [int(run.data.params["epochs"]) for run in trials(finished)] == drawn


def test_trials_log_their_dataset(finished: search.Search, loaded: loading.Data) -> None:
    for run in trials(finished):
        inputs = {tag.value: used.dataset.digest for used in run.inputs.dataset_inputs for tag in used.tags}
        assert inputs == {
            "training": loaded.dataset.part_digest(loaded.split.training),
            "validation": loaded.dataset.part_digest(loaded.split.validation),
        }


def test_same_command_continues_study(copied: search.Search, loaded: loading.Data) -> None:
    seven = dataclasses.replace(SIX, n_trials=7)
    second, third = (search.search(loaded, SPACE, seven) for _ in range(2))
    assert copied.run_id == second.run_id == third.run_id
    assert len(trials(third)) == 7
    assert len({tuple(trial.params.values()) for trial in third.study.trials}) == 7, "no trial is drawn twice"
    assert len(mlflow.search_runs(filter_string="tags.role = 'study'")) == 1


def test_deleted_trial_is_not_best(copied: search.Search, loaded: loading.Data) -> None:
    best = chosen(copied)
    mlflow.delete_run(best.user_attrs["mlflow_run_id"])
    again = search.search(loaded, SPACE, SIX)
    assert chosen(again).number != best.number
    assert mlflow.get_run(again.run_id).data.tags["best_run_id"] == chosen(again).user_attrs["mlflow_run_id"]


def test_warm_start_enqueues_best_trials(
    copied: search.Search, loaded: loading.Data, caplog: pytest.LogCaptureFixture
) -> None:
    first = copied.study.study_name
    wider = Space.of("notebook", epochs=Range(2, 4), batch_size=16)
    with caplog.at_level("INFO"):
        opened = search.search(
            loaded, wider, dataclasses.replace(ONE, n_trials=2, study_name="wider", warm_start=first)
        )
    assert (
        f"study wider is new; {first}, of the same photographs, has other settings: epochs was 1:3, is 2:4"
        in caplog.text
    )
    origins = [trial.user_attrs.get("origin") for trial in opened.study.trials]
    best = study.rank_trials(copied.study)[: study.WARM_START_TRIALS]
    assert origins == ["baseline", *(f"{first}/{trial.number}" for trial in best)]
    started = opened.study.trials[1].params
    assert started == best[0].params | {"epochs": max(2, best[0].params["epochs"])}
    assert trials(opened)[1].data.tags["origin"] == f"{first}/{best[0].number}"


def test_unknown_warm_start_is_refused(store: str, loaded: loading.Data) -> None:
    with pytest.raises(UsageError, match="warm_start=nowhere: no such study in the storage"):
        search.search(loaded, SPACE, dataclasses.replace(ONE, warm_start="nowhere"))


def test_pruned_trials_are_no_failures(store: str, loaded: loading.Data) -> None:
    space = Space.of("notebook", epochs=5, batch_size=16)
    with search.open_study(loaded, space, dataclasses.replace(ONE, n_trials=2)) as opened:
        opened.study.pruner = DeterministicPruner(False)
        search.optimize_study(dataclasses.replace(opened, parameters=ONE))
        opened.study.pruner = DeterministicPruner(True)
        search.optimize_study(opened)
    pruned = trials(opened)[1]
    assert opened.study.trials[1].state == TrialState.PRUNED
    assert pruned.info.status == "FINISHED"
    assert pruned.data.tags["trial_state"] == "PRUNED"
    assert len(mlflow.MlflowClient().get_metric_history(pruned.info.run_id, "val_accuracy")) == 2, (
        "a quarter, rounded up"
    )
    assert mlflow.get_run(opened.run_id).data.metrics["trials_pruned"] == 1


def test_failed_trial_has_reason(store: str, loaded: loading.Data) -> None:
    pixels = np.full(loaded.fitting.x.shape, 1e38, np.float32)
    broken = dataclasses.replace(loaded, fitting=loading.Images(pixels, loaded.fitting.y))
    with pytest.raises(UsageError, match="the last 3 trials failed; the last error: TrainingDiverged"):
        search.search(broken, SPACE, ONE)
    opened = search.search(loaded, SPACE, ONE)
    assert Counter(run.info.status for run in trials(opened)) == {"FAILED": 3, "FINISHED": 1}
    failed = trials(opened)[0]
    assert failed.data.tags["failure_reason"].startswith("TrainingDiverged: loss became nan in epoch 1")
    assert opened.study.trials[0].state == TrialState.FAIL
    drawn = [tuple(trial.params.values()) for trial in opened.study.trials]
    assert len(set(drawn)) == len(drawn), "a trial that failed is not drawn again"


def test_val_loss_can_be_objective(store: str, loaded: loading.Data) -> None:
    opened = search.search(loaded, SPACE, dataclasses.replace(ONE, objective="val_loss"))
    assert chosen(opened).value == chosen(opened).user_attrs["val_loss"]
    assert opened.study.direction == optuna.study.StudyDirection.MINIMIZE


def test_timeout_starts_no_trial(store: str, loaded: loading.Data) -> None:
    opened = search.search(loaded, SPACE, dataclasses.replace(ONE, n_trials=1000, timeout=0.001))
    assert len(opened.study.trials) <= 2, "the one that ran, and perhaps one that waits"


def test_interrupted_trial_is_retried_three_times(store: str, loaded: loading.Data) -> None:
    with search.open_study(loaded, SPACE, ONE) as opened:
        for _ in range(study.MAX_RETRIES + 1):
            opened.space.suggest(opened.study.ask())  # and the process is killed
            study.reconcile_stores(opened.study)
        assert len({tuple(trial.params.values()) for trial in opened.study.trials}) == 1
        assert {trial.user_attrs["origin"] for trial in opened.study.trials} == {study.BASELINE}, (
            "each is the first trial"
        )
        opened.space.suggest(opened.study.ask())
        assert opened.study.trials[-1].params != opened.study.trials[0].params


def test_cluster_on_sqlite_is_refused(store: str, loaded: loading.Data) -> None:
    with pytest.raises(UsageError, match="other machines cannot share a SQLite file; pass a PostgreSQL URL"):
        search.search(loaded, SPACE, dataclasses.replace(ONE, ray_address="auto"))
    assert not Path("optuna.db").exists()


def test_different_settings_are_refused(finished: search.Search, loaded: loading.Data) -> None:
    named = dataclasses.replace(ONE, study_name=finished.study.study_name)
    with pytest.raises(UsageError, match=r"other settings \(batch_size was 16, is 8\); give another --study_name"):
        search.search(loaded, Space.of("notebook", epochs=Range(1, 3), batch_size=8), named)


def test_too_small_images_are_refused(store: str, loaded: loading.Data) -> None:
    with pytest.raises(
        UsageError, match="conv_blocks=4, stem_stride=2: each block halves the image, and 16 pixels are too few"
    ):
        search.search(loaded, Space.of("extended"), ONE)
    assert not Path("optuna.db").exists()


def test_joined_digits_are_not_mirrored(store: str, loaded: loading.Data) -> None:
    joined = dataclasses.replace(
        loaded, dataset=dataclasses.replace(loaded.dataset, name="handwritten-digits+accepted")
    )
    with search.open_study(joined, EXTENDED, dataclasses.replace(ONE, space="extended")) as opened:
        assert runs.find_run(opened.run_id).data.params["horizontal_flip"] == "0.0"
        assert opened.space.ranges["epochs"] == EXTENDED.ranges["epochs"], "given ones stay"


def test_locked_study_is_refused(store: str, loaded: loading.Data) -> None:
    named = dataclasses.replace(ONE, study_name="mine")
    with (
        storage.lock_study(named.storage, "mine"),
        pytest.raises(UsageError, match="another process is searching it"),
        search.open_study(loaded, SPACE, named),
    ):
        pass


@pytest.mark.outage
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_search_completes_n_trials(store: str, loaded: loading.Data, photographs: Path, workers: int) -> None:
    line = [sys.executable, "-m", "signdigits", "search", "--data", str(photographs), "--image_size", "16"]
    # Trials long enough, a second or more, to be killed in the middle of one.
    line += ["--space", "notebook", "--epochs", "20:30", "--batch_size", "16", "--pruner", "none", "--n_trials", "3"]
    line += ["--workers", str(workers)]
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "env": dict(os.environ)}

    process = subprocess.Popen(line, **options)
    wait_until(lambda: running_after_a_finished_one() or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert running_after_a_finished_one(), "killed in the middle of a trial"
    interrupted = len(column("optuna.db", "SELECT trial_id FROM trials WHERE state = 'RUNNING'"))

    (before,) = mlflow.search_runs(
        filter_string="tags.role = 'study'", search_all_experiments=True, output_format="list"
    )
    mlflow.MlflowClient().set_tag(before.info.run_id, "failure_reason", "as if it had been Ctrl-C")
    done = subprocess.run(line, check=True, timeout=300, text=True, **options | {"stdout": subprocess.PIPE})
    assert "compare-runs?runs=" in done.stdout.splitlines()[-1]
    (name,) = optuna.get_all_study_names("sqlite:///optuna.db")
    study = optuna.load_study(study_name=name, storage="sqlite:///optuna.db")
    states = Counter(trial.state for trial in study.trials)
    assert states == {TrialState.COMPLETE: 3, TrialState.FAIL: interrupted}

    everything = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert {run.info.status for run in everything} == {"FINISHED", "KILLED"}
    (parent,) = [run for run in everything if run.data.tags["role"] == "study"]
    assert "failure_reason" not in parent.data.tags
    children = [run for run in everything if run.data.tags["role"] == "trial"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert Counter(run.info.status for run in children) == {"FINISHED": 3, "KILLED": interrupted}

    for killed in [trial for trial in study.trials if trial.state == TrialState.FAIL]:
        (retry,) = [trial for trial in study.trials if trial.user_attrs.get("retry_of") == killed.number]
        assert retry.params == killed.params | retry.params


def running_after_a_finished_one() -> bool:
    """Tell whether the search in this folder has a finished trial and a running one, in both stores.

    Reads the files themselves: a client needs a second, in which the trial may end, and makes the tables that it misses
    while the search makes them too.
    """
    kept = "SELECT status FROM runs JOIN tags USING (run_uuid) WHERE tags.key = 'role' AND tags.value = 'trial'"
    trials, runs = column("optuna.db", "SELECT state FROM trials"), column("mlflow.db", kept)
    return {"COMPLETE", "RUNNING"} <= trials and {"FINISHED", "RUNNING"} <= runs


def column(file: str, query: str) -> set[str]:
    """Return the result of a query of one column; empty while the file or the table is missing."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return {value for (value,) in connection.execute(query)}
    except sqlite3.OperationalError:
        return set()
