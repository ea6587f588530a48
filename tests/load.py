"""A constant load on an endpoint, for the tests and the benchmarks."""

import http.client
import threading
import time
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
    """Threads that ask again and again, each over a connection that stays open, until the block is left."""

    def __init__(self, port: int, body: bytes, threads: int = 4) -> None:
        self.port, self.body = port, body
        self.replies: list[Reply] = []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.work) for _ in range(threads)]

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def work(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        while not self.ended.wait(PAUSE):
            sent = time.monotonic()
            status, version = self.ask(connection)
            self.replies.append(Reply(sent, time.monotonic() - sent, status, version))

    def ask(self, connection: http.client.HTTPConnection) -> tuple[int, str]:
        """Return status and version of the reply; 0 and no version if none comes."""
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
