"""Write the network of a registered version as a file for use without MLflow, and compare it with the served answers.

python -m signdigits export --format tflite
mlflow run . -e export -P format=onnx -P model_uri=models:/sign-digits/3
"""

import base64
import logging
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
import numpy as np
from mlflow.entities import LoggedModel
from mlflow.models import Model

from signdigits.batch.scoring import Scorer
from signdigits.config import ExportParameters, SourceParameters
from signdigits.data import split
from signdigits.data.dataset import Dataset, scan_dataset
from signdigits.errors import DataError, DownloadError, ModelError, UsageError
from signdigits.model import architecture
from signdigits.packaging import formats
from signdigits.tracking import registry, runs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportComparison:
    """The probabilities of an exported network beside the served ones."""

    images: int
    largest_difference: float  # of a probability
    equal_labels: float  # fraction

    @classmethod
    def of(cls, served: np.ndarray, exported: np.ndarray) -> "ExportComparison":
        """Compare two arrays of shape (images, classes)."""
        equal = served.argmax(axis=1) == exported.argmax(axis=1)
        return cls(len(served), float(np.abs(served - exported).max()), float(equal.mean()))


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
    formats.check_installed(parameters.format)
    model = registry.find_model("", parameters.model_uri)
    folder = Path(mlflow.artifacts.download_artifacts(model.model_uri))
    photographs = _select_photographs(model, folder, parameters)
    version, output = registry.version_of(model), Path(parameters.output)
    target = output / f"network-{version}{formats.FORMATS[parameters.format].suffix}"
    tags = {"model_id": model.model_id, "model_version": version}
    with runs.start_run("export", f"export version {version} as {parameters.format}", tags=tags):
        runs.log_params(asdict(parameters))
        try:
            output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as workshop:
                file = Path(workshop, target.name)
                comparison = _write_network(folder, file, photographs, parameters.format)
                file.replace(target)
            shutil.copy(_find_artifact(folder, "settings"), output / f"network-{version}.json")
        except OSError as error:
            raise UsageError(f"output={output}: {error.strerror}; choose a folder that can be written") from error
        _log_export(target, comparison, photographs)
    return comparison


def _select_photographs(model: LoggedModel, folder: Path, parameters: ExportParameters) -> Photographs:
    """Return the model's test images and some of its training images, else, if they are not at hand, its input example."""
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
    evenly = np.linspace(0, len(parts.training) - 1, formats.MAX_CALIBRATION_IMAGES).round().astype(int)
    training = parts.training[np.unique(evenly)]
    return Photographs("test images", _read_all(dataset, parts.testing), _read_all(dataset, training))


def _read_all(dataset: Dataset, indices: np.ndarray) -> list[bytes]:
    return [dataset.read(dataset.photographs[index]) for index in indices.tolist()]


def _write_network(folder: Path, file: Path, photographs: Photographs, format: str) -> ExportComparison:
    """Write the network of the logged model in `folder`, and compare what was written with the served answers."""
    from keras.saving import load_model

    scorer = Scorer(str(folder))
    served = scorer.served.unwrap_python_model()

    def decode(contents: list[bytes]) -> np.ndarray:
        pixels = [served.images.decode_image(content, served.image_size, served.color_mode) for content in contents]
        return np.array(pixels, np.float32)

    network = architecture.with_probabilities(
        load_model(_find_artifact(folder, "keras"), compile=False), served.temperature
    )
    written = formats.FORMATS[format]
    written.write(network, file, decode(photographs.training))
    names = [str(number) for number in range(len(photographs.compared))]
    table = scorer.score_photographs(names, lambda name: photographs.compared[int(name)])
    probabilities = table[[f"p({name})" for name in scorer.class_names]].to_numpy(float)
    return ExportComparison.of(probabilities, written.run(file, decode(photographs.compared)))


def _find_artifact(folder: Path, name: str) -> Path:
    """Return a file of the logged model in `folder`. Raises ModelError if it has none of that name."""
    artifacts = Model.load(str(folder)).flavors["python_function"].get("artifacts", {})
    if name not in artifacts:
        raise ModelError(f"the model was logged without its artifact {name}; train it again")
    return folder / artifacts[name]["path"]


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
