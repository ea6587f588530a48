"""The time of a request, against MLflow's Keras flavor and a model that does nothing."""

import contextlib
import io
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import tensorflow as tf
from PIL import Image
from tests.conftest import serving

from benchmarks import servers
from benchmarks.measure import Row, in_turns, temporary_store
from benchmarks.servers import log_untrained, make_client, make_request
from signdigits.config import DataParameters
from signdigits.data import loading
from signdigits.model import architecture
from signdigits.packaging import package
from signdigits.tracking import runs

ROUNDS, EACH = 20, 10  # several in a row: a server finds its own code and weights in the caches
MANY = 64
LARGE, LARGE_ROUNDS = (4000, 3000), 7  # the photograph of a telephone
NOTHING = str(Path(__file__).with_name("nothing.py"))


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    network = architecture.build_network(loaded.image_shape, loaded.n_classes)
    pixels = tf.constant(loaded.training.x[:1].astype(np.float32))
    forward = tf.function(lambda x: tf.nn.softmax(network(x, training=False)))
    small = [servers.read_photograph(loaded, i) for i in range(MANY)]
    large = [enlarge(content) for content in small]
    with temporary_store("serving") as folder, contextlib.ExitStack() as stack:
        urls = {
            name: stack.enter_context(serving(uri, Path(folder, f"{name}.log")))
            for name, uri in log_models(network, loaded).items()
        }
        ask = {
            "ours": make_client(urls["ours"], make_request(small[0])),
            "stock": make_client(urls["stock"], {"instances": loaded.training.x[:1].tolist()}),
            "nothing": make_client(urls["nothing"], make_request(small[0])),
            "forward": lambda: forward(pixels).numpy(),
        }
        seconds = in_turns(ask, ROUNDS, EACH)
        several = []
        for what, contents, rounds, each, target in (
            (f"{MANY} photographs in one request", small, ROUNDS, EACH, 6.0),
            (f"{MANY} JPEGs of 12 megapixels in one request", large, LARGE_ROUNDS, 1, 1.8),
        ):
            clients = {
                "many": make_client(urls["ours"], make_request(*contents)),
                "one": make_client(urls["ours"], make_request(contents[0])),
            }
            taken = in_turns(clients, rounds, each)
            detail = f"{MANY / taken['many']:.1f} against {1 / taken['one']:.1f} photographs a second"
            several.append(Row(what, "one at a time", MANY * taken["one"] / taken["many"], target, True, detail))
    text = {name: f"{value * 1000:.1f} ms" for name, value in seconds.items()}
    return [
        Row(
            "one photograph, median", "MLflow's Keras flavor, pixels as JSON", seconds["stock"] / seconds["ours"], 12,
            True, f"{text['ours']} against {text['stock']}",
        ),
        Row(
            "one photograph, median", "a model that does nothing + one forward pass",
            seconds["ours"] / (seconds["nothing"] + seconds["forward"]), 1.5, False,
            f"{text['ours']} against {text['nothing']} + {text['forward']}",
        ),
        *several,
    ]  # fmt: skip


def log_models(network: Any, loaded: loading.Data) -> dict[str, str]:
    """Log the three models, and return their URIs."""
    with runs.start_run("train", "train"):
        stock = mlflow.tensorflow.log_model(network, name="stock", input_example=loaded.training.x[:1]).model_uri
        nothing = mlflow.pyfunc.log_model(
            name="nothing", python_model=NOTHING, signature=package.SIGNATURE, pip_requirements=["mlflow"]
        ).model_uri
    return {"ours": log_untrained(loaded).model_uri, "stock": stock, "nothing": nothing}


def enlarge(content: bytes) -> bytes:
    """Return the same photograph as a JPEG of 12 megapixels."""
    with Image.open(io.BytesIO(content)) as small, io.BytesIO() as file:
        small.convert("RGB").resize(LARGE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        return file.getvalue()
