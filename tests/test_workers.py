import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import joblib
import pytest
from optuna.trial import TrialState

from signdigits import cli, search
from signdigits.config import StudyParameters
from signdigits.data import loading
from signdigits.errors import UsageError
from signdigits.tracking import runs
from signdigits.tuning import executors
from signdigits.tuning.space import Range, Space

from .conftest import wait_until

STUDY = StudyParameters(n_trials=4, pruner="none", space="notebook", workers=2)
# Trials long enough, a second or more, to be killed in the middle of one.
SPACE = Space.of("notebook", epochs=Range(20, 30), batch_size=16)


@pytest.mark.slow
def test_killed_local_worker_loses_no_trial(store: str, loaded: loading.Data) -> None:
    """Two workers share the SQLite stores; one is killed in the middle of a trial, and replaced."""
    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill_a_worker)
        opened = search.search(loaded, SPACE, STUDY)
        number = killing.result()
    trials = opened.study.trials
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(complete) == STUDY.n_trials
    assert len({trial.user_attrs.get("worker") for trial in trials}) > 1
    assert [trial.number for trial in trials if trial.state == TrialState.FAIL] == [number]
    (retry,) = [trial for trial in trials if trial.user_attrs.get("retry_of") == number]
    assert retry.params == trials[number].params
    recorded = {int(run.data.tags["trial"]): run.info.status for run in runs.nested_runs(opened.run_id, "trial")}
    assert recorded == {trial.number: "FINISHED" for trial in complete} | {number: "KILLED"}
    assert runs.find_run(opened.run_id).info.status == "FINISHED"
    assert multiprocessing.active_children() == []


def kill_a_worker() -> int:
    """Kill a worker that trains while another trial has finished; return the number of its trial."""
    tags = "JOIN tags AS {0} ON {0}.run_uuid = runs.run_uuid AND {0}.key = '{0}'"
    query = f"SELECT trial.value, process.value, status FROM runs {tags.format('trial')} {tags.format('process')}"

    def find() -> tuple[str, str] | None:
        with contextlib.suppress(sqlite3.OperationalError):  # it waits for no lock
            with contextlib.closing(sqlite3.connect("file:mlflow.db?mode=ro", uri=True)) as connection:
                rows = connection.execute(query).fetchall()
            running = [(trial, process) for trial, process, status in rows if status == "RUNNING"]
            return running[0] if running and any(status == "FINISHED" for *_, status in rows) else None
        return None

    found = wait_until(find, interval=0.1)
    assert found
    trial, process = found
    os.kill(int(process.split(":")[1]), signal.SIGKILL)
    return int(trial)


@pytest.mark.parametrize(
    ("changes", "cpus", "workers"),
    [
        ({}, 16, 4),
        ({}, 2, 2),
        ({"n_trials": 100}, 16, 16),
        ({"n_trials": 100, "cpus_per_trial": 3}, 16, 5),
        ({"n_trials": 2}, 16, 1),
        ({"storage": "sqlite:///:memory:"}, 16, 1),
        ({"workers": 3}, 2, 3),
    ],
)
def test_auto_counts_workers(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], cpus: int, workers: int) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: cpus)
    parameters = dataclasses.replace(StudyParameters(n_trials=12, workers=0), **changes)
    assert executors.count_workers(parameters).workers == workers


def test_auto_is_read_as_zero() -> None:
    assert cli.parse_arguments(["search", "--workers", "auto"])["workers"] == 0
    with pytest.raises(UsageError, match="workers=auto, ray_address=auto: pass the number of workers"):
        executors.count_workers(StudyParameters(workers=0, ray_address="auto"))


@pytest.mark.parametrize(
    ("storage", "options", "message"),
    [
        (
            "sqlite:///optuna.db",
            {"ray_address": "auto"},
            "other machines cannot share a SQLite file; pass a PostgreSQL",
        ),
        ("postgresql://nowhere/db", {"ray_address": "auto"}, "log to a tracking server; set MLFLOW_TRACKING_URI"),
        ("sqlite:///:memory:", {"workers": 2}, "in one process's memory; name a file"),
    ],
)
def test_stores_that_workers_cannot_share_are_refused(
    store: str, storage: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        executors.check_stores(dataclasses.replace(StudyParameters(storage=storage), **options))
