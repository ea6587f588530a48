"""Write the network of a registered version as a file for use without MLflow, and compare it with the served predictions.

python -m signdigits export --format tflite
mlflow run . -e export -P format=onnx -P model_uri=models:/sign-digits/3

A file holds the preprocessing of the network itself (scale, standardization) and the temperature. Its input is float32 of shape
(n, image_size, image_size, channels), as data/images.py decodes it; its output is float32 of shape (n, classes), calibrated
probabilities.
"""

import base64
import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
from mlflow.entities import LoggedModel
from mlflow.models import Model

from signdigits import startup
from signdigits.batch.scoring import Scorer
from signdigits.config import ExportParameters, SourceParameters
from signdigits.data import split
from signdigits.data.dataset import scan_dataset
from signdigits.data.start import find_artifact
from signdigits.errors import DataError, DownloadError, ModelError, UsageError, install_hint
from signdigits.model import architecture
from signdigits.tracking import registry, runs

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

SUFFIXES = {"keras": ".keras", "tflite": ".tflite", "tflite-int8": ".int8.tflite", "onnx": ".onnx"}
MAX_CALIBRATION_IMAGES = 200  # for the ranges of int8; TensorFlow's guide to quantization takes 100 to 500


@dataclass(frozen=True)
class ExportComparison:
    """The probabilities of an exported network beside the served ones."""

    images: int
    largest_difference: float  # largest difference of a probability
    equal_labels: float  # fraction


@dataclass(frozen=True)
class Photographs:
    """The contents of image files: those to compare on, by their name in messages, and those to quantize with."""

    name: str
    compared: list[bytes]
    training: list[bytes]


def export(parameters: ExportParameters) -> ExportComparison:
    """Write, compare and log the file, in a run of its own.

    Raises ModelError if there is no such model, or if a package is missing; DataError or ModelError if `data` is given, or
    needed for int8, and is not what the model was trained on; UsageError if the folder cannot be written.
    """
    if parameters.format == "onnx" and not (
        importlib.util.find_spec("tf2onnx") and importlib.util.find_spec("onnxruntime")
    ):
        raise ModelError(f"format=onnx: needs tf2onnx and onnxruntime; {install_hint('export')}")
    model = registry.find_model("", parameters.model_uri)
    folder = Path(mlflow.artifacts.download_artifacts(model.model_uri))
    photographs = _select_photographs(model, folder, parameters)
    version, output = registry.version_of(model), Path(parameters.output)
    target = output / f"network-{version}{SUFFIXES[parameters.format]}"
    tags = {"model_id": model.model_id, "model_version": version}
    with runs.start_run("export", f"export version {version} as {parameters.format}", tags=tags):
        runs.log_params(asdict(parameters))
        try:
            output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as workshop:
                file = Path(workshop, target.name)
                comparison = _export_network(folder, file, photographs, parameters.format)
                file.replace(target)
            shutil.copy(find_artifact(folder, "settings"), output / f"network-{version}.json")
        except OSError as error:
            raise UsageError(f"output={output}: {error.strerror}; choose a folder that can be written") from error
        _log_export(target, comparison, photographs)
    return comparison


def _select_photographs(model: LoggedModel, folder: Path, parameters: ExportParameters) -> Photographs:
    """Return the model's test images and some of its training images, or its input example if they are missing."""
    data = parameters.data or model.tags.get("data", "")
    try:
        dataset = scan_dataset(SourceParameters(data=data, skip_unreadable=True))
        parts = split.repeat_split(dataset, data, model.tags)
    except (DataError, DownloadError, ModelError) as error:
        if parameters.data or parameters.format == "tflite-int8":  # its ranges are those of training images
            raise
        log.warning("%s; comparing on the model's input example only", error)
        (text,) = Model.load(str(folder)).load_input_example(str(folder))["image"]
        return Photographs("input example", [base64.b64decode(text)], [])
    evenly = np.linspace(0, len(parts.training) - 1, MAX_CALIBRATION_IMAGES).round().astype(int)
    compared, training = (
        [dataset.read(dataset.photographs[index]) for index in indices]
        for indices in (parts.testing, parts.training[np.unique(evenly)])
    )
    return Photographs("test images", compared, training)


def _export_network(folder: Path, file: Path, photographs: Photographs, format: str) -> ExportComparison:
    """Write the network of the logged model in `folder`, and compare what was written with the served predictions."""
    from keras.saving import load_model

    scorer = Scorer(str(folder))
    served = scorer.served.unwrap_python_model()

    def decode(contents: list[bytes]) -> np.ndarray:
        pixels = [served.images.decode_image(content, served.image_size, served.color_mode) for content in contents]
        return np.array(pixels, np.float32)

    network = load_model(find_artifact(folder, "keras"), compile=False)
    write_network(
        architecture.with_probabilities(network, served.temperature), file, format, decode(photographs.training)
    )
    names = [str(number) for number in range(len(photographs.compared))]
    table = scorer.score_photographs(names, lambda name: photographs.compared[int(name)])
    expected = table[[f"p({name})" for name in scorer.class_names]].to_numpy(float)
    exported = run_network(file, decode(photographs.compared))
    equal = expected.argmax(axis=1) == exported.argmax(axis=1)
    return ExportComparison(len(names), float(np.abs(expected - exported).max()), float(equal.mean()))


def write_network(network: "keras.Model", file: Path, format: str, training_images: np.ndarray) -> None:
    """Write a network. `tflite-int8` has 8-bit integers (Jacob et al., 2018, arXiv:1712.05877); input and output stay float32."""
    import keras
    from tensorflow import lite

    def representative_dataset() -> Iterator[list[np.ndarray]]:
        yield from ([image[np.newaxis]] for image in training_images)

    if format == "keras":
        network.save(file)
        return
    options: dict[str, Any] = {"format": "litert"}
    if format == "tflite-int8":
        options["optimizations"] = [lite.Optimize.DEFAULT]
        options["representative_dataset"] = representative_dataset
        options["target_spec"] = {"supported_ops": [lite.OpsSet.TFLITE_BUILTINS_INT8]}
    elif format == "onnx":
        signature = keras.InputSpec(shape=network.input_shape, dtype="float32", name="image")
        options = {"format": "onnx", "input_signature": [signature]}
    with startup.filtered_stderr(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Keras patches tf2onnx for numpy 2
        network.export(file, verbose=False, **options)


def run_network(file: Path, pixels: np.ndarray) -> np.ndarray:
    """Return the probabilities that an exported network computes."""
    if file.suffix == ".keras":
        from keras.saving import load_model

        return np.asarray(load_model(file).predict(pixels, verbose=0))
    if file.suffix == ".onnx":
        from onnxruntime import InferenceSession

        return np.asarray(InferenceSession(str(file)).run(None, {"image": pixels})[0])
    from ai_edge_litert.interpreter import Interpreter

    with startup.filtered_stderr():
        interpreter = Interpreter(str(file), num_threads=1)
        interpreter.allocate_tensors()
    (input_,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
    rows = []
    for image in pixels:
        interpreter.set_tensor(input_["index"], image[np.newaxis])
        interpreter.invoke()
        rows.append(interpreter.get_tensor(output["index"])[0])
    return np.array(rows)


def _log_export(target: Path, comparison: ExportComparison, photographs: Photographs) -> None:
    size = target.stat().st_size
    mlflow.log_artifact(str(target))
    mlflow.log_metrics({**asdict(comparison), "bytes": size})
    outcome = (
        f"largest difference of a probability {comparison.largest_difference:.2g}, {comparison.equal_labels:.2%} equal labels, "
        f"on {comparison.images} {photographs.name}"
    )
    runs.set_description(f"`{target.name}`, {size:,} bytes: {outcome}, against the served model.")
    log.info("%s, %s bytes: %s", target, f"{size:,}", outcome)
