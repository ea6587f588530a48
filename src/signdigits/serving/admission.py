"""The admission of requests with a body: token, type, size, a queue, deadlines, cancellation and small errors.

MLflow's server starts every request immediately, and continues after its client has disconnected or its time is up. Here a
body is read and bounded first, then a few requests are worked on at a time, and the model is told when a reply is no longer
needed. Nothing of a request comes back in an error.
"""

import asyncio
import contextlib
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from signdigits.serving import metrics
from signdigits.serving.options import ServeParameters, read_token

# Requests that a process works on at once: the model releases the GIL for most of the time. Of the large ones, a single one,
# so that small ones need not wait for it.
SMALL_REQUESTS, LARGE_REQUESTS = 4, 1
LARGE_BODY = 2_000_000  # bytes
HELD_BODIES = 2  # bodies of the maximum size, or as many bytes, that a process holds at once; small ones have one more

# Bytes of a body outside base64's alphabet: a row has a dozen. Parsing 64 MB of empty rows, or of spaces, takes a gigabyte.
# The backslash is in the alphabet here: some clients escape each slash.
MAX_STRUCTURE = 100_000
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_\\"

JSON_TYPE = r"application/json\s*(;\s*charset=\"?utf-8\"?\s*)?"


def make_error(status: int, code: str, message: str) -> Response:
    """Return an error in MLflow's form; one that passes by itself says when to try again."""
    headers = {"Retry-After": "1"} if code == "TEMPORARILY_UNAVAILABLE" else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error_code": code, "message": message}, status, headers)


UNAUTHENTICATED = make_error(
    401, "UNAUTHENTICATED", "missing or wrong token; send the header Authorization: Bearer TOKEN"
)
NOT_JSON = make_error(
    415, "BAD_REQUEST", "not JSON; send it uncompressed, with the header Content-Type: application/json"
)
TOO_MUCH_STRUCTURE = make_error(
    413, "BAD_REQUEST", "more brackets, commas and spaces than 1,000 rows have; send one table"
)
BUSY = make_error(503, "TEMPORARILY_UNAVAILABLE", "too many requests are waiting; try again in a few seconds")
TOO_LATE = make_error(504, "DEADLINE_EXCEEDED", "no reply in time; send fewer photographs in one request")
TOO_SLOW = make_error(408, "DEADLINE_EXCEEDED", "the body does not arrive; send it without a pause")
DISCONNECTED = Response(status_code=499)  # nginx's number for a client that went away

Work = Callable[[Request, bytes], Awaitable[Response]]


class Refused(Exception):
    """A request that is not worked on; `reply` says why."""

    def __init__(self, reply: Response) -> None:
        super().__init__()
        self.reply = reply


class Admission:
    """The limits of a process, for the routes that take a body."""

    def __init__(self, parameters: ServeParameters) -> None:
        self.parameters = parameters
        self.token = read_token(parameters.token_file)
        self.max_body = parameters.max_body_mb * 1_000_000
        self.small, self.large = asyncio.Semaphore(SMALL_REQUESTS), asyncio.Semaphore(LARGE_REQUESTS)
        self.waiting = 0
        self.complete = 0  # bytes of the bodies that wait for their turn, or are worked on
        self.arriving: dict[asyncio.Timeout, bytearray] = {}  # the others, by their deadlines

    def allows(self, request: Request) -> bool:
        """Tell whether the request has the token, if one is needed."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return not self.token or (
            scheme.lower() == "bearer" and hmac.compare_digest(token.encode(), self.token.encode())
        )

    def guarded(self, work: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Return the handler of a route that asks for the token."""

        async def handle(request: Request) -> Response:
            return await work(request) if self.allows(request) else UNAUTHENTICATED

        return handle

    def admitted(self, work: Work) -> Callable[[Request], Awaitable[Response]]:
        """Return the handler of a route that takes a body of JSON, within the limits."""

        async def handle(request: Request) -> Response:
            try:
                async with asyncio.timeout(self.parameters.timeout):
                    async with self.read_body(request) as body, self.slot(body):
                        return await _until_disconnect(request, work(request, body))
            except Refused as refused:
                return refused.reply
            except TimeoutError:
                return TOO_LATE
            except ClientDisconnect:
                return DISCONNECTED

        return handle

    @contextlib.asynccontextmanager
    async def read_body(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the body. Raises Refused if it is not allowed, too large, too slow, or not what a table of photographs is."""
        self.check_head(request)
        body = await self.receive(request)
        self.complete += len(body)
        try:
            yield body
        finally:
            self.complete -= len(body)

    async def receive(self, request: Request) -> bytes:
        """Return the body; its deadline moves with each part. Raises Refused."""
        size, structure, body = 0, 0, bytearray()
        deadline = asyncio.timeout(self.parameters.client_timeout)
        self.arriving[deadline] = body
        try:
            async with deadline:
                async for chunk in request.stream():
                    if deadline not in self.arriving:
                        raise Refused(BUSY)
                    deadline.reschedule(asyncio.get_running_loop().time() + self.parameters.client_timeout)
                    size += len(chunk)
                    structure += len(chunk.translate(None, BASE64))
                    if size > self.max_body:
                        raise Refused(self.too_large())
                    if structure <= MAX_STRUCTURE:  # else the rest is only read: the client waits for the end with it
                        body += chunk
                        self.make_room(deadline)
        except TimeoutError:
            raise Refused(TOO_SLOW if deadline in self.arriving else BUSY) from None
        finally:
            is_dropped = self.arriving.pop(deadline, None) is None
        if is_dropped:
            raise Refused(BUSY)
        if structure > MAX_STRUCTURE:
            raise Refused(TOO_MUCH_STRUCTURE)
        return bytes(body)

    def make_room(self, deadline: asyncio.Timeout) -> None:
        """Drop the largest of the bodies that arrive, until there is room for this one: slow clients exclude nobody."""
        while deadline in self.arriving:
            is_small = len(self.arriving[deadline]) <= LARGE_BODY
            held = self.complete + sum(map(len, self.arriving.values()))
            if held <= (HELD_BODIES + is_small) * self.max_body:
                return
            largest = max(self.arriving, key=lambda other: len(self.arriving[other]))
            largest.reschedule(asyncio.get_running_loop().time())
            self.arriving.pop(largest).clear()

    def check_head(self, request: Request) -> None:
        if not self.allows(request):
            raise Refused(UNAUTHENTICATED)
        compressed = request.headers.get("content-encoding", "identity").lower() != "identity"
        if compressed or not re.fullmatch(JSON_TYPE, request.headers.get("content-type", "").lower()):
            raise Refused(NOT_JSON)
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body:
            raise Refused(self.too_large())

    def too_large(self) -> Response:
        limit = self.parameters.max_body_mb
        return make_error(
            413, "BAD_REQUEST", f"the request is larger than {limit} MB; send fewer or smaller photographs"
        )

    @contextlib.asynccontextmanager
    async def slot(self, body: bytes) -> AsyncIterator[None]:
        """Wait for one of the requests that are worked on at once."""
        if self.waiting >= self.parameters.max_waiting:
            raise Refused(BUSY)
        slots = self.small if len(body) <= LARGE_BODY else self.large
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


async def _until_disconnect(request: Request, work: Awaitable[Response]) -> Response:
    """Return the reply; cancel the work when it is no longer needed. Raises ClientDisconnect."""
    works = asyncio.ensure_future(work)
    leaves = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((works, leaves), return_when=asyncio.FIRST_COMPLETED)
        if works.done():
            return works.result()
        raise ClientDisconnect
    finally:
        works.cancel()
        leaves.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
