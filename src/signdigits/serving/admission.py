"""ASGI middleware around MLflow's scoring server: a queue, deadlines, cancellation and small errors.

MLflow's server starts every request immediately, and continues after its client has disconnected or its time is up. `Admission`
admits a few at a time, lets the others wait without reading their bodies, and signals the model when a reply is no longer needed.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from mlflow.pyfunc import PyFuncModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from signdigits.serving import metrics
from signdigits.serving.invocation import REQUEST_ID, Invocation, invocation_variable

# Requests that a process works on at once: the model releases the GIL for most of the time. Of the large ones, a single one,
# so that small ones need not wait for it.
SMALL_REQUESTS, LARGE_REQUESTS = 4, 1
LARGE_BODY = 2_000_000  # bytes

SHADOW_REQUESTS = 8  # copies of requests that wait in a shadow; the next one is dropped

# Brackets, braces and commas in a body: a row has three, and base64 none. Parsing 64 MB of empty rows takes a gigabyte.
MAX_STRUCTURE = 100_000

UNPARSABLE = b"JSON nested too deeply, or a number with too many digits; send one table"
MAX_MESSAGE = 1000  # characters of an error message

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def make_error(status: int, code: str, message: str) -> Response:
    """Return an error in MLflow's form; one that passes by itself says when to try again."""
    headers = {"Retry-After": "1"} if code == "TEMPORARILY_UNAVAILABLE" else {}
    return JSONResponse({"error_code": code, "message": message}, status, headers)


BUSY = make_error(503, "TEMPORARILY_UNAVAILABLE", "too many requests are waiting; try again in a few seconds")
TOO_MANY_ROWS = make_error(413, "BAD_REQUEST", "more brackets, braces and commas than 1,000 rows have; send one table")
TOO_LATE = make_error(504, "DEADLINE_EXCEEDED", "no reply in time; send fewer photographs in one request")


class Admission:
    """An ASGI middleware that limits the requests to /invocations, and cancels those whose reply is no longer needed."""

    def __init__(self, app: Any, model: PyFuncModel, timeout: float, max_waiting: int) -> None:
        self.app, self.timeout, self.max_waiting = app, timeout, max_waiting
        self.invocation = invocation_variable(model)
        self.small, self.large = asyncio.Semaphore(SMALL_REQUESTS), asyncio.Semaphore(LARGE_REQUESTS)
        self.waiting = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if not _is_invocation(scope):
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        response = await self.answer(Request(scope, receive))
        metrics.SECONDS.observe(time.monotonic() - started)
        metrics.REQUESTS.labels(response.status_code).inc()
        await response(scope, receive, send)

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


class ReplyFirst:
    """An ASGI middleware of a shadow: it replies before it works, and drops a request that finds too many waiting."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.copies: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if not _is_invocation(scope):
            await self.app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        if len(self.copies) < SHADOW_REQUESTS:
            copy = asyncio.create_task(self.app(scope, _repeat(body), _discard))
            self.copies.add(copy)
            copy.add_done_callback(self.copies.discard)
        await Response(status_code=202)(scope, receive, send)


async def _discard(message: Message) -> None:
    pass


def _is_invocation(scope: Message) -> bool:
    return scope["type"] == "http" and scope["path"] == "/invocations" and scope["method"] == "POST"


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
    return make_error(status, code, shorten_message(message))


def shorten_message(message: str) -> str:
    """Return an error message of MLflow without what it repeats of the request."""
    if message.startswith("Ensure that input is a valid JSON"):
        return 'the body is not valid JSON; send {"dataframe_records": [{"image": BASE64}]}'
    if message.startswith("Failed to predict data"):
        message = message.partition("'. \nError: ")[2]
    if message.startswith("Failed to enforce schema"):
        message = message.rpartition("Error: ")[2]
    return message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."
