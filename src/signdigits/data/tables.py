"""Tables that a person may have edited: groups.csv, the list for `predict`, review.csv.

Spreadsheets write semicolons or tabs, a byte order mark, UTF-16, and separators at the end of a row. What stays unclear is
refused with its line. Tables that only programs write are read by `files.read_csv`.
"""

import codecs
import csv
import io
import re
from pathlib import Path

import pandas as pd

from signdigits.data.names import normalize_text
from signdigits.errors import DataError

SEPARATORS = (",", ";", "\t")
NO_SEPARATOR = "\x1f"  # of a table with one column, whose names may hold commas


def read_table(file: Path, *required: str) -> pd.DataFrame:
    """Return the rows of a table with the columns `required`, as text; the index, `line`, has the line of each.

    Raises OSError if the file cannot be read, and DataError, with the line, if it is not such a table.
    """
    if file.exists() and not file.is_file():
        raise DataError(f"{file}: not a file")
    text = _decode(file)
    stream = io.StringIO(text, newline="")
    offset, header_line = 1, stream.readline()
    while header_line and (not header_line.strip(" ,;\t\r\n") or header_line.strip('"').lower().startswith("sep=")):
        offset, header_line = offset + 1, stream.readline()
    separator, header = _read_header(file, header_line, required)
    lines = (re.sub(r'"[,;\t ]+(\r?\n?)$', r'"\1', line) for line in stream) if separator == NO_SEPARATOR else stream
    has_spaces = f"{separator} " in header_line or f'{separator} "' in text  # as in `path, group`
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=has_spaces, strict=True)
    rows: dict[int, list[str]] = {}
    line, key = offset + 1, header.index(required[0])
    try:
        for row in reader:
            if "".join(row[len(header) :]).strip():
                raise DataError(
                    f"{file}: line {line}: {len(row)} fields, but the header has {len(header)}; put a name that contains a "
                    "separator between double quotes"
                )
            if "".join(row).strip():
                rows[line] = row = (row + [""] * len(header))[: len(header)]
                if not row[key].strip():
                    raise DataError(f"{file}: line {line}: no {required[0]}; remove or correct the row")
            line = offset + reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}: line {line}: {error}; correct its double quotes") from error
    return pd.DataFrame(list(rows.values()), index=pd.Index(rows, name="line"), columns=header, dtype=str)


def _decode(file: Path) -> str:
    content = file.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{file}: line {line}: not UTF-8 ({error.reason}); save it as CSV in UTF-8") from error


def _read_header(file: Path, line: str, required: tuple[str, ...]) -> tuple[str, list[str]]:
    """Return the separator with which the header has the columns `required`, and its columns without empty ones at the end."""
    headers = {}
    for separator in SEPARATORS:
        cells = [
            normalize_text(cell) for cell in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
        ]
        headers[separator] = [cell.casefold() if cell.casefold() in required else cell for cell in cells]
    separator, header = min(headers.items(), key=lambda item: len(set(required) - set(item[1])))
    if missing := [name for name in required if name not in header]:
        raise DataError(
            f"{file}: no column {' and '.join(missing)} (columns: {', '.join(header)[:100] or 'none'}); add one, in a first line with the names of the columns"
        )
    if twice := [name for name in required if header.count(name) > 1]:
        raise DataError(f"{file}: several columns {twice[0]}; keep one")
    has_separators = len(header) > 1
    while not header[-1]:
        header.pop()
    return separator if has_separators else NO_SEPARATOR, header
