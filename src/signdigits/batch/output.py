"""The output folder of a batch prediction: a part file per finished chunk, and two tables at the end, written atomically.

OUTPUT/job.json              model, photographs and MLflow run of the tables
OUTPUT/parts/000000.parquet  the rows of a chunk; removed at the end
OUTPUT/predictions.parquet   all rows, in the order of the photographs
OUTPUT/predictions.csv       the same
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import filelock
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from signdigits import files
from signdigits.errors import UsageError

TABLES = ("predictions.parquet", "predictions.csv")


@dataclass(frozen=True)
class BatchJob:
    """The model and the photographs of a batch prediction."""

    model: str  # the logged model's id
    version: str
    images: str  # as given: a folder or a table
    digest: str
    count: int
    run_id: str = ""
    finished: bool = False

    def is_of(self, other: "BatchJob") -> bool:
        return (self.model, self.digest) == (other.model, other.digest)


@dataclass(frozen=True)
class Output:
    """The output folder, locked by this process."""

    folder: Path
    job: BatchJob

    @property
    def is_finished(self) -> bool:
        return self.job.finished and all((self.folder / name).is_file() for name in TABLES)

    @property
    def tables(self) -> tuple[Path, Path]:
        parquet, csv = (self.folder / name for name in TABLES)
        return parquet, csv

    def part(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:06d}.parquet"

    def update_job(self, **changes: str | bool) -> "Output":
        """Write changes of the job to disk, and return the changed output."""
        job = replace(self.job, **changes)  # type: ignore[arg-type]
        _write_atomically(
            self.folder / "job.json", lambda path: path.write_text(json.dumps(asdict(job), indent=1) + "\n")
        )
        return replace(self, job=job)

    def write_part(self, number: int, rows: pd.DataFrame) -> None:
        """Write the rows of a chunk."""
        self.part(number).parent.mkdir(exist_ok=True)
        table = pa.Table.from_pandas(rows, _schema_of(rows.columns.tolist()), preserve_index=False)
        _write_atomically(self.part(number), lambda path: pq.write_table(table, path))

    def write_tables(self, count: int) -> None:
        """Write both tables from `count` parts, with one part in memory at a time."""
        parts = [self.part(number) for number in range(count)]
        parquet, csv = self.tables
        _write_atomically(parquet, lambda path: _join_parquet(parts, path))
        _write_atomically(csv, lambda path: _join_csv(parts, path))

    def remove_parts(self) -> None:
        """Remove the parts."""
        shutil.rmtree(self.folder / "parts", ignore_errors=True)


def _schema_of(columns: Sequence[str]) -> pa.Schema:
    """Return the types of the columns, text if in doubt; a chunk without a readable photograph has no dtypes."""
    return pa.schema([(name, _type_of(name)) for name in columns])


def _type_of(column: str) -> pa.DataType:
    if files.is_probability(column) or column == "outlier_score":
        return pa.float64()
    return pa.bool_() if column == "is_outlier" else pa.string()


def _join_parquet(parts: Sequence[Path], target: Path) -> None:
    with pq.ParquetWriter(target, pq.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))


def _join_csv(parts: Sequence[Path], target: Path) -> None:
    with target.open("w", newline="") as file:
        for part in parts:
            pd.read_parquet(part).to_csv(file, index=False, header=part is parts[0], lineterminator="\n")


def _write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: `write` fills a temporary file, renamed once on disk. Raises UsageError on failure."""
    partial_file = target.with_name(f".{target.name}.unfinished")
    try:
        write(partial_file)
        with partial_file.open("rb+") as file:
            os.fsync(file.fileno())
        partial_file.replace(target)
    except OSError as error:
        raise _not_writable(target, error) from error


@contextlib.contextmanager
def lock_output(folder: Path, job: BatchJob) -> Iterator[Output]:
    """Lock the output folder for `job`, new or left by an interrupted run.

    Raises UsageError if it belongs to another job, holds tables of unknown origin, or is locked by another process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(f"output={folder}: in use by another process; wait for it, or pass another --output") from None
    except OSError as error:
        raise _not_writable(folder, error) from error
    with lock:
        existing = find_job(folder)
        if existing is not None and not existing.is_of(job):
            raise UsageError(
                f"output={folder}: {_describe_difference(existing, job)}; pass another --output, or remove the folder"
            )
        yield Output(folder, existing or job)


def find_job(folder: Path) -> BatchJob | None:
    try:
        return BatchJob(**json.loads((folder / "job.json").read_text()))
    except FileNotFoundError:
        table = next((name for name in TABLES if (folder / name).exists()), None)
        if table is None:
            return None
        raise UsageError(
            f"output={folder}: {table} exists without job.json; pass another --output, or remove it"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"output={folder}: job.json cannot be read ({error}); pass another --output, or remove it"
        ) from error


def _describe_difference(other: BatchJob, job: BatchJob) -> str:
    """Describe the difference between two jobs, for a message."""
    if other.model != job.model:
        return (
            f"started with version {other.version}, not {job.version} (--model_uri models:/{other.model} continues it)"
        )
    return f"started with {other.count} other images, from {other.images}"


def _not_writable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path}: {error.strerror}; free some space or choose a writable --output, then rerun")
