"""Which photographs a prediction is of: those of a folder, or of a table of paths."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from signdigits import tables
from signdigits.data.dataset import find_files
from signdigits.errors import DataError

READERS: dict[str, Callable[[Path], pd.DataFrame]] = {".csv": tables.read_csv, ".parquet": pd.read_parquet}


@dataclass(frozen=True)
class BatchInput:
    """Photographs in a fixed order, each once."""

    name: str
    folder: Path  # absolute; what the paths are relative to
    paths: tuple[str, ...]
    repeated: int = 0  # paths that a table named again

    @cached_property
    def digest(self) -> str:
        """Stands for the photographs: their paths in order, and each file's size and time of change."""
        told = hashlib.sha256(os.fsencode(self.folder))
        for path in self.paths:
            try:
                found = (self.folder / path).stat()
                state = f"{found.st_size} {found.st_mtime_ns}"
            except OSError:
                state = "cannot be looked at"
            told.update(os.fsencode(path) + b"\0" + state.encode() + b"\n")
        return told.hexdigest()[:32]


def find_inputs(images: str, output: Path) -> BatchInput:
    """The photographs that `images` names: a folder, but for what lies in `output`, or a table with a column `path`.

    Every file of a folder counts that is not hidden, in the order of folder and file names; the paths of a table are
    taken as they stand, relative to the table's folder. Raises DataError if there are none.
    """
    place = Path(images)
    listing = _find_in_folder(place, output.resolve()) if place.is_dir() else read_table(place)
    if not listing.paths:
        raise DataError(f"{place}: no photograph in it; pass --images a folder that has some, or a table of paths")
    return listing


def _find_in_folder(folder: Path, output: Path) -> BatchInput:
    whole = folder.resolve()
    if whole.is_relative_to(output):
        raise DataError(f"{folder}: lies in the folder for the tables, {output}; pass another --output")
    try:
        files = [path for path in find_files(whole) if not path.is_relative_to(output)]
    except OSError as error:  # a folder that may not be entered
        raise DataError(f"{error.filename or folder}: {error.strerror}; make it readable") from error
    return BatchInput(whole.name, whole, tuple(path.relative_to(whole).as_posix() for path in files))


def read_table(table: Path) -> BatchInput:
    if not table.is_file():
        raise DataError(f"{table}: no such folder or table; pass --images a folder, or a CSV or Parquet file")
    if table.suffix.lower() not in READERS:
        raise DataError(f"{table}: not a folder, nor a table whose name ends in {', '.join(READERS)}")
    try:
        found = READERS[table.suffix.lower()](table)
    except Exception as error:  # whatever pandas and pyarrow have to say of a damaged file
        raise DataError(f"{table}: cannot be read ({str(error).splitlines()[0]})") from error
    if "path" not in found:
        raise DataError(f"{table}: no column path among {', '.join(map(str, found.columns)) or 'none'}; add one")
    paths = found["path"]
    for row, path in enumerate(paths):
        if not isinstance(path, str) or not path or "\0" in path:
            raise DataError(f"{table}: row {row} has no path but {path!r}; remove the row, or fill it in")
    unique = tuple(dict.fromkeys(paths))
    return BatchInput(table.stem, table.resolve().parent, unique, len(paths) - len(unique))
