"""The split into training, validation and test photographs.

`random` is the notebook's split, `stratified` divides class by class, and `grouped` keeps each group, such as one signer's
photographs, in one part. What another folder adds (`data=A,B`) is divided by checksum. `folds` is for few photographs: cross-
validation, stratified by class and, with a groups.csv, by group.

The groups are in `groups.csv` beside the class folders, with the columns `path` (relative to the folder, with forward slashes)
and `group` (any text).
"""

import errno
import itertools
import logging
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split

from signdigits import files
from signdigits.data import sources
from signdigits.data.dataset import Dataset
from signdigits.data.names import Names, normalize_text
from signdigits.data.tables import read_table
from signdigits.errors import DataError, ModelError

log = logging.getLogger(__name__)

GROUPS = "groups.csv"

# The notebook's seed and fraction: the test images are its 412 validation images. Constants, because runs can be compared
# only on the same images.
SPLIT_SEED = 1337
TEST_FRACTION = 0.2
VALIDATION_FRACTION = 0.2  # of the photographs that are not for the test
FEW_GROUPS = 8  # every way to cut them is tried
FEW_PHOTOGRAPHS = 30  # of a class: below, a fifth of them tells little about a model
FOLDS = 5


@dataclass(frozen=True)
class Split:
    """Indices into a data set's photographs; no photograph is in two parts, and every one is in one.

    With folds, a model is trained on all photographs, and each of them is tested: by a model of the other folds.
    """

    name: str
    training: np.ndarray
    validation: np.ndarray
    testing: np.ndarray
    digest: str  # digest of the photographs and their parts: 32 hexadecimal digits
    test_digest: str  # digest of the test photographs
    folds: tuple[np.ndarray, ...] = ()

    @property
    def fitting(self) -> np.ndarray:
        """The training indices, then the validation indices."""
        return np.concatenate([self.training, self.validation])

    @property
    def parts(self) -> dict[str, np.ndarray]:
        if self.folds:
            return {f"fold {number}": fold for number, fold in enumerate(self.folds, start=1)}
        return {"training": self.training, "validation": self.validation, "testing": self.testing}


def split_dataset(dataset: Dataset, name: str, *, has_start: bool = False) -> Split:
    """Return the split called `name`, or chosen by the photographs, and by whether a model is started from, if that is `auto`.

    Of a joined data set (`data=A,B`), the photographs of the first are split as if they were alone, so that models trained with
    and without the others can be compared on the same test images.

    Raises DataError if there is only one class, or a class is missing from one of the three parts.
    """
    if len(dataset.class_names) == 1:
        raise DataError(
            f"{dataset.folder}: only one class folder, {dataset.class_names[0]!r}; a classifier needs two or more"
        )
    is_added = np.array([photograph.is_added for photograph in dataset.photographs])
    original, added = np.flatnonzero(~is_added), np.flatnonzero(is_added)
    first = replace(dataset, name=dataset.origin, photographs=tuple(dataset.photographs[i] for i in original))
    if name == "auto":  # random for the named data sets, wherever they lie
        is_named = first.name == sources.HANDWRITTEN_DIGITS or first.digest == sources.SIGN_LANGUAGE_DIGITS_DIGEST
        is_small = has_start and min(dataset.counts().values()) < FEW_PHOTOGRAPHS
        name = "random" if is_named else "folds" if is_small else "stratified"
    if name == "folds":
        return _split_folds(dataset)
    training, validation, testing = (
        np.concatenate([original[indices], more])
        for indices, more in zip(_split_first(first, name), _split_added(dataset, added), strict=True)
    )
    parts = {"training": training, "validation": validation, "testing": testing}
    return Split(name, training, validation, testing, _digest_parts(dataset, parts), dataset.part_digest(testing))


def _digest_parts(dataset: Dataset, parts: Mapping[str, np.ndarray]) -> str:
    return files.compute_digest(
        (dataset.photographs[i].path, f"{part} {dataset.photographs[i].checksum}")
        for part, indices in parts.items()
        for i in indices
    )


def _split_folds(dataset: Dataset) -> Split:
    """Return five folds, or as many as the smallest class has photographs: scikit-learn's stratified ones, by group if there are groups.

    Raises DataError if a model of the other folds would lack a class.
    """
    everything = np.arange(len(dataset.photographs))
    _require_each_class(dataset, everything, least=2, part="two folds")
    n_folds = min(FOLDS, *dataset.counts().values())
    has_groups = (dataset.folder / GROUPS).exists()
    if has_groups:
        groups = read_groups(dataset)
        n_folds = min(n_folds, len(np.unique(groups)))
    if n_folds < 2:
        raise DataError(f"{dataset.folder / GROUPS}: one group; split=folds needs two or more, or no {GROUPS}")
    kind = StratifiedGroupKFold if has_groups else StratifiedKFold
    cuts = kind(n_folds, shuffle=True, random_state=SPLIT_SEED).split(
        everything, dataset.labels, groups if has_groups else None
    )
    folds = tuple(held for _, held in cuts if len(held))
    for fold in folds:
        _require_each_class(dataset, np.setdiff1d(everything, fold), least=1, part="the other folds")
    digest = _digest_parts(dataset, {f"fold {number}": fold for number, fold in enumerate(folds)})
    nothing = np.array([], int)
    return Split("folds", everything, nothing, everything, digest, dataset.part_digest(everything), folds)


def _split_first(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return training, validation and test images of a folder that is not joined. Raises DataError for a missing class."""
    if name == "grouped":
        training, validation, testing = _split_groups(dataset)
    elif name == "stratified":
        training, validation, testing = _split_classes(dataset)
    else:
        rest, testing = _split_as_keras(len(dataset.labels))
        _require_each_class(dataset, rest, least=2, part="training and validation")
        _require_each_class(dataset, testing, least=1, part="test")
        training, validation = _split_evenly(dataset, rest)
    for part, indices in {"training": training, "validation": validation, "test": testing}.items():
        _require_each_class(dataset, indices, least=1, part=part)
    return training, validation, testing


def _split_added(dataset: Dataset, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return training, validation and test images of those that a joined data set adds, by their checksums.

    A photograph stays in its part when more are added: a later model is not tested on what an earlier one was trained on.
    """
    shares = np.array([int(dataset.photographs[i].checksum[:8], 16) / 16**8 for i in indices])
    is_test = shares < TEST_FRACTION
    is_validation = ~is_test & (shares < TEST_FRACTION + (1 - TEST_FRACTION) * VALIDATION_FRACTION)
    return indices[~is_test & ~is_validation], indices[is_validation], indices[is_test]


def repeat_split(dataset: Dataset, data: str, tags: Mapping[str, str]) -> Split:
    """Split `dataset`, read from `data`, as a model's photographs were, by the `tags` of the model.

    Raises ModelError if it was trained on others: the split would not keep its training images out of the test (leakage).
    """
    parts = split_dataset(dataset, tags.get("split", "random"))
    if tags.get("dataset_digest") != parts.digest:
        raise ModelError(
            f"the model was trained on data={tags.get('data')} with digest {tags.get('dataset_digest')}, but data={data} has "
            f"{parts.digest}; pass --data the photographs that the model was trained on"
        )
    return parts


def _split_as_keras(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Split `n` sorted files as Keras' `image_dataset_from_directory` does with seed 1337 and validation_split 0.2.

    The second part is the last fifth of a seeded shuffle.
    """
    order = list(range(n))
    np.random.RandomState(SPLIT_SEED).shuffle(order)
    n_test = int(TEST_FRACTION * n)
    return np.array(order[: n - n_test], int), np.array(order[n - n_test :], int)


def _split_evenly(dataset: Dataset, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split `indices`, a fifth of each class into the second part."""
    try:
        first, second = train_test_split(
            indices, test_size=VALIDATION_FRACTION, stratify=dataset.labels[indices], random_state=SPLIT_SEED
        )
    except ValueError as error:  # fewer validation images than classes
        raise DataError(f"{dataset.folder}: too few photographs to split ({error}); add more") from error
    return first, second


def _split_classes(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return training, validation and test images: a fifth of each class, but at least one, is cut off twice."""
    everything = np.arange(len(dataset.labels))
    _require_each_class(dataset, everything, least=3, part="training, validation and test")

    def cut(indices: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        count = max(1, round(fraction * len(indices)))
        first, second = train_test_split(indices, test_size=count, random_state=SPLIT_SEED)
        return first, second

    parts: list[tuple[np.ndarray, ...]] = []
    for label in range(len(dataset.class_names)):
        rest, testing = cut(everything[dataset.labels == label], TEST_FRACTION)
        parts.append((*cut(rest, VALIDATION_FRACTION), testing))
    random = np.random.default_rng(SPLIT_SEED)  # not sorted by class, as the other splits
    training, validation, testing = (random.permutation(np.concatenate(part)) for part in zip(*parts, strict=True))
    return training, validation, testing


def _split_groups(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return training, validation and test images, by group.

    Each cut is a fold of scikit-learn's StratifiedGroupKFold, which keeps the classes as even as the groups allow: the first of
    five or, if a part would lack a class, another one, or one of fewer. Raises DataError if no cut gives each part every class.
    """
    group_names = read_groups(dataset)
    for rest, testing in _cut_groups(dataset, group_names, np.arange(len(dataset.photographs))):
        for training, validation in _cut_groups(dataset, group_names, rest):
            return training, validation, testing
    n_groups = len(np.unique(group_names))
    counts = [len(np.unique(group_names[dataset.labels == label])) for label in range(len(dataset.class_names))]
    rarest = int(np.argmin(counts))
    lacking = f"class {dataset.class_names[rarest]} has photographs of {counts[rarest]}"
    raise DataError(
        f"{dataset.folder}: {n_groups} groups, and {lacking}; split=grouped needs three groups or more, and photographs of every "
        "class in the training, validation and test groups: add those of another group, remove the class, or pass --split "
        "stratified"
    )


def _cut_groups(
    dataset: Dataset, group_names: np.ndarray, indices: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ways to cut `indices` in two that have every class on both sides: those of five folds, of fewer, and all of few groups."""
    labels, groups = dataset.labels[indices], group_names[indices]
    names = np.unique(groups)

    def has_every_class(part: np.ndarray) -> bool:
        return len(np.unique(labels[part])) == len(dataset.class_names)

    for n_folds in range(min(5, len(names), np.bincount(labels).max()), 1, -1):
        folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=SPLIT_SEED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a class with fewer photographs than folds
            cuts = list(folds.split(indices, labels, groups))
        for first, second in cuts:
            if has_every_class(first) and has_every_class(second):
                yield indices[first], indices[second]
    for size in range(1, len(names) if len(names) <= FEW_GROUPS else 0):
        for chosen in itertools.combinations(names, size):
            second = np.isin(groups, chosen)
            if has_every_class(~second) and has_every_class(second):
                yield indices[~second], indices[second]


def _require_each_class(dataset: Dataset, indices: np.ndarray, least: int, part: str) -> None:
    counts = np.bincount(dataset.labels[indices], minlength=len(dataset.class_names))
    for name, count in zip(dataset.class_names, counts.tolist(), strict=True):
        if count < least:
            raise DataError(
                f"{dataset.folder / name}: too few photographs to split: {dataset.counts()[name]} in the class leave "
                f"{count} for {part}; add more, or remove the class"
            )


def read_groups(dataset: Dataset) -> np.ndarray:
    """Return the group of each photograph; text, of shape (n,).

    Raises DataError if groups.csv is missing or unusable, or lacks a photograph.
    """
    file = dataset.folder / GROUPS
    if not file.exists() and _is_sign_language_digits(dataset):
        return _infer_students(dataset)  # the folder is read-only
    try:
        table = read_table(file, "path", "group")
    except OSError as error:
        raise DataError(
            f"{file}: needed by split=grouped, with the columns path and group ({error}); create it, or pass --split stratified"
        ) from error
    names = Names(photograph.path for photograph in dataset.photographs)
    spellings: dict[str, str] = {}  # one group, however its name is written
    lines: dict[str, tuple[int, str]] = {}
    for line, path, group in table[["path", "group"]].itertuples():
        if not (key := normalize_text(group)):
            continue
        group, found = spellings.setdefault(key, group), names.find(path)
        other_line, other = lines.setdefault(found or path, (line, group))
        if found and other != group:
            raise DataError(
                f"{file}: lines {other_line} and {line}: {found} is in the groups {other} and {group}; keep one"
            )
    missing = [photograph.path for photograph in dataset.photographs if photograph.path not in lines]
    if missing:
        close = Names(lines.keys() - names.names).find_close(missing[0])
        hint = f"; line {lines[close][0]} has {close}" if close else ""
        raise DataError(
            f"{file}: no group for {len(missing)} photographs, the first of them {missing[0]}{hint}; add them"
        )
    return np.array([lines[photograph.path][1] for photograph in dataset.photographs])


def write_groups(dataset: Dataset) -> None:
    """Write groups.csv for the sign language digits, whose groups can be inferred; do nothing for other photographs.

    A read-only folder is left unchanged, even by root.
    """
    file = dataset.folder / GROUPS
    if file.exists() or not _is_sign_language_digits(dataset):
        return
    table = pd.DataFrame({"path": [p.path for p in dataset.photographs], "group": _infer_students(dataset)})
    try:
        if not dataset.folder.stat().st_mode & stat.S_IWUSR:
            raise PermissionError(errno.EACCES, "the folder is read-only")
        with files.atomic_file(file) as partial_file:
            partial_file.write_text(files.to_csv(table))
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
