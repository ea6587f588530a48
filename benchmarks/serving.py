"""The time of a request, against MLflow's Keras flavor and a model that does nothing."""

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import tensorflow as tf
from PIL import Image

from benchmarks.measure import Row, in_turns, temporary_store
from benchmarks.untrained import log_untrained
from signdigits.config import DataParameters
from signdigits.data import loading
from signdigits.model import architecture
from signdigits.packaging import package
from signdigits.tracking import runs

# An endpoint that is asked finds its own code and weights in the caches, not what another server's threads have left there.
ROUNDS, EACH = 20, 10
MANY = 64
TELEPHONE_SIZE, TELEPHONE_ROUNDS = (4000, 3000), 7


class Nothing(mlflow.pyfunc.PythonModel):
    """Answers without looking."""

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        answer = {"label": "0", "probability": 1.0, "probabilities": {str(digit): 0.1 for digit in range(10)}}
        return pd.DataFrame([answer] * len(model_input))


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    network = architecture.build_network((100, 100, 3), 10)
    with temporary_store("serving") as folder, contextlib.ExitStack() as servers:
        uris = log_models(network, loaded)
        ports = {name: servers.enter_context(serving(uri, Path(folder))) for name, uri in uris.items()}
        rows_of = [encode(loaded, i) for i in range(MANY)]
        pixels = loaded.training.x[:1].tolist()
        ask = {
            "ours": asker(ports["ours"], {"dataframe_records": rows_of[:1]}),
            "stock": asker(ports["stock"], {"instances": pixels}),
            "nothing": asker(ports["nothing"], {"dataframe_records": rows_of[:1]}),
            "forward": forward_pass(network, loaded),
        }
        one = in_turns(ask, ROUNDS, EACH)
        many = in_turns(
            {"many": asker(ports["ours"], {"dataframe_records": rows_of}), "one": ask["ours"]}, ROUNDS, EACH
        )
        telephone = [as_row(enlarge(read(loaded, i))) for i in range(MANY)]
        large = in_turns(
            {
                "many": asker(ports["ours"], {"dataframe_records": telephone}),
                "one": asker(ports["ours"], {"dataframe_records": telephone[:1]}),
            },
            TELEPHONE_ROUNDS,
        )
    floor = one["nothing"] + one["forward"]
    shown = {name: f"{seconds * 1000:.1f} ms" for name, seconds in one.items()}
    return [
        Row(
            "one photograph, median", "MLflow's Keras flavor, pixels as JSON", one["stock"] / one["ours"], 15, True,
            f"{shown['ours']} against {shown['stock']}; a model that does nothing: {one['stock'] / one['nothing']:.1f} times",
        ),
        Row(
            "one photograph, median", "a model that does nothing + one forward pass", one["ours"] / floor, 1.5, False,
            f"{shown['ours']} against {shown['nothing']} + {shown['forward']}",
        ),
        Row(
            f"{MANY} photographs in one request", "one at a time", MANY * many["one"] / many["many"], 6, True,
            f"{MANY / many['many']:.0f} against {1 / many['one']:.0f} photographs a second",
        ),
        Row(
            f"{MANY} JPEGs of 12 megapixels in one request", "one at a time", MANY * large["one"] / large["many"], 1.8, True,
            f"{MANY / large['many']:.1f} against {1 / large['one']:.1f} photographs a second",
        ),
    ]  # fmt: skip


def log_models(network: Any, loaded: loading.Data) -> dict[str, str]:
    """The three models, logged; their addresses."""
    ours = log_untrained(loaded, network).model_uri
    with runs.start_run("train", "train"):
        stock = mlflow.tensorflow.log_model(network, name="stock", input_example=loaded.training.x[:1]).model_uri
        nothing = mlflow.pyfunc.log_model(
            name="nothing", python_model=Nothing(), signature=package.SIGNATURE, pip_requirements=["mlflow"]
        ).model_uri
    return {"ours": ours, "stock": stock, "nothing": nothing}


def encode(loaded: loading.Data, index: int) -> dict[str, str]:
    return as_row(read(loaded, index))


def read(loaded: loading.Data, index: int) -> bytes:
    return loaded.dataset.read(loaded.dataset.photographs[loaded.split.training[index]])


def as_row(content: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(content).decode()}


def enlarge(content: bytes) -> bytes:
    """The same photograph as a telephone's JPEG, of 12 megapixels."""
    with Image.open(io.BytesIO(content)) as small, io.BytesIO() as file:
        small.convert("RGB").resize(TELEPHONE_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        return file.getvalue()


def asker(port: int, body: Any) -> Callable[[], object]:
    """A function that sends `body` and waits for the reply, over a connection that stays open."""
    connection, content = http.client.HTTPConnection("127.0.0.1", port), json.dumps(body)

    def ask() -> object:
        connection.request("POST", "/invocations", content, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        text = reply.read()
        if reply.status != 200:
            raise RuntimeError(text[:500])
        return text

    return ask


def forward_pass(network: Any, loaded: loading.Data) -> Callable[[], object]:
    forward = tf.function(lambda x: tf.nn.softmax(network(x, training=False)))
    x = tf.constant(loaded.training.x[:1].astype(np.float32))
    return lambda: forward(x).numpy()


@contextlib.contextmanager
def serving(uri: str, folder: Path) -> Iterator[int]:
    """`mlflow models serve` on a free port."""
    port = free_port()
    line = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "--port", str(port)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(line, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        while not answers(port):
            if server.poll() is not None:
                raise RuntimeError((folder / "server.log").read_text()[-2000:])
            time.sleep(0.2)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int, target: str = "/ping") -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{target}", timeout=5):
            return True
    except OSError:
        return False
