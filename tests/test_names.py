from pathlib import Path

import pytest

from signdigits.data.names import Names, locate, suggest_file

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
NAMES = [
    f"{DECOMPOSED}/1.JPG",
    "0/Shot at 9.41\u202fAM.png",
    "0/a  b.jpg",
    "0/twice.jpg",
    "0/twice.jpg ",
    "0/comma,.jpg",
]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (f"{COMPOSED}/1.JPG", NAMES[0]),
        (f"./{COMPOSED}/1.JPG", NAMES[0]),
        (f"{DECOMPOSED}\\1.JPG", NAMES[0]),
        (f"\ufeff{COMPOSED}//1.JPG,;", NAMES[0]),
        ("0/Shot at 9.41 AM.png", NAMES[1]),
        ("0/a b.jpg", NAMES[2]),
        ("0/twice.jpg", NAMES[3]),
        ("0/twice.jpg ", NAMES[4]),
        ("0/twice.jpg,", None),
        ("0/comma,.jpg", NAMES[5]),
        (f"{COMPOSED}/1.jpg", None),
        (",", None),
    ],
)
def test_names_that_look_the_same_are_found(written: str, name: str | None) -> None:
    assert Names(NAMES).find(written) == name


@pytest.mark.parametrize(
    "written", [f"{COMPOSED}/1.jpg", f"{COMPOSED}/1.jpeg", "1.JPG", f"four/{COMPOSED}/1.JPG", f"{COMPOSED}/1.JPG;x"]
)
def test_close_names_are_suggested(written: str) -> None:
    assert Names(NAMES).suggest(written) == f"; perhaps {NAMES[0]} is meant"
    assert Names(NAMES).suggest("0/2.JPG") == ""


def test_files_are_located_by_what_looks_the_same(tmp_path: Path) -> None:
    file = tmp_path / DECOMPOSED / "deep" / "Shot 9.41\u202fAM.png"
    file.parent.mkdir(parents=True)
    file.touch()
    written = f".\\{COMPOSED}\\deep\\Shot 9.41 AM.png,"
    assert locate(tmp_path, written) == locate(Path(), f"{tmp_path}/{written}") == file
    assert locate(tmp_path, f"{COMPOSED}/deep/other.png") == tmp_path / DECOMPOSED / "deep/other.png"
    assert suggest_file(file.with_name("shot 9.41 am.PNG")) == f"; perhaps {file.name} is meant"
    file.with_name("exact,.png").touch()
    assert locate(tmp_path, f"{COMPOSED}/deep/exact,.png").name == "exact,.png"
    assert suggest_file(tmp_path / "nowhere" / "1.jpg") == ""
