"""Score photographs in chunks: in threads of this process, or in worker processes that Ray starts."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.types.schema import DataType

from signdigits import startup
from signdigits.config import PredictParameters
from signdigits.data import images
from signdigits.data.names import locate, suggest_file
from signdigits.errors import DataError, SignDigitsError, UsageError, escape_undecodable
from signdigits.packaging import prediction_log
from signdigits.ray_cluster import connect_ray, is_distributed

BATCH_SIZE = 32  # photographs that one thread holds in memory
MAX_RETRIES = 3  # retries of a chunk whose worker died
DTYPES = {DataType.string: "str", DataType.double: "float64", DataType.boolean: "boolean"}  # each with missing values


@dataclass(frozen=True)
class Chunk:
    """Photographs whose rows form one part file."""

    number: int
    folder: str  # the paths are relative to it
    paths: tuple[str, ...]


class Scorer:
    """A model, loaded as its endpoint does but without the prediction log, that scores photographs."""

    n_folds = 0  # models of folds; 0: one model

    def __init__(self, model_uri: str) -> None:
        with startup.filtered_stderr(), prediction_log.disable_log():
            self.served = mlflow.pyfunc.load_model(model_uri)
        self.class_names: list[str] = self.served.unwrap_python_model().class_names
        self.dtypes = {"path": "str"}  # of the columns of a table
        for field in self.served.metadata.signature.outputs.inputs:
            if field.name == "probabilities":
                self.dtypes |= {f"p({name})": "float64" for name in self.class_names}
            elif field.required:
                self.dtypes[field.name] = DTYPES[field.type]
        self.dtypes["reason"] = "str"

    def score(self, chunk: Chunk) -> pd.DataFrame:
        """Return a row per photograph, as `score_photographs` does.

        Raises DataError if the folder is missing, which would make all its photographs unreadable.
        """
        folder = Path(chunk.folder)
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder on host {os.uname().nodename}; every worker needs it at the same path"
            )
        return self.score_photographs(chunk.paths, lambda path: read_photograph(locate(folder, path)))

    def score_photographs(self, paths: Sequence[str], read: Callable[[str], bytes | str]) -> pd.DataFrame:
        """Return a row per path: path, the fields of the reply, with `p(CLASS)` of each class, and reason if it is unreadable.

        `read` returns a photograph's bytes, or the reason for which it is unreadable.
        """
        rows: list[dict[str, Any]] = []
        for start in range(0, len(paths), BATCH_SIZE):
            batch = paths[start : start + BATCH_SIZE]
            rows += map(_make_row, batch, self.predict([read(path) for path in batch]))
        return pd.DataFrame(rows, columns=list(self.dtypes)).astype(self.dtypes)

    def predict(self, contents: Sequence[bytes | str]) -> list[dict[str, Any] | str]:
        """Return the prediction of each photograph, or the reason for which it is unreadable."""
        readable = [content for content in contents if isinstance(content, bytes)]
        predictions = iter(self._predict_readable(readable) if readable else [])
        return [next(predictions) if isinstance(content, bytes) else content for content in contents]

    def explain(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        """Return the occlusion map of each readable photograph."""
        reply = self.served.predict(pd.DataFrame({"image": contents}), params={"explain": True})
        return [np.array(explanation) for explanation in reply["explanation"]]

    def _predict_readable(self, contents: list[bytes]) -> list[dict[str, Any] | str]:
        """Predict; if the model rejects the table for a bad row, predict its halves, down to that row."""
        try:
            predictions: list[dict[str, Any] | str] = self.served.predict(pd.DataFrame({"image": contents})).to_dict(
                "records"
            )
            return predictions
        except MlflowException as error:
            if len(contents) == 1:
                return [error.message.removeprefix("row 0: ")]
            half = len(contents) // 2
            return self._predict_readable(contents[:half]) + self._predict_readable(contents[half:])


class FoldScorer(Scorer):
    """Scores each photograph of a data set with a model that was not trained on it, and others as `Scorer` does."""

    def __init__(self, model_uri: str, folds: Mapping[str, Scorer]) -> None:
        super().__init__(model_uri)
        self.folds = folds  # by path
        self.n_folds = len({id(scorer) for scorer in folds.values()})

    def score_photographs(self, paths: Sequence[str], read: Callable[[str], bytes | str]) -> pd.DataFrame:
        tables = []
        for scorer in {id(self.folds.get(path)): self.folds.get(path) for path in paths}.values():
            own = [path for path in paths if self.folds.get(path) is scorer]
            score = scorer.score_photographs if scorer else super().score_photographs
            tables.append(score(own, read).set_axis([paths.index(path) for path in own]))
        return pd.concat(tables).sort_index()


def read_photograph(path: Path) -> bytes | str:
    """Return the content of a file, or the reason for which it is unreadable."""
    try:
        if path.exists() and not path.is_file():
            return "cannot be read (not a file)"
        content = images.read_file(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        suggestion = suggest_file(path) if isinstance(error, FileNotFoundError) else ""
        return f"cannot be read ({getattr(error, 'strerror', None) or error}{suggestion})"
    return content or "empty"


def _make_row(path: str, prediction: dict[str, Any] | str) -> dict[str, Any]:
    escaped = escape_undecodable(path)
    if isinstance(prediction, str):
        return {"path": escaped, "reason": prediction}
    probabilities = {f"p({name})": value for name, value in prediction["probabilities"].items()}
    return {"path": escaped, **prediction, **probabilities}


def score_chunks(
    model_folder: Path, chunks: Sequence[Chunk], parameters: PredictParameters
) -> Iterator[tuple[Chunk, pd.DataFrame]]:
    """Yield each chunk with its rows, in any order. Raises UsageError if the workers cannot be started, or keep dying."""
    if is_distributed(parameters):
        with connect_ray(parameters, cpus=1):
            yield from _score_on_workers(model_folder, chunks, parameters.workers)
    else:
        yield from _score_in_threads(model_folder, chunks)


def _score_in_threads(model_folder: Path, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, pd.DataFrame]]:
    """Score in a thread per CPU; decoder and network release the GIL."""
    scorers = [Scorer(str(model_folder)) for _ in range(os.cpu_count() or 1)]
    with ThreadPoolExecutor(len(scorers)) as threads:
        try:
            rows = threads.map(lambda chunk: scorers[chunk.number % len(scorers)].score(chunk), chunks)
            yield from zip(chunks, rows, strict=True)
        finally:
            threads.shutdown(cancel_futures=True)


def _score_on_workers(
    model_folder: Path, chunks: Sequence[Chunk], workers: int
) -> Iterator[tuple[Chunk, pd.DataFrame]]:
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util import ActorPool

    paths = [path for path in model_folder.rglob("*") if path.is_file()]
    files = ray.put({path.relative_to(model_folder).as_posix(): path.read_bytes() for path in paths})
    start_worker = ray.remote(ScoringWorker).options(num_cpus=1, max_restarts=-1, max_task_retries=MAX_RETRIES).remote
    pool = ActorPool([start_worker(files) for _ in range(min(workers, len(chunks)))])
    try:
        yield from pool.map_unordered(lambda worker, chunk: worker.score.remote(chunk), chunks)
    except RayTaskError as error:
        if isinstance(error.cause, SignDigitsError):
            raise error.cause from None
        raise
    except RayError as error:
        raise UsageError(
            f"workers={workers}: they keep dying ({str(error).splitlines()[0]}); run the same command to continue, perhaps with fewer"
        ) from error


class ScoringWorker:
    """A worker process that Ray restarts when it dies. It receives the model's files, and needs no tracking store."""

    def __init__(self, files: dict[str, bytes]) -> None:
        startup.configure_mlflow()
        self.folder = tempfile.TemporaryDirectory()  # as long as the process
        for name, content in files.items():
            path = Path(self.folder.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.scorer = Scorer(self.folder.name)

    def score(self, chunk: Chunk) -> tuple[Chunk, pd.DataFrame]:
        return chunk, self.scorer.score(chunk)
