"""Rude clients and a registry that is away: hostile bodies, decompression bombs, and promotions during an outage."""

import base64
import contextlib
import http.client
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
from PIL import Image
from tests.load import JSON, Load

from benchmarks import proxy, serving
from benchmarks.measure import Row, temporary_store, until
from signdigits.config import DataParameters
from signdigits.data import loading

LIMIT = 64_000_000  # bytes of a body
ATTACKERS, GIVE_UP = 8, 5.0  # clients, and the seconds after which each goes away


def rows(
    photographs: str, hostile: int = 2000, seconds: float = 60, outages: int = 10, outage: float = 60
) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    body = json.dumps({"dataframe_records": [serving.encode(loaded, 0)]}).encode()
    with temporary_store("attack") as name:
        for _ in range(2):
            proxy.register_model(loaded)
        with proxy.started(Path(name), body, workers=1) as server:
            found = [send_hostile_bodies(server.port, hostile), *send_bombs(server, seconds)]
        return [*found, interrupt_registry(Path(name), body, outages, outage)]


def send_hostile_bodies(port: int, count: int) -> Row:
    """Send bodies of all sizes up to the limit, and return the row of the longest reply."""
    numbers, longest, statuses = random.Random(0), 0, set()
    for _ in range(count):
        status, content = post(port, hostile_body(numbers))
        longest = max(longest, len(content))
        statuses.add(status)
    said = f"statuses {sorted(statuses)}"
    return Row(f"longest reply to {count:,} hostile bodies, in KB", "", longest / 1024, 8, False, said)


def hostile_body(numbers: random.Random) -> bytes:
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
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent
                connection.request("POST", "/invocations", body, JSON)
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            return 0, b""


def bombs(count: int, side: int = 7000) -> bytes:
    """Return a request with `count` PNG files of `side` x `side` pixels, of 80 KB each."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 90).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    return json.dumps({"dataframe_records": [{"image": image}] * count}).encode()


def send_bombs(server: proxy.Server, seconds: float) -> list[Row]:
    """Measure other clients, health and memory while some send bombs and give up: too many pixels, and just few enough."""
    quiet = observe(server, [], min(seconds, 20))
    found = []
    for what, body in {"100 large PNGs": bombs(100), "4 large PNGs": bombs(4)}.items():
        seen = observe(server, [body] * ATTACKERS, seconds)
        said = (
            f"{len(seen.waits)} requests of others, {len(body) / 1e6:.1f} MB a body, {seen.healthy:.0%} of /health 200"
        )
        against = f"{statistics.median(quiet.waits) * 1000:.1f} ms quiet"
        slower = statistics.median(seen.waits) / statistics.median(quiet.waits)
        found += [
            Row(f"{what} x {ATTACKERS}: others' median", against, slower, 10, False, said),
            Row(f"{what} x {ATTACKERS}: others' longest wait, in s", against, max(seen.waits), 2, False, said),
            Row(f"{what} x {ATTACKERS}: memory of the process, in MB", "", seen.memory / 1e6, 600, False, said),
            Row(f"{what} x {ATTACKERS}: others' failed requests", "", seen.failed, 0, False, said),
        ]
    return found


class Observation:
    """Waits of other clients, the share of healthy replies, the largest memory of the worker process, failed requests."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.healthy = 1.0
        self.memory = self.failed = 0


def observe(server: proxy.Server, bodies: list[bytes], seconds: float) -> Observation:
    ended, seen, healths = threading.Event(), Observation(), []

    def attack(body: bytes) -> None:
        while not ended.is_set():
            post(server.port, body, timeout=GIVE_UP)

    attackers = [threading.Thread(target=attack, args=(body,)) for body in bodies]
    for thread in attackers:
        thread.start()
    with Load(server.port, server.body, threads=1) as load:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            seen.memory = max(seen.memory, max(map(memory_of, server.endpoints().values()), default=0))
            healths.append(serving.answers(server.port, "/health"))
            time.sleep(0.5)
    ended.set()
    for thread in attackers:
        thread.join()
    seen.waits = [reply.seconds for reply in load.replies]
    seen.failed, seen.healthy = load.failed(), statistics.mean(healths)
    return seen


def memory_of(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def interrupt_registry(folder: Path, body: bytes, times: int, seconds: float) -> Row:
    """Move the alias, kill the registry at a random moment of the promotion, and start it again after `seconds`."""
    numbers, lost, failed, refused = random.Random(0), 0, 0, 0
    port = serving.free_port()
    local = mlflow.get_tracking_uri()
    with contextlib.ExitStack() as stack:
        tracking = stack.enter_context(tracking_server(folder, local, port))
        mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
        server = stack.enter_context(proxy.started(folder, body, workers=1))
        for number in range(times):
            version = str(2 - number % 2)
            with Load(server.port, server.body, threads=1) as load:
                proxy.move(int(version))
                time.sleep(numbers.uniform(0, 8))
                os.killpg(tracking.pid, signal.SIGKILL)
                tracking.wait()
                time.sleep(seconds)
                tracking = stack.enter_context(tracking_server(folder, local, port))
                try:
                    until(lambda load=load, version=version: load.replies[-1].version == version, 180)  # type: ignore[misc]
                except RuntimeError:
                    lost += 1
                failed += load.failed()
        tags = mlflow.MlflowClient().get_model_version(proxy.MODEL_NAME, version).tags
        refused = tags.get("serving_state") == "refused"
    said = f"{times} outages of {seconds:.0f} s, {failed} failed requests, refused: {refused}"
    return Row("promotions lost to a registry that is away", "", lost, 0, False, said)


@contextlib.contextmanager
def tracking_server(folder: Path, store: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    line = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        store,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    with (folder / "tracking.log").open("a") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: serving.answers(port, "/health") or process.poll() is not None, proxy.LONGEST)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
