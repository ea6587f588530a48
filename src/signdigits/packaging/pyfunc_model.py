"""The model that is served: photographs in, digits with probabilities out.

MLflow copies this file into every model and runs it from there ("models from code"), so it imports nothing of
the project. The decoder and the log of answers come with the model as files, under module names of their own: two
versions of the model can be loaded into one process, and each reads photographs as it was trained to.
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

# Rows of a request that are looked at side by side: decoder and network release Python's lock, and an endpoint seldom has
# more processors to itself. An interpreter takes 8 MB.
INTERPRETERS = 2


@dataclass(frozen=True)
class Decoded:
    """A photograph: its width and height, float32 of shape (image_size, image_size, channels), and its logits."""

    size: tuple[int, int]
    pixels: np.ndarray
    logits: np.ndarray


class SignDigits(PythonModel):
    """Reads a column `image`: base64 text of an image file, also as a data URL (or, from Python, its bytes)."""

    def load_context(self, context: PythonModelContext) -> None:
        # LiteRT, once TensorFlow Lite: imported in 0.2 s where TensorFlow takes 10, and twice as fast on one image.
        from ai_edge_litert.interpreter import Interpreter

        settings = json.loads(Path(context.artifacts["settings"]).read_text())
        self.class_names: list[str] = settings["class_names"]
        self.image_size: int = settings["image_size"]
        self.color_mode: str = settings["color_mode"]
        self.temperature: float = settings["temperature"]
        self.images = _load_module(context.artifacts["images"])
        # Off unless the environment asks for it, which is the only thing that reaches `mlflow models serve`.
        self.answers = _load_module(context.artifacts["answers"]).Answers.of_surroundings(os.environ)
        # An interpreter has one set of tensors: it is taken by one thread at a time.
        self.interpreters = queue.SimpleQueue[Any]()
        for _ in range(INTERPRETERS):
            interpreter = Interpreter(context.artifacts["network"], num_threads=1)
            interpreter.allocate_tensors()
            self.interpreters.put(interpreter)
        self.threads = ThreadPoolExecutor(INTERPRETERS)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """For each row: `label`, its `probability`, and `probabilities` by class name.

        Raises MlflowException (HTTP 400), naming every row at fault, if one holds no usable photograph.
        """
        if not len(model_input):
            raise _bad_request("no rows: send one photograph or more in the column 'image'")
        values = model_input["image"].tolist()
        each = self.threads.map if len(values) > 1 else map  # one row is not worth a thread
        seen = _require_decoded(each(self.infer, values))
        probabilities = softmax(np.array([one.logits for one in seen], float) / self.temperature)
        by_class = [dict(zip(self.class_names, row, strict=True)) for row in probabilities.tolist()]
        if self.answers is not None:
            self.answers.add([one.size for one in seen], [one.pixels for one in seen], by_class)
        best = probabilities.argmax(axis=1)
        return pd.DataFrame(
            {
                "label": [self.class_names[index] for index in best],
                "probability": probabilities.max(axis=1),
                "probabilities": by_class,
            }
        )

    def infer(self, value: Any) -> "Decoded | str":
        """Decode a photograph and ask the network, or say why that cannot be done."""
        try:
            image = self.images.open_image(to_bytes(value))
            pixels = self.images.to_array(image, self.image_size, self.color_mode).astype(np.float32)
        except ValueError as error:  # ImageError among them
            return str(error)
        interpreter = self.interpreters.get()
        try:
            return Decoded(image.size, pixels, _infer_logits(interpreter, pixels))
        finally:
            self.interpreters.put(interpreter)


def _require_decoded(looked_at: Iterable[Decoded | str]) -> list[Decoded]:
    """What was seen in every row; the refusal of them all, with the first reasons, if there is a row that cannot be read."""
    rows = list(looked_at)
    faults = [f"row {number}: {row}" for number, row in enumerate(rows) if isinstance(row, str)]
    if faults:
        raise _bad_request("; ".join(faults[:10]) + ("; ..." if len(faults) > 10 else ""))
    return [row for row in rows if isinstance(row, Decoded)]


def _infer_logits(interpreter: Any, pixels: np.ndarray) -> np.ndarray:
    """The network's logits, of shape (classes,), for an image of shape (height, width, channels)."""
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(taken["index"], pixels[np.newaxis])
    interpreter.invoke()
    logits: np.ndarray = interpreter.get_tensor(given["index"])[0]
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, of the shape (n, classes) of the logits."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return found


def to_bytes(value: Any) -> bytes:
    """The bytes of a photograph given as base64 text, or as bytes. Raises ValueError with the reason if it is neither."""
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
    """The Python file at `path` as a module that no other import can meet."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_{uuid.uuid4().hex}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


set_model(SignDigits())
