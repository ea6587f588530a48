"""The served model: encoded photographs in, labels with probabilities out.

MLflow copies this file into each model and runs it from there ("models from code"), so that it imports nothing of the
project. The decoder, the outlier detector and the prediction log are artifacts of the model, loaded under unique module
names: two versions can be loaded into one process, each with the decoder of its training.
"""

import base64
import binascii
import importlib.util
import json
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import DEADLINE_EXCEEDED, INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc import PythonModel, PythonModelContext
from threadpoolctl import ThreadpoolController

# Rows of a request that are processed in parallel: decoder and network release the GIL, and an endpoint seldom has more CPUs
# to itself. An interpreter takes 8 MB.
INTERPRETERS = 2

# Limits of a request. The pixels are those that must be decoded: few of a JPEG, which is decoded at a smaller scale.
MAX_ROWS = 1000
MAX_REQUEST_PIXELS = 240_000_000  # twice those of the largest photograph; 64 of a telephone's JPEGs are 12,000,000
# A request with more is decoded in one thread, one such request at a time: the others keep a CPU.
LARGE_REQUEST_PIXELS = 16_000_000

GRID = 10  # cells on a side of an occlusion map
MAX_EXPLAINED = 16  # rows of a request with `explain`: each takes GRID * GRID passes through the network


T = TypeVar("T")


@dataclass(frozen=True)
class Decoded:
    """A decoded photograph: width and height, pixels (float32 of shape (image_size, image_size, channels)), logits, features."""

    size: tuple[int, int]
    pixels: np.ndarray
    logits: np.ndarray
    features: np.ndarray


class SignDigits(PythonModel):
    """Classifies a column `image`: base64 text of an image file, also as a data URL (or, from Python, its bytes)."""

    def load_context(self, context: PythonModelContext) -> None:
        # LiteRT (formerly TensorFlow Lite) is imported in 0.2 s, TensorFlow in 10, and is twice as fast for one image.
        from ai_edge_litert.interpreter import Interpreter

        settings = json.loads(Path(context.artifacts["settings"]).read_text())
        self.class_names: list[str] = settings["class_names"]
        self.image_size: int = settings["image_size"]
        self.color_mode: str = settings["color_mode"]
        self.temperature: float = settings["temperature"]
        self.logged_fields: list[str] = settings["logged_fields"]
        self.handwriting: bool = settings["handwriting"]
        # A JPEG file of a typical photograph by class, for the page. Models of version 0.2 do not have this attribute.
        self.examples: dict[str, bytes] = {}
        if folder := context.artifacts.get("examples"):
            files = ((name, Path(folder, f"{number}.jpeg")) for number, name in enumerate(self.class_names))
            self.examples = {name: file.read_bytes() for name, file in files if file.exists()}
        self.images = _load_module(context.artifacts["images"])
        self.detector = _load_module(context.artifacts["outliers"]).Detector.load(context.artifacts["detector"])
        # Configured by the environment, which is all that `mlflow models serve` passes on.
        logging_ = _load_module(context.artifacts["prediction_log"])
        self.prediction_log = logging_.PredictionLog.from_environ(os.environ)
        self.image_statistics = logging_.image_statistics  # for the drift reference of an evaluation
        self.libraries = ThreadpoolController()
        # An interpreter has one set of tensors, and is used by one thread at a time.
        self.interpreters = queue.SimpleQueue[Any]()
        for _ in range(INTERPRETERS):
            interpreter = Interpreter(context.artifacts["network"], num_threads=1)
            interpreter.allocate_tensors()
            self.interpreters.put(interpreter)
        self.threads = ThreadPoolExecutor(INTERPRETERS)
        # A server's time-out ends its reply, not the work on it: the timer and the request's event end that.
        self.timeout = float(os.environ.get("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "inf"))
        self.request = ContextVar[Any]("request", default=None)  # an Invocation, set by signdigits.serving.worker
        self.large_request = threading.Lock()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return `label`, its `probability` and the `probabilities` by class name, `outlier_score` and `is_outlier` of each row.

        The reply has the index of the rows.

        An outlier, with a score above 1, resembles none of the training images; its label is meaningless. With the parameter
        `explain` each row also has an `explanation`, its occlusion map. Raises MlflowException (HTTP 400), naming each row
        at fault, if a row is not a usable photograph, or if there are more rows than MAX_ROWS or more pixels than
        MAX_REQUEST_PIXELS; before any is decoded.
        """
        explain = bool((params or {}).get("explain"))
        images = model_input["image"].tolist()
        _check_rows(len(images), explain)
        started = time.perf_counter()
        decoded = self.decode(images, self.start_timer())
        probabilities = softmax(np.array([photograph.logits for photograph in decoded], float) / self.temperature)
        best = probabilities.argmax(axis=1)
        # OpenBLAS threads busy-wait after a product, and take a CPU from the next photographs.
        with self.libraries.limit(limits=1, user_api="blas"):
            scores = self.detector.score(np.array([photograph.features for photograph in decoded]))
        reply = pd.DataFrame(  # the fields are declared in reply.py
            {
                "label": [self.class_names[index] for index in best],
                "probability": probabilities.max(axis=1),
                "probabilities": [dict(zip(self.class_names, row, strict=True)) for row in probabilities.tolist()],
                "outlier_score": scores.astype(float),
                "is_outlier": scores > 1,
            },
            index=model_input.index,  # pandas assigns a column by it
        )
        request = self.request.get()
        if self.prediction_log is not None and getattr(request, "is_logged", True):
            self.prediction_log.add(
                [(photograph.size, photograph.pixels) for photograph in decoded],
                reply[self.logged_fields].to_dict("records"),
                request_id=getattr(request, "id", ""),
                seconds=time.perf_counter() - started,
            )
        if explain:
            reply["explanation"] = pd.Series(list(map(self.explain, decoded, best)), reply.index)
        return reply

    def start_timer(self) -> Callable[[], bool]:
        """Return a function that tells whether the request need not be answered any more."""
        request, deadline = self.request.get(), time.monotonic() + self.timeout
        return lambda: time.monotonic() > deadline or (request is not None and request.cancelled.is_set())

    def decode(self, images: list[Any], is_over: Callable[[], bool]) -> list["Decoded"]:
        """Decode the photographs of a request and compute their logits and features.

        A large request does not wait for another one: the client is asked to retry. Raises MlflowException.
        """
        opened = _require_usable(self.open(image, is_over) for image in images)
        pixels = sum(self.images.count_pixels(image, self.image_size) for image in opened)
        if pixels > MAX_REQUEST_PIXELS:
            raise _bad_request(
                f"{pixels:,} pixels in {len(opened)} rows are more than the {MAX_REQUEST_PIXELS:,} allowed; send several requests"
            )
        is_large = pixels > LARGE_REQUEST_PIXELS and math.isfinite(self.timeout)
        map_rows = map if is_large or len(opened) == 1 else self.threads.map  # a single row needs no thread
        if is_large and not self.large_request.acquire(blocking=False):
            raise MlflowException("busy with other large photographs; try again", TEMPORARILY_UNAVAILABLE)
        try:
            results = list(map_rows(lambda image: self.infer(image, is_over), opened))
        finally:
            if is_large:
                self.large_request.release()
        if is_over():
            raise MlflowException("no reply in time; send fewer photographs in one request", DEADLINE_EXCEEDED)
        return _require_usable(results)

    def explain(self, photograph: Decoded, label: int) -> list[list[float]]:
        """Return the occlusion map: the decrease of the label's log-odds when a part of the photograph is covered.

        A list of GRID rows of GRID cells, from the top left; a patch of the mean colour, twice as wide as the cell, covers
        it. Log-odds, because a certain answer's probability hardly moves. After Zeiler and Fergus, "Visualizing and
        understanding convolutional networks", 2014, arXiv:1311.2901.
        """
        colour = photograph.pixels.mean(axis=(0, 1))
        edges = np.linspace(0, self.image_size, 2 * GRID + 1).round().astype(int)

        def cover(cell: int) -> np.ndarray:
            row, column = divmod(cell, GRID)
            top, left = max(2 * row - 1, 0), max(2 * column - 1, 0)
            bottom, right = min(2 * row + 3, 2 * GRID), min(2 * column + 3, 2 * GRID)
            covered = photograph.pixels.copy()
            covered[edges[top] : edges[bottom], edges[left] : edges[right]] = colour
            return self.run(covered)[: len(self.class_names)]

        logits = np.array([photograph.logits, *self.threads.map(cover, range(GRID * GRID))], float)
        log_odds = logits[:, label] - np.logaddexp.reduce(np.delete(logits, label, axis=1), axis=1)
        lost = ((log_odds[0] - log_odds[1:]) / self.temperature).round(4)
        rows: list[list[float]] = lost.reshape(GRID, GRID).tolist()
        return rows

    def open(self, value: Any, is_over: Callable[[], bool]) -> Any:
        """Read the header of a photograph; return the image, or the reason for which it is unusable."""
        try:
            return self.images.open_image(to_bytes(value), is_over)
        except ValueError as error:  # ImageError among them
            return str(error)

    def infer(self, image: Any, is_over: Callable[[], bool]) -> "Decoded | str":
        """Decode an opened image and compute its logits and features, or return the reason for which it is unusable."""
        if is_over():
            return "no time left"
        size = image.size
        try:
            pixels = self.images.to_array(image, self.image_size, self.color_mode).astype(np.float32)
        except ValueError as error:
            return str(error)
        finally:
            image.close()  # its pixels, which may be 360 MB
        logits, features = np.split(self.run(pixels), [len(self.class_names)])
        return Decoded(size, pixels, logits, features)

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """Return the logits, then the features, of an image of shape (height, width, channels)."""
        interpreter = self.interpreters.get()
        try:
            (input_,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
            interpreter.set_tensor(input_["index"], pixels[np.newaxis])
            interpreter.invoke()
            outputs: np.ndarray = interpreter.get_tensor(output["index"])[0]
            return outputs
        finally:
            self.interpreters.put(interpreter)


def _check_rows(rows: int, explain: bool) -> None:
    """Raise MlflowException if a request has no rows, or more than allowed."""
    if not rows:
        raise _bad_request("no rows: send one photograph or more in the column 'image'")
    if explain and rows > MAX_EXPLAINED:
        raise _bad_request(f"{rows} rows are more than the {MAX_EXPLAINED} allowed with explain=true")
    if rows > MAX_ROWS:
        raise _bad_request(f"{rows} rows are more than the {MAX_ROWS} allowed; send several requests")


def _require_usable(results: Iterable[T | str]) -> list[T]:
    """Return the usable rows. Raises MlflowException, with the first ten reasons, if one is not."""
    rows = list(results)
    problems = [f"row {number}: {row}" for number, row in enumerate(rows) if isinstance(row, str)]
    if problems:
        raise _bad_request("; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else ""))
    return [row for row in rows if not isinstance(row, str)]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities of the logits' shape, (n, classes)."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def to_bytes(value: Any) -> bytes:
    """Return the bytes of a photograph given as base64 text or bytes. Raises ValueError if it is neither."""
    if isinstance(value, str):
        text = value.partition(",")[2] if value.startswith("data:") else value  # a browser's data URL
        try:
            value = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("not base64") from None
    if not isinstance(value, bytes):
        raise ValueError(f"not base64 text of a photograph but {type(value).__name__}")
    if not value:
        raise ValueError("empty")
    return value


def _bad_request(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


def _load_module(path: str) -> ModuleType:
    """Import the Python file at `path` under a unique module name."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_{uuid.uuid4().hex}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


set_model(SignDigits())
