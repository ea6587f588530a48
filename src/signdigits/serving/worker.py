"""A worker process: MLflow's scoring server, with a limited queue, cancellation, small errors, health and metrics.

python -m signdigits.serving.worker --model FOLDER --version 3 --uds SOCKET

MLflow's server starts to work on each request at once, and goes on when its client is gone or its time is over. An ASGI
middleware around it admits a few at a time, lets the others wait without reading their bodies, and tells the model when
nobody waits for a reply.
"""

import argparse
import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
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
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from signdigits.serving import metrics
from signdigits.serving.corrections import Corrections
from signdigits.serving.invocation import (
    INPUT_EXAMPLE,
    INTERNAL,
    REQUEST_ID,
    Invocation,
    invocation_variable,
)

# Requests that a process works on at once: the model releases the GIL for most of the time. Of the large ones, a single one,
# so that small ones need not wait for it.
SMALL_REQUESTS, LARGE_REQUESTS = 4, 1
LARGE_BODY = 2_000_000  # bytes

SHADOW_REQUESTS = 8  # copies of requests that wait in a shadow; the next one is dropped

# Brackets, braces and commas in a body: a row has three, and base64 none. Parsing 64 MB of empty rows takes a gigabyte.
MAX_STRUCTURE = 100_000

UNPARSABLE = b"JSON nested too deeply, or a number with too many digits; send one table"
MAX_MESSAGE = 1000  # characters of an error message
HEALTH_INTERVAL = 2.0  # seconds for which an answer to the input example proves health

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

BUSY = JSONResponse(
    {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "too many requests are waiting; try again in a few seconds"},
    503,
    {"Retry-After": "1"},
)
TOO_MANY_ROWS = JSONResponse(
    {"error_code": "BAD_REQUEST", "message": "more brackets, braces and commas than 1,000 rows have; send one table"},
    413,
)
TOO_LATE = JSONResponse(
    {"error_code": "DEADLINE_EXCEEDED", "message": "no reply in time; send fewer photographs in one request"}, 504
)


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
        if isinstance(predictions, pd.DataFrame) and "label" in predictions:
            metrics.count_predictions(predictions)
        return predictions


class Admission:
    """An ASGI middleware that limits the requests to /invocations, and cancels those that nobody waits for."""

    def __init__(self, app: Any, model: PyFuncModel, timeout: float, max_waiting: int, is_shadow: bool) -> None:
        self.app, self.timeout, self.max_waiting = app, timeout, max_waiting
        self.invocation = invocation_variable(model)
        self.small, self.large = asyncio.Semaphore(SMALL_REQUESTS), asyncio.Semaphore(LARGE_REQUESTS)
        self.waiting = 0
        self.copies: set[asyncio.Task[Response]] | None = set() if is_shadow else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/invocations" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.copies is not None:
            await self.take_copy(scope, receive)
            await Response(status_code=202)(scope, receive, send)
            return
        started = time.monotonic()
        response = await self.answer(Request(scope, receive))
        metrics.SECONDS.observe(time.monotonic() - started)
        metrics.REQUESTS.labels(response.status_code).inc()
        await response(scope, receive, send)

    async def take_copy(self, scope: Message, receive: Receive) -> None:
        """Read a shadow's request, to process it later, or drop it if too many are waiting."""
        assert self.copies is not None
        body = await Request(scope, receive).body()
        if len(self.copies) < SHADOW_REQUESTS:
            copy = asyncio.create_task(self.answer(Request(scope, _repeat(body))))
            self.copies.add(copy)
            copy.add_done_callback(self.copies.discard)

    async def answer(self, request: Request) -> Response:
        if self.waiting >= self.max_waiting:
            return BUSY
        try:
            async with asyncio.timeout(self.timeout), self.slot(request):
                body = await request.body()
                if sum(map(body.count, (b"[", b"{", b","))) > MAX_STRUCTURE:
                    return TOO_MANY_ROWS
                return await self.invoke(request, body)
        except TimeoutError:
            return TOO_LATE
        except ClientDisconnect:
            return Response(status_code=499)  # nginx's number for a client that went away

    @contextlib.asynccontextmanager
    async def slot(self, request: Request) -> AsyncIterator[None]:
        """Wait for one of the requests that are worked on at once. A waiting request's body is not read yet."""
        length = request.headers.get("content-length", "")
        slots = self.small if length.isdecimal() and int(length) <= LARGE_BODY else self.large
        self.waiting += 1
        metrics.WAITING.inc()
        try:
            await slots.acquire()
        finally:
            self.waiting -= 1
            metrics.WAITING.dec()
        try:
            yield
        finally:
            slots.release()

    async def invoke(self, request: Request, body: bytes) -> Response:
        """Return MLflow's reply to a request, with its errors shortened."""
        invocation = Invocation(request.headers.get(REQUEST_ID, ""))
        self.invocation.set(invocation)
        calls = asyncio.create_task(_call(self.app, request.scope, body))
        leaves = asyncio.create_task(_wait_for_disconnect(request.receive))
        try:
            await asyncio.wait((calls, leaves), return_when=asyncio.FIRST_COMPLETED)
            if calls.done():
                status, content = calls.result()
                return _make_response(status, content)
            raise ClientDisconnect
        finally:
            invocation.cancelled.set()
            calls.cancel()
            leaves.cancel()


async def _call(app: Any, scope: Message, body: bytes) -> tuple[int, bytes]:
    """Return status and content of an ASGI application's reply to a request with `body`; 500 if it fails."""
    status, parts = 500, []

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    # MLflow's server raises only if Python cannot parse the JSON; its own reply is sent before.
    with contextlib.suppress(Exception):
        await app(scope, _repeat(body), send)
    return status, b"".join(parts)


def _repeat(body: bytes) -> Receive:
    """Return an ASGI channel of a client that sends `body` and waits."""
    messages: list[Message] = [{"type": "http.request", "body": body}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Future()
        return messages.pop()

    return receive


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _make_response(status: int, content: bytes) -> Response:
    """Return MLflow's reply; of an error, only code and message, and nothing that repeats the request."""
    if status == 200:
        return Response(content, media_type="application/json")
    try:
        error = json.loads(content)
        code, message = str(error["error_code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):  # MLflow's server fails on nothing but JSON that Python cannot parse
        if status == 500:
            status, content = 400, UNPARSABLE
        code, message = "BAD_REQUEST", content[:MAX_MESSAGE].decode(errors="replace")
    headers = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse({"error_code": code, "message": shorten_message(message)}, status, headers)


def shorten_message(message: str) -> str:
    """Return an error message of MLflow without what it repeats of the request."""
    if message.startswith("Ensure that input is a valid JSON"):
        return 'the body is not valid JSON; send {"dataframe_records": [{"image": BASE64}]}'
    if message.startswith("Failed to predict data"):
        message = message.partition("'. \nError: ")[2]
    if message.startswith("Failed to enforce schema"):
        message = message.rpartition("Error: ")[2]
    return message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."


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
    server = Admission(
        scoring_server.init(CountingModel(model)), model, options.timeout, options.max_waiting, options.shadow
    )
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
