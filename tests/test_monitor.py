"""Drift in prediction logs of a served model, with the command line."""

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Run
from PIL import Image, ImageOps

from signdigits.config import MonitorParameters
from signdigits.data import loading
from signdigits.errors import ModelError
from signdigits.model import architecture
from signdigits.monitor import monitor
from signdigits.packaging import package, prediction_log
from signdigits.tracking import runs

from .conftest import calibrate, command

pytestmark = pytest.mark.slow

ENOUGH = 120
COLUMNS = ["size", "brightness", "contrast", "sharpness", "probability", "label"]


@contextmanager
def logging_to(folder: Path, version: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(prediction_log.FOLDER, str(folder))
        patch.setenv(prediction_log.VERSION, version)
        yield


def ask(loaded: loading.Data, folder: Path, change: Callable[[Image.Image], Image.Image], version: str = "1") -> None:
    """Let the champion answer the test photographs, changed, some times over, and log it."""
    contents = []
    for index in loaded.split.testing:
        with Image.open(loaded.dataset.folder / loaded.dataset.photographs[index].path) as photograph:
            changed = io.BytesIO()
            change(photograph.convert("RGB")).save(changed, "PNG")
        contents.append(changed.getvalue())
    with logging_to(folder, version):
        served = mlflow.pyfunc.load_model("models:/sign-digits@champion")
    for _ in range(ENOUGH // len(contents)):
        served.predict(pd.DataFrame({"image": contents}))


def same(image: Image.Image) -> Image.Image:
    return image


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 60, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def the_run() -> Run:
    (run,) = mlflow.search_runs(
        search_all_experiments=True, filter_string="tags.role = 'monitor'", output_format="list"
    )
    return run


def test_same_photographs_do_not_drift(champion: str, loaded: loading.Data, tmp_path: Path) -> None:
    ask(loaded, tmp_path / "log", same)
    done = command("monitor", "--prediction_log", "log", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no drift: 0 of 6 columns have drifted (none)" in done.stdout
    assert done.stderr == ""
    run = the_run()
    assert run.info.status == "FINISHED"
    assert run.data.tags["outcome"] == "no drift"
    assert run.data.tags["model_version"] == "1"
    assert run.data.metrics["predictions"] == ENOUGH
    assert run.data.metrics["drifted_share"] == 0
    assert {f"drift_{name}" for name in COLUMNS} <= set(run.data.metrics)
    assert all(run.data.metrics[f"drift_{name}"] < 0.01 for name in COLUMNS)


@pytest.mark.parametrize(
    ("change", "columns"),
    [(ImageOps.invert, {"brightness", "label"}), (noisy, {"contrast", "sharpness"})],
    ids=["inverted", "noisy"],
)
def test_changed_photographs_drift(
    champion: str, loaded: loading.Data, tmp_path: Path, change: Callable[[Image.Image], Image.Image], columns: set[str]
) -> None:
    ask(loaded, tmp_path / "log", change)
    done = command("monitor", "--prediction_log", "log", cwd=tmp_path)
    assert done.returncode == 3
    assert "columns have drifted" in done.stderr
    assert "Traceback" not in done.stderr
    run = the_run()
    assert run.info.status == "FINISHED", "the monitoring did not fail"
    assert run.data.tags["outcome"] == "drift"
    assert run.data.metrics["drifted_share"] >= 0.3
    drifted = {name for name in COLUMNS if run.data.metrics[f"drift_{name}"] >= (0.3 if name == "label" else 0.5)}
    assert columns <= drifted
    assert run.data.metrics["drifted_columns"] == len(drifted)
    files = {item.path: item.file_size for item in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert set(files) == {"drift.png"}, done.stdout


def test_too_few_predictions_exit_with_4(champion: str, loaded: loading.Data, tmp_path: Path) -> None:
    ask(loaded, tmp_path / "log", ImageOps.invert, version="7")
    done = command("monitor", "--prediction_log", "log", cwd=tmp_path)
    assert done.returncode == 4
    assert "0 predictions of version 1, 100 needed (it holds 120 of version 7)" in done.stderr
    assert not mlflow.search_runs(
        search_all_experiments=True, filter_string="tags.role = 'monitor'", output_format="list"
    )


def test_missing_log_is_misuse(champion: str, tmp_path: Path) -> None:
    done = command("monitor", "--prediction_log", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "prediction_log=nowhere: no such folder; serve with SIGN_DIGITS_PREDICTION_LOG=nowhere" in done.stderr


def test_max_predictions_limits_the_window(champion: str, loaded: loading.Data, tmp_path: Path) -> None:
    ask(loaded, tmp_path / "log", noisy)
    ask(loaded, tmp_path / "log", same)
    found = monitor(MonitorParameters(prediction_log="log", max_predictions=ENOUGH))
    assert found is not None
    assert found.share == 0
    assert the_run().data.metrics["predictions"] == ENOUGH


def test_other_entries_are_ignored(champion: str, loaded: loading.Data, tmp_path: Path) -> None:
    ask(loaded, tmp_path / "log", same)
    (file,) = prediction_log.list_log_files(tmp_path / "log")
    lines = file.read_text().splitlines()
    old = [json.dumps({**json.loads(line), "time": "2026-01-01T00:00:00.000+00:00"}) for line in lines]
    other = [json.dumps({**json.loads(line), "version": "2"}) for line in lines]
    unnamed = [json.dumps({**json.loads(line), "version": ""}) for line in lines[:5]]
    strange = ["[]", "{}", "five fingers", lines[0][:50]]
    file.write_text("\n".join([*old, *other, *lines, *unnamed, *strange]))
    monitor(MonitorParameters(prediction_log="log", window_hours=24))
    assert the_run().data.metrics["predictions"] == ENOUGH + 5


def test_missing_reference_names_remedy(
    champion: str, loaded: loading.Data, tmp_path: Path, log_another: Callable[[], str]
) -> None:
    ask(loaded, tmp_path / "log", same)
    with pytest.raises(ModelError, match="not evaluated; run `python -m signdigits evaluate --model_uri"):
        monitor(MonitorParameters(prediction_log="log", model_uri=log_another()))


@pytest.fixture
def log_another(champion: str, loaded: loading.Data) -> Callable[[], str]:
    """A function that logs an untrained network, and returns its address."""

    def log() -> str:
        with runs.start_run("train", "train"):
            network = architecture.build_network(loaded.training.shape, 3)
            return str(package.log_model(network, calibrate(network, loaded), loaded, {}).model_uri)

    return log


def test_monitor_opens_no_connection(champion: str, loaded: loading.Data, tmp_path: Path) -> None:
    """Python's audit hook reports every connection and look-up of every library."""
    ask(loaded, tmp_path / "log", same)
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
    done = command("monitor", "--prediction_log", "log", cwd=tmp_path, env=watched)
    assert done.returncode == 0, done.stderr
    assert calls.read_text() == ""
