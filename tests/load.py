"""A constant load on an endpoint, for the tests and the benchmarks."""

import http.client
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

JSON = {"Content-Type": "application/json"}
PAUSE = 0.02  # seconds between a reply and a thread's next request


@dataclass(frozen=True)
class Reply:
    sent: float  # on the clock of time.monotonic
    seconds: float
    status: int  # 0 for none
    version: str

    @property
    def came(self) -> float:
        return self.sent + self.seconds


class Load:
    """Threads that ask again and again, each over a connection that stays open, until the block is left.

    With several ports, a request that gets no reply from one goes to the next, as a load balancer would send it.
    """

    def __init__(self, port: int, body: bytes, threads: int = 4, more_ports: Sequence[int] = ()) -> None:
        self.ports, self.body = (port, *more_ports), body
        self.replies: list[Reply] = []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.work, args=(number,)) for number in range(threads)]

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def work(self, number: int) -> None:
        first = number % len(self.ports)
        ports = self.ports[first:] + self.ports[:first]
        connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=120) for port in ports]
        while not self.ended.wait(PAUSE):
            sent = time.monotonic()
            status, version = self.ask(connections)
            self.replies.append(Reply(sent, time.monotonic() - sent, status, version))

    def ask(self, connections: Sequence[http.client.HTTPConnection]) -> tuple[int, str]:
        """Return status and version of the first reply; 0 and no version if none replies."""
        for connection in connections:
            try:
                connection.request("POST", "/invocations", self.body, JSON)
                reply = connection.getresponse()
                reply.read()
                return reply.status, reply.getheader("Model-Version", "")
            except (OSError, http.client.HTTPException):
                connection.close()
        return 0, ""

    def failed(self) -> int:
        return sum(reply.status != 200 for reply in self.replies)

    def first(self, version: str, start: int) -> Reply | None:
        """Return the first reply of a version, of those from number `start` on."""
        replies = [reply for reply in self.replies[start:] if reply.version == version]
        return min(replies, key=lambda reply: reply.came, default=None)
