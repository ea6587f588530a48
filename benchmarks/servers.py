"""Models and requests to measure servers with."""

import base64
import http.client
import json
from collections.abc import Callable
from typing import Any

import mlflow
from mlflow.models.model import ModelInfo
from tests.load import JSON

from signdigits.config import MODEL_NAME, Hyperparameters
from signdigits.data import loading
from signdigits.model import training
from signdigits.packaging import package
from signdigits.tracking import runs


def log_untrained(loaded: loading.Data) -> ModelInfo:
    """Log the notebook's network with its initial weights, for measurements of speed."""
    with runs.start_run("train", "train"):
        network = training.new_network(loaded, loaded.training, Hyperparameters())
        fitted = training.Fit(network, {}, Hyperparameters())
        calibration = training.calibrate_network(fitted, loaded.training, loaded.validation)
        return package.log_model(network, calibration, loaded, {})


def register_versions(loaded: loading.Data) -> None:
    """Register two versions of an untrained network, the first of them the champion."""
    for _ in range(2):
        mlflow.register_model(log_untrained(loaded).model_uri, MODEL_NAME)
    promote(1)


def promote(version: int, alias: str = "champion") -> None:
    mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, alias, str(version))


def read_photograph(loaded: loading.Data, index: int) -> bytes:
    """Return the file of a training photograph."""
    return loaded.dataset.read(loaded.dataset.photographs[loaded.split.training[index]])


def make_request(*photographs: bytes) -> dict[str, Any]:
    return {"dataframe_records": [{"image": base64.b64encode(content).decode()} for content in photographs]}


def make_client(url: str, request: dict[str, Any]) -> Callable[[], object]:
    """Return a function that sends `request` and waits for the reply, over one connection."""
    connection, body = http.client.HTTPConnection(url.removeprefix("http://")), json.dumps(request)

    def ask() -> object:
        connection.request("POST", "/invocations", body, JSON)
        reply = connection.getresponse()
        content = reply.read()
        if reply.status != 200:
            raise RuntimeError(content[:500])
        return content

    return ask
