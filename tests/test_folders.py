import os
import shutil
from pathlib import Path

import pytest

from signdigits.batch import inputs
from signdigits.config import SourceParameters
from signdigits.data import dataset, folders
from signdigits.errors import DataError

from .conftest import write_photographs

JUNK_FOLDERS = [
    ".ipynb_checkpoints",
    "__MACOSX",
    "@eaDir",
    "#recycle",
    ".AppleDouble",
    "$RECYCLE.BIN",
    "System Volume Information",
]
JUNK_FILES = ["Thumbs.db", "thumbs.db", "._IMG_0000.JPG", "Desktop.ini", "Icon\r", "ehthumbs.db", "~$IMG_0000.JPG"]


def count(folder: Path) -> dict[str, int]:
    return dataset.scan_dataset(SourceParameters(data=str(folder))).counts()


def test_junk_is_skipped(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bars", each=2)
    for place in (folder, folder / "0", folder / "0" / "more"):
        for name in JUNK_FOLDERS:
            (place / name).mkdir(parents=True)
            shutil.copy(folder / "0" / "IMG_0000.JPG", place / name / "copy.JPG")
        for name in JUNK_FILES:
            (place / name).write_bytes(b"junk")
    assert folders.count_junk(folder) == 3 * len(JUNK_FOLDERS + JUNK_FILES)
    assert count(folder) == {"0": 2, "1": 2, "2": 2}
    found = inputs.find_inputs(str(folder), tmp_path / "out")
    assert len(found.paths) == 6
    assert found.junk == 3 * len(JUNK_FOLDERS + JUNK_FILES)


@pytest.mark.parametrize("name", ["#1", "@", "recycle", "~", "thumbs", "$"])
def test_class_is_not_junk(name: str) -> None:
    assert not folders.is_junk(Path(name))


def test_links_are_followed_once(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bars")
    (folder / "0" / "again").symlink_to(".")
    (folder / "1" / "a").mkdir()
    (folder / "1" / "a" / "up").symlink_to("../../1")
    (folder / "2" / "all").symlink_to("..")
    (folder / "2" / "twin.JPG").symlink_to("IMG_0000.JPG")
    shutil.move(folder / "2" / "IMG_0001.JPG", tmp_path / "outside.JPG")
    for name in ("linked.JPG", "twice.JPG"):
        (folder / "2" / name).symlink_to(tmp_path / "outside.JPG")
    assert count(folder) == {"0": 20, "1": 20, "2": 20}


def test_pipes_are_skipped(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bars", each=2)
    os.mkfifo(folder / "0" / "pipe.jpg")
    (folder / "1" / "linked.jpg").symlink_to(folder / "0" / "pipe.jpg")
    for name in ("pipe", "pipe.parquet", "pipe.csv"):
        os.mkfifo(folder / name)
        with pytest.raises(DataError, match=f"{name}: neither a folder nor a table"):
            inputs.find_inputs(str(folder / name), tmp_path / "out")
    assert count(folder) == {"0": 2, "1": 2, "2": 2}
    assert len(inputs.find_inputs(str(folder), tmp_path / "out").paths) == 6
