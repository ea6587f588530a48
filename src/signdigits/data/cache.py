"""Decoded photographs: in memory while they fit a budget, beyond it in a file on disk that is made once.

The file is named after what it holds, so that it is found again by whoever needs the same. It is made beside its place,
under a lock, and moved there when complete: a process that is killed leaves nothing that another would take for whole,
and of two processes the second waits and reads what the first has made.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import PIL

import signdigits.threads
from signdigits.config import DataParameters
from signdigits.data import images
from signdigits.data.dataset import Dataset
from signdigits.errors import DataError

log = logging.getLogger(__name__)

FOLDER = Path("data", "cache")


@dataclass(frozen=True)
class DiskArray:
    """Rows of an .npy file, of `shape` (n, height, width, channels), read when asked for: `stored[5:9]`, `stored[[7, 2]]`.

    They are read, not mapped: the pages of a mapped file would count as memory of the process.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # bytes before the first row

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        numbers = np.arange(len(self))[rows]
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        count = found[:1].size
        for place, number in zip(found, numbers.tolist(), strict=True):
            start = self.offset + number * count * self.dtype.itemsize
            place.flat = np.fromfile(self.path, self.dtype, count, offset=start)
        return found

    def part(self, start: int, stop: int) -> "DiskArray":
        """Rows from `start` up to `stop`, still on disk."""
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        return DiskArray(self.path, (stop - start, *self.shape[1:]), self.dtype, self.offset + start * row)


def decode_photographs(dataset: Dataset, indices: np.ndarray, parameters: DataParameters) -> np.ndarray | DiskArray:
    """The photographs at `indices`, decoded, in that order; on disk if they need more than `memory_budget` megabytes.

    Raises DataError if the file cannot be made.
    """
    channels, kind = (3, np.uint8) if parameters.color_mode == "rgb" else (1, np.float32)
    shape, dtype = (len(indices), parameters.image_size, parameters.image_size, channels), np.dtype(kind)
    arrays = _decode_each(dataset, indices, parameters)
    if np.prod(shape, dtype=float) * dtype.itemsize <= parameters.memory_budget * 1e6:
        found = np.empty(shape, dtype)
        for place, array in zip(found, arrays, strict=True):
            place[...] = array
        return found
    path = FOLDER / f"{_cache_key(dataset, indices, parameters)}.npy"
    try:
        _write_cache(path, arrays, shape, dtype)
        return _open_cache(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; make room for it, or raise --memory_budget") from error


def _decode_each(dataset: Dataset, indices: np.ndarray, parameters: DataParameters) -> Iterator[np.ndarray]:
    """Each photograph as the network sees it."""

    def one(index: int) -> np.ndarray:
        return images.decode_image(
            dataset.read(dataset.photographs[index]), parameters.image_size, parameters.color_mode
        )

    return signdigits.threads.map_in_threads(one, indices.tolist(), "decoding")


def _cache_key(dataset: Dataset, indices: np.ndarray, parameters: DataParameters) -> str:
    """Stands for all that the decoded bytes depend on: the photographs, their order, what reads them, and how."""
    told = hashlib.sha256(f"{parameters.image_size} {parameters.color_mode} {PIL.__version__}\n".encode())
    told.update(Path(images.__file__).read_bytes())
    for index in indices.tolist():
        told.update(dataset.photographs[index].checksum.encode())
    return told.hexdigest()[:32]


def _write_cache(path: Path, arrays: Iterator[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Write the file, unless it is there or another process is writing it: then wait for that one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with filelock.FileLock(path.with_suffix(".lock")):
        if path.exists():
            return
        log.info("decoding %d photographs into %s, once", shape[0], path)
        with unfinished.open("wb") as file:
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for array in arrays:
                file.write(array.tobytes())
            file.flush()
            os.fsync(file.fileno())  # whole on disk before it has its name
        unfinished.replace(path)


def _open_cache(path: Path) -> DiskArray:
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return DiskArray(path.resolve(), shape, dtype, file.tell())
