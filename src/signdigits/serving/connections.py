"""uvicorn's HTTP protocol, with an end to the head of a request that it waits for."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 32_000  # bytes: request line and headers
GRACE = 1.0  # seconds in which a request on its way to a process that stops is still answered


class Connection(HttpToolsProtocol):
    """A connection that is closed if the head of a request takes longer than `client_timeout`, or more than MAX_HEAD.

    uvicorn itself waits for ever, and keeps what comes. The methods are asyncio's, and those that httptools' parser calls.
    """

    deadline: asyncio.TimerHandle | None = None
    head = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.deadline = self.loop.call_later(self.app_state["client_timeout"], transport.close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self.deadline is None:
            self.deadline = self.loop.call_later(self.app_state["client_timeout"], self.transport.close)

    def on_headers_complete(self) -> None:
        self.stop_waiting()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.deadline:
            self.head += len(data)
            if self.head > MAX_HEAD:
                self.transport.close()

    def shutdown(self) -> None:
        """Close the connection, but not while its next request may be on the way: that would be a reset."""
        self.loop.call_later(GRACE, super().shutdown)

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        super().connection_lost(exc)

    def stop_waiting(self) -> None:
        self.head = 0
        if self.deadline:
            self.deadline.cancel()
            self.deadline = None
