"""Read and write CSV so that text stays text.

By default pandas parses `None`, `NA`, `null` and `nan` as missing values, and `007` as a number. All may be names of
classes, groups or files.
"""

import io
from collections.abc import Callable
from pathlib import Path

import pandas as pd


def read_csv(source: Path | str, is_number: Callable[[str], bool] = lambda column: False) -> pd.DataFrame:
    """Read a CSV file, or the text of one. Columns are text, except those that `is_number` selects by name.

    Raises OSError or ValueError if it cannot be read.
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
