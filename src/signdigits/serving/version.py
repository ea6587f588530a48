"""One version in memory: loaded from its folder, and asked for its own input example."""

import json
import os
import re
import sys
import threading
import time
import traceback
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Self

import mlflow
import pandas as pd
from mlflow.pyfunc import PyFuncModel, scoring_server

from signdigits import startup
from signdigits.errors import SignDigitsError
from signdigits.files import atomic_file
from signdigits.packaging import prediction_log, reply

INPUT_EXAMPLE = "serving_input_example.json"  # MLflow's name of the file in a model


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

    def __init__(self, publication: Publication, *, suppress_warnings: bool = False) -> None:
        self.publication, self.folder = publication, Path(publication.folder)
        os.environ[prediction_log.VERSION] = publication.version  # a model does not know its own version
        try:
            with startup.filtered_stderr():
                self.model: PyFuncModel = mlflow.pyfunc.load_model(
                    publication.folder, suppress_warnings=suppress_warnings
                )
        except Exception as error:
            raise VersionFailed(f"it does not load ({type(error).__name__}: {error})", may_pass=True) from error
        self.python_model: Any = self.model.unwrap_python_model()
        # Where a model of this project looks for its request.
        self.request = getattr(self.python_model, "request", ContextVar[Any]("request"))
        self.example = read_example(self.folder)
        self.answered = 0.0
        if problem := self.find_problem():
            raise VersionFailed(f"it answers its own input example with {problem}")
        # Or the module that MLflow has imported the model from would stay for as long as the process.
        sys.modules.pop(type(self.python_model).__module__, None)
        mlflow.models.model.__mlflow_model__ = None

    @property
    def number(self) -> str:
        return self.publication.version

    @property
    def class_names(self) -> list[str]:
        return list(getattr(self.python_model, "class_names", []))

    @property
    def examples(self) -> dict[str, bytes]:
        """Return JPEG files by class, typical training photographs. Models of version 0.2 have none."""
        return dict(getattr(self.python_model, "examples", {}))

    @property
    def reads_hands(self) -> bool:
        """Tell whether the photographs show hands that sign digits: the classes are digits, and not those of handwriting."""
        are_digits = bool(self.class_names) and all(re.fullmatch("[0-9]", name) for name in self.class_names)
        return are_digits and not getattr(self.python_model, "handwriting", False)  # models of version 0.2 do not know

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
            problem = next(filter(None, map(reply.find_problem, predictions)), "")
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        self.answered = time.monotonic() if not problem else self.answered
        return problem

    def owns(self, error: Exception) -> bool:
        """Tell whether the model's own code raised the error: its messages repeat nothing of a request, MLflow's do."""
        return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(self.folder)


def read_example(folder: Path) -> pd.DataFrame:
    """Return the model's input example. Raises VersionFailed if it has none."""
    try:
        table = json.loads((folder / INPUT_EXAMPLE).read_text())["dataframe_split"]
        return pd.DataFrame(table["data"], columns=table["columns"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VersionFailed(f"it has no usable input example ({error!r})") from error
