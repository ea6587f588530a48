"""Groups of photographs that belong together, such as those of one signer: `groups.csv` beside the class folders.

The file has the columns `path` (relative to the folder, with forward slashes) and `group` (any text).
"""

import logging
import re
import stat

import numpy as np
import pandas as pd

from signdigits import files, tables
from signdigits.data import joined, sources
from signdigits.data.dataset import Dataset
from signdigits.errors import DataError

log = logging.getLogger(__name__)

FILE = joined.GROUPS


def read_groups(dataset: Dataset) -> np.ndarray:
    """Return the group of each photograph; text, of shape (n,).

    Raises DataError if groups.csv is missing or unusable, or lacks a photograph.
    """
    file = dataset.folder / FILE
    if not file.exists() and _is_sign_language_digits(dataset):
        return _infer_students(dataset)  # the folder is read-only
    try:
        table = tables.read_csv(file)[["path", "group"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{file}: needed by split=grouped, with the columns path and group ({error}); create it, or pass --split stratified"
        ) from error
    group_by_path = {path: group for path, group in zip(table["path"], table["group"], strict=True) if group}
    missing = [photograph.path for photograph in dataset.photographs if photograph.path not in group_by_path]
    if missing:
        raise DataError(f"{file}: no group for {len(missing)} photographs, the first of them {missing[0]}; add them")
    return np.array([group_by_path[photograph.path] for photograph in dataset.photographs])


def write_groups(dataset: Dataset) -> None:
    """Write groups.csv for the sign language digits, whose groups can be inferred; do nothing for other photographs.

    A read-only folder is left unchanged, even by root.
    """
    file = dataset.folder / FILE
    if file.exists() or not _is_sign_language_digits(dataset):
        return
    if not dataset.folder.stat().st_mode & stat.S_IWUSR:
        log.info(
            "%s: not written, the folder is read-only; the groups are inferred from the file names each time", file
        )
        return
    table = pd.DataFrame({"path": [p.path for p in dataset.photographs], "group": _infer_students(dataset)})
    try:
        with files.atomic_file(file) as partial_file:
            partial_file.write_text(tables.to_csv(table))
    except OSError as error:
        log.info("%s: not written (%s); the groups are inferred from the file names each time", file, error.strerror)
    else:
        log.info("%s: %d groups, written for --split grouped", file, table["group"].nunique())


def _is_sign_language_digits(dataset: Dataset) -> bool:
    return dataset.digest == sources.SIGN_LANGUAGE_DIGITS_DIGEST


def _infer_students(dataset: Dataset) -> np.ndarray:
    """Infer the student on each of the sign language digits from the numbers in the file names.

    Each of the 218 students posed for about ten consecutive photographs, one per digit. Sorted by number, the label rises
    within a student and does not rise at the next one, which yields 220 groups.
    """
    numbers = [int(re.findall(r"\d+", photograph.path)[-1]) for photograph in dataset.photographs]
    order = np.argsort(numbers)
    is_first = np.diff(dataset.labels[order], prepend=-1) <= 0
    students = np.empty(len(order), dtype=object)
    students[order] = [f"student {number:03d}" for number in np.cumsum(is_first)]
    return students.astype(str)
