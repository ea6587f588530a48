"""A worker process: MLflow's scoring server behind a queue, with health, metrics and corrections.

python -m signdigits.serving.worker --model FOLDER --version 3 --uds SOCKET
"""

import argparse
import asyncio
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import uvicorn
from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR
from mlflow.pyfunc import PyFuncModel, scoring_server
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from signdigits.serving import metrics
from signdigits.serving.admission import Admission, ReplyFirst
from signdigits.serving.corrections import Corrections
from signdigits.serving.invocation import INPUT_EXAMPLE, INTERNAL, Invocation, invocation_variable

HEALTH_INTERVAL = 2.0  # seconds for which an answer to the input example proves health


class CountingModel:
    """A model whose predictions are counted in the metrics."""

    def __init__(self, model: PyFuncModel) -> None:
        self.model, self.metadata = model, model.metadata

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        try:
            predictions = self.model.predict(data, params=params)
        except MlflowException:
            raise
        except Exception as error:
            raise MlflowException(f"the model failed ({type(error).__name__}: {error})", INTERNAL_ERROR) from error
        if isinstance(predictions, pd.DataFrame) and "is_outlier" in predictions:
            metrics.count_predictions(predictions)
        return predictions


class HealthCheck:
    """The route /health: 200 if the model has answered its input example within the last seconds, else 503.

    /ping is liveness: it says that the process answers at all, even while all of its threads are busy.
    """

    def __init__(self, model: PyFuncModel, folder: Path) -> None:
        table = json.loads((folder / INPUT_EXAMPLE).read_text())["dataframe_split"]
        self.model, self.example = model, pd.DataFrame(table["data"], columns=table["columns"])
        self.invocation = invocation_variable(model)
        self.answered = 0.0
        self.answering: asyncio.Task[None] | None = None

    async def reply(self, request: Request) -> Response:
        if time.monotonic() - self.answered > HEALTH_INTERVAL:
            if self.answering is None or self.answering.done():
                self.answering = asyncio.create_task(self.ask())
            await asyncio.wait((self.answering,), timeout=HEALTH_INTERVAL / 2)
        healthy = time.monotonic() - self.answered <= HEALTH_INTERVAL
        return Response("\n", 200 if healthy else 503, media_type="application/json")

    async def ask(self) -> None:
        """Let the model answer its input example, in the threads that requests are answered in."""
        self.invocation.set(Invocation(INTERNAL))
        with contextlib.suppress(Exception):  # that is what 503 says
            await asyncio.to_thread(self.model.predict, self.example)
            self.answered = time.monotonic()


def _render_metrics(request: Request) -> Response:
    return Response(metrics.render_metrics(), media_type="text/plain; version=0.0.4")


def create_app(options: argparse.Namespace) -> Starlette:
    """Return the application that serves the model in the folder `options.model`."""
    os.environ[MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.name] = str(options.timeout)  # the model reads it, too
    model = mlflow.pyfunc.load_model(str(options.model))
    server: Any = Admission(scoring_server.init(CountingModel(model)), model, options.timeout, options.max_waiting)
    if options.shadow:
        server = ReplyFirst(server)
    routes = [Route("/health", HealthCheck(model, options.model).reply), Route("/metrics", _render_metrics)]
    if options.corrections:
        corrections = Corrections(model, options.version, options.corrections, options.corrections_mb * 1_000_000)
        routes.append(Route("/corrections", corrections.reply, methods=["POST"]))
    return Starlette(routes=[*routes, Mount("/", server)])


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--timeout", type=int, default=60)
    parser.add_argument("--max_waiting", type=int, default=256)
    parser.add_argument("--keep_alive", type=int, default=75)
    parser.add_argument("--corrections", type=Path)
    parser.add_argument("--corrections_mb", type=int, default=64)
    parser.add_argument("--uds")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5001)
    parser.add_argument("--shadow", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    if options.shadow:
        os.nice(10)  # the live workers come first
    uvicorn.run(
        create_app(options),
        uds=options.uds,
        host=options.host,
        port=options.port,
        headers=[("Model-Version", options.version)],
        server_header=False,
        timeout_keep_alive=options.keep_alive,
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
