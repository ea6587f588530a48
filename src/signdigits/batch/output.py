"""The output folder of a batch prediction.

OUTPUT/job.json              model, photographs and MLflow run of the tables
OUTPUT/parts/000000.parquet  the rows of a chunk, while the job is unfinished
OUTPUT/predictions.parquet   the same folder, once all rows are there, in the order of the photographs
OUTPUT/predictions.csv       the same rows

Each file has its name only when it is complete.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import filelock
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from signdigits.errors import UsageError

TABLES = ("predictions.parquet", "predictions.csv")
PARQUET_TYPES = {"float64": pa.float64(), "boolean": pa.bool_()}  # of the columns' dtypes; the others are text


@dataclass(frozen=True)
class BatchJob:
    """The model and the photographs of a batch prediction."""

    model: str  # the logged model's id
    version: str
    images: str  # as given: a folder or a table
    digest: str
    count: int
    run_id: str = ""


@dataclass(frozen=True)
class Output:
    """The output folder, locked by this process."""

    folder: Path
    job: BatchJob

    @property
    def parts(self) -> Path:
        return self.folder / "parts"

    @property
    def parquet(self) -> Path:
        return self.folder / TABLES[0]

    @property
    def csv(self) -> Path:
        return self.folder / TABLES[1]

    @property
    def is_finished(self) -> bool:
        return self.parquet.exists() and self.csv.exists()

    def part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.parquet"

    def start(self, run_id: str) -> "Output":
        """Write the job with its run, and return the changed output."""
        if self.parquet.is_dir():  # without predictions.csv, which was removed
            self.parquet.replace(self.parts)
        self.parquet.unlink(missing_ok=True)  # the file that earlier versions wrote, likewise
        job = replace(self.job, run_id=run_id)
        with _atomic_file(self.folder / "job.json") as partial_file:
            partial_file.write_text(json.dumps(asdict(job), indent=1) + "\n")
        return replace(self, job=job)

    def write_part(self, number: int, rows: pd.DataFrame) -> None:
        """Write the rows of a chunk; all parts have the same schema, also one without a readable photograph."""
        schema = pa.schema([(name, PARQUET_TYPES.get(str(dtype), pa.string())) for name, dtype in rows.dtypes.items()])
        self.parts.mkdir(exist_ok=True)
        with _atomic_file(self.part(number)) as partial_file:
            table = pa.Table.from_pandas(rows, schema, preserve_index=False)
            pq.write_table(table.replace_schema_metadata(), partial_file)  # else pandas reads its own "boolean"

    def write_csv(self) -> None:
        """Write the rows of all parts, with one part in memory at a time."""
        with _atomic_file(self.csv) as partial_file, partial_file.open("w", newline="") as file:
            for number, part in enumerate(sorted(self.parts.glob("*.parquet"))):
                pd.read_parquet(part).to_csv(file, index=False, header=number == 0, lineterminator="\n")

    def finish(self) -> None:
        """Give the folder of the parts its final name."""
        try:
            self.parts.replace(self.parquet)
        except OSError as error:
            raise _not_writable(self.parquet, error) from error


@contextlib.contextmanager
def _atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary file name, which becomes `target` once the file is on disk. Raises UsageError on failure."""
    partial_file = target.with_name(f".{target.name}.unfinished")
    try:
        yield partial_file
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
        if existing is not None and (existing.model, existing.digest) != (job.model, job.digest):
            difference = f"started with {existing.count} other images, from {existing.images}"
            if existing.model != job.model:
                difference = (
                    f"started with version {existing.version}, not {job.version} "
                    f"(--model_uri models:/{existing.model} continues it)"
                )
            raise UsageError(f"output={folder}: {difference}; pass another --output, or remove the folder")
        yield Output(folder, existing or job)


def find_job(folder: Path) -> BatchJob | None:
    """Return the job of an output folder, if it has one. Raises UsageError if it cannot be read, or if tables are without one."""
    try:
        facts = json.loads((folder / "job.json").read_text())
        return BatchJob(**{field.name: facts[field.name] for field in fields(BatchJob)})
    except FileNotFoundError:
        table = next((name for name in TABLES if (folder / name).exists()), None)
        if table is None:
            return None
        raise UsageError(
            f"output={folder}: {table} exists without job.json; pass another --output, or remove it"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"output={folder}: job.json cannot be read ({error}); pass another --output, or remove it"
        ) from error


def _not_writable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path}: {error.strerror}; free some space or choose a writable --output, then rerun")
