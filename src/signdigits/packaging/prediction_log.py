"""What an endpoint has answered, kept for `monitor`: one line of JSON for each photograph, never the photograph.

    SIGN_DIGITS_PREDICTION_LOG=FOLDER mlflow models serve ...     # off without it
    SIGN_DIGITS_PREDICTION_LOG_MB=64                              # all files of the folder together, at most
    SIGN_DIGITS_VERSION=3                                  # the registered version, which a model itself does not know

Imports NumPy alone, so that the served model can carry this file along. Every process writes files of its own, up to a
64th of what is allowed; when there are more than 64, the oldest are removed, whosesoever they are.
"""

import contextlib
import datetime
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

log = logging.getLogger(__name__)

FOLDER, MEGABYTES, VERSION = "SIGN_DIGITS_PREDICTION_LOG", "SIGN_DIGITS_PREDICTION_LOG_MB", "SIGN_DIGITS_VERSION"
DEFAULT_MEGABYTES = 64.0  # some 200,000 answers
FILES = 64
PAUSE = 30.0  # seconds until a folder that could not be written is tried again
STATISTICS = ("width", "height", "brightness", "contrast", "sharpness")


def image_statistics(size: tuple[int, int], array: np.ndarray) -> dict[str, float]:
    """What can be said of a photograph without showing it.

    `size` is its own, upright or not; the rest is of `array`, as the network sees it, of shape (height, width, channels)
    and 0 to 255 (or 0 to 1, inverted, where it is gray): mean and standard deviation of the middle channel, and the root
    mean square of its differences from pixel to pixel, all as a share of the whole range.
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
    """The log of one process. Nothing that happens to it reaches who asked: what cannot be written is left out."""

    def __init__(self, folder: Path, limit: int, version: str) -> None:
        self.folder, self.size, self.version = folder, limit // FILES, version
        self.lock = threading.Lock()  # a server answers in threads
        self.file: int | None = None
        self.written = 0
        self.silent_until = 0.0

    @classmethod
    def from_environ(cls, surroundings: Mapping[str, str]) -> Self | None:
        """The log that the environment asks for, or None. Raises ValueError for a limit that is no number above 0."""
        if not surroundings.get(FOLDER):
            return None
        text = surroundings.get(MEGABYTES, str(DEFAULT_MEGABYTES))
        try:
            megabytes = float(text)
        except ValueError:
            megabytes = float("nan")
        if not 0.1 <= megabytes < float("inf"):
            raise ValueError(f"{MEGABYTES}={text}: must be a number of megabytes, 0.1 or more")
        return cls(Path(surroundings[FOLDER]), int(megabytes * 1e6), surroundings.get(VERSION, ""))

    def add(
        self, sizes: Sequence[tuple[int, int]], arrays: Sequence[np.ndarray], probabilities: Sequence[dict[str, float]]
    ) -> None:
        """Note the answers to a request; never raises."""
        if time.monotonic() < self.silent_until:
            return
        try:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            lines = [
                self.line(now, image_statistics(size, array), row)
                for size, array, row in zip(sizes, arrays, probabilities, strict=True)
            ]
            with self.lock:
                for line in lines:
                    self.write(line)
        except Exception as error:  # a full disk, a folder that is gone, anything: the answer is worth more
            self.silent_until = time.monotonic() + PAUSE
            log.warning("the log of answers in %s pauses for %.0f s: %s", self.folder, PAUSE, error)
            with self.lock:
                self.close()

    def line(self, now: str, found: dict[str, float], row: dict[str, float]) -> bytes:
        shares = {name: round(probability, 6) for name, probability in row.items()}
        told: dict[str, Any] = {"time": now, "version": self.version, **found, "probabilities": shares}
        return json.dumps(told).encode() + b"\n"

    def write(self, line: bytes) -> None:
        """Append a line, in a new file where the present one is full, or has been removed by whoever tidied up."""
        if self.file is not None and (self.written + len(line) > self.size or not os.fstat(self.file).st_nlink):
            self.close()
        if self.file is None:
            self.file, self.written = self.begin(), 0
            self.tidy()
        done = os.write(self.file, line)
        self.written += done
        if done < len(line):  # the disk is full, and what comes next must not be glued to this half
            raise OSError("no space left for a whole line")

    def begin(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
        path = self.folder / f"predictions-{now}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o640)

    def tidy(self) -> None:
        for old in list_log_files(self.folder)[:-FILES]:
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                old.unlink()

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                os.close(self.file)
        self.file = None


@contextlib.contextmanager
def disable_log() -> Iterator[None]:
    """Models that are loaded in the block keep no log: what `evaluate` asks is not what users ask."""
    folder = os.environ.pop(FOLDER, None)
    try:
        yield
    finally:
        if folder is not None:
            os.environ[FOLDER] = folder


def list_log_files(folder: Path) -> list[Path]:
    """Return the files of the log, oldest first."""
    return sorted(folder.glob("*.jsonl"), key=lambda path: path.name.partition("-")[2])
