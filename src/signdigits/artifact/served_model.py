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
import threading
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

FORMATS = ("JPEG", "MPO", "PNG")  # MPO: how some telephones write JPEG
MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000  # 150 MB when decoded


class SignDigits(PythonModel):
    """Reads a column `image`: base64 text of a JPEG or PNG of any size (or, from Python, its bytes)."""

    def load_context(self, context: PythonModelContext) -> None:
        # LiteRT, once TensorFlow Lite: imported in 0.2 s where TensorFlow takes 10, and twice as fast on one image.
        from ai_edge_litert.interpreter import Interpreter

        settings = json.loads(Path(context.artifacts["settings"]).read_text())
        self.class_names: list[str] = settings["class_names"]
        self.image_size: int = settings["image_size"]
        self.color_mode: str = settings["color_mode"]
        self.temperature: float = settings["temperature"]
        self.images = load_module(context.artifacts["images"])
        # Off unless the environment asks for it, which is the only thing that reaches `mlflow models serve`.
        self.answers = load_module(context.artifacts["answers"]).Answers.of_surroundings(os.environ)
        self.interpreter = Interpreter(context.artifacts["network"], num_threads=1)
        self.interpreter.allocate_tensors()
        # The server answers requests in threads, and an interpreter has one set of tensors.
        self.lock = threading.Lock()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """For each row: `label`, its `probability`, and `probabilities` by class name.

        Raises MlflowException (HTTP 400), naming every row at fault, if one holds no usable photograph.
        """
        if not len(model_input):
            raise refusal("no rows: send one photograph or more in the column 'image'")
        sizes, x = self.read(model_input["image"].tolist())
        probabilities = softmax(self.forward(x) / self.temperature)
        by_class = [dict(zip(self.class_names, row, strict=True)) for row in probabilities.tolist()]
        if self.answers is not None:
            self.answers.add(sizes, x, by_class)
        best = probabilities.argmax(axis=1)
        return pd.DataFrame(
            {
                "label": [self.class_names[index] for index in best],
                "probability": probabilities.max(axis=1),
                "probabilities": by_class,
            }
        )

    def forward(self, x: np.ndarray) -> np.ndarray:
        """The network's logits, float64 of shape (n, classes), for float32 images of shape (n, height, width, channels).

        One after the other: on one thread a batch takes as long.
        """
        (taken,), (given,) = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        logits = []
        with self.lock:
            for image in x:
                self.interpreter.set_tensor(taken["index"], image[np.newaxis])
                self.interpreter.invoke()
                logits.append(self.interpreter.get_tensor(given["index"])[0])
        return np.array(logits, float)

    def read(self, values: list[Any]) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Decode every value; widths and heights, and float32 of shape (n, image_size, image_size, channels)."""
        sizes, arrays, faults = [], [], []
        for row, value in enumerate(values):
            try:
                data = to_bytes(value)
                image = self.images.open_image(data, FORMATS, MAX_PIXELS)
                arrays.append(self.images.to_array(image, self.image_size, self.color_mode))
                sizes.append(image.size)
            except ValueError as error:  # ImageError among them
                faults.append(f"row {row}: {error}")
        if faults:
            raise refusal("; ".join(faults[:10]) + ("; ..." if len(faults) > 10 else ""))
        return sizes, np.stack(arrays).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, of the shape (n, classes) of the logits."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return found


def to_bytes(value: Any) -> bytes:
    """The bytes of a photograph given as base64 text, or as bytes. Raises ValueError with the reason if it is neither."""
    if isinstance(value, str):
        try:
            value = base64.b64decode("".join(value.split()), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("not base64") from None
    if not isinstance(value, bytes):
        raise ValueError(f"not base64 text of a photograph but {type(value).__name__}")
    if not value:
        raise ValueError("empty")
    if len(value) > MAX_BYTES:
        raise ValueError(f"{len(value):,} bytes are more than the {MAX_BYTES:,} allowed")
    return value


def refusal(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


def load_module(path: str) -> ModuleType:
    """The Python file at `path` as a module that no other import can meet."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_{uuid.uuid4().hex}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


set_model(SignDigits())
