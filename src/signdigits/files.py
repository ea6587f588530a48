"""Atomic writes, digests of many files, and CSV in which text stays text."""

import hashlib
import io
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary file name, which becomes `target` if the block succeeds and is removed if it fails."""
    partial_file = target.with_name(f".{target.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        yield partial_file
        partial_file.replace(target)
    finally:
        partial_file.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `target` if the block succeeds and is removed if it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary_folder:
        folder = Path(temporary_folder) / target.name
        folder.mkdir()
        yield folder
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # another process may have created the same folder meanwhile
                raise


def compute_digest(entries: Iterable[tuple[str, str]]) -> str:
    """Return SHA-256 over sorted pairs of relative path and checksum, shortened to 32 hexadecimal digits."""
    sha256 = hashlib.sha256()
    for path, checksum in sorted(entries):
        sha256.update(os.fsencode(f"{path}\0{checksum}\n"))
    return sha256.hexdigest()[:32]


def read_csv(source: Path | str, is_number: Callable[[str], bool] = lambda column: False) -> pd.DataFrame:
    """Read a CSV file, or the text of one. Columns are text, except those that `is_number` selects by name.

    By default pandas parses `None`, `NA`, `null` and `nan` as missing values, and `007` as a number. All may be names of
    classes, groups or files. Raises OSError or ValueError if it cannot be read.
    """
    stream = io.StringIO(source) if isinstance(source, str) else source
    table = pd.read_csv(stream, dtype=str, keep_default_na=False, na_filter=False)
    numbers = [column for column in table if is_number(str(column))]
    return table.astype(dict.fromkeys(numbers, float))


def to_csv(table: pd.DataFrame) -> str:
    """Return the table as CSV text, without its index; missing values are empty."""
    return table.to_csv(index=False, lineterminator="\n")


def is_probability(column: str) -> bool:
    """Return whether a column holds probabilities: `probability`, and `p(CLASS)` of each class."""
    return column == "probability" or column.startswith("p(")
