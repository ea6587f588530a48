"""Formats of the network for use without MLflow: pixels in, calibrated probabilities out.

Each holds the preprocessing of the network itself (scale, standardization) and the temperature. Its input is float32 of shape
(n, image_size, image_size, channels), as data/images.py decodes it; its output is float32 of shape (n, classes).
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from signdigits import startup
from signdigits.errors import ModelError, install_hint

if TYPE_CHECKING:
    import keras

MAX_CALIBRATION_IMAGES = 200  # TensorFlow's guide to quantization takes 100 to 500


@dataclass(frozen=True)
class Format:
    """The suffix of a format's files, its writer and its runner."""

    suffix: str
    write: "Callable[[keras.Model, Path, np.ndarray], None]"  # with training images, from which int8 takes its ranges
    run: Callable[[Path, np.ndarray], np.ndarray]


def check_installed(name: str) -> None:
    """Raise ModelError if the format needs packages that this environment lacks."""
    if name == "onnx" and not (importlib.util.find_spec("tf2onnx") and importlib.util.find_spec("onnxruntime")):
        raise ModelError(f"format=onnx: needs tf2onnx and onnxruntime; {install_hint('export')}")


def _write_keras(model: "keras.Model", path: Path, calibration: np.ndarray) -> None:
    model.save(path)


def _write_tflite(model: "keras.Model", path: Path, calibration: np.ndarray) -> None:
    with startup.filtered_stderr():
        model.export(path, format="litert", verbose=False)


def _write_int8(model: "keras.Model", path: Path, calibration: np.ndarray) -> None:
    """Write a network of 8-bit integers (Jacob et al., 2018, arXiv:1712.05877); input and output stay float32."""
    from tensorflow import lite

    def representative_dataset() -> Iterator[list[np.ndarray]]:
        yield from ([image[np.newaxis]] for image in calibration)

    with startup.filtered_stderr():
        model.export(
            path,
            format="litert",
            verbose=False,
            optimizations=[lite.Optimize.DEFAULT],
            representative_dataset=representative_dataset,
            target_spec={"supported_ops": [lite.OpsSet.TFLITE_BUILTINS_INT8]},
        )


def _write_onnx(model: "keras.Model", path: Path, calibration: np.ndarray) -> None:
    from keras import InputSpec

    signature = [InputSpec(shape=model.input_shape, dtype="float32", name="image")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Keras patches tf2onnx for numpy 2
        model.export(path, format="onnx", verbose=False, input_signature=signature)


def _run_keras(path: Path, pixels: np.ndarray) -> np.ndarray:
    from keras.saving import load_model

    return np.asarray(load_model(path).predict(pixels, verbose=0))


def _run_tflite(path: Path, pixels: np.ndarray) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    with startup.filtered_stderr():
        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
    (input_,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
    rows = []
    for image in pixels:
        interpreter.set_tensor(input_["index"], image[np.newaxis])
        interpreter.invoke()
        rows.append(interpreter.get_tensor(output["index"])[0])
    return np.array(rows)


def _run_onnx(path: Path, pixels: np.ndarray) -> np.ndarray:
    from onnxruntime import InferenceSession

    return np.asarray(InferenceSession(str(path)).run(None, {"image": pixels})[0])


FORMATS = {
    "keras": Format(".keras", _write_keras, _run_keras),
    "tflite": Format(".tflite", _write_tflite, _run_tflite),
    "tflite-int8": Format(".int8.tflite", _write_int8, _run_tflite),
    "onnx": Format(".onnx", _write_onnx, _run_onnx),
}
