"""Joined folders: `data=A,B`."""

import hashlib
import shutil
from pathlib import Path

import pytest

from signdigits.config import DataParameters, SourceParameters
from signdigits.data import loading, sources, split
from signdigits.data.dataset import Dataset, scan_dataset
from signdigits.errors import DataError

from .conftest import write_photographs


def write_corrections(folder: Path, photographs: Path, each: int = 30) -> Path:
    """Write `each` photographs for class 1 that no other folder has."""
    (folder / "1").mkdir(parents=True)
    (folder / "review.csv").write_text("id\n")
    original = (photographs / "1" / "IMG_0000.JPG").read_bytes()
    for number in range(each):
        (folder / "1" / f"{number:03d}.jpeg").write_bytes(original + bytes([number]))
    return folder


def join(*folders: Path) -> Dataset:
    return scan_dataset(SourceParameters(data=",".join(map(str, folders))))


def parts(dataset: Dataset, name: str = "auto") -> dict[str, set[str]]:
    found = split.split_dataset(dataset, name)
    return {part: {dataset.photographs[i].path for i in indices} for part, indices in found.parts.items()}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_added_photographs_are_marked(photographs: Path, tmp_path: Path) -> None:
    accepted = write_corrections(tmp_path / "accepted", photographs, each=2)
    joined = join(photographs, accepted)
    assert joined.name == "bars+accepted"
    assert joined.counts() == {"0": 20, "1": 22, "2": 20}
    before = {photograph.path for photograph in scan_dataset(SourceParameters(data=str(photographs))).photographs}
    after = {photograph.path for photograph in joined.photographs}
    assert after - before == {"1/+accepted/000.jpeg", "1/+accepted/001.jpeg"}
    assert joined.source == f"{photographs},{accepted}"
    assert joined.locate("1/+accepted/000.jpeg") == accepted / "1" / "000.jpeg"
    assert scan_dataset(SourceParameters(data=joined.source)) == joined


def test_edited_photograph_is_noticed(photographs: Path, tmp_path: Path) -> None:
    """The folders are not copied: an edit makes another data set, and the first refuses to read it."""
    accepted = write_corrections(tmp_path / "accepted", photographs, each=2)
    first = join(photographs, accepted)
    assert [hashlib.sha256(first.read(found)).hexdigest() == found.checksum for found in first.photographs]
    edited = accepted / "1" / "000.jpeg"
    edited.write_bytes(edited.read_bytes() + b"edited")
    assert join(photographs, accepted).digest != first.digest
    with pytest.raises(DataError, match=r"accepted/1/000.jpeg: has changed since the folder was scanned"):
        [first.read(photograph) for photograph in first.photographs]


@pytest.mark.parametrize("name", ["random", "stratified", "grouped"])
def test_photographs_stay_in_their_part(photographs: Path, tmp_path: Path, name: str) -> None:
    original = Path(shutil.copytree(photographs, tmp_path / "bars"))
    listed = scan_dataset(SourceParameters(data=str(original))).photographs
    rows = [f"{photograph.path},signer {int(photograph.checksum[:2], 16) % 15}" for photograph in listed]
    (original / split.GROUPS).write_text("\n".join(["path,group", *rows]))
    alone = parts(scan_dataset(SourceParameters(data=str(original))), name)
    few = parts(join(original, write_corrections(tmp_path / "few" / "accepted", photographs, 10)), name)
    many = parts(join(original, write_corrections(tmp_path / "many" / "accepted", photographs, 100)), name)
    for part in alone:
        assert alone[part] < few[part] < many[part]
    assert [len(many[part] - alone[part]) for part in ("training", "validation", "testing")] == pytest.approx(
        [64, 16, 20], abs=10
    )


def test_copies_are_left_out(photographs: Path, tmp_path: Path) -> None:
    """In another class, a copy is a label that is doubted: it stays, and is a finding."""
    accepted = tmp_path / "accepted"
    for label in ("0", "1"):
        (accepted / label).mkdir(parents=True)
        shutil.copy(photographs / "0" / "IMG_0000.JPG", accepted / label / "again.jpeg")
    joined = join(photographs, accepted)
    assert [photograph.path for photograph in joined.photographs if "+" in photograph.path] == [
        "1/+accepted/again.jpeg"
    ]


def test_forms_of_class_names_are_joined(photographs: Path, tmp_path: Path) -> None:
    first = Path(shutil.copytree(photographs, tmp_path / "bars"))
    (first / "1").rename(first / "Cafe\u0301")
    more = write_corrections(tmp_path / "se\u0301ance", photographs, each=2)
    (more / "1").rename(more / "Caf\u00e9")
    joined = scan_dataset(SourceParameters(data="bars, s\u00e9ance,"))
    assert joined.counts() == {"0": 20, "2": 20, "Cafe\u0301": 22}
    (more / "Caf\u00e9").rename(more / "caf\u00e9")
    with pytest.raises(DataError, match="which it is joined to; perhaps Cafe\u0301 is meant; rename it"):
        join(first, more)


def test_more_can_be_added(photographs: Path, tmp_path: Path) -> None:
    """A data set that joins folders can be kept by a run; its copy can be the first of another, also with the same folders."""
    accepted = write_corrections(tmp_path / "accepted", photographs, 2)
    first = join(photographs, accepted)
    kept = tmp_path / "kept" / first.name  # as `data=runs:/RUN` finds it
    for photograph in first.photographs:
        (kept / photograph.path).parent.mkdir(parents=True, exist_ok=True)
        (kept / photograph.path).write_bytes(first.read(photograph))
    for again in (join(kept), join(kept, accepted)):
        assert [photograph.path for photograph in again.photographs] == [found.path for found in first.photographs]
        assert again.digest == first.digest
    (tmp_path / "more" / "2").mkdir(parents=True)
    (tmp_path / "more" / "2" / "new.jpeg").write_bytes((photographs / "2" / "IMG_0000.JPG").read_bytes() + b"new")
    again = join(kept, tmp_path / "more")
    assert again.name == "bars+accepted+more"
    assert {path.split("/")[1] for path in (p.path for p in again.photographs) if "+" in path} == {"+accepted", "+more"}


def test_named_data_set_can_be_joined(photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(photographs, Path("data", sources.HANDWRITTEN_DIGITS))  # fewer
    write_corrections(tmp_path / "accepted", photographs, each=1)
    joined = scan_dataset(SourceParameters(data="handwritten-digits,accepted"))
    assert len(joined.photographs) == 61
    assert split.split_dataset(joined, "auto").name == "random", "as of the first alone"
    assert loading.load_data(DataParameters(data="handwritten-digits,accepted")).image_size == 32


def test_comma_may_be_in_a_name(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "left,right", each=1)
    assert sources.resolve_source(str(folder)) == (folder,)


def test_misuse_names_remedy(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder; data=A,B joins existing folders"):
        join(photographs, tmp_path / "nowhere")
    (tmp_path / "other" / "nine").mkdir(parents=True)
    with pytest.raises(DataError, match=f"other/nine: no class of {photographs}, which it is joined to; rename it"):
        join(photographs, tmp_path / "other")
    for name in ("a", "b"):
        write_corrections(tmp_path / name / "accepted", photographs, each=1)
    with (tmp_path / "b" / "accepted" / "1" / "000.jpeg").open("ab") as other:
        other.write(b"other")
    with pytest.raises(DataError, match=r"would have the same path, 1/\+accepted/000.jpeg; rename one"):
        join(photographs, tmp_path / "a" / "accepted", tmp_path / "b" / "accepted")
