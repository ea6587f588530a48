import re
import tomllib
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow.exceptions import ExecutionException

from signdigits import cli

from .conftest import PROJECT, write_photographs


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.make_parser().parse_args([name, "--help"])
    assert raised.value.code == 0
    assert cli.COMMANDS[name].summary.split(":")[0] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["train", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["train", "--epochs", "0"], "epochs=0: must be 1 or more"),
        (["train", "--epochs", "2:5"], "invalid int value: '2:5'"),
        (["train", "--initial_learning_rate", "-1"], "initial_learning_rate=-1.0: must be greater than 0"),
        (["main", "--n_trails", "2"], "n_trails: no such parameter; did you mean n_trials?"),
        (["train", "--learning_rate=1"], "learning_rate: no such parameter; did you mean initial_learning_rate?"),
        (["train", "--epoch", "1"], "epoch: no such parameter; did you mean epochs?"),
        (["train", "--shoes", "2"], "shoes: no such parameter; docs/parameters.md lists all"),
        (["train", "--color_mode", "sepia"], "color_mode='sepia': must be one of rgb, grayscale"),
        (["train", "--skip_unreadable", "maybe"], "'maybe': write true or false"),
        (["search", "--epochs", "9:3"], "epochs=9:3: the range is empty"),
        (["search", "--epochs", "3:"], "argument --epochs: invalid int or LOW:HIGH value: '3:'"),
        (["search", "--n_trials", "0"], "n_trials=0: must be 1 or more"),
        (
            ["search", "--objective", "accuracy"],
            "objective='accuracy': must be one of auto, val_accuracy, val_loss, val_brier, robust_accuracy, robust_brier",
        ),
        (["search", "--pruner", "secateurs"], "pruner='secateurs': must be one of median, percentile, hyperband, none"),
        (["search", "--timeout", "inf"], "timeout=inf: must be a finite number"),
        (["search", "--space", "outer"], "space='outer': must be one of notebook, extended"),
        (["main", "--alias", "v1"], "alias='v1': must be letters, digits"),
        (["register", "--version", "-1"], "version=-1: must be 0 or more"),
        (["serve", "--port", "70000"], "port=70000: must be 65535 or less"),
        (["serve", "--host", "a b"], "host='a b': must be a host name or an address"),
        (["serve", "--supervise", "false", "--shadow", "challenger"], "shadow='challenger': needs the supervisor"),
        (["serve", "--model_uri", "model"], "model_uri='model': a supervised server follows an alias"),
        (["serve", "--key", "key.pem"], "certificate='', key='key.pem': give both, or neither"),
    ],
)
def test_wrong_parameter_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(" ".join(["signdigits", *arguments[:1]]))
    assert message in line


def test_missing_things_exit_with_2(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (["prepare", "--data", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["evaluate"], "give one of the two"),
        (["register"], "give one of the three"),
        (["show"], "has no champion"),
        (["serve"], "has no champion"),
        (["serve", "--supervise", "false", "--model_uri", "/no/such/model"], "model_uri=/no/such/model: no such model"),
    ]:
        assert cli.main(arguments) == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert "Traceback" not in errors


def test_bad_photographs_leave_no_run(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_photographs(tmp_path / "bad")
    (folder / "1" / "notes.txt").write_text("five fingers")
    before = set(tmp_path.iterdir())
    assert cli.main(["main", "--data", str(folder)]) == 2
    assert capsys.readouterr().err.strip().endswith("not an image; remove it, or pass --skip_unreadable true")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "data"}, "the photographs that were decoded"
    assert mlflow.search_runs(search_all_experiments=True, output_format="list") == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite:////proc/missing/mlflow.db", "No such file or directory"),
        ("./mlruns", "maintenance mode"),
        ("postgresql://me:secret@127.0.0.1:9/runs", "postgresql://me:***@127.0.0.1:9/runs: "),
    ],
)
def test_unusable_store_hides_password(store: str, uri: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    mlflow.set_tracking_uri(uri)
    assert cli.main(["show"]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "set MLFLOW_TRACKING_URI to a store that can be used" in errors
    assert "secret" not in errors


@pytest.fixture
def launched(store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Open a run as `mlflow run` does, and return its id."""
    experiment = mlflow.get_experiment_by_name("tests")
    run = mlflow.MlflowClient().create_run(experiment.experiment_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    return str(run.info.run_id)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["main", "--n_trails", "2"], "UsageError: n_trails: no such parameter; did you mean n_trials?"),
        (["train", "--epochs", "many"], "UsageError: argument --epochs: invalid int value: 'many'; see"),
        (["train", "--epochs", "0"], "UsageError: epochs=0: must be 1 or more"),
    ],
)
def test_launched_run_has_reason(launched: str, arguments: list[str], reason: str) -> None:
    assert cli.main(arguments) == 2
    assert mlflow.get_run(launched).data.tags["failure_reason"].startswith(reason)


@pytest.mark.slow
def test_mlflow_run_passes_parameters(store: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A run shows what was given, under `mlflow run`, and a wrong name ends it with the right one."""
    given = {"study_name": "a b", "photometric": "0.5", "n_trails": "2"}
    with pytest.raises(ExecutionException):
        mlflow.projects.run(str(PROJECT), "main", parameters=given, env_manager="local")
    assert "signdigits main: n_trails: no such parameter; did you mean n_trials?" in capfd.readouterr().err
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.params == given | {"study_name": "'a b'"}, "MLflow records the quoted value"
    assert run.data.tags["failure_reason"].endswith("did you mean n_trials?")


def test_mlproject_has_no_defaults() -> None:
    """A default stands once, in config.py, and MLflow records no parameter that nobody gave."""
    text = (PROJECT / "MLproject").read_text()
    entries = yaml.safe_load(text)["entry_points"]
    assert entries == {
        name: {"command": f"PYTHONPATH=$PWD/src python -m signdigits {name}"}
        for name, command in cli.COMMANDS.items()
        if command.is_entry_point
    }
    shown = re.findall(r"# -P (.+)\n  (\w+):\n", text)
    assert [name for _, name in shown] == list(entries)
    for names, command in shown:
        assert len(names.split()) <= 8
        assert set(names.split()) <= set(cli.parse_arguments([command]))


def test_pins_are_exact() -> None:
    pins = [line.split("#")[0].strip() for line in (PROJECT / "requirements.txt").read_text().splitlines()]
    assert all("==" in pin for pin in pins if pin)


def test_conda_environment_has_extras() -> None:
    """The environment that `mlflow run` makes can run every entry point."""
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    environment = yaml.safe_load((PROJECT / "conda.yaml").read_text())
    pins = ["-r requirements.txt", *extras["cluster"], *extras["export"]]
    assert environment["dependencies"][-1] == {"pip": pins}
