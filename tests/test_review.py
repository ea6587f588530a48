"""The review of corrections, as `serving/corrections.py` keeps them."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from signdigits import cli, review
from signdigits.config import ReviewParameters, SourceParameters
from signdigits.data.dataset import scan_dataset
from signdigits.data.outlier_images import find_no_sign
from signdigits.errors import DataError, UsageError
from signdigits.files import read_csv

IDS = ["aaaa", "bbbb", "cccc"]


@pytest.fixture
def corrections(photographs: Path, tmp_path: Path) -> Path:
    """Three pending corrections to the labels 0, 1 and 2, and a photograph that is being written."""
    folder = tmp_path / "corrections"
    for label, name in enumerate(IDS):
        place = folder / "pending" / str(label)
        place.mkdir(parents=True)
        shutil.copy(photographs / str(label) / "IMG_0000.JPG", place / f"{name}.jpeg")
        facts = {
            "time": "2026-11-26T10:00:00+00:00",
            "version": "1",
            "label": str(label),
            "prediction": "2",
            "probability": 0.5,
        }
        (place / f"{name}.json").write_text(json.dumps(facts))
    (folder / "pending" / "2" / ".dddd.jpeg-77").write_bytes(b"half")
    return folder


def places(folder: Path) -> dict[str, str]:
    """The folder that each photograph lies in."""
    found = [path for path in folder.glob("*/*/*.jpeg") if not path.name.startswith(".")]
    assert len({path.stem for path in found}) == len(found), "none is in two places"
    return {path.stem: path.relative_to(folder).parts[0] for path in found}


def the_run() -> Run:
    run = mlflow.last_active_run()
    assert run is not None
    return mlflow.get_run(run.info.run_id)


def test_review_lists_corrections(store: str, corrections: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "signdigits")
    assert cli.main(["review", "--corrections", str(corrections)]) == 0
    run = the_run()
    assert run.data.tags["role"] == "review"
    assert run.data.metrics == {"pending": 3, "accepted": 0, "dropped": 0}
    files = {item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id, "review")}
    assert files == {"review/corrections.csv", "review/corrections-01.png"}
    table = read_csv(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/review/corrections.csv"))
    assert table["id"].tolist() == IDS
    assert table.loc[0].to_dict() == {
        "id": "aaaa", "label": "0", "prediction": "2", "probability": "0.5", "version": "1",
        "time": "2026-11-26T10:00:00+00:00", "decision": "pending", "reason": "",
    }  # fmt: skip
    assert "cccc" in caplog.text
    assert places(corrections) == dict.fromkeys(IDS, "pending")


def test_accepted_corrections_are_a_data_set(store: str, corrections: Path) -> None:
    review.review(ReviewParameters(str(corrections), accept="all", drop="bbbb"))
    assert the_run().data.metrics == {"pending": 0, "accepted": 2, "dropped": 1}
    assert places(corrections) == {"aaaa": "accepted", "cccc": "accepted"}
    assert [path.name for path in (corrections / "pending").rglob("*") if path.is_file()] == [".dddd.jpeg-77"]
    dataset = scan_dataset(SourceParameters(data=str(corrections / "accepted")))
    assert [photograph.path for photograph in dataset.photographs] == ["0/aaaa.jpeg", "2/cccc.jpeg"]
    record = read_csv(corrections / "accepted" / "review.csv")
    assert record[["id", "label", "prediction"]].to_numpy().tolist() == [["aaaa", "0", "2"], ["cccc", "2", "2"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accept", "aaaa,eeee"], "accept=eeee: no pending correction of that id"),
        (["--accept", "aaaa", "--drop", "aaaa,bbbb"], "accept and drop: both name aaaa"),
        (["--accept", "all", "--drop", "all"], "pass all to one of the two"),
    ],
)
def test_misuse_changes_nothing(
    store: str, corrections: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    before = places(corrections)
    assert cli.main(["review", "--corrections", str(corrections), *options]) == 2
    assert message in capsys.readouterr().err
    assert places(corrections) == before
    assert mlflow.search_runs(search_all_experiments=True).empty


def test_missing_folder_is_misuse(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["review", "--corrections", "nowhere"]) == 2
    assert "corrections=nowhere: no such folder; serve with --corrections nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("step", range(1, 6))
def test_killed_review_is_completed(store: str, corrections: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The kill comes before the `step`-th change of a file."""
    steps = 0

    def counted(change: str) -> None:
        original = getattr(Path, change)

        def stop(path: Path, *arguments: object, **options: object) -> object:
            nonlocal steps
            if path.is_relative_to(corrections):
                steps += 1
                if steps == step:
                    raise KeyboardInterrupt
            return original(path, *arguments, **options)

        patch.setattr(Path, change, stop)

    parameters = ReviewParameters(str(corrections), accept="aaaa", drop="all")
    with monkeypatch.context() as patch:
        for change in ("replace", "unlink"):
            counted(change)
        with pytest.raises(KeyboardInterrupt):
            review.review(parameters)
    assert places(corrections).keys() >= {"aaaa"}, "what is accepted is not lost"
    try:
        review.review(parameters)
    except UsageError:  # it was accepted before the kill
        review.review(ReviewParameters(str(corrections), drop="all"))
    assert places(corrections) == {"aaaa": "accepted"}
    assert read_csv(corrections / "accepted" / "review.csv")[["id", "prediction"]].to_numpy().tolist() == [
        ["aaaa", "2"]
    ]
    assert list((corrections / "pending").rglob("*.json")) == []


def test_damaged_file_costs_one_picture(store: str, corrections: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Among the corrections are a damaged photograph, facts that are none, an id in two classes, junk and a pipe."""
    pending = corrections / "pending"
    (pending / "0" / "eeee.jpeg").write_bytes((pending / "0" / "aaaa.jpeg").read_bytes()[:300])
    (pending / "0" / "aaaa.json").write_text('["no facts"]')
    shutil.copy(pending / "2" / "cccc.jpeg", pending / "1" / "cccc.jpeg")
    (pending / "1" / "@eaDir").mkdir()
    (pending / "1" / "Thumbs.db").write_bytes(b"junk")
    os.mkfifo(pending / "2" / "pipe.jpeg")
    (pending / "1" / "bbbb.json").unlink()
    os.mkfifo(pending / "1" / "bbbb.json")
    parameters = ReviewParameters(str(corrections), accept="eeee")
    with pytest.raises(UsageError, match=r"accept=eeee: .*; leave it out, or drop it"):
        review.review(parameters)
    table = review.review(replace(parameters, accept="all"))
    assert dict(zip(table["id"], table["decision"], strict=True)) == {
        "aaaa": "accepted", "eeee": "pending", "bbbb": "accepted", "1/cccc.jpeg": "accepted", "2/cccc.jpeg": "accepted",
    }  # fmt: skip
    assert "it is neither shown nor accepted, and --drop eeee removes it" in caplog.text
    assert mlflow.artifacts.list_artifacts(run_id=the_run().info.run_id, artifact_path="review")[0].file_size
    assert scan_dataset(SourceParameters(data=str(corrections / "accepted"))).counts() == {"0": 1, "1": 2, "2": 1}
    assert review.review(replace(parameters, accept="", drop="all"))["id"].tolist() == ["eeee"]


def test_no_sign_is_no_class(store: str, corrections: Path, photographs: Path) -> None:
    """An answer "not a sign", and one whose facts a killed review left."""
    place = corrections / "pending" / "not-a-sign"
    place.mkdir()
    shutil.copy(photographs / "0" / "IMG_0001.JPG", place / "eeee.jpeg")
    for name in ("eeee", "ffff"):
        (place / f"{name}.json").write_text('{"label": null, "prediction": "2"}')
    (corrections / "not-a-sign").mkdir()
    shutil.copy(photographs / "0" / "IMG_0002.JPG", corrections / "not-a-sign" / "ffff.jpeg")
    table = review.review(ReviewParameters(str(corrections)))
    assert table.set_index("id")["label"].to_dict() == {"aaaa": "0", "bbbb": "1", "cccc": "2", "eeee": "not-a-sign"}
    assert cli.main(["review", "--corrections", str(corrections), "--accept", "all"]) == 0
    accepted = corrections / "accepted"
    assert scan_dataset(SourceParameters(data=str(accepted))).class_names == ("0", "1", "2")
    assert [path.name for path in find_no_sign([photographs, accepted])] == ["eeee.jpeg", "ffff.jpeg"]
    record = read_csv(accepted / "review.csv")
    assert record.loc[record["label"] == "not-a-sign", "id"].tolist() == ["ffff", "eeee"]
    assert list(place.iterdir()) == []


def test_edited_record_is_kept(store: str, corrections: Path) -> None:
    record = corrections / "accepted" / "review.csv"
    record.parent.mkdir()
    record.write_bytes("\ufeffid;label;note\r\n0007;0;wrong, I think;\r\n".encode())
    review.review(ReviewParameters(str(corrections), accept="aaaa"))
    table = read_csv(record)
    assert table[["id", "label", "note"]].to_numpy().tolist() == [["0007", "0", "wrong, I think"], ["aaaa", "0", ""]]
    record.write_text('id,label\naaaa,0\n"bbbb,1\n')
    with pytest.raises(DataError, match=r"review.csv: line 3: unexpected end of data"):
        review.review(ReviewParameters(str(corrections), accept="bbbb"))
    assert places(corrections) == {"aaaa": "accepted", "bbbb": "pending", "cccc": "pending"}
