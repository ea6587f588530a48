"""The throughput of a batch prediction, decoding and writing included, against a bare loop over the same files."""

import itertools
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from ai_edge_litert.interpreter import Interpreter

from benchmarks.measure import Row, in_turns, temporary_store
from benchmarks.servers import log_untrained
from signdigits import predict
from signdigits.config import DataParameters, PredictParameters
from signdigits.data import images, loading

ROUNDS = 5
COUNT = 1000  # photographs: the second thousand costs what a thousand more cost, without the start of a command


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    paths = [loaded.dataset.folder / photograph.path for photograph in loaded.dataset.photographs[: 2 * COUNT]]
    outputs = itertools.count()
    with temporary_store("batch") as folder:
        uri = log_untrained(loaded).model_uri
        network = Path(mlflow.artifacts.download_artifacts(uri), "artifacts", "network.tflite")

        def predict_first(count: int) -> None:
            table = Path(folder, f"{count}.csv")
            pd.DataFrame({"path": paths[:count]}).to_csv(table, index=False)
            output = f"{folder}/output-{next(outputs)}"
            predict.predict(PredictParameters(images=str(table), output=output, model_uri=uri))

        ways = {
            "bare": lambda: run_bare_loop(network, paths[:COUNT]),
            "half": lambda: predict_first(COUNT),
            "all": lambda: predict_first(2 * COUNT),
        }
        seconds = in_turns(ways, ROUNDS)
    ours, bare = COUNT / (seconds["all"] - seconds["half"]), COUNT / seconds["bare"]
    detail = f"{ours:.0f} against {bare:.0f} a second; `predict` of {2 * COUNT:,}: {seconds['all']:.1f} s"
    return [Row("photographs a second", "a loop that decodes and runs LiteRT", ours / bare, 0.8, True, detail)]


def run_bare_loop(network: Path, paths: list[Path]) -> list[np.ndarray]:
    interpreter = Interpreter(str(network), num_threads=1)
    interpreter.allocate_tensors()
    (inputs,), (outputs,) = interpreter.get_input_details(), interpreter.get_output_details()
    predictions = []
    for path in paths:
        array = images.decode_image(path.read_bytes(), 100, "rgb")
        interpreter.set_tensor(inputs["index"], array[np.newaxis].astype(np.float32))
        interpreter.invoke()
        predictions.append(interpreter.get_tensor(outputs["index"])[0])
    return predictions
