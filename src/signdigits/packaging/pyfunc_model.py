"""The served model: encoded photographs in, labels with probabilities out.

MLflow copies this file into each model and runs it from there ("models from code"), so that it imports nothing of the
project. The decoder and the prediction log are artifacts of the model, loaded under unique module names: two versions can
be loaded into one process, each with the decoder of its training.
"""

import base64
import binascii
import importlib.util
import json
import os
import queue
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

# Rows of a request that are processed in parallel: decoder and network release the GIL, and an endpoint seldom has more CPUs
# to itself. An interpreter takes 8 MB.
INTERPRETERS = 2


@dataclass(frozen=True)
class Decoded:
    """A decoded photograph: width and height, pixels (float32 of shape (image_size, image_size, channels)) and logits."""

    size: tuple[int, int]
    pixels: np.ndarray
    logits: np.ndarray


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
        self.images = _load_module(context.artifacts["images"])
        # Configured by the environment, which is all that `mlflow models serve` passes on.
        logging_ = _load_module(context.artifacts["prediction_log"])
        self.prediction_log = logging_.PredictionLog.from_environ(os.environ)
        self.image_statistics = logging_.image_statistics  # for the drift reference of an evaluation
        # An interpreter has one set of tensors, and is used by one thread at a time.
        self.interpreters = queue.SimpleQueue[Any]()
        for _ in range(INTERPRETERS):
            interpreter = Interpreter(context.artifacts["network"], num_threads=1)
            interpreter.allocate_tensors()
            self.interpreters.put(interpreter)
        self.threads = ThreadPoolExecutor(INTERPRETERS)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return `label`, its `probability` and the `probabilities` by class name for each row.

        Raises MlflowException (HTTP 400), naming each row at fault, if a row is not a usable photograph.
        """
        if not len(model_input):
            raise _bad_request("no rows: send one photograph or more in the column 'image'")
        values = model_input["image"].tolist()
        map_rows = self.threads.map if len(values) > 1 else map  # a single row needs no thread
        decoded = _require_decoded(map_rows(self.infer, values))
        probabilities = softmax(np.array([photograph.logits for photograph in decoded], float) / self.temperature)
        by_class = [dict(zip(self.class_names, row, strict=True)) for row in probabilities.tolist()]
        if self.prediction_log is not None:
            self.prediction_log.add(
                [photograph.size for photograph in decoded], [photograph.pixels for photograph in decoded], by_class
            )
        best = probabilities.argmax(axis=1)
        return pd.DataFrame(
            {
                "label": [self.class_names[index] for index in best],
                "probability": probabilities.max(axis=1),
                "probabilities": by_class,
            }
        )

    def infer(self, value: Any) -> "Decoded | str":
        """Decode a photograph and compute its logits, or return the reason for which it is unusable."""
        try:
            image = self.images.open_image(to_bytes(value))
            size = image.size
            pixels = self.images.to_array(image, self.image_size, self.color_mode).astype(np.float32)
        except ValueError as error:  # ImageError among them
            return str(error)
        interpreter = self.interpreters.get()
        try:
            return Decoded(size, pixels, _infer_logits(interpreter, pixels))
        finally:
            self.interpreters.put(interpreter)


def _require_decoded(results: Iterable[Decoded | str]) -> list[Decoded]:
    """Return the decoded rows. Raises MlflowException, with the first ten reasons, if a row is unusable."""
    rows = list(results)
    problems = [f"row {number}: {row}" for number, row in enumerate(rows) if isinstance(row, str)]
    if problems:
        raise _bad_request("; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else ""))
    return [row for row in rows if isinstance(row, Decoded)]


def _infer_logits(interpreter: Any, pixels: np.ndarray) -> np.ndarray:
    """Return the logits, of shape (classes,), of an image of shape (height, width, channels)."""
    (input_,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(input_["index"], pixels[np.newaxis])
    interpreter.invoke()
    logits: np.ndarray = interpreter.get_tensor(output["index"])[0]
    return logits


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
