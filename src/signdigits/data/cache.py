"""Decoded photographs on disk, each in a file named by its SHA-256: one that was decoded once is not decoded again.

A file gets its name when it is complete, and one that is damaged counts as missing: processes share the folder without a lock,
and a killed one leaves nothing that another would read. Remove the folder at any time.
"""

import hashlib
import json
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from signdigits.data import images
from signdigits.errors import DataError
from signdigits.files import atomic_file

FOLDER = Path("data", "cache", "photographs")


@dataclass(frozen=True)
class PhotographCache:
    """The photographs preprocessed to `image_size` pixels square and `color_mode`, by this version of the decoder."""

    image_size: int
    color_mode: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.image_size, self.image_size, 3 if self.color_mode == "rgb" else 1

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.color_mode == "rgb" else np.float32)

    def read_properties(self, checksum: str) -> dict[str, Any] | None:
        """Return the properties of a photograph; None if it is not here, or its file is damaged."""
        content = self._read(checksum)
        return json.loads(content.partition(b"\n")[0]) if content else None

    def read_pixels(self, checksum: str) -> np.ndarray:
        """Return the pixels of a photograph. Raises DataError if it has gone from the cache."""
        content = self._read(checksum)
        if content is None:
            raise DataError(f"{self.path(checksum)}: was removed; run the same command to continue")
        return np.frombuffer(content.partition(b"\n")[2], self.dtype).reshape(self.shape)

    def write(self, checksum: str, properties: dict[str, Any], pixels: np.ndarray) -> None:
        """Keep a photograph. Raises DataError, naming the file, if it cannot be written."""
        content = json.dumps(properties).encode() + b"\n" + pixels.tobytes()
        path = self.path(checksum)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial_file:
                partial_file.write_bytes(_check(content) + b"\n" + content)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; free some space, or make the folder writable") from error

    def _read(self, checksum: str) -> bytes | None:
        try:
            check, _, content = self.path(checksum).read_bytes().partition(b"\n")
        except OSError:
            return None
        return content if content and check == _check(content) else None

    def path(self, checksum: str) -> Path:
        return self._folder / checksum[:2] / checksum

    @cached_property
    def _folder(self) -> Path:
        decoder = f"{PIL.__version__}\n{Path(images.__file__).read_text()}"
        version = hashlib.sha256(decoder.encode()).hexdigest()[:8]
        return FOLDER.absolute() / f"{self.image_size}-{self.color_mode}-{version}"


@dataclass(frozen=True)
class DiskArray:
    """The pixels of cached photographs as an array of `shape` (n, height, width, channels), read by row: `array[5:9]`, `array[[7, 2]]`."""

    cache: PhotographCache
    checksums: np.ndarray  # of the photographs, in the order of the array; text of shape (n,)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.cache.shape

    @property
    def dtype(self) -> np.dtype:
        return self.cache.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.checksums)

    def __getitem__(self, chosen: slice | np.ndarray) -> np.ndarray:
        """Return some of the rows. Raises DataError if a photograph has gone from the cache."""
        checksums = self.checksums[chosen].tolist()
        array = np.empty((len(checksums), *self.cache.shape), self.dtype)
        for row, checksum in zip(array, checksums, strict=True):
            row[:] = self.cache.read_pixels(checksum)
        return array

    def part(self, chosen: slice | np.ndarray) -> "DiskArray":
        """Return some of the rows, still on disk."""
        return replace(self, checksums=self.checksums[chosen])


def _check(content: bytes) -> bytes:
    return b"%08x" % zlib.crc32(content)
