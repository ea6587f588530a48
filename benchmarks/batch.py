"""Throughput of a batch prediction, decoding and writing included, against a bare loop over the same files."""

import itertools
import time
from pathlib import Path

import mlflow
import numpy as np
from ai_edge_litert.interpreter import Interpreter

from benchmarks.measure import Row, in_turns, temporary_store
from benchmarks.untrained import log_untrained
from signdigits import predict
from signdigits.batch import inputs
from signdigits.batch.inputs import BatchInput
from signdigits.batch.output import BatchJob, lock_output
from signdigits.config import DataParameters, PredictParameters
from signdigits.data import images, loading
from signdigits.tracking import registry

ROUNDS = 5
ENOUGH = 2000  # photographs of a round, so that what a start costs is not what is measured


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    with temporary_store("batch") as folder:
        info = log_untrained(loaded)
        found = inputs.find_inputs(str(loaded.dataset.folder), Path(folder, "tables"))
        found = BatchInput(found.name, found.folder, found.paths[:ENOUGH])
        parameters = PredictParameters(images=str(found.folder), output=folder, model_uri=info.model_uri)
        network = Path(mlflow.artifacts.download_artifacts(info.model_uri), "artifacts", "network.tflite")
        rounds = itertools.count()
        ways = {
            "bare": lambda: bare_loop(network, found),
            "ours": lambda: into_tables(found, parameters, Path(folder, f"tables{next(rounds)}")),
        }
        seconds = in_turns(ways, ROUNDS)
        began = time.perf_counter()
        predict.predict(PredictParameters(images=str(found.folder), output=f"{folder}/whole", model_uri=info.model_uri))
        whole = time.perf_counter() - began
    each = {name: len(found.paths) / taken for name, taken in seconds.items()}
    return [
        Row(
            "photographs a second of a prediction", "a loop that decodes and runs LiteRT", each["ours"] / each["bare"],
            0.8, True, f"{each['ours']:.0f} against {each['bare']:.0f} a second; all of `predict`, its run in MLflow "
            f"included, on {len(found.paths):,}: {whole:.1f} s",
        )
    ]  # fmt: skip


def bare_loop(network: Path, found: BatchInput) -> list[np.ndarray]:
    interpreter = Interpreter(str(network), num_threads=1)
    interpreter.allocate_tensors()
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    answers = []
    for path in found.paths:
        array = images.decode_image((found.folder / path).read_bytes(), 100, "rgb")
        interpreter.set_tensor(taken["index"], array[np.newaxis].astype(np.float32))
        interpreter.invoke()
        answers.append(interpreter.get_tensor(given["index"])[0])
    return answers


def into_tables(found: BatchInput, parameters: PredictParameters, target: Path) -> None:
    """All that grows with the number of photographs: reading, answering, part files, tables."""
    served = registry.find_model("", parameters.model_uri)
    job = BatchJob(served.model_id, "1", parameters.images, found.digest, len(found.paths))
    with lock_output(target, job) as output:
        chunks = predict.split_into_chunks(found)
        predict.score_missing(output, chunks, served, parameters)
        output.write_tables(len(chunks))
