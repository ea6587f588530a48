"""The prediction log of an endpoint, for `monitor`: a line of JSON per photograph, never the photograph.

    SIGN_DIGITS_PREDICTION_LOG=FOLDER mlflow models serve ...     # off without it
    SIGN_DIGITS_PREDICTION_LOG_MB=64                              # maximum size of the folder
    SIGN_DIGITS_VERSION=3                                         # registered version, which a model does not know

This file is packaged with each model, and therefore imports only NumPy. Each process writes its own files, each up to a
64th of the maximum size; of more than 64 files in the folder, the oldest are removed.
"""

import contextlib
import datetime
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

log = logging.getLogger(__name__)

FOLDER, MEGABYTES, VERSION = "SIGN_DIGITS_PREDICTION_LOG", "SIGN_DIGITS_PREDICTION_LOG_MB", "SIGN_DIGITS_VERSION"
DEFAULT_MEGABYTES = 64.0  # about 200,000 predictions
FILES = 64
RETRY_INTERVAL = 30.0  # seconds after a failed write
STATISTICS = ("width", "height", "brightness", "contrast", "sharpness")


def image_statistics(size: tuple[int, int], array: np.ndarray) -> dict[str, float]:
    """Return statistics of a photograph that do not reveal it.

    `size` is its width and height as stored. `array`, the network's input, of shape (height, width, channels) and 0 to 255
    (grayscale: 0 to 1, inverted), gives mean and standard deviation of the middle channel, and the root mean square of its
    differences from pixel to pixel, all as a fraction of the range.
    """
    channels = array.shape[-1]
    stored = array[..., channels // 2].astype(np.float32)
    plane = 1 - stored if channels == 1 else stored / 255
    down, across = (np.diff(plane, axis=axis).ravel() for axis in (0, 1))
    brightness = float(plane.mean())
    values = plane.ravel() - np.float32(brightness)
    return {
        "width": size[0],
        "height": size[1],
        "brightness": round(brightness, 5),
        "contrast": round(float(np.sqrt(values @ values / values.size)), 5),
        "sharpness": round(float(np.sqrt(down @ down / down.size + across @ across / across.size)), 5),
    }


class PredictionLog:
    """The log of one process. A failed write loses the entry, never the reply."""

    def __init__(self, folder: Path, limit: int, version: str) -> None:
        self.folder, self.size, self.version = folder, limit // FILES, version
        self.lock = threading.Lock()  # a server answers in threads
        self.file: int | None = None
        self.written = 0
        self.paused_until = 0.0

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self | None:
        """Return the log that the environment configures, or None. Raises ValueError for a maximum size below 0.1 MB."""
        if not environ.get(FOLDER):
            return None
        text = environ.get(MEGABYTES, str(DEFAULT_MEGABYTES))
        try:
            megabytes = float(text)
        except ValueError:
            megabytes = float("nan")
        if not 0.1 <= megabytes < float("inf"):
            raise ValueError(f"{MEGABYTES}={text}: must be a number of megabytes, 0.1 or more")
        return cls(Path(environ[FOLDER]), int(megabytes * 1e6), environ.get(VERSION, ""))

    def add(
        self,
        photographs: Iterable[tuple[tuple[int, int], np.ndarray]],
        replies: Iterable[Mapping[str, Any]],
        request_id: str = "",
        seconds: float = 0.0,
    ) -> None:
        """Log a request, which took `seconds`: the size and the array of each photograph, and its reply; never raises."""
        if time.monotonic() < self.paused_until:
            return
        try:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            shared = {"time": now, "version": self.version, "request_id": request_id, "seconds": round(seconds, 6)}
            entries = [
                {**shared, "row": row, **image_statistics(*photograph), **_round(reply)}
                for row, (photograph, reply) in enumerate(zip(photographs, replies, strict=True))
            ]
            with self.lock:
                for entry in entries:
                    self._write(json.dumps(entry).encode() + b"\n")
        except Exception as error:  # a full disk or a missing folder must not fail the request
            self.paused_until = time.monotonic() + RETRY_INTERVAL
            log.warning("prediction log %s paused for %.0f s: %s", self.folder, RETRY_INTERVAL, error)
            with self.lock:
                self._close()

    def _write(self, line: bytes) -> None:
        """Append a line, to a new file if the present one is full or was removed."""
        if self.file is not None and (self.written + len(line) > self.size or not os.fstat(self.file).st_nlink):
            self._close()
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
            path = self.folder / f"predictions-{now}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
            self.file, self.written = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o640), 0
            for old in list_log_files(self.folder)[:-FILES]:
                old.unlink(missing_ok=True)  # another process may be quicker
        done = os.write(self.file, line)
        self.written += done
        if done < len(line):  # the disk is full; the next line must not continue this half
            raise OSError("no space left for a complete line")

    def _close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                os.close(self.file)
        self.file = None


def _round(value: Any) -> Any:
    """Round a number, or the numbers of a mapping, to six digits."""
    if isinstance(value, Mapping):
        return {name: _round(item) for name, item in value.items()}
    return round(value, 6) if isinstance(value, float) else value


@contextlib.contextmanager
def disable_log() -> Iterator[None]:
    """Load models without a prediction log: what `evaluate` and `predict` send them is no user's request."""
    folder = os.environ.pop(FOLDER, None)
    try:
        yield
    finally:
        if folder is not None:
            os.environ[FOLDER] = folder


def list_log_files(folder: Path) -> list[Path]:
    """Return the files of the log, the oldest first: their names begin with the time."""
    return sorted(folder.glob("predictions-*.jsonl"))
