"""Preprocessed photographs: in memory up to a budget, beyond it in a file on disk.

The file is named by the digest of its content. It is written under a lock and gets its name when it is complete: a killed
process leaves a partial file that the next start overwrites, and a second process waits for the first.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import filelock
import numpy as np
import PIL

from signdigits.config import DataParameters
from signdigits.data import images
from signdigits.errors import DataError

log = logging.getLogger(__name__)

FOLDER = Path("data", "cache")


@dataclass(frozen=True)
class DiskArray:
    """An array in a file, of `shape` (n, height, width, channels), read by row: `array[5:9]`, `array[[7, 2]]`.

    Rows are read, not memory-mapped: the pages of a mapped file would count as memory of the process.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: np.ndarray  # of the file, in the order of the array; int64 of shape (n,)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: slice | np.ndarray) -> np.ndarray:
        rows = self.rows[chosen]
        array = np.empty((len(rows), *self.shape[1:]), self.dtype)
        row_size = array[:1].size
        for row, number in zip(array, rows.tolist(), strict=True):
            row.flat = np.fromfile(self.path, self.dtype, row_size, offset=number * row_size * self.dtype.itemsize)
        return array

    def part(self, chosen: slice | np.ndarray) -> "DiskArray":
        """Return some of the rows, still on disk."""
        rows = self.rows[chosen]
        return replace(self, shape=(len(rows), *self.shape[1:]), rows=rows)


class PixelCollector:
    """Collects the pixels of each photograph of a scan; those beyond `memory_budget` go to a file, and all before with them."""

    def __init__(self, parameters: DataParameters, resources: ExitStack) -> None:
        self.parameters = parameters
        self.resources = resources
        self.in_memory: list[np.ndarray] = []
        self.file: BinaryIO | None = None
        self.count = 0

    def add(self, pixels: np.ndarray) -> None:
        """Add the pixels of a photograph, of the same shape each. Raises DataError if the file cannot be written."""
        self.count += 1
        self.shape, self.dtype = pixels.shape, pixels.dtype
        with self._report_errors():
            if self.file is None and self.count * pixels.nbytes > self.parameters.memory_budget * 1e6:
                self.file = self._open_file()
                log.info("writing the decoded photographs to %s, beyond %d MB", FOLDER, self.parameters.memory_budget)
                for earlier in self.in_memory:
                    self.file.write(earlier.tobytes())
                self.in_memory.clear()
            if self.file is None:
                self.in_memory.append(pixels)
            else:
                self.file.write(pixels.tobytes())

    def finish(self, checksums: Iterable[str]) -> np.ndarray | DiskArray:
        """Return what was collected, in order; `checksums` are those of the photographs. Raises DataError as `add` does."""
        if self.file is None:
            pixels = np.stack(self.in_memory)
            self.in_memory.clear()
            return pixels
        decoder = (PIL.__version__, Path(images.__file__).read_text())
        key = _cache_key(self.parameters.image_size, self.parameters.color_mode, *decoder, *checksums)
        path = FOLDER / f"{key}.raw"
        with self._report_errors():
            self.file.flush()
            os.fsync(self.file.fileno())  # complete on disk before it gets its name
            if path.exists():
                self.partial.unlink()
            else:
                self.partial.replace(path)
        return DiskArray(path.resolve(), (self.count, *self.shape), self.dtype, np.arange(self.count))

    @property
    def partial(self) -> Path:
        """The file that is written: one per folder and settings."""
        folder = Path(self.parameters.data).absolute()
        return FOLDER / f"{_cache_key(str(folder), self.parameters.image_size, self.parameters.color_mode)}.part"

    def _open_file(self) -> BinaryIO:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.resources.enter_context(filelock.FileLock(self.partial.with_suffix(".lock")))
        return self.resources.enter_context(self.partial.open("wb"))

    @contextmanager
    def _report_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.partial}: {error.strerror}; free some space, or raise --memory_budget") from error


@contextmanager
def collect_pixels(parameters: DataParameters) -> Iterator[PixelCollector]:
    """Yield a collector; at the end its file is closed, and its lock released."""
    with ExitStack() as resources:
        yield PixelCollector(parameters, resources)


def _cache_key(*parts: object) -> str:
    """Return a digest of everything that the content of a file depends on, as 32 hexadecimal digits."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
