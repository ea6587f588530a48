import os
from pathlib import Path

import pytest

from signdigits.batch import inputs, scoring
from signdigits.data.names import locate
from signdigits.errors import DataError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_folder_is_listed_recursively(tmp_path: Path) -> None:
    folder = touch(tmp_path / "all", "b/2.jpg", "b/1.jpg", "a/deep/3.jpg", "0.jpg", ".hidden", "b/.hidden")
    assert inputs.find_inputs(str(folder), tmp_path / "out").paths == ("0.jpg", "a/deep/3.jpg", "b/1.jpg", "b/2.jpg")


def test_digest_depends_on_input(tmp_path: Path) -> None:
    table = touch(tmp_path, "a.jpg", "b.jpg") / "list.csv"
    digests = set()
    for text in ("path\na.jpg\nb.jpg\n", "path\nb.jpg\na.jpg\n", "path\na.jpg\n", "path\na.jpg\nmissing.jpg\n"):
        table.write_text(text)
        digests.add(inputs.find_inputs(str(table), tmp_path / "out").digest)
    before = inputs.find_inputs(str(table), tmp_path / "out")
    (tmp_path / "a.jpg").write_text("longer than it was")
    digests |= {inputs.find_inputs(str(table), tmp_path / "out").digest}
    assert len(digests) == 5
    assert before.digest in digests
    again = inputs.find_inputs(str(table), tmp_path / "out")
    assert again.digest == inputs.find_inputs(str(table), tmp_path / "out").digest


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_unreadable_folder_is_reported(tmp_path: Path) -> None:
    folder = touch(tmp_path / "all", "a/1.jpg")
    (folder / "a").chmod(0)
    try:
        with pytest.raises(DataError, match="Permission denied; make it readable"):
            inputs.find_inputs(str(folder), tmp_path / "out")
    finally:
        (folder / "a").chmod(0o755)


def test_listed_files_are_found_by_what_looks_the_same(tmp_path: Path) -> None:
    touch(tmp_path, "cafe\u0301/1.JPG", "holiday,1.jpg", "1.jpg")
    table = tmp_path / "list.csv"
    table.write_text("path\nholiday,1.jpg\ncaf\u00e9\\1.JPG\ncaf\u00e9/1.jpg\n")
    found = inputs.find_inputs(str(table), tmp_path / "out")
    contents = [scoring.read_photograph(locate(found.folder, path)) for path in found.paths]
    missing = "cannot be read (No such file or directory; perhaps 1.JPG is meant)"
    assert contents == [b"holiday,1.jpg", "cafe\u0301/1.JPG".encode(), missing]
    digest = found.digest
    (tmp_path / "cafe\u0301" / "1.JPG").write_text("longer than it was")
    assert inputs.find_inputs(str(table), tmp_path / "out").digest != digest
