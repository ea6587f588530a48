import json
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from PIL import Image

from signdigits import data, prepare
from signdigits.hyperparameters import DataParameters

from .conftest import SIZE, write_photographs


def download(run_id: str, name: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name))


def test_the_report_lands_in_the_run(store: str, loaded: data.Data) -> None:
    run_id = prepare.prepare(loaded)
    report = json.loads(download(run_id, "data/report.json").read_text())
    assert report["classes"] == {"0": 20, "1": 20, "2": 20}
    assert report["sizes"] == {"24x24": 60}
    assert report["modes"] == {"RGB": 60}
    assert report["digest"] == loaded.dataset.digest
    assert {name: part["images"] for name, part in report["split"].items()} == {
        "training": 38,
        "validation": 10,
        "testing": 12,
    }
    files = pd.read_csv(download(run_id, "data/files.csv"))
    assert files["part"].value_counts().to_dict() == {"training": 38, "validation": 10, "testing": 12}
    with Image.open(download(run_id, "data/sample.png")) as picture:
        assert picture.width > 400


def test_the_data_set_is_an_input_of_the_run_with_its_digest(store: str, loaded: data.Data) -> None:
    run = mlflow.get_run(prepare.prepare(loaded))
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "bars"
    assert used.dataset.digest == loaded.dataset.digest
    assert run.data.metrics["photographs"] == 60
    assert run.info.status == "FINISHED"


def test_what_was_unreadable_or_turned_is_told(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_photographs(tmp_path / "bad")
    (folder / "1" / "notes.txt").write_text("five fingers")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(folder / "0" / "turned.jpg", exif=exif)
    caplog.set_level("INFO", "signdigits")
    run_id = prepare.prepare(data.load(DataParameters(data=str(folder), image_size=SIZE, skip_unreadable=True)))
    report = json.loads(download(run_id, "data/report.json").read_text())
    assert report["unreadable"] == {"1/notes.txt": "not an image"}
    assert report["turned upright"] == ["0/turned.jpg"]
    assert "left out: 1/notes.txt: not an image" in caplog.text
