"""The model that a training starts from (transfer learning): the file of its network, and how it sees photographs."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlflow
from mlflow.models import Model

from signdigits.config import DataParameters
from signdigits.errors import ModelError, UsageError
from signdigits.tracking import registry

KERAS_SUFFIX = ".keras"


@dataclass(frozen=True)
class Start:
    """A network whose weights are the beginning of others."""

    uri: str  # models:/ID, or the path of a Keras file: the same network also after an alias was moved
    name: str  # for people
    network: Path  # the Keras file
    image_size: int
    color_mode: str
    class_names: tuple[str, ...] = ()  # those that it was trained on; empty: not known
    tags: Mapping[str, str] = field(default_factory=dict)  # of the model
    model_id: str = ""  # of MLflow

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.image_size, self.image_size, 3 if self.color_mode == "rgb" else 1

    @cached_property
    def digest(self) -> str:
        """The digest of the network's file, as 32 hexadecimal digits."""
        return hashlib.sha256(self.network.read_bytes()).hexdigest()[:32]

    def facts(self) -> dict[str, str]:
        """Return the origin as tags of a run and a model, which stay when it is deleted."""
        return {
            "start_from": self.name,
            "start_uri": self.uri,
            "start_digest": self.digest,
            **{f"start_{name}": self.tags[name] for name in ("data", "dataset_digest") if name in self.tags},
        }

    def adapt(self, parameters: DataParameters) -> DataParameters:
        """Return the parameters with this network's image size and colours.

        Raises UsageError if others were asked for.
        """
        if parameters.image_size not in (0, self.image_size):
            raise UsageError(
                f"image_size={parameters.image_size}: {self.name} reads images of {self.image_size} pixels; leave it out with "
                "start_from"
            )
        if parameters.color_mode not in (DataParameters.color_mode, self.color_mode):
            raise UsageError(f"color_mode={parameters.color_mode}: {self.name} reads {self.color_mode}; leave it out")
        return replace(parameters, start_from=self.uri, image_size=self.image_size, color_mode=self.color_mode)


def find_start(start_from: str) -> Start:
    """Return the model that `start_from` names: a URI of a model, `runs:/RUN`, or the path of a Keras file.

    Raises ModelError if there is no such model, or if it is not a network of this project.
    """
    if start_from.endswith(KERAS_SUFFIX):
        file = Path(start_from).resolve()
        image_size, color_mode = _read_input(file)
        return Start(str(file), file.name, file, image_size, color_mode)
    if not start_from.startswith(("models:/", "runs:/")):
        raise ModelError(
            f"start_from={start_from}: neither models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN, nor a file {KERAS_SUFFIX}"
        )
    run_id = start_from.removeprefix("runs:/").partition("/")[0] if start_from.startswith("runs:/") else ""
    model = registry.find_model(run_id, "" if run_id else start_from)
    folder = Path(mlflow.artifacts.download_artifacts(model.model_uri))
    try:
        network, settings = (find_artifact(folder, name) for name in ("keras", "settings"))
    except KeyError as error:
        raise ModelError(f"start_from={start_from}: not a model of this project") from error
    read = json.loads(settings.read_text())
    return Start(
        model.model_uri,
        registry.describe_model(model),
        network,
        read["image_size"],
        read["color_mode"],
        tuple(read["class_names"]),
        model.tags,
        model.model_id,
    )


def find_artifact(folder: Path, name: str) -> Path:
    """Return a file of the logged model in `folder`. Raises KeyError if it has none of this name."""
    path: str = Model.load(str(folder)).flavors["python_function"]["artifacts"][name]["path"]
    return folder / path


def _read_input(file: Path) -> tuple[int, str]:
    """Return image size and color mode of the network in a Keras file."""
    try:
        with zipfile.ZipFile(file) as archive:
            config: dict[str, Any] = json.loads(archive.read("config.json"))["config"]
        layers = [layer["config"] for layer in config["layers"] if layer["class_name"] == "InputLayer"]
        (_, height, width, channels) = layers[0]["batch_shape"]
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(f"start_from={file}: not a Keras file of a network of images ({error})") from error
    if height != width or channels not in (1, 3) or not height:
        raise ModelError(f"start_from={file}: reads {height}x{width}x{channels}, not square images in RGB or gray")
    return height, "rgb" if channels == 3 else "grayscale"
