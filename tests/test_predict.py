"""Batch prediction, with the command line and in this process."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.entities import Run

from signdigits import cli, predict
from signdigits.batch.output import TABLES, BatchJob, Output, find_job, lock_output
from signdigits.config import PredictParameters
from signdigits.errors import UsageError
from signdigits.packaging.reply import FIELDS

from .conftest import settings_of_others, store_like, use_store, wait_until

pytestmark = pytest.mark.slow

REQUIRED = [field.name for field in FIELDS if field.is_required]
AT = REQUIRED.index("probabilities")
COLUMNS = ["path", *REQUIRED[:AT], "p(0)", "p(1)", "p(2)", *REQUIRED[AT + 1 :], "model_version", "reason"]


def read(images: Path, output: str = "out", **options: str | int) -> Output:
    return predict.predict(PredictParameters(images=str(images), output=output, **options))  # type: ignore[arg-type]


def tables(output: str = "out") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables, read back."""
    text = {"path": str, "label": str, "model_version": str, "reason": str}
    csv = pd.read_csv(Path(output, "predictions.csv"), dtype=text)
    return pd.read_parquet(Path(output, "predictions.parquet")), csv


def contents(output: str) -> dict[str, bytes]:
    """The bytes of each file of the tables."""
    files = [Path(output, "predictions.csv"), *Path(output, "predictions.parquet").iterdir()]
    return {file.name: file.read_bytes() for file in files}


def predictions() -> list[Run]:
    return mlflow.search_runs(search_all_experiments=True, filter_string="tags.role = 'predict'", output_format="list")


def link_copies(photographs: Path, folder: Path, times: int) -> Path:
    """Fill a folder with links to the photographs, several to each."""
    folder.mkdir()
    for number in range(times):
        for path in sorted(photographs.rglob("*.JPG")):
            os.link(path, folder / f"{number:03d}-{path.parent.name}-{path.name}")
    return folder


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory: pytest.TempPathFactory, photographs: Path, champion_store: Path) -> Path:
    """A folder with a store and a finished job, in parts of 20, over `mixed`: photographs, and files that are none."""
    home = tmp_path_factory.mktemp("finished")
    mixed = Path(shutil.copytree(photographs, home / "mixed"))
    whole = (mixed / "1" / "IMG_0003.JPG").read_bytes()
    (mixed / "1" / "IMG_0003.JPG").write_bytes(whole[:-200])
    (mixed / "notes.txt").write_text("five fingers")
    (mixed / "2" / "nothing.png").touch()
    (mixed / "2" / "link.png").symlink_to("nowhere")
    (mixed / ".hidden").touch()
    (mixed / os.fsdecode(b"\xff.jpg")).write_bytes(whole)  # a name that is not UTF-8
    with store_like(champion_store, home), pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "CHUNK_SIZE", 20)
        experiment = mlflow.get_experiment_by_name("tests").experiment_id
        launched = mlflow.MlflowClient().create_run(experiment)  # as `mlflow run` does
        patch.setenv("MLFLOW_RUN_ID", launched.info.run_id)
        assert cli.main(["predict", "--images", "mixed", "--output", "out"]) == 0
        assert [run.info.run_id for run in predictions()] == [launched.info.run_id]
    return home


@pytest.fixture
def finished(finished_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the finished job as the working directory; tests leave the job as it is."""
    with use_store(finished_folder) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield finished_folder


def test_every_photograph_has_a_row(finished: Path) -> None:
    parquet, csv = tables()
    assert list(parquet) == COLUMNS
    pd.testing.assert_frame_equal(parquet, csv, check_exact=True, check_dtype=False)
    assert len(parquet) == 64
    in_classes = parquet[parquet["path"].str.contains("/")]
    assert in_classes["path"].is_monotonic_increasing
    readable = in_classes[in_classes["reason"].isna()]
    assert len(readable) == 59
    assert (readable["label"] == readable["path"].str[0]).mean() > 0.9
    shares = readable[["p(0)", "p(1)", "p(2)"]]
    assert shares.sum(axis=1).tolist() == pytest.approx([1] * 59)
    assert shares.max(axis=1).tolist() == readable["probability"].tolist()
    assert set(parquet["model_version"]) == {"1"}
    assert readable["is_outlier"].mean() < 0.1
    assert readable["is_outlier"].tolist() == (readable["outlier_score"] > 1).tolist()


def test_predictions_match_served_model(finished: Path) -> None:
    table = tables()[0].dropna(subset=["label"])
    table = table[table["path"].str.contains("/")]
    served = mlflow.pyfunc.load_model("models:/sign-digits@champion")
    direct = served.predict(pd.DataFrame({"image": [Path("mixed", path).read_bytes() for path in table["path"]]}))
    assert table["label"].tolist() == direct["label"].tolist()
    assert table["probability"].tolist() == direct["probability"].tolist()


def test_run_summarizes_prediction(finished: Path) -> None:
    (run,) = predictions()
    assert run.info.status == "FINISHED"
    assert run.data.params["model_uri"] == "models:/sign-digits@champion"
    assert run.data.tags["model_version"] == "1"
    expected = {
        "images": 64,
        "readable": 60,
        "unreadable": 4,
        "junk_files": 1,
        "repeated_paths": 0,
        "resumed_images": 0,
    }
    assert expected.items() <= run.data.metrics.items()
    assert run.data.metrics["outliers"] == tables()[0]["is_outlier"].sum()
    assert run.data.metrics["images_per_second"] == pytest.approx(64 / run.data.metrics["seconds"])
    files = {item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert files == {"least_certain.png", "predictions.csv"}
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "mixed"
    assert "64 images of `mixed`, predicted with version 1" in run.data.tags["mlflow.note.content"]
    assert "| not an image | 1 |" in run.data.tags["mlflow.note.content"]


def test_unreadable_rows_have_reasons(finished: Path) -> None:
    table = tables()[0].set_index("path")
    bad = table[table["label"].isna()]
    reasons = bad["reason"]
    assert set(reasons.index) == {"1/IMG_0003.JPG", "notes.txt", "2/nothing.png", "2/link.png"}
    assert reasons["1/IMG_0003.JPG"].startswith("truncated or damaged")
    assert reasons["notes.txt"] == "not an image"
    assert reasons["2/nothing.png"] == "empty"
    assert reasons["2/link.png"] == "cannot be read (No such file or directory)"
    assert bad[["probability", "p(0)", "p(1)", "p(2)"]].isna().all(axis=None)
    assert table.loc["\\udcff.jpg", "label"] == "1"


def test_second_start_changes_nothing(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.name != ".lock"}

    before, (run,) = times(), predictions()
    assert cli.main(["predict", "--images", "mixed", "--output", "out"]) == 0
    assert f"already finished, in run {run.info.run_id}" in caplog.text
    assert times() == before
    assert [other.to_dictionary() for other in predictions()] == [run.to_dictionary()]


def copy_output(change: Callable[[Output], object]) -> None:
    """Copy the finished output to `copy`, and change it."""
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree("out", "copy")
    job = find_job(Path("copy"))
    assert job is not None
    change(Output(Path("copy"), job))


def test_finished_parts_are_kept(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(output: Output) -> None:
        output.parquet.rename(output.parts)
        output.csv.unlink()
        rows = pd.read_parquet(output.part(0)).astype({"is_outlier": "boolean"})
        output.write_part(0, rows.assign(label="from before"))
        output.part(2).unlink()

    monkeypatch.setattr(predict, "CHUNK_SIZE", 20)
    copy_output(interrupt)
    read(Path("mixed"), "copy")
    again = tables("copy")[0]
    assert again["label"][:20].unique().tolist() == ["from before"]
    pd.testing.assert_frame_equal(again[20:], tables()[0][20:])


def test_removed_csv_is_written_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "CHUNK_SIZE", 20)
    copy_output(lambda output: output.csv.unlink())
    read(Path("mixed"), "copy")
    assert contents("copy") == contents("out")


def test_single_file_of_earlier_version_is_finished(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    def join(output: Output) -> None:
        rows = pd.read_parquet(output.parquet)
        shutil.rmtree(output.parquet)
        rows.to_parquet(output.parquet)

    copy_output(join)
    read(Path("mixed"), "copy")
    assert "already finished" in caplog.text
    Path("copy", "predictions.csv").unlink()  # of no use without it: both are made anew
    read(Path("mixed"), "copy")
    assert Path("copy", "predictions.csv").read_bytes() == Path("out", "predictions.csv").read_bytes()
    pd.testing.assert_frame_equal(tables("copy")[0], tables()[0])


def test_different_job_is_refused(finished: Path) -> None:
    before = contents("out")
    shutil.copytree("mixed", "more", symlinks=True)
    (Path("more") / "0" / "IMG_0000.JPG").unlink()
    with pytest.raises(UsageError, match=r"started with 64 other images, from .*; pass another --output"):
        read(Path("more"))
    assert contents("out") == before
    assert len(predictions()) == 1


def test_other_version_is_named(finished: Path) -> None:
    text = Path("out", "job.json").read_text()
    job = find_job(Path("out"))
    assert job is not None

    def change(output: Output) -> None:
        path = output.folder / "job.json"
        path.write_text(text.replace(job.model, "m-other").replace('"version": "1"', '"version": "7"'))

    copy_output(change)
    with pytest.raises(UsageError, match=r"started with version 7, not 1 \(--model_uri models:/m-other continues it\)"):
        read(Path("mixed"), "copy")


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


@dataclass(frozen=True)
class KilledJob:
    """A job that was killed after its first parts, and what its process printed; beside it the tables of a whole one."""

    images: Path
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, photographs: Path, champion_store: Path) -> KilledJob:
    home = tmp_path_factory.mktemp("killed")
    images = link_copies(photographs, home / "many", times=50)
    with store_like(champion_store, home):
        line = [sys.executable, "-X", "importtime", "-m", "signdigits", "predict", "--images", str(images)]
        with Path("printed").open("w") as file:
            process = subprocess.Popen(
                [*line, "--output", "out"], stdout=file, stderr=file, env=settings_of_others(home)
            )
            wait_until(lambda: list(Path("out", "parts").glob("0*.parquet")) or process.poll() is not None)
            process.send_signal(signal.SIGKILL)
            process.wait()
        read(images, "straight")
    return KilledJob(images, home, (home / "printed").read_text())


@pytest.fixture
def resumable(killed: KilledJob, monkeypatch: pytest.MonkeyPatch) -> Iterator[KilledJob]:
    with use_store(killed.folder) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield killed


def test_predict_imports_no_tensorflow(killed: KilledJob) -> None:
    imported = {row.rpartition("|")[2].strip() for row in killed.printed.splitlines()}
    assert not imported & {"tensorflow", "keras", "ray", "optuna"}
    assert "mlflow" in imported


def test_killed_prediction_resumes(resumable: KilledJob) -> None:
    assert not any(Path("out", name).exists() for name in TABLES)
    kept = {path: path.stat().st_mtime_ns for path in Path("out", "parts").glob("0*.parquet")}
    assert 0 < len(kept) < 12
    started = find_job(Path("out"))
    assert started is not None

    assert cli.main(["predict", "--images", str(resumable.images), "--output", "out"]) == 0
    run = mlflow.get_run(started.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["images"] == 3000
    assert run.data.metrics["resumed_images"] >= 256 * len(kept) - 256
    assert not Path("out", "parts").exists()
    assert {path: Path("out", "predictions.parquet", path.name).stat().st_mtime_ns for path in kept} == kept
    assert contents("out") == contents("straight")


def test_workers_give_same_tables(resumable: KilledJob) -> None:
    """One of the two workers is killed on the way, and replaced."""
    pytest.importorskip("ray", reason="needs the extra .[cluster]")
    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill_a_worker, Path("spread", "parts"))
        read(resumable.images, "spread", workers=2)
        killing.result()
    assert contents("spread") == contents("straight")


def kill_a_worker(parts: Path) -> None:
    """Kill one of the processes that Ray started for this one, once there is a part."""
    wait_until(lambda: any(parts.glob("0*.parquet")), interval=0.01)
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_worker = status.read_bytes().startswith(b"ray::ScoringWorker")
        except OSError:
            continue
        if is_worker and is_ours(int(status.parent.name)):
            os.kill(int(status.parent.name), signal.SIGKILL)
            return
    raise AssertionError("no worker was found")


def is_ours(process: int) -> bool:
    """Tell whether this process is an ancestor: another search or prediction may run on the machine."""
    while process > 1 and process != os.getpid():
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return process == os.getpid()


def test_unknown_tables_are_kept(champion: str, photographs: Path) -> None:
    Path("out").mkdir()
    Path("out", "predictions.csv").write_text("mine")
    with pytest.raises(UsageError, match="pass another --output, or remove it"):
        read(photographs)
    assert Path("out", "predictions.csv").read_text() == "mine"


def test_output_in_use_is_refused(champion: str, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock_output(Path("out"), BatchJob("m-1", "1", "some", "digest", 1)):
        assert cli.main(["predict", "--images", str(photographs), "--output", "out"]) == 2
    assert "in use by another process" in capsys.readouterr().err


def test_output_folder_is_not_input(champion: str, photographs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photographs / "0", tmp_path / "some"))
    read(folder, str(folder / "tables"))
    read(folder, str(folder / "tables"))
    assert len(tables(str(folder / "tables"))[0]) == 20


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
        (["--images", "gap.csv"], "gap.csv: line 3: no path; remove or correct the row"),
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
