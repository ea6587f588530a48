import platform
import subprocess
from pathlib import Path

import mlflow
import pytest

from signdigits import cli
from signdigits.errors import ModelError, UsageError
from signdigits.tracking import registry, runs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "FINISHED", None),
        (ValueError("three fingers"), "FAILED", "ValueError: three fingers"),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
    ],
)
def test_run_has_true_status(store: str, error: BaseException | None, status: str, reason: str | None) -> None:
    def work() -> None:
        with runs.start_run("train", "train"):
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            work()
    else:
        work()
    run = mlflow.last_active_run()
    assert run.info.status == status
    assert run.data.tags["role"] == "train"
    assert run.data.tags.get("failure_reason") == reason


def test_mlflow_run_is_adopted(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = mlflow.MlflowClient().create_run(mlflow.get_experiment_by_name("tests").experiment_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", launched.info.run_id)
    with runs.start_run("train", "train") as run:
        runs.log_params({"epochs": 3})
    assert run.info.run_id == launched.info.run_id


def test_chosen_run_name_is_kept(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    for chosen in ("friday's idea", "sign-digits-3", "big-hand-12"):
        launched = mlflow.MlflowClient().create_run(experiment, run_name=chosen)
        monkeypatch.setenv("MLFLOW_RUN_ID", launched.info.run_id)
        with runs.start_run("train", "train"):
            pass
        assert mlflow.get_run(launched.info.run_id).info.run_name == chosen


def test_logged_parameter_is_kept(store: str) -> None:
    with mlflow.start_run() as run:
        mlflow.log_param("initial_learning_rate", "1e-4")
        runs.log_params({"initial_learning_rate": 0.0001, "epochs": 3})
    assert mlflow.get_run(run.info.run_id).data.params == {"initial_learning_rate": "1e-4", "epochs": "3"}


def test_resuming_run_names_the_study(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with runs.start_run("study", "study") as study:
        pass
    launched = mlflow.MlflowClient().create_run(study.info.experiment_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", launched.info.run_id)
    with runs.start_run("study", "study", run_id=study.info.run_id) as continued:
        assert continued.info.run_id == study.info.run_id
        with runs.start_run("trial", "trial-000") as nested:
            assert nested.info.run_id != launched.info.run_id
    tags = mlflow.get_run(launched.info.run_id).data.tags
    assert (tags["role"], tags["continued_by"]) == ("resume", study.info.run_id)


def test_run_of_other_store_names_remedy(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(UsageError, match="set MLFLOW_TRACKING_URI"), runs.start_run("train", "train"):
        pass


def test_deleted_study_names_remedy(store: str) -> None:
    with runs.start_run("study", "study") as study:
        pass
    mlflow.delete_run(study.info.run_id)
    with (
        pytest.raises(UsageError, match=f"mlflow runs restore --run-id {study.info.run_id}"),
        runs.start_run("study", "study", run_id=study.info.run_id),
    ):
        pass


def test_stale_runs_are_closed(store: str) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with mlflow.start_run() as left:
        mlflow.set_tag(runs.PROCESS, f"{platform.node()}:{gone.pid}:")
        with runs.start_run("train", "train") as alive:
            runs.open_experiment("prepare")
            assert mlflow.get_run(alive.info.run_id).info.status == "RUNNING"
    closed = mlflow.get_run(left.info.run_id)
    assert closed.data.tags["failure_reason"] == "interrupted"


def test_early_error_is_recorded(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = mlflow.MlflowClient().create_run(mlflow.get_experiment_by_name("tests").experiment_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", launched.info.run_id)
    assert cli.main(["prepare", "--data", str(tmp_path / "nowhere")]) == 2
    tags = mlflow.get_run(launched.info.run_id).data.tags
    assert tags["role"] == "prepare"
    assert "nowhere: no such folder" in tags["failure_reason"]


def test_deleted_experiment_names_remedy(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.delete_experiment(mlflow.create_experiment("sign-digits"))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    with pytest.raises(UsageError, match="MLFLOW_EXPERIMENT_NAME to an experiment that is not deleted"):
        runs.open_experiment("train")


def test_experiment_is_described_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)  # MLflow sets it with the active experiment
    runs.open_experiment("train")
    experiment = mlflow.get_experiment_by_name(runs.EXPERIMENT)
    assert "study" in experiment.tags["mlflow.note.content"]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    mlflow.set_experiment("tests")
    mlflow.set_experiment_tag("mlflow.note.content", "ours")
    runs.open_experiment("train")
    assert mlflow.get_experiment_by_name("tests").tags["mlflow.note.content"] == "ours"


@pytest.mark.parametrize(
    ("run_id", "model_uri", "message"),
    [
        ("", "", "give one of the two"),
        ("a", "models:/b", "give one of the two"),
        ("0" * 32, "", "no such run in sqlite"),
        ("", "models:/sign-digits@champion", "no such model"),
        ("", "models:/m-0123", "no such model"),
        ("", "nonsense", "no such model"),
    ],
)
def test_missing_model_is_reported(store: str, run_id: str, model_uri: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        registry.find_model(run_id, model_uri)


def test_run_without_model_is_reported(store: str, tmp_path: Path) -> None:
    with runs.start_run("prepare", "prepare") as run:
        pass
    with pytest.raises(ModelError, match="the run has no model; pass a run with the role train or refit"):
        registry.find_model(run.info.run_id, "")


def test_deleted_run_has_no_model(store: str) -> None:
    with runs.start_run("train", "train") as run:
        pass
    mlflow.delete_run(run.info.run_id)
    with pytest.raises(UsageError, match="was deleted; restore it with `mlflow runs restore"):
        registry.find_model(run.info.run_id, "")


def test_runs_of_other_hosts_are_left(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An underscore of a host's name is any letter in MLflow's LIKE."""
    monkeypatch.setattr(runs.platform, "node", lambda: "node_1")
    for host in ("node-1", "node_1"):
        mlflow.MlflowClient().create_run("0", tags={runs.PROCESS: f"{host}:1:00000000-1"})
    runs.open_experiment("train")
    statuses = {run.data.tags[runs.PROCESS]: run.info.status for run in runs.search_runs("")}
    assert statuses == {"node-1:1:00000000-1": "RUNNING", "node_1:1:00000000-1": "KILLED"}


@pytest.mark.parametrize("name", ["sam's hands", 'the "best" hands', "a\\'s 100% -- a_b; `c`"])
def test_name_may_hold_a_quotation_mark(store: str, tmp_path: Path, name: str) -> None:
    client = mlflow.MlflowClient()
    client.create_registered_model(name)
    version = client.create_model_version(name, str(tmp_path))
    client.set_registered_model_alias(name, registry.CHAMPION, version.version)
    assert [found.version for found in registry.list_versions(name)] == [version.version]
    found = registry.find_alias(name, registry.CHAMPION)
    assert found is not None
    assert found.version == version.version
    assert "none of its 1 versions has it" in registry.missing_alias(name, "other")
