import os
import tomllib
from pathlib import Path

import mlflow
import pytest
import yaml

from signdigits import cli

from .conftest import PROJECT, command, write_photographs


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
        (["train", "--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
        (["train", "--epoch", "1"], "unrecognized arguments: --epoch"),
        (["train", "--color_mode", "sepia"], "color_mode='sepia': must be one of rgb, grayscale"),
        (["train", "--skip_unreadable", "maybe"], "'maybe': write true or false"),
        (["search", "--epochs", "9:3"], "epochs=9:3: the range is empty"),
        (["search", "--epochs", "3:"], "argument --epochs: invalid int or LOW:HIGH value: '3:'"),
        (["search", "--n_trials", "0"], "n_trials=0: must be 1 or more"),
        (
            ["search", "--objective", "accuracy"],
            "objective='accuracy': must be one of auto, val_accuracy, val_loss, robust_accuracy",
        ),
        (["search", "--pruner", "secateurs"], "pruner='secateurs': must be one of percentile, median, hyperband, none"),
        (["search", "--timeout", "inf"], "timeout=inf: must be a finite number"),
        (["main", "--repeats", "5"], "--repeats was renamed in version 0.2: use --n_seeds"),
        (["monitor", "--answers=log"], "--answers was renamed in version 0.2: use --prediction_log"),
        (["main", "--alias", "v1"], "alias='v1': must be letters, digits"),
        (["prepare", "--data", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["evaluate"], "give one of the two"),
        (["register"], "give one of the three"),
        (["register", "--version", "-1"], "version=-1: must be 0 or more"),
        (["show"], "has no champion"),
        (["serve"], "has no champion"),
        (["serve", "--port", "70000"], "port=70000: must be 65535 or less"),
        (["serve", "--host", "a b"], "host='a b': must be a host name or an address"),
        (["serve", "--supervise", "false", "--shadow", "challenger"], "shadow='challenger': needs the supervisor"),
        (["serve", "--model_uri", "model"], "model_uri='model': a supervised server follows an alias"),
        (["serve", "--supervise", "false", "--model_uri", "/no/such/model"], "model_uri=/no/such/model: no such model"),
        (["serve", "--key", "key.pem"], "certificate='', key='key.pem': give both, or neither"),
    ],
)
def test_misuse_exits_with_2(
    store: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(arguments)
    except SystemExit as exited:  # argparse's way
        code = int(exited.code or 0)
    errors = capsys.readouterr().err
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_bad_photographs_leave_no_run(store: str, tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bad")
    (folder / "1" / "notes.txt").write_text("five fingers")
    before = set(tmp_path.iterdir())
    failed = command("main", "--data", str(folder), cwd=tmp_path, env=dict(os.environ))
    assert failed.returncode == 2
    assert failed.stderr.strip().endswith("not an image; remove it, or pass --skip_unreadable true")
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
def test_unusable_store_hides_password(tmp_path: Path, uri: str, message: str) -> None:
    failed = command("show", cwd=tmp_path, env=dict(os.environ) | {"MLFLOW_TRACKING_URI": uri})
    assert failed.returncode == 2
    assert message in failed.stderr
    assert "set MLFLOW_TRACKING_URI to a store that can be used" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "secret" not in failed.stderr


def test_mlproject_matches_command_line() -> None:
    project = yaml.safe_load((PROJECT / "MLproject").read_text())
    assert set(project["entry_points"]) == {name for name, command in cli.COMMANDS.items() if command.is_entry_point}
    parser = cli.make_parser()
    for name, entry in project["entry_points"].items():
        assert entry["command"].split()[:5] == ["PYTHONPATH=$PWD/src", "python", "-m", "signdigits", name]
        passed = entry["command"].split()[5:]
        options = [f"--{parameter}" for parameter in entry["parameters"]]
        assert passed == [word for option in options for word in (option, f"{{{option[2:]}}}")]
        defaults = [word for key, value in entry["parameters"].items() for word in (f"--{key}", str(value["default"]))]
        read, own = vars(parser.parse_args([name, *defaults])), vars(parser.parse_args([name]))
        assert {key: str(value) for key, value in read.items()} == {key: str(value) for key, value in own.items()}


def test_pins_are_exact() -> None:
    pins = [line.split("#")[0].strip() for line in (PROJECT / "requirements.txt").read_text().splitlines()]
    assert all("==" in pin for pin in pins if pin)


def test_conda_environment_has_extras() -> None:
    """The environment that `mlflow run` makes can run every entry point."""
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    environment = yaml.safe_load((PROJECT / "conda.yaml").read_text())
    pins = ["-r requirements.txt", *extras["cluster"], *extras["export"]]
    assert environment["dependencies"][-1] == {"pip": pins}
