"""The input of a batch prediction: the photographs of a folder, or of a table of paths."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from signdigits.data.folders import count_junk, describe_file, find_files
from signdigits.data.names import locate, suggest_file
from signdigits.data.tables import read_table
from signdigits.errors import DataError

READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda table: read_table(table, "path"),
    ".parquet": pd.read_parquet,
}


@dataclass(frozen=True)
class BatchInput:
    """Photographs in a fixed order, each once."""

    name: str
    folder: Path  # absolute; the paths are relative to it
    paths: tuple[str, ...]
    repeated: int = 0  # duplicate paths of a table
    junk: int = 0  # hidden and junk files and folders of a folder, skipped

    @cached_property
    def digest(self) -> str:
        """A digest of the photographs: their paths in order, and the size and modification time of each file."""
        sha256 = hashlib.sha256(os.fsencode(self.folder))
        for path in self.paths:
            try:
                status = locate(self.folder, path).stat()
                state = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:
                state = "no status"
            sha256.update(os.fsencode(path) + b"\0" + state.encode() + b"\n")
        return sha256.hexdigest()[:32]


def find_inputs(images: str, output: Path) -> BatchInput:
    """Return the photographs of a folder, without those below `output`, or of a table with a column `path`.

    The files of the folder, without hidden ones, are sorted by folder and name; the paths of a table keep their order and
    are relative to the table's folder. Raises DataError if there are none.
    """
    source = locate(Path(), images)
    photographs = _read_folder(source, output.resolve()) if source.is_dir() else _read_table(source)
    if not photographs.paths:
        raise DataError(f"{source}: no photographs; pass --images a folder with photographs, or a table of paths")
    return photographs


def _read_folder(folder: Path, output: Path) -> BatchInput:
    root = folder.resolve()
    if root.is_relative_to(output):
        raise DataError(f"{folder}: lies inside the output folder {output}; pass another --output")
    try:
        files = [path for path in find_files(root) if not path.is_relative_to(output)]
    except OSError as error:  # a folder that may not be entered
        raise DataError(f"{error.filename or folder}: {error.strerror}; make it readable") from error
    paths = tuple(path.relative_to(root).as_posix() for path in files)
    return BatchInput(root.name, root, paths, junk=count_junk(root))


def _read_table(table: Path) -> BatchInput:
    if not table.exists():
        raise DataError(
            f"{table}: {describe_file(table) or 'no such folder or table'}{suggest_file(table)}; pass --images a folder, or a CSV or Parquet file"
        )
    if table.suffix.lower() not in READERS or not table.is_file():
        unknown = f"neither a folder nor a table; the name of a table ends in {', '.join(READERS)}"
        raise DataError(f"{table}: {describe_file(table) or unknown}")
    try:
        frame = READERS[table.suffix.lower()](table)
    except DataError:
        raise
    except Exception as error:  # pandas and pyarrow raise many types for damaged files
        raise DataError(f"{table}: cannot be read ({str(error).splitlines()[0]})") from error
    if "path" not in frame:
        raise DataError(f"{table}: no column path (columns: {', '.join(map(str, frame.columns)) or 'none'}); add one")
    paths = frame["path"]
    for row, path in paths.items():
        if not isinstance(path, str) or not path or "\0" in path:
            raise DataError(
                f"{table}: {frame.index.name or 'row'} {row}: path={path!r} is not a path; remove or correct the row"
            )
    unique = tuple(dict.fromkeys(paths))
    return BatchInput(table.stem, table.resolve().parent, unique, len(paths) - len(unique))
