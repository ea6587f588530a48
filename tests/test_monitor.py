"""Drift in prediction logs of a served model, with the command line."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Run
from PIL import Image, ImageOps

from signdigits import cli
from signdigits.config import MonitorParameters
from signdigits.data import loading
from signdigits.errors import ModelError
from signdigits.monitor import monitor
from signdigits.packaging import prediction_log
from signdigits.packaging.reply import COMPARED

from .conftest import command, log_untrained, store_like

pytestmark = pytest.mark.slow

ENOUGH = 120
COLUMNS = ["size", "brightness", "contrast", "sharpness", *COMPARED, "probability", "label"]


def same(image: Image.Image) -> Image.Image:
    return image


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 60, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory, loaded: loading.Data, champion_store: Path) -> Path:
    """Prediction logs, one for each change of the test photographs, which the champion has answered some times over."""
    folder = tmp_path_factory.mktemp("logs")
    with store_like(champion_store, tmp_path_factory.mktemp("store")):
        served = mlflow.pyfunc.load_model("models:/sign-digits@champion")
    for change in (same, ImageOps.invert, noisy):
        contents = []
        for index in loaded.split.testing:
            with Image.open(loaded.dataset.folder / loaded.dataset.photographs[index].path) as photograph:
                changed = io.BytesIO()
                change(photograph.convert("RGB")).save(changed, "PNG")
            contents.append(changed.getvalue())
        settings = {prediction_log.FOLDER: str(folder / change.__name__), prediction_log.VERSION: "1"}
        served.unwrap_python_model().prediction_log = prediction_log.PredictionLog.from_environ(settings)
        for _ in range(ENOUGH // len(contents)):
            served.predict(pd.DataFrame({"image": contents}))
    return folder


def entries(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for file in prediction_log.list_log_files(folder) for line in file.read_text().splitlines()
    ]


def write_log(folder: Path, *lines: dict[str, Any] | str) -> None:
    """Write entries, or other lines, as a prediction log."""
    folder.mkdir()
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "predictions-20261128T190000.000000-1-0.jsonl").write_text("\n".join(texts))


def the_run() -> Run:
    (run,) = mlflow.search_runs(
        search_all_experiments=True, filter_string="tags.role = 'monitor'", output_format="list"
    )
    return run


def test_same_photographs_do_not_drift(champion: str, logs: Path, tmp_path: Path) -> None:
    """In a process that opens no connection: Python's audit hook reports those, and every look-up, of every library."""
    calls = tmp_path / "calls"
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(
        "import sys\n"
        "def watch(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        f"        open({str(calls)!r}, 'a').write(f'{{event}} {{arguments}}\\n')\n"
        "sys.addaudithook(watch)\n"
        f"open({str(calls)!r}, 'a').close()\n"
    )
    watched = os.environ | {"PYTHONPATH": str(tmp_path / "watch"), "HOME": str(tmp_path)}
    done = command("monitor", "--prediction_log", str(logs / "same"), cwd=tmp_path, env=watched)
    assert done.returncode == 0, done.stderr
    assert calls.read_text() == ""
    assert f"no drift: 0 of {len(COLUMNS)} columns have drifted (none)" in done.stdout
    assert "% of the predictions are outliers (" in done.stdout
    assert done.stderr == ""
    run = the_run()
    assert run.info.status == "FINISHED"
    assert run.data.tags["outcome"] == "no drift"
    assert run.data.tags["model_version"] == "1"
    assert run.data.metrics["predictions"] == ENOUGH
    assert run.data.metrics["drifted_share"] == 0
    assert {name for name in run.data.metrics if name.startswith("drift_")} == {f"drift_{name}" for name in COLUMNS}
    assert all(run.data.metrics[f"drift_{name}"] < 0.01 for name in COLUMNS)


@pytest.mark.parametrize(
    ("change", "columns"),
    [("invert", {"brightness", "label"}), ("noisy", {"contrast", "sharpness"})],
)
def test_changed_photographs_drift(
    champion: str, logs: Path, change: str, columns: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["monitor", "--prediction_log", str(logs / change)]) == 3
    errors = capsys.readouterr().err
    assert "columns have drifted" in errors
    assert "Traceback" not in errors
    run = the_run()
    assert run.info.status == "FINISHED", "the monitoring did not fail"
    assert run.data.tags["outcome"] == "drift"
    assert run.data.metrics["drifted_share"] >= 0.3
    drifted = {name for name in COLUMNS if run.data.metrics[f"drift_{name}"] >= (0.3 if name == "label" else 0.5)}
    assert columns <= drifted
    assert run.data.metrics["drifted_columns"] == len(drifted)
    files = {item.path: item.file_size for item in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert set(files) == {"drift.png"}


def test_too_few_predictions_exit_with_4(
    champion: str, logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "log", *({**entry, "version": "7"} for entry in entries(logs / "same")))
    assert cli.main(["monitor", "--prediction_log", "log"]) == 4
    assert "0 predictions of version 1, 100 needed (it holds 120 of version 7)" in capsys.readouterr().err
    assert not mlflow.search_runs(
        search_all_experiments=True, filter_string="tags.role = 'monitor'", output_format="list"
    )


def test_missing_log_is_misuse(champion: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["monitor", "--prediction_log", "nowhere"]) == 2
    errors = capsys.readouterr().err
    assert "prediction_log=nowhere: no such folder; serve with SIGN_DIGITS_PREDICTION_LOG=nowhere" in errors


def test_max_predictions_limits_the_window(champion: str, logs: Path, tmp_path: Path) -> None:
    recent = [{**entry, "time": "2999-01-01T00:00:00.000+00:00"} for entry in entries(logs / "same")]
    write_log(tmp_path / "log", *recent, *entries(logs / "noisy"))
    found = monitor(MonitorParameters(prediction_log="log", max_predictions=ENOUGH))
    assert found is not None
    assert found.share == 0
    assert the_run().data.metrics["predictions"] == ENOUGH


def test_other_entries_are_ignored(champion: str, logs: Path, tmp_path: Path) -> None:
    same = entries(logs / "same")
    old = [{**entry, "time": "2026-01-01T00:00:00.000+00:00"} for entry in same]
    other = [{**entry, "version": "2"} for entry in same]
    unnamed = [{**entry, "version": ""} for entry in same[:5]]
    write_log(
        tmp_path / "log", *old, *other, *same, *unnamed, "[]", "{}", "five fingers", json.dumps(same[0])[:50]
    )  # fmt: skip
    monitor(MonitorParameters(prediction_log="log", window_hours=24))
    assert the_run().data.metrics["predictions"] == ENOUGH + 5


def test_missing_reference_names_remedy(
    champion: str, logs: Path, loaded: loading.Data, model_files: Callable[[float], Path]
) -> None:
    untested = log_untrained(model_files(1.0), loaded).model_uri
    with pytest.raises(ModelError, match="not evaluated; run `python -m signdigits evaluate --model_uri"):
        monitor(MonitorParameters(prediction_log=str(logs / "same"), model_uri=untested))


def test_agreement_with_shadow_is_recorded(champion: str, logs: Path, tmp_path: Path) -> None:
    live = [{**entry, "request_id": "a", "row": row} for row, entry in enumerate(entries(logs / "same"))]
    shadow = [{**entry, "version": "2"} for entry in live]
    for entry in shadow[:30]:  # a class further
        names, shares = list(entry["probabilities"]), list(entry["probabilities"].values())
        entry["probabilities"] = dict(zip(names, shares[-1:] + shares[:-1], strict=True))
    write_log(tmp_path / "log", *live, *shadow)
    assert monitor(MonitorParameters(prediction_log="log", shadow=True)) is None
    run = the_run()
    assert run.data.tags["shadow_version"] == "2"
    assert run.data.metrics["predictions"] == ENOUGH
    assert run.data.metrics["agreement"] == 0.75
    assert [item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id)] == ["disagreements.png"]
