"""Package a trained network as an MLflow model that `mlflow models serve` can serve."""

import base64
import importlib.metadata
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import mlflow.pyfunc
import pandas as pd
from mlflow.entities import LoggedModel
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types.schema import Array, ColSpec, DataType, Map, ParamSchema, ParamSpec, Schema
from PIL import Image

from signdigits import startup
from signdigits.data import images, lineage
from signdigits.data.loading import Data
from signdigits.data.sources import HANDWRITTEN_DIGITS
from signdigits.data.start import find_artifact
from signdigits.errors import ModelError
from signdigits.model import architecture, outliers
from signdigits.model.calibration import Calibration
from signdigits.packaging import prediction_log, reply

if TYPE_CHECKING:
    import keras

# The imports of the served model; the model pins the installed versions.
REQUIREMENTS = (
    "mlflow",
    "ai-edge-litert",
    "numpy",
    "pandas",
    "pillow",
    "pillow-heif",
    "uvloop",
    "httptools",
    "threadpoolctl",
)

EXAMPLES = "examples"  # folder of a model's files; tag with their number

TYPES = {
    str: DataType.string,
    float: DataType.double,
    bool: DataType.boolean,
    dict[str, float]: Map(DataType.double),
    list[list[float]]: Array(Array(DataType.double)),
}
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "image")]),
    outputs=Schema([ColSpec(TYPES[field.type], field.name, required=field.is_required) for field in reply.FIELDS]),
    params=ParamSchema([ParamSpec("explain", DataType.boolean, False)]),
)


def log_model(
    network: "keras.Model",
    calibration: Calibration,
    data: Data,
    facts: Mapping[str, Any],
    examples: Mapping[int, bytes] | None = None,
) -> ModelInfo:
    """Log the network to the active run as a model that takes encoded photographs.

    The model is code (pyfunc_model.py) with the network, the decoder (images.py), the outlier detector (outliers.py), the
    prediction log (prediction_log.py) and the settings as artifacts: nothing is pickled. It predicts with the network in
    LiteRT's format; the Keras file beside it is for further training. The logits are divided by the temperature of
    `calibration`. `facts` become tags of the model and its version. `examples` are JPEG files by label, which the page shows.

    Raises ModelError, and deletes the model, if it cannot be loaded or does not answer its input example.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_files(network, calibration, data, Path(folder))
        write_examples(examples or {}, Path(folder))
        info = log_files(Path(folder), data, {"temperature": calibration.temperature, **facts})
    try:
        _check_answer(info)
    except Exception as error:  # of MLflow, LiteRT or the model
        mlflow.MlflowClient().delete_logged_model(info.model_id)
        raise ModelError(
            f"model {info.model_id}: cannot be loaded, or does not answer its input example ({error}); check the environment"
        ) from error
    return info


def _check_answer(info: ModelInfo) -> None:
    """Load a logged model as its endpoint does, and raise an error unless it answers its input example."""
    with startup.filtered_stderr(), prediction_log.disable_log():
        served = mlflow.pyfunc.load_model(info.model_uri)
        (row,) = served.predict(served.input_example).to_dict("records")
    if problem := reply.find_problem(row):
        raise ValueError(problem)


def write_files(network: "keras.Model", calibration: Calibration, data: Data, folder: Path) -> None:
    """Write the files of the model that depend on its training: the network in both formats, the detector, the settings."""
    network.save(folder / "network.keras", include_optimizer=False)
    with startup.filtered_stderr():
        architecture.with_features(network).export(folder / "network.tflite", format="litert", verbose=False)
    calibration.detector.save(folder / "detector.npz")
    settings = {
        "class_names": data.dataset.class_names,
        "image_size": data.image_size,
        "color_mode": data.parameters.color_mode,
        "temperature": calibration.temperature,
        "logged_fields": reply.LOGGED,
        "handwriting": data.dataset.origin == HANDWRITTEN_DIGITS,  # no hands: for the words of the page
    }
    (folder / "settings.json").write_text(json.dumps(settings))


def write_examples(examples: Mapping[int, bytes], folder: Path) -> None:
    """Write JPEG files by label beside those of `write_files`, named by the label, because any text may be a class name."""
    if examples:
        (folder / EXAMPLES).mkdir()
    for label, content in examples.items():
        (folder / EXAMPLES / f"{label}.jpeg").write_bytes(content)


def log_files(folder: Path, data: Data, facts: Mapping[str, Any]) -> ModelInfo:
    """Log a model with the files of `write_files` to the active run; `facts` become its tags."""
    active = mlflow.active_run()
    assert active is not None
    info = mlflow.pyfunc.log_model(name="model", **_describe_model(folder, data))
    commit = mlflow.get_run(active.info.run_id).data.tags.get("mlflow.source.git.commit", "unknown")
    tags = lineage.data_tags(data.dataset, data.split) | {"git_commit": commit, "data": data.parameters.data}
    tags |= data.start.facts() if data.start else {}
    mlflow.set_logged_model_tags(info.model_id, {name: str(value) for name, value in {**tags, **facts}.items()})
    return info


def save_model(network: "keras.Model", calibration: Calibration, data: Data, folder: Path) -> None:
    """Save a model as `log_model` logs it to `folder`, for this job only."""
    with tempfile.TemporaryDirectory() as place:
        write_files(network, calibration, data, Path(place))
        mlflow.pyfunc.save_model(folder, **_describe_model(Path(place), data))


def _describe_model(folder: Path, data: Data) -> dict[str, Any]:
    """Return what MLflow needs to know of a model with the files of `write_files` in `folder`."""
    examples = {EXAMPLES: str(folder / EXAMPLES)} if (folder / EXAMPLES).exists() else {}
    return {
        "python_model": str(Path(__file__).with_name("pyfunc_model.py")),
        "artifacts": {
            "network": str(folder / "network.tflite"),
            "keras": str(folder / "network.keras"),
            "settings": str(folder / "settings.json"),
            "detector": str(folder / "detector.npz"),
            "images": images.__file__,
            "outliers": outliers.__file__,
            "prediction_log": prediction_log.__file__,
            **examples,
        },
        "signature": SIGNATURE,
        "input_example": make_input_example(data),
        "pip_requirements": [f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS],
    }


def read_model(model: LoggedModel) -> tuple["keras.Model", Calibration]:
    """Return the network and the calibration of a model that `log_model` logged."""
    from keras.saving import load_model

    folder = Path(mlflow.artifacts.download_artifacts(model.model_uri))
    network = load_model(find_artifact(folder, "keras"), compile=False)
    detector = outliers.Detector.load(find_artifact(folder, "detector"))
    return network, Calibration(float(model.tags["temperature"]), detector)


def make_input_example(data: Data) -> pd.DataFrame:
    """Return a training photograph as a request of the endpoint: a column `image` of base64 text."""
    first = data.dataset.photographs[data.split.training[0]]
    array = images.decode_image(data.dataset.read(first), data.image_size, "rgb")
    jpeg = io.BytesIO()
    Image.fromarray(array).save(jpeg, "JPEG")
    return pd.DataFrame({"image": [base64.b64encode(jpeg.getvalue()).decode()]})
