"""The ASGI application of a process: page, predictions, corrections, health, metrics.

uvicorn -> Envelope (id, headers, access log) -> a route -> Admission -> MLflow's scoring server -> Delegate -> the model.
"""

import asyncio
import contextlib
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import IO, Any

import mlflow
from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.pyfunc import scoring_server
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from signdigits.data import images
from signdigits.serving import metrics
from signdigits.serving.admission import Admission, make_error
from signdigits.serving.corrections import Corrections
from signdigits.serving.options import ServeParameters
from signdigits.serving.pages import ENCODED_HEADERS, PAGE, route_files
from signdigits.serving.version import INVOCATION, Invocation
from signdigits.serving.versions import Delegate, Versions

LIVE_FRAME = "live-frame"  # header of most requests of the page's camera, which are not logged: a visitor is no window

REPLIES = {
    404: make_error(404, "ENDPOINT_NOT_FOUND", "not found; send photographs to /invocations"),
    405: make_error(405, "BAD_REQUEST", "method not allowed; send photographs to /invocations with POST"),
}
NO_TABLE = 'no table in JSON; send {"dataframe_records": [{"image": BASE64}]}, or dataframe_split'


def create_app(parameters: ServeParameters, home: Path) -> Starlette:
    """Return the application of a process; it answers when the version that `home` names is loaded."""
    os.environ[MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.name] = str(parameters.timeout)  # the model reads it, too
    versions = Versions(home, parameters)
    endpoint = Endpoint(versions, parameters)
    admission = Admission(parameters)
    routes = [
        Route("/invocations", admission.admitted(endpoint.invoke), methods=["POST"]),
        Route("/ping", endpoint.ping),
        Route("/health", endpoint.health),
        Route("/version", admission.guarded(endpoint.mlflow_version)),
        Route("/model", admission.guarded(endpoint.model)),
        Route("/metrics", admission.guarded(endpoint.metrics)),
        Route("/settings.json", endpoint.settings),
        Route("/examples/{number:int}", endpoint.example),
    ]
    if parameters.corrections:
        corrections = Corrections(versions, Path(parameters.corrections), parameters.corrections_mb * 1_000_000)
        routes.append(Route("/corrections", admission.admitted(corrections.reply), methods=["POST"]))
    routes += route_files(PAGE)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with versions.follow():
            endpoint.start()
            yield {"client_timeout": parameters.client_timeout}  # read by connections.py

    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Envelope, versions=versions, access_log=parameters.access_log)],
        exception_handlers={HTTPException: _reply_to_error, Exception: _reply_to_failure},
    )


class Endpoint:
    """The routes of a process."""

    def __init__(self, versions: Versions, parameters: ServeParameters) -> None:
        self.versions, self.parameters = versions, parameters
        self.scoring_server: Any = None

    def start(self) -> None:
        """Create MLflow's server: one for all versions, since each would stay in memory."""
        INVOCATION.set(Invocation("", self.versions.live))  # the server asks for the input's schema
        self.scoring_server = scoring_server.init(Delegate(self.versions.shadow))

    async def invoke(self, request: Request, body: bytes) -> Response:
        """Return MLflow's reply to a request, which one version answers from beginning to end."""
        started = time.monotonic()
        served = self.versions.live
        request.state.version = served.number
        invocation = Invocation(request.state.id, served, is_logged=LIVE_FRAME not in request.headers)
        INVOCATION.set(invocation)
        try:
            status, content = await _call(self.scoring_server, request.scope, body)
        finally:
            invocation.cancelled.set()
        metrics.SECONDS.labels(served.number).observe(time.monotonic() - started)
        if status == 200:
            return Response(content, media_type="application/json")
        if not invocation.problem:  # MLflow could not read it
            return make_error(400, "BAD_REQUEST", NO_TABLE)
        return make_error(status, json.loads(content)["error_code"], invocation.problem)

    async def ping(self, request: Request) -> Response:
        """Reply at once, even while all threads are busy: the process lives."""
        return Response("\n", media_type="application/json")

    async def health(self, request: Request) -> Response:
        healthy = await self.versions.is_healthy()
        return Response("\n", 200 if healthy else 503, media_type="application/json")

    async def mlflow_version(self, request: Request) -> Response:
        return Response(mlflow.__version__, media_type="application/json")

    async def model(self, request: Request) -> Response:
        """Return what is known of the live version."""
        live = self.versions.live
        known = live.publication
        return JSONResponse({
            "name": known.name, "version": known.version, "alias": known.alias, "classes": live.class_names,
            "test_accuracy": float(known.test_accuracy) if known.test_accuracy else None, "since": known.since,
        })  # fmt: skip

    async def metrics(self, request: Request) -> Response:
        return Response(metrics.render_metrics(), media_type="text/plain; version=0.0.4")

    async def settings(self, request: Request) -> Response:
        """Return what the page must know, and nothing else of the model: the page is shown without the token.

        `examples` are the addresses of photographs by class: those that the model was packaged with, to be shown to anybody.
        """
        live = self.versions.live
        return JSONResponse({
            "max_bytes": images.MAX_BYTES, "media_types": sorted(set(images.FORMATS.values())),
            "classes": len(live.class_names), "reads_hands": live.reads_hands,
            "examples": {name: f"examples/{number}" for number, name in enumerate(live.examples)},
            "needs_token": bool(self.parameters.token_file), "takes_corrections": bool(self.parameters.corrections),
        })  # fmt: skip

    async def example(self, request: Request) -> Response:
        """Return a JPEG file: the example of this number in the order of `settings`."""
        contents = list(self.versions.live.examples.values())
        number = request.path_params["number"]
        return Response(contents[number], media_type="image/jpeg") if number < len(contents) else REPLIES[404]


class Envelope:
    """An ASGI middleware around everything: an id for each request, headers for each reply, a line for the access log."""

    def __init__(self, app: ASGIApp, versions: Versions, access_log: str) -> None:
        self.app, self.versions = app, versions
        self.access_log = _open_log(access_log)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, size = time.monotonic(), 0, 0
        state = scope.setdefault("state", {})
        state["id"] = uuid.uuid4().hex

        async def send_in_envelope(message: MutableMapping[str, Any]) -> None:
            nonlocal status, size
            size += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                status = message["status"]
                version = state.setdefault("version", self.versions.live.number)
                own = [(b"model-version", version.encode()), (b"x-request-id", state["id"].encode())]
                message["headers"] = [*message["headers"], *own, *ENCODED_HEADERS]
                if scope["path"] == "/invocations":
                    metrics.REQUESTS.labels(status).inc()
            await send(message)

        await self.app(scope, receive, send_in_envelope)
        if self.access_log:
            entry = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "client": (scope["client"] or [""])[0],
                "method": scope["method"], "path": scope["path"], "status": status, "bytes": size,
                "seconds": round(time.monotonic() - started, 6), "id": state["id"], "version": state.get("version", ""),
            }  # fmt: skip
            self.access_log.write(json.dumps(entry) + "\n")


def _open_log(path: str) -> IO[str] | None:
    if not path:
        return None
    return Path("/dev/stdout" if path == "-" else path).open("a", buffering=1)


async def _call(app: Any, scope: Scope, body: bytes) -> tuple[int, bytes]:
    """Return status and content of an ASGI application's reply to a request with `body`."""
    status, parts, messages = 400, [], [{"type": "http.request", "body": body}]

    async def receive() -> MutableMapping[str, Any]:
        if not messages:
            await asyncio.Future()  # a client that waits
        return messages.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    with contextlib.suppress(RecursionError, ValueError):  # JSON that Python cannot parse; MLflow has not replied to it
        await app({**scope, "headers": [(b"content-type", b"application/json")], "state": {}}, receive, send)
    return status, b"".join(parts)


async def _reply_to_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return REPLIES.get(error.status_code) or make_error(
        error.status_code, "BAD_REQUEST", "send photographs to /invocations"
    )


async def _reply_to_failure(request: Request, error: Exception) -> Response:
    return make_error(500, "INTERNAL_ERROR", "the server failed; its log says why")
