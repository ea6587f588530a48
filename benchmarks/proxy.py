"""The reverse proxy: overhead per request, promotions and kills under load, and saturation."""

import contextlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
from tests.load import Load

from benchmarks import serving
from benchmarks.measure import Row, in_turns, temporary_store, until
from benchmarks.saturation import saturate
from benchmarks.untrained import log_untrained
from signdigits.config import MODEL_NAME, DataParameters
from signdigits.data import loading
from signdigits.serving import processes
from signdigits.serving.options import ServeParameters

PROCESSES = 2
LONGEST = 300.0  # seconds that anything may take
TIMEOUT = ServeParameters().timeout


@dataclass(frozen=True)
class Server:
    """`python -m signdigits serve`, asked with one photograph."""

    process: int
    port: int
    body: bytes

    def endpoints(self) -> dict[Path, int]:
        """The socket and the number of every process that answers."""
        found = {}
        for child in psutil.Process(self.process).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = child.cmdline()
                if "signdigits.serving.worker" in line:
                    found[Path(line[line.index("--uds") + 1])] = child.pid
        return found


def rows(
    photographs: str,
    promotions: int = 50,
    kills: int = 5,
    rounds: int = 200,
    seconds: int = 600,
    connections: int = 200,
    requests: int = 3000,
) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    body = json.dumps({"dataframe_records": [serving.encode(loaded, 0)]}).encode()
    with temporary_store("proxy") as name, contextlib.ExitStack() as servers:
        folder = Path(name)
        uris = [register_model(loaded) for _ in range(2)]
        direct = servers.enter_context(serving.serving(uris[0], folder))
        server = servers.enter_context(started(folder, body))
        found = [added(server, direct, loaded, rounds), *shadow(folder, body, requests)]
        following, median = promote(server, promotions)
        found += following
        found += kill(server, kills, median)
        found += drown(server, folder, seconds, connections)
    return found


def register_model(loaded: loading.Data) -> str:
    """An untrained network as the next version, and its address."""
    uri: str = log_untrained(loaded).model_uri
    mlflow.register_model(uri, MODEL_NAME)
    return uri


def move(version: int) -> None:
    mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, "champion", str(version))


@contextlib.contextmanager
def started(folder: Path, body: bytes, *options: str, workers: int = PROCESSES) -> Iterator[Server]:
    """The server on a free port, version 1 live."""
    move(1)
    port = serving.free_port()
    line = [sys.executable, "-m", "signdigits", "serve", "--port", str(port), "--processes", str(workers), *options]
    environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    log = folder / f"proxy-{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=file, env=environment)
    try:
        until(lambda: serving.answers(port) or process.poll() is not None, LONGEST)
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-2000:])
        yield Server(process.pid, port, body)
    finally:
        process.terminate()
        process.wait()


def added(server: Server, direct: int, loaded: loading.Data, rounds: int) -> Row:
    one = {"dataframe_records": [serving.encode(loaded, 0)]}
    ways = {"proxy": serving.asker(server.port, one), "direct": serving.asker(direct, one)}
    took = {name: seconds * 1000 for name, seconds in in_turns(ways, rounds).items()}
    return Row(
        "proxy overhead for one photograph, median, in ms", "`mlflow models serve`", took["proxy"] - took["direct"],
        0.5, False, f"{took['proxy']:.2f} ms against {took['direct']:.2f} ms",
    )  # fmt: skip


def shadow(folder: Path, body: bytes, requests: int) -> list[Row]:
    """What a shadow that gets a tenth of the requests adds to the latency: two servers, asked in turns."""
    mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, "challenger", "2")
    with contextlib.ExitStack() as stack:
        servers = {
            "without": stack.enter_context(started(folder, body, workers=1)),
            "with": stack.enter_context(started(folder, body, "--shadow", "challenger", workers=1)),
        }
        until(lambda: len(servers["with"].endpoints()) == 2, LONGEST)
        times: dict[str, list[float]] = {name: [] for name in servers}
        request = json.loads(body)
        ways = {name: serving.asker(server.port, request) for name, server in servers.items()}
        for _ in range(requests):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - began)
    quantiles = {name: statistics.quantiles(seconds, n=100) for name, seconds in times.items()}
    found = []
    for what, index, reach in (("median", 49, 1.05), ("99th percentile", 98, 1.1)):
        mine, plain = (quantiles[name][index] * 1000 for name in ("with", "without"))
        said = f"{mine:.2f} ms against {plain:.2f} ms, {requests:,} requests each"
        found.append(Row(f"{what} with a shadow of 10 %", "without", mine / plain, reach, False, said))
    return found


def promote(server: Server, times: int) -> tuple[list[Row], float]:
    """Rows, and the median time from the alias's move to the new version's first reply, in seconds."""
    wrong, took = 0, []
    with Load(server.port, server.body) as load:
        for number in range(times):
            version = str(2 - number % 2)
            start, moved = len(load.replies), time.monotonic()
            move(int(version))
            first = until(lambda version=version, start=start: load.first(version, start), LONGEST)  # type: ignore[misc]
            until(lambda: len(server.endpoints()) == PROCESSES, LONGEST)  # the version before has ended
            took.append(first.came - moved)
            later = [reply for reply in load.replies[start:] if reply.sent > first.came]
            wrong += sum(reply.version not in (version, "") for reply in later)
    said = (
        f"{times} promotions, {len(load.replies):,} requests, {statistics.median(took):.1f} s from alias to first reply"
    )
    return [
        Row("failed requests, promotions under load", "", load.failed(), 0, False, said),
        Row("old versions after the switch", "", wrong, 0, False, said),
    ], statistics.median(took)


def kill(server: Server, times: int, start: float) -> list[Row]:
    """How long a killed process is away, `start` being what the start of a version takes under the same load."""
    away = []
    with Load(server.port, server.body) as load:
        for _ in range(times):
            path, victim = next(iter(server.endpoints().items()))
            killed = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            until(lambda path=path, victim=victim: back(server, path, victim), LONGEST)  # type: ignore[misc]
            away.append(time.monotonic() - killed)
            time.sleep(35)  # one that ends again sooner is made to wait
    slowest = max(reply.seconds for reply in load.replies)
    said = f"{times} killed, {len(load.replies):,} requests"
    return [
        Row("a killed process is back, in its start times", "a version's start", statistics.median(away) / start, 1,
            False, f"{statistics.median(away):.1f} s against {start:.1f} s"),
        Row("failed requests, processes killed under load", "", load.failed(), 0, False, said),
        Row("the slowest request meanwhile, in seconds", "", slowest, TIMEOUT, False, said),
    ]  # fmt: skip


def back(server: Server, path: Path, victim: int) -> bool:
    if server.endpoints().get(path, victim) == victim:
        return False
    try:
        return processes.send_request(path, "GET", "/ping", timeout=1).status == 200
    except (OSError, http.client.HTTPException):
        return False


def drown(server: Server, folder: Path, seconds: int, connections: int) -> list[Row]:
    found = saturate(server.port, server.body, folder, seconds, connections, server.process)
    said = (
        f"{connections} connections, {seconds} s, {found.requests:,} requests, {found.requests_per_second:.0f} a second"
    )
    return [
        Row("errors at saturation", "", found.errors, 0, False, said),
        Row("growth of memory at saturation", "after the first minute", found.growth, 0.05, False, said),
    ]
