"""Rude clients: hostile bodies, and decompression bombs whose senders do not wait for the reply."""

import base64
import contextlib
import http.client
import io
import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from PIL import Image
from tests.load import JSON, Load

from benchmarks import servers
from benchmarks.measure import Row, temporary_store
from benchmarks.servers import Server, make_request
from signdigits.config import DataParameters
from signdigits.data import loading

LIMIT = 64_000_000  # bytes of a body
ATTACKERS, PATIENCE = 8, 5.0  # clients, and the seconds after which each disconnects


def rows(photographs: str, hostile: int = 2000, seconds: float = 60) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    body = json.dumps(make_request(servers.read_photograph(loaded, 0))).encode()
    with temporary_store("attack") as folder:
        servers.register_versions(loaded)
        with servers.serve(Path(folder)) as server:
            return [send_hostile_bodies(server.port, hostile), *send_bombs(server, body, seconds)]


def send_hostile_bodies(port: int, count: int) -> Row:
    """Send bodies of all sizes up to the limit, and return the row of the longest reply."""
    numbers, longest, statuses = random.Random(0), 0, set()
    for _ in range(count):
        status, content = post(port, make_hostile_body(numbers))
        longest = max(longest, len(content))
        statuses.add(status)
    detail = f"statuses {sorted(statuses)}"
    return Row(f"longest reply to {count:,} hostile bodies, in KB", "", longest / 1024, 8, False, detail)


def make_hostile_body(numbers: random.Random) -> bytes:
    size = int(10 ** numbers.uniform(2, 7.79))  # to 62 MB
    text = base64.b64encode(numbers.randbytes(1000)) * (size // 1336 + 1)
    kinds: list[Callable[[], bytes]] = [
        lambda: numbers.randbytes(size),
        lambda: text,
        lambda: b'{"dataframe_records": [{"image": "' + text,
        lambda: b'{"dataframe_records": [{"image": "' + text + b'"}]}',
        lambda: b'{"dataframe_records": [{"' + text + b'": 1}]}',
        lambda: b'{"' + text + b'": 1}',
        lambda: b'{"dataframe_split": {"columns": ["' + text + b'"], "data": []}}',
        lambda: b'{"dataframe_records": [' + b'{"image": ""},' * (size // 14) + b"{}]}",
        lambda: b"[" * size,
        lambda: b'{"dataframe_records": ' + b"9" * size + b"}",
        lambda: b'{"inputs": "' + text + b'"}',
        lambda: b'{"dataframe_records": [{"image": "x"}], "params": {"' + text + b'": 1}}',
    ]
    return numbers.choice(kinds)()[:LIMIT]


def post(port: int, body: bytes, timeout: float = 70) -> tuple[int, bytes]:
    """Return status and content of the reply; 0 if none comes."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)) as connection:
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # rejected before all was sent
                connection.request("POST", "/invocations", body, JSON)
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            return 0, b""


def make_bombs(count: int, side: int = 7000) -> bytes:
    """Return a request with `count` PNG files of `side` x `side` pixels, of 80 KB each."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 90).save(buffer, "PNG")
    return json.dumps(make_request(*[buffer.getvalue()] * count)).encode()


def send_bombs(server: Server, body: bytes, seconds: float) -> list[Row]:
    """Observe another client, health and memory during bombs with too many pixels, and with just few enough."""
    quiet = observe(server, body, None, min(seconds, 20))
    against = f"{quiet.median * 1000:.1f} ms quiet"
    table = []
    for count in (100, 4):
        bombs = make_bombs(count)
        seen = observe(server, body, bombs, seconds)
        what = f"{count} large PNGs x {ATTACKERS}"
        detail = (
            f"{seen.requests} requests of others, {len(bombs) / 1e6:.1f} MB a body, {seen.healthy:.0%} of /health 200"
        )
        table += [
            Row(f"{what}: others' median", against, seen.median / quiet.median, 10, False, detail),
            Row(f"{what}: others' longest wait, in seconds", against, seen.longest, 2, False, detail),
            Row(f"{what}: memory of the process, in MB", "", seen.memory / 1e6, 600, False, detail),
            Row(f"{what}: others' failed requests", "", seen.failed, 0, False, detail),
        ]
    return table


@dataclass(frozen=True)
class Observation:
    """The requests of another client, the fraction of healthy replies, and the largest memory of a worker process."""

    requests: int
    failed: int
    median: float
    longest: float
    healthy: float
    memory: int


def observe(server: Server, body: bytes, attack: bytes | None, seconds: float) -> Observation:
    ended, healthy, memory = threading.Event(), [], 0

    def send_attacks() -> None:
        while attack and not ended.is_set():
            post(server.port, attack, timeout=PATIENCE)

    attackers = [threading.Thread(target=send_attacks) for _ in range(ATTACKERS)]
    for thread in attackers:
        thread.start()
    with Load(server.port, body, threads=1) as load:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            memory = max([memory, *(psutil.Process(pid).memory_info().rss for pid in server.workers().values())])
            healthy.append(servers.answers(server.port, "/health"))
            time.sleep(0.5)
    ended.set()
    for thread in attackers:
        thread.join()
    waits = [reply.seconds for reply in load.replies]
    return Observation(
        len(waits), load.failed(), statistics.median(waits), max(waits), statistics.mean(healthy), memory
    )
