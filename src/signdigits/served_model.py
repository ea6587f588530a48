"""The model that is served: photographs in, digits with probabilities out.

MLflow copies this file into every model and runs it from there ("models from code"), so it imports nothing of
the project. The decoder comes with the model as a file, under a module name of its own: two versions of the model
can be loaded into one process, and each reads photographs as it was trained to.
"""

import base64
import binascii
import importlib.util
import json
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
BATCH = 256  # images in one forward pass: bounds the memory that a large request takes


class SignDigits(PythonModel):
    """Reads a column `image`: base64 text of a JPEG or PNG of any size (or, from Python, its bytes)."""

    def load_context(self, context: PythonModelContext) -> None:
        import keras  # an MLflow process that only looks at the model does not need it
        import tensorflow as tf

        settings = json.loads(Path(context.artifacts["settings"]).read_text())
        self.class_names: list[str] = settings["class_names"]
        self.image_size: int = settings["image_size"]
        self.color_mode: str = settings["color_mode"]
        self.images = load_module(context.artifacts["images"])
        temperature: float = settings["temperature"]
        network = keras.saving.load_model(context.artifacts["network"], compile=False)

        # A traced function answers one photograph about 40 ms sooner than `network.predict`.
        @tf.function
        def forward(x: Any) -> Any:
            return tf.nn.softmax(network(x, training=False) / temperature)

        # Traced here and once: TensorFlow warns of a function that is traced anew with every model that is loaded.
        shape = network.input_shape[1:]
        self.forward = forward.get_concrete_function(tf.TensorSpec([None, *shape], tf.float32))
        self.tensor = tf.constant
        self.forward(tf.zeros([1, *shape]))  # the first call takes longer than all others

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """For each row: `label`, its `probability`, and `probabilities` by class name.

        Raises MlflowException (HTTP 400), naming every row at fault, if one holds no usable photograph.
        """
        if not len(model_input):
            raise refusal("no rows: send one photograph or more in the column 'image'")
        x = self.read(model_input["image"].tolist())
        chunks = [self.forward(self.tensor(x[start : start + BATCH])).numpy() for start in range(0, len(x), BATCH)]
        probabilities = np.concatenate(chunks).astype(float)
        best = probabilities.argmax(axis=1)
        return pd.DataFrame(
            {
                "label": [self.class_names[index] for index in best],
                "probability": probabilities.max(axis=1),
                "probabilities": [dict(zip(self.class_names, row, strict=True)) for row in probabilities.tolist()],
            }
        )

    def read(self, values: list[Any]) -> np.ndarray:
        """Decode every value; float32 of shape (n, image_size, image_size, channels)."""
        arrays, faults = [], []
        for row, value in enumerate(values):
            try:
                data = to_bytes(value)
                arrays.append(self.images.decode(data, self.image_size, self.color_mode, FORMATS, MAX_PIXELS))
            except ValueError as error:  # ImageError among them
                faults.append(f"row {row}: {error}")
        if faults:
            raise refusal("; ".join(faults[:10]) + ("; ..." if len(faults) > 10 else ""))
        return np.stack(arrays).astype(np.float32)


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
    spec = importlib.util.spec_from_file_location(f"images_{uuid.uuid4().hex}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


set_model(SignDigits())
