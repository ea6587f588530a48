"""The versions that a process serves: the live one, a shadow, and the switch to others.

The server's parent process looks at the registry and writes a file per version to serve, `live` and `shadow`; each process
that answers requests watches these files, loads what they name, and switches between two requests.
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Self

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PyFuncModel, scoring_server

from signdigits import startup
from signdigits.errors import SignDigitsError
from signdigits.files import atomic_file
from signdigits.packaging import prediction_log
from signdigits.serving import metrics
from signdigits.serving.shadow import Shadow

log = logging.getLogger(__name__)

INPUT_EXAMPLE = "serving_input_example.json"  # MLflow's name of the file in a model
SETTINGS = Path("artifacts", "settings.json")  # of a model's folder
LIVE, SHADOW, PROCESSES = "live", "shadow", "processes"  # in the server's folder
WATCH_INTERVAL = 0.1  # seconds between two looks at the files
HEALTH_INTERVAL = 2.0  # seconds for which an answer to the input example proves health


class VersionFailed(SignDigitsError):
    """A version cannot be served; the message gives the reason. `may_pass`: a retry may succeed."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


@dataclass(frozen=True)
class Publication:
    """A version that every process is to serve: the model's copy on this machine, and what the registry knows of it."""

    name: str
    version: str
    alias: str
    folder: str
    since: str  # when it went live: ISO 8601
    test_accuracy: str

    def write(self, file: Path) -> None:
        with atomic_file(file) as partial_file:
            partial_file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> Self | None:
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None


@dataclass
class Invocation:
    """A request, for the model: its id, and an event that is set when the reply is no longer needed."""

    id: str
    served: "Version"
    is_logged: bool = True
    cancelled: threading.Event = field(default_factory=threading.Event)
    problem: str = ""  # the message of the reply, if the model refuses the request


INVOCATION = ContextVar[Invocation]("invocation")


class Version:
    """A version in memory. Raises VersionFailed unless it loads and answers its own input example."""

    def __init__(self, publication: Publication) -> None:
        self.publication, self.folder = publication, Path(publication.folder)
        os.environ[prediction_log.VERSION] = publication.version  # a model does not know its own version
        try:
            with startup.filtered_stderr():
                self.model: PyFuncModel = mlflow.pyfunc.load_model(publication.folder)
        except Exception as error:
            raise VersionFailed(f"it does not load ({type(error).__name__}: {error})", may_pass=True) from error
        self.python_model: Any = self.model.unwrap_python_model()
        # Where a model of this project looks for its request.
        self.request = getattr(self.python_model, "request", ContextVar[Any]("request"))
        self.example = read_example(self.folder)
        self.answered = 0.0
        if problem := self.find_problem():
            raise VersionFailed(f"it answers its own input example with {problem}")
        _forget_code(self.python_model)

    @property
    def number(self) -> str:
        return self.publication.version

    @property
    def class_names(self) -> list[str]:
        return list(getattr(self.python_model, "class_names", []))

    def predict(self, data: Any, params: Any = None, invocation: Invocation | None = None) -> Any:
        """Return the model's predictions; without an invocation, the model logs none."""
        self.request.set(invocation or Invocation("", self, is_logged=False))
        return self.model.predict(data, params=params)

    def find_problem(self) -> str:
        """Answer the input example, and return what is wrong with the answer; empty if nothing is."""
        try:
            text = StringIO()
            scoring_server.predictions_to_json(self.predict(self.example), text)
            predictions = json.loads(text.getvalue())["predictions"]
            if len(predictions) != len(self.example):
                return f"{len(predictions)} predictions for {len(self.example)} rows"
            problem = next(filter(None, map(_find_problem_in_row, predictions)), "")
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        self.answered = time.monotonic() if not problem else self.answered
        return problem

    def owns(self, error: Exception) -> bool:
        """Tell whether the model's own code raised the error: its messages repeat nothing of a request, MLflow's do."""
        return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(self.folder)


class Delegate:
    """What MLflow's scoring server holds as its model: the version of the request that it works on."""

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow

    @property
    def metadata(self) -> Any:
        return INVOCATION.get().served.model.metadata

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        invocation = INVOCATION.get()
        served = invocation.served
        try:
            predictions = served.predict(data, params, invocation)
        except MlflowException as error:
            if served.owns(error):
                invocation.problem = error.message
                raise
            columns = ", ".join(self.metadata.get_input_schema().input_names())
            invocation.problem = f"wrong columns, types or params; send rows with the column {columns} of base64 text"
            raise MlflowException("", INVALID_PARAMETER_VALUE) from error
        except Exception as error:
            log.warning("version %s fails: %s: %s", served.number, type(error).__name__, error)
            invocation.problem = f"the model failed ({type(error).__name__}); the server's log says why"
            raise MlflowException("", INTERNAL_ERROR) from error
        if isinstance(predictions, pd.DataFrame) and "is_outlier" in predictions:
            metrics.count_predictions(predictions)
            self.shadow.offer(data, params, predictions, invocation)
        return predictions


class Versions:
    """The live version of a process, and its shadow; they follow the files that the parent process writes."""

    def __init__(self, home: Path, *, supervised: bool, shadow_share: float = 0.0) -> None:
        self.home, self.supervised = home, supervised
        self.live: Version
        self.shadow = Shadow(shadow_share)
        self.failed: dict[str, Publication] = {}
        self.health: asyncio.Task[str] | None = None

    @contextlib.asynccontextmanager
    async def follow(self) -> AsyncIterator[None]:
        """Load the live version, and follow the files until the block is left. Raises VersionFailed if unsupervised."""
        while not await self.refresh():
            await asyncio.sleep(WATCH_INTERVAL)
        following = asyncio.create_task(self.watch(os.getppid()))
        try:
            yield
        finally:
            following.cancel()

    async def watch(self, parent: int) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            await self.refresh()
            if self.supervised and os.getppid() != parent:
                log.warning("the parent process is gone: stopping")
                signal.raise_signal(signal.SIGTERM)
                return

    async def refresh(self) -> bool:
        """Switch to the versions that the files name, and tell whether there is a live one."""
        present = getattr(self, "live", None)
        if live := await self.load(LIVE, present):
            self.live = live
            for name in live.class_names:
                metrics.PREDICTIONS.labels(name)  # from the start, at 0
            self.report(live.number)
        if shadow := await self.load(SHADOW, self.shadow.version):
            self.shadow.replace(shadow)
        return hasattr(self, "live")

    async def load(self, name: str, present: Version | None) -> Version | None:
        """Load what a file names, unless it is present, or has failed. The present version answers meanwhile."""
        wanted = Publication.read(self.home / name)
        if wanted is None or wanted == self.failed.get(name) or (present and wanted == present.publication):
            return None
        try:
            return await asyncio.to_thread(Version, wanted)
        except VersionFailed as failure:
            if not self.supervised:
                raise
            log.warning("version %s: %s", wanted.version, failure)
            self.failed[name] = wanted
            if name == LIVE:
                self.report(f"{wanted.version}: {failure}")
            return None

    def report(self, text: str) -> None:
        """Tell the parent process which version this one serves, or why it does not."""
        with atomic_file(self.home / PROCESSES / str(os.getpid())) as partial_file:
            partial_file.write_text(text)

    async def is_healthy(self) -> bool:
        """Tell whether the model has answered its input example within the last seconds, or does so now."""
        live = self.live
        if time.monotonic() - live.answered > HEALTH_INTERVAL:
            if self.health is None or self.health.done():
                self.health = asyncio.create_task(asyncio.to_thread(live.find_problem))
            await asyncio.wait((self.health,), timeout=HEALTH_INTERVAL / 2)
        return time.monotonic() - live.answered <= HEALTH_INTERVAL


def read_example(folder: Path) -> pd.DataFrame:
    """Return the model's input example. Raises VersionFailed if it has none."""
    try:
        table = json.loads((folder / INPUT_EXAMPLE).read_text())["dataframe_split"]
        return pd.DataFrame(table["data"], columns=table["columns"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VersionFailed(f"it has no usable input example ({error!r})") from error


def _find_problem_in_row(row: Any) -> str:
    try:
        probabilities = row["probabilities"]
        if row["label"] not in probabilities:
            return f"the label {row['label']!r}, which is not one of its classes"
        if not math.isclose(total := sum(probabilities.values()), 1, abs_tol=1e-3):
            return f"probabilities that add up to {total:.3f}"
    except (KeyError, TypeError, AttributeError) as error:
        return f"a reply without label, probability and probabilities ({error!r})"
    return ""


def _forget_code(python_model: Any) -> None:
    """Let go of the module that MLflow has imported the model from, or it would stay for as long as the process."""
    sys.modules.pop(type(python_model).__module__, None)
    mlflow.models.model.__mlflow_model__ = None
