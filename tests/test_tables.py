from pathlib import Path

import pytest

from signdigits.data.tables import read_table
from signdigits.errors import DataError

COMPLETE = [["0/a.jpg", "Ann"], ["0/b, c.jpg", "Bo, Jr."]]


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    (folder / "table.csv").write_bytes(text.encode(encoding))
    return folder / "table.csv"


@pytest.mark.parametrize(
    "text",
    [
        'path,group\n0/a.jpg,Ann\n"0/b, c.jpg","Bo, Jr."\n',
        "path;group\r\n0/a.jpg;Ann\r\n0/b, c.jpg;Bo, Jr.\r\n",
        "path\tgroup\n0/a.jpg\tAnn\n0/b, c.jpg\tBo, Jr.\n",
        'path,group\n0/a.jpg,Ann,\n"0/b, c.jpg","Bo, Jr.",,\n,,\n',
        'path,group,\n0/a.jpg,Ann,\n"0/b, c.jpg","Bo, Jr.",\n',
        'sep=;\nPath;GROUP\n\n0/a.jpg;Ann\n;\n0/b, c.jpg;"Bo, Jr."',
        'path, group\n0/a.jpg, Ann\n"0/b, c.jpg", "Bo, Jr."\n',
        'path,group\r0/a.jpg,Ann\r"0/b, c.jpg","Bo, Jr."\r',
        'number,group,path\n1,Ann,0/a.jpg\n2,"Bo, Jr.","0/b, c.jpg"\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_spreadsheets_are_read(tmp_path: Path, text: str, encoding: str) -> None:
    table = read_table(write(tmp_path, text, encoding), "path", "group")
    assert table[["path", "group"]].to_numpy().tolist() == COMPLETE


@pytest.mark.parametrize("text", ["path\n", "path,\n", "\ufeffpath\r\n"])
def test_one_column_has_no_separators(tmp_path: Path, text: str) -> None:
    rows = (
        ["holiday,1.jpg", "a;b.jpg", '"c,d.jpg",', "NA", "007"] if "," not in text else ['"holiday,1.jpg",', "a;b.jpg"]
    )
    table = read_table(write(tmp_path, text + "\n".join(rows)), "path")
    assert table["path"].tolist() == ["holiday,1.jpg", "a;b.jpg", "c,d.jpg", "NA", "007"][: len(rows)]


def test_index_is_the_line(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, 'path,note\na,1\n\n"b\nc",2\nd,3\n'), "path")
    assert table["path"].to_dict() == {2: "a", 4: "b\nc", 6: "d"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,group\n0/a.jpg,Ann\nholiday,1.jpg,Bo\n", "line 3: 3 fields, but the header has 2"),
        (b'path,group\n0/a.jpg,Ann\n"0/b.jpg,Bo\n0/c.jpg,Ann\n', "line 3: unexpected end of data"),
        (b'path,group\n"0/a.jpg"b,Ann\n', "line 2: .* expected after"),
        (b"path,group\n0/a.jpg,Ann\n0/caf\xe9.jpg,Bo\n", "line 3: not UTF-8"),
        (b"path,group\n,Ann\n", "line 2: no path; remove or correct the row"),
        (b"0/a.jpg,Ann\n", r"no column path and group \(columns: 0/a.jpg, Ann\); add one"),
        (b"path;name\n", r"no column group \(columns: path, name\)"),
        (b"path,group,Group\n", "several columns group"),
        (b"", r"no column path and group \(columns: none\)"),
    ],
)
def test_unclear_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"table.csv: {message}"):
        read_table(tmp_path / "table.csv", "path", "group")
    assert (tmp_path / "table.csv").read_bytes() == content


def test_comma_beside_a_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: 2 fields, but the header has 1; put a name that contains a separator"):
        read_table(write(tmp_path, "path,\nholiday,1.jpg\n"), "path")
