"""The request that a worker tells the model of, and names that the supervisor and a worker share."""

import threading
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from mlflow.pyfunc import PyFuncModel

INPUT_EXAMPLE = "serving_input_example.json"  # MLflow's name of the file in a model

# The id of requests that are not logged as predictions. nginx sets its own id on those of clients.
INTERNAL = "internal"
REQUEST_ID = "X-Request-ID"


@dataclass(frozen=True)
class Invocation:
    """A request, for the model: its id, and an event that is set when the reply is no longer needed."""

    id: str
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def is_logged(self) -> bool:
        return self.id != INTERNAL


def invocation_variable(model: PyFuncModel) -> ContextVar[Any]:
    """Return the variable in which the model looks for its request; a model of another kind looks for none."""
    return getattr(model.unwrap_python_model(), "request", ContextVar("request"))
