"""Batch prediction, with the command line and in this process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.entities import Run

from signdigits import cli, predict
from signdigits.batch.output import TABLES, BatchJob, Output, find_job, lock_output
from signdigits.config import PredictParameters
from signdigits.errors import UsageError

from .conftest import PROJECT, command, wait_until

pytestmark = pytest.mark.slow

COLUMNS = [
    "path",
    "label",
    "probability",
    "p(0)",
    "p(1)",
    "p(2)",
    "outlier_score",
    "is_outlier",
    "model_version",
    "reason",
]


def read(images: Path, output: str = "out", **options: str | int) -> Output:
    return predict.predict(PredictParameters(images=str(images), output=output, **options))  # type: ignore[arg-type]


def tables(output: str = "out") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables, read back."""
    text = {"path": str, "label": str, "model_version": str, "reason": str}
    csv = pd.read_csv(Path(output, "predictions.csv"), dtype=text)
    return pd.read_parquet(Path(output, "predictions.parquet")), csv


def predictions() -> list[Run]:
    return mlflow.search_runs(search_all_experiments=True, filter_string="tags.role = 'predict'", output_format="list")


def many(photographs: Path, folder: Path, times: int) -> Path:
    """The photographs so many times over, as links."""
    folder.mkdir()
    for number in range(times):
        for path in sorted(photographs.rglob("*.JPG")):
            os.link(path, folder / f"{number:03d}-{path.parent.name}-{path.name}")
    return folder


def test_every_photograph_has_a_row(champion: str, photographs: Path) -> None:
    read(photographs)
    parquet, csv = tables()
    assert list(parquet) == COLUMNS
    assert parquet["path"].tolist() == [f"{label}/IMG_{number:04d}.JPG" for label in range(3) for number in range(20)]
    assert (parquet["label"] == parquet["path"].str[0]).mean() > 0.9
    shares = parquet[["p(0)", "p(1)", "p(2)"]]
    assert shares.sum(axis=1).tolist() == pytest.approx([1] * 60)
    assert shares.max(axis=1).tolist() == parquet["probability"].tolist()
    assert set(parquet["model_version"]) == {"1"}
    assert parquet["is_outlier"].mean() < 0.1
    assert parquet["is_outlier"].equals(parquet["outlier_score"] > 1)
    assert parquet["reason"].isna().all()
    pd.testing.assert_frame_equal(parquet, csv, check_exact=True, check_dtype=False)


def test_predictions_match_served_model(champion: str, photographs: Path) -> None:
    read(photographs)
    served = mlflow.pyfunc.load_model("models:/sign-digits@champion")
    contents = [(photographs / path).read_bytes() for path in tables()[0]["path"]]
    direct = served.predict(pd.DataFrame({"image": contents}))
    assert tables()[0]["label"].tolist() == direct["label"].tolist()
    assert tables()[0]["probability"].tolist() == direct["probability"].tolist()


def test_run_summarizes_prediction(champion: str, photographs: Path) -> None:
    read(photographs)
    (run,) = predictions()
    assert run.info.status == "FINISHED"
    assert run.data.params["model_uri"] == "models:/sign-digits@champion"
    assert run.data.tags["model_version"] == "1"
    expected = {"images": 60, "readable": 60, "unreadable": 0, "repeated_paths": 0, "resumed_images": 0}
    assert expected.items() <= run.data.metrics.items()
    assert run.data.metrics["images_per_second"] == pytest.approx(60 / run.data.metrics["seconds"])
    files = {item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert files == {"least_certain.png", "predictions.csv"}
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "bars"
    assert "60 images of `bars`, predicted with version 1" in run.data.tags["mlflow.note.content"]


def test_unreadable_rows_have_reasons(champion: str, photographs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photographs, tmp_path / "mixed"))
    whole = (folder / "1" / "IMG_0003.JPG").read_bytes()
    (folder / "1" / "IMG_0003.JPG").write_bytes(whole[:-200])
    (folder / "notes.txt").write_text("five fingers")
    (folder / "2" / "nothing.png").touch()
    (folder / "2" / "link.png").symlink_to("nowhere")
    (folder / ".hidden").touch()
    strange = os.fsdecode(b"\xff.jpg")  # no UTF-8
    (folder / strange).write_bytes(whole)
    read(folder)
    parquet, csv = tables()
    pd.testing.assert_frame_equal(parquet, csv, check_exact=True, check_dtype=False)
    assert len(parquet) == 64
    assert parquet["path"].is_unique
    bad = parquet[parquet["label"].isna()].set_index("path")
    reasons = bad["reason"]
    assert set(reasons.index) == {"1/IMG_0003.JPG", "notes.txt", "2/nothing.png", "2/link.png"}
    assert reasons["1/IMG_0003.JPG"].startswith("truncated or damaged")
    assert reasons["notes.txt"] == "not an image"
    assert reasons["2/nothing.png"] == "empty"
    assert reasons["2/link.png"] == "cannot be read (No such file or directory)"
    assert bad[["probability", "p(0)", "p(1)", "p(2)"]].isna().all(axis=None)
    assert parquet.set_index("path").loc["\\udcff.jpg", "label"] == "1"
    assert predictions()[0].data.metrics["unreadable"] == 4


def test_table_keeps_its_order(champion: str, photographs: Path, tmp_path: Path) -> None:
    paths = [str(photographs / "2" / "IMG_0001.JPG"), "NA", str(photographs / "0" / "IMG_0001.JPG"), "007", "NA"]
    listed = pd.DataFrame({"path": paths, "note": range(5)})
    listed.to_csv("some.csv", index=False)
    listed.to_parquet("some.parquet", index=False)
    shutil.copy(photographs / "1" / "IMG_0001.JPG", tmp_path / "007")  # relative to the table's folder
    read(Path("some.csv"), "one")
    read(Path("some.parquet"), "two")
    found, other = tables("one")[0], tables("two")[0]
    pd.testing.assert_frame_equal(found, other)
    assert found["path"].tolist() == paths[:4]
    assert found["label"].fillna("-").tolist() == ["2", "-", "0", "1"]
    assert found["reason"][1] == "cannot be read (No such file or directory)"
    assert {run.data.metrics["repeated_paths"] for run in predictions()} == {1}


def test_unreadable_folder_gives_table(champion: str, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "notes.txt").write_text("five fingers")
    read(folder)
    parquet, csv = tables()
    pd.testing.assert_frame_equal(parquet, csv, check_exact=True, check_dtype=False)
    assert parquet["reason"].tolist() == ["not an image"]


def test_killed_prediction_resumes(champion: str, photographs: Path, tmp_path: Path) -> None:
    folder = many(photographs, tmp_path / "many", times=75)
    line = [sys.executable, "-m", "signdigits", "predict", "--images", str(folder), "--output"]
    killed = subprocess.Popen([*line, "out"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: list(Path("out", "parts").glob("0*.parquet")) or killed.poll() is not None, seconds=120)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not Path("out", "predictions.parquet").exists()
    assert not Path("out", "predictions.csv").exists()
    kept = {path: path.stat().st_mtime_ns for path in Path("out", "parts").glob("0*.parquet")}
    assert 0 < len(kept) < 18

    resumed = command("predict", "--images", str(folder), "--output", "out")
    assert resumed.returncode == 0, resumed.stderr
    (run,) = predictions()
    assert run.info.status == "FINISHED"
    assert run.data.metrics["images"] == 4500
    assert run.data.metrics["resumed_images"] >= 256 * len(kept) - 256
    assert not Path("out", "parts").exists()

    read(folder, "straight")
    for name in TABLES:
        assert Path("out", name).read_bytes() == Path("straight", name).read_bytes()


def test_finished_parts_are_kept(champion: str, photographs: Path, tmp_path: Path) -> None:
    folder = many(photographs, tmp_path / "many", times=10)
    read(folder)
    rows = tables()[0]
    job = find_job(Path("out"))
    assert job is not None
    output = Output(Path("out"), job).update_job(finished=False)
    output.write_part(0, rows[:256].assign(label="from before"))
    for table in output.tables:
        table.unlink()
    read(folder)
    again = tables()[0]
    assert again["label"][:256].unique().tolist() == ["from before"]
    pd.testing.assert_frame_equal(again[256:], rows[256:])


def test_second_start_changes_nothing(champion: str, photographs: Path) -> None:
    first = command("predict", "--images", str(photographs), "--output", "out")
    assert first.returncode == 0, first.stderr
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.name != ".lock"}
    (run,) = predictions()
    again = command("predict", "--images", str(photographs), "--output", "out")
    assert again.returncode == 0
    assert f"already finished, in run {run.info.run_id}" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.name != ".lock"} == before
    assert [other.to_dictionary() for other in predictions()] == [run.to_dictionary()]


def test_different_job_is_refused(champion: str, photographs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photographs, tmp_path / "some"))
    read(folder)
    before = Path("out", "predictions.csv").read_bytes()
    os.utime(folder / "0" / "IMG_0000.JPG", (time.time(), time.time()))
    with pytest.raises(UsageError, match=r"started with 60 other images, from .*; pass another --output"):
        read(folder)
    shutil.copytree(photographs, tmp_path / "more")
    (tmp_path / "more" / "0" / "IMG_0000.JPG").unlink()
    with pytest.raises(UsageError, match="other images, from"):
        read(tmp_path / "more")
    assert Path("out", "predictions.csv").read_bytes() == before
    assert len(predictions()) == 1


def test_other_version_is_named(champion: str, photographs: Path) -> None:
    read(photographs)
    job = find_job(Path("out"))
    assert job is not None
    Output(Path("out"), job).update_job(model="m-other", version="7")
    with pytest.raises(UsageError, match=r"started with version 7, not 1 \(--model_uri models:/m-other continues it\)"):
        read(photographs)


def test_unknown_tables_are_kept(champion: str, photographs: Path) -> None:
    Path("out").mkdir()
    Path("out", "predictions.csv").write_text("mine")
    with pytest.raises(UsageError, match="pass another --output, or remove it"):
        read(photographs)
    assert Path("out", "predictions.csv").read_text() == "mine"


def test_second_process_is_refused(champion: str, photographs: Path) -> None:
    with lock_output(Path("out"), BatchJob("m-1", "1", "some", "digest", 1)):
        refused = command("predict", "--images", str(photographs), "--output", "out")
    assert refused.returncode == 2
    assert "in use by another process" in refused.stderr


def test_output_folder_is_not_input(champion: str, photographs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photographs, tmp_path / "some"))
    read(folder, str(folder / "tables"))
    read(folder, str(folder / "tables"))
    assert len(tables(str(folder / "tables"))[0]) == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "images='': must be a folder of photographs"),
        (["--images", "nowhere"], "nowhere: no such folder or table"),
        (["--images", "empty"], "empty: no photographs"),
        (
            ["--images", "list.txt"],
            "list.txt: neither a folder nor a table; the name of a table ends in .csv, .parquet",
        ),
        (["--images", "bad.parquet"], "bad.parquet: cannot be read"),
        (["--images", "names.csv"], "names.csv: no column path (columns: name); add one"),
        (["--images", "gap.csv"], "gap.csv: row 1: path='' is not a path"),
        (["--images", "empty", "--output", "."], "lies inside the output folder"),
        (["--images", "bars", "--output", "list.txt/out"], "list.txt/out: Not a directory; free some space"),
        (["--images", "bars", "--model_uri", "models:/other@champion"], "no such model"),
        (["--images", "bars", "--workers", "0"], "workers=0: must be 1 or more"),
    ],
)
def test_misuse_is_one_line(
    champion: str,
    photographs: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("empty").mkdir()
    Path("bars").symlink_to(photographs)
    Path("list.txt").write_text("a.jpg")
    Path("bad.parquet").write_text("five fingers")
    Path("names.csv").write_text("name\na.jpg\n")
    Path("gap.csv").write_text('path,note\na.jpg,1\n"",2\n')
    assert cli.main(["predict", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not predictions()


def test_predict_imports_no_tensorflow(champion: str, photographs: Path) -> None:
    line = [sys.executable, "-X", "importtime", "-m", "signdigits", "predict", "--images", str(photographs)]
    told = subprocess.run(line, check=True, capture_output=True, text=True, timeout=300).stderr
    imported = {row.rpartition("|")[2].strip() for row in told.splitlines()}
    assert not imported & {"tensorflow", "keras", "ray", "optuna"}
    assert "mlflow" in imported


def test_workers_give_same_tables(champion: str, photographs: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra .[cluster]")
    folder = many(photographs, tmp_path / "many", times=20)
    read(folder, "threads")
    line = ["predict", "--images", str(folder), "--output", "workers", "--workers", "2"]
    spread = command(*line, cwd=tmp_path)
    assert spread.returncode == 0, spread.stderr
    for name in TABLES:
        assert Path("workers", name).read_bytes() == Path("threads", name).read_bytes()


def test_mlflow_run_adopts_its_run(champion: str, photographs: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "mlflow", "run", str(PROJECT), "-e", "predict", "--env-manager", "local"]
    line += ["-P", f"images={photographs}", "-P", f"output={tmp_path / 'out'}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (run,) = predictions()
    assert run.info.status == "FINISHED"
    assert run.data.metrics["images"] == 60
    assert len(tables(str(tmp_path / "out"))[0]) == 60
