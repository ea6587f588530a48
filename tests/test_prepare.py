import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from signdigits import prepare
from signdigits.config import DataParameters, ReportParameters, SourceParameters
from signdigits.data import loading, quality, split
from signdigits.data.dataset import scan_dataset

from .conftest import SIZE, write_photographs


def download(run_id: str, name: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name))


def test_report_is_logged(store: str, loaded: loading.Data) -> None:
    run_id = prepare.prepare(loaded, ReportParameters())
    report = json.loads(download(run_id, "data/report.json").read_text())
    assert report["classes"] == {"0": 20, "1": 20, "2": 20}
    assert report["sizes"] == {"24x24": 60}
    assert report["modes"] == {"RGB": 60}
    assert report["digest"] == loaded.dataset.digest
    assert report["test accuracy"] == {"images": 12, "right": 11, "low": 0.646, "high": 0.985}
    assert {name: part["images"] for name, part in report["split"].items()} == {
        "training": 39,
        "validation": 9,
        "testing": 12,
    }
    files = pd.read_csv(download(run_id, "data/files.csv"))
    assert files["part"].value_counts().to_dict() == {"training": 39, "validation": 9, "testing": 12}
    with Image.open(download(run_id, "data/sample.png")) as picture:
        assert picture.width > 400


def test_dataset_is_run_input(store: str, loaded: loading.Data) -> None:
    run = mlflow.get_run(prepare.prepare(loaded, ReportParameters()))
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "bars"
    assert used.dataset.digest == loaded.dataset.digest
    assert run.data.metrics["photographs"] == 60
    assert run.info.status == "FINISHED"


def test_unreadable_and_turned_are_reported(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_photographs(tmp_path / "bad")
    (folder / "1" / "notes.txt").write_text("five fingers")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(folder / "0" / "turned.jpg", exif=exif)
    caplog.set_level("INFO", "signdigits")
    run_id = prepare.prepare(
        loading.load_data(DataParameters(data=str(folder), image_size=SIZE, skip_unreadable=True)), ReportParameters()
    )
    report = json.loads(download(run_id, "data/report.json").read_text())
    assert report["unreadable"] == {"1/notes.txt": "not an image"}
    assert report["turned upright"] == ["0/turned.jpg"]
    assert "skipped: 1/notes.txt: not an image" in caplog.text


def test_findings_are_table_and_picture(store: str, tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "odd", each=30)
    for path in list((folder / "2").iterdir())[:12]:
        path.unlink()
    random = np.random.default_rng(1)
    Image.fromarray(random.integers(0, 80, (96, 24, 3), dtype=np.uint8)).save(folder / "0" / "long.jpg")
    Image.new("RGB", (24, 24), (250, 0, 0)).save(folder / "1" / "red.jpg")
    loaded = loading.load_data(DataParameters(data=str(folder), image_size=SIZE))
    parts = dict(zip((p.path for p in loaded.dataset.photographs), quality.part_names(loaded), strict=True))
    kept = next(path for path, part in parts.items() if part == "testing")
    copied = next(path for path, part in parts.items() if part == "training" and path[0] == kept[0])
    with Image.open(folder / kept) as picture:
        picture.resize((48, 48)).save(folder / copied, quality=90)

    run_id = prepare.prepare(loading.load_data(loaded.parameters), ReportParameters())
    table = pd.read_csv(download(run_id, "data/findings.csv"), keep_default_na=False)
    found = {(row.finding, row.path, row.other) for row in table.itertuples()}
    assert ("imbalance", "2", "") in found
    assert ("size", "0/long.jpg", "") in found
    assert ("colour", "1/red.jpg", "") in found
    assert ("near-duplicate", *sorted((kept, copied))) in found
    assert len(list(folder.rglob("*.JPG"))) == 78, "nothing is deleted"
    with Image.open(download(run_id, "data/findings.png")) as shown:
        assert shown.width > 500
    assert mlflow.get_run(run_id).data.metrics["findings"] == len(table)


def test_photograph_in_two_classes_is_found(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "twice", each=9)
    copied = folder / "1" / "copy.JPG"
    shutil.copy(folder / "0" / "IMG_0003.JPG", copied)
    with Image.open(folder / "0" / "IMG_0004.JPG") as picture:
        picture.resize((48, 48)).save(folder / "2" / "resized.JPG", quality=90)
    findings = quality.find_issues(loading.load_data(DataParameters(data=str(folder), image_size=SIZE)))
    twice = findings[findings["finding"] == "two classes"]
    assert list(zip(twice["path"], twice["other"], strict=True)) == [
        ("0/IMG_0003.JPG", "1/copy.JPG"),
        ("0/IMG_0004.JPG", "2/resized.JPG"),
    ]
    few = findings[findings["finding"] == "few"]
    assert few["path"].tolist() == ["0"]


def test_planted_label_errors_come_first(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_photographs(tmp_path / "wrong")
    planted = ["0/planted.JPG", "2/planted.JPG"]
    (folder / "1" / "IMG_0003.JPG").rename(folder / planted[0])
    (folder / "0" / "IMG_0005.JPG").rename(folder / planted[1])
    caplog.set_level("INFO", "signdigits")
    data = loading.load_data(DataParameters(data=str(folder), image_size=SIZE))
    run_id = prepare.prepare(data, ReportParameters(label_errors=True))
    table = pd.read_csv(download(run_id, "data/label_errors.csv"), dtype={"suggested": str})
    assert set(table["path"][:2]) == set(planted)
    assert (
        dict(zip(table["path"], table["suggested"], strict=True)).items() >= {planted[0]: "1", planted[1]: "0"}.items()
    )
    assert table["issue"][:2].all()
    assert mlflow.get_run(run_id).data.metrics["label_issues"] == table["issue"].sum()
    assert f"  {planted[0]}: perhaps 1" in caplog.text
    with Image.open(download(run_id, "data/label_errors.png")) as shown:
        assert shown.width > 1000


def test_real_groups_are_written(sign_digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    shutil.copytree(sign_digits, folder, ignore=shutil.ignore_patterns(split.GROUPS))
    found = scan_dataset(SourceParameters(data=str(folder)))
    folder.chmod(0o555)
    split.write_groups(found)
    assert not (folder / split.GROUPS).exists(), "read-only, also for root"
    folder.chmod(0o755)
    told = split.read_groups(found)
    split.write_groups(found)
    table = pd.read_csv(folder / split.GROUPS)
    assert table["group"].nunique() == 220
    assert split.read_groups(found).tolist() == told.tolist() == table["group"].tolist()
    assert scan_dataset(SourceParameters(data=str(folder))).digest == found.digest
