"""A cache of decoded photographs: in memory up to a budget, beyond it in a file on disk.

The file is named by the digest of its content. It is written atomically under a lock: a killed process leaves no partial
file, and a second process waits for the first and reads its file.
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

from signdigits.config import DataParameters
from signdigits.data import images
from signdigits.data.dataset import Dataset, Photograph, fits_budget
from signdigits.errors import DataError
from signdigits.threads import map_in_threads

log = logging.getLogger(__name__)

FOLDER = Path("data", "cache")


@dataclass(frozen=True)
class DiskArray:
    """An array in an .npy file, of `shape` (n, height, width, channels), read by row: `array[5:9]`, `array[[7, 2]]`.

    Rows are read, not memory-mapped: the pages of a mapped file would count as memory of the process.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # bytes before the first row

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        row_numbers = np.arange(len(self))[rows]
        array = np.empty((len(row_numbers), *self.shape[1:]), self.dtype)
        row_size = array[:1].size
        for row, row_number in zip(array, row_numbers.tolist(), strict=True):
            start = self.offset + row_number * row_size * self.dtype.itemsize
            row.flat = np.fromfile(self.path, self.dtype, row_size, offset=start)
        return array

    def part(self, start: int, stop: int) -> "DiskArray":
        """Return the rows from `start` up to `stop`, still on disk."""
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        return DiskArray(self.path, (stop - start, *self.shape[1:]), self.dtype, self.offset + start * row)


def decode_photographs(dataset: Dataset, indices: np.ndarray, parameters: DataParameters) -> np.ndarray | DiskArray:
    """Return the photographs at `indices`, preprocessed; on disk if they need more than `memory_budget` megabytes.

    Raises DataError if the file cannot be written.
    """
    channels, scalar_type = (3, np.uint8) if parameters.color_mode == "rgb" else (1, np.float32)
    shape, dtype = (len(indices), parameters.image_size, parameters.image_size, channels), np.dtype(scalar_type)
    arrays = _decode_each(dataset, indices, parameters)
    if fits_budget(len(indices), parameters):
        decoded = np.empty(shape, dtype)
        for row, array in zip(decoded, arrays, strict=True):
            row[...] = array
        return decoded
    path = FOLDER / f"{_cache_key(dataset, indices, parameters)}.npy"
    try:
        _write_cache(path, arrays, shape, dtype)
        return _open_cache(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; free some space, or raise --memory_budget") from error


def _decode_each(dataset: Dataset, indices: np.ndarray, parameters: DataParameters) -> Iterator[np.ndarray]:
    """Yield each photograph, preprocessed for the network; those with pixels from the scan are not read again."""
    photographs = [dataset.photographs[index] for index in indices.tolist()]
    if all(photograph.pixels is not None for photograph in photographs):
        return (photograph.pixels for photograph in photographs if photograph.pixels is not None)

    def decode(photograph: Photograph) -> np.ndarray:
        return images.decode_image(dataset.read(photograph), parameters.image_size, parameters.color_mode)

    return map_in_threads(decode, photographs, "decoding")


def _cache_key(dataset: Dataset, indices: np.ndarray, parameters: DataParameters) -> str:
    """Return a digest of everything that the decoded bytes depend on: photographs, order, decoder and settings."""
    sha256 = hashlib.sha256(f"{parameters.image_size} {parameters.color_mode} {PIL.__version__}\n".encode())
    sha256.update(Path(images.__file__).read_bytes())
    for index in indices.tolist():
        sha256.update(dataset.photographs[index].checksum.encode())
    return sha256.hexdigest()[:32]


def _write_cache(path: Path, arrays: Iterator[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Write the file atomically unless it exists; wait if another process is writing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(".part")
    with filelock.FileLock(path.with_suffix(".lock")):
        if path.exists():
            return
        log.info("decoding %d photographs into the cache %s", shape[0], path)
        with partial_file.open("wb") as file:
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for array in arrays:
                file.write(array.tobytes())
            file.flush()
            os.fsync(file.fileno())  # complete on disk before it gets its name
        partial_file.replace(path)


def _open_cache(path: Path) -> DiskArray:
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return DiskArray(path.resolve(), shape, dtype, file.tell())
