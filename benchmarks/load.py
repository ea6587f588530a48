"""The endpoint under load: proxy overhead, a shadow, promotions, rolling restarts and saturation.

Needs nginx, and wrk for the saturation.
"""

import contextlib
import json
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import mlflow
from tests.load import Load

from benchmarks import servers
from benchmarks.measure import Row, in_turns, temporary_store
from benchmarks.servers import Server, make_client, make_request, wait_until
from signdigits.config import DataParameters
from signdigits.data import loading

PROCESSES = 2
PODS = 3
WRK = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local file = io.open("{body}", "rb")
wrk.body = file:read("*a")
"""


def rows(
    photographs: str,
    rounds: int = 200,
    requests: int = 3000,
    promotions: int = 50,
    restarts: int = 3,
    seconds: int = 600,
    connections: int = 200,
) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    photograph = servers.read_photograph(loaded, 0)
    body = json.dumps(make_request(photograph)).encode()
    with temporary_store("load") as name:
        folder = Path(name)
        servers.register_versions(loaded)
        table = measure_shadow(folder, photograph, requests)
        with servers.serve(folder, "--processes", str(PROCESSES)) as server:
            with servers.serve_with_mlflow("models:/sign-digits/1", folder) as direct:
                table.append(measure_overhead(server, direct, photograph, rounds))
            table += promote_under_load(server, body, promotions)
            table += saturate(server, body, folder, seconds, connections)
        return table + restart_pods(body, folder, restarts)


def measure_overhead(server: Server, direct: int, photograph: bytes, rounds: int) -> Row:
    request = make_request(photograph)
    ways = {"proxy": make_client(server.port, request), "direct": make_client(direct, request)}
    taken = {name: seconds * 1000 for name, seconds in in_turns(ways, rounds).items()}
    detail = f"{taken['proxy']:.2f} ms against {taken['direct']:.2f} ms"
    overhead = taken["proxy"] - taken["direct"]
    return Row(
        "proxy overhead for one photograph, median, in ms", "`mlflow models serve`", overhead, 0.5, False, detail
    )


def measure_shadow(folder: Path, photograph: bytes, requests: int) -> list[Row]:
    """Compare the latency of two servers, one of them with a shadow that gets a tenth of the requests."""
    servers.promote(2, "challenger")
    with servers.serve(folder) as plain, servers.serve(folder, "--shadow", "challenger") as shadowed:
        wait_until(lambda: len(shadowed.workers()) == 2)
        ways = {
            name: make_client(one.port, make_request(photograph))
            for name, one in (("with", shadowed), ("without", plain))
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(requests):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - started)
    percentiles = {name: statistics.quantiles(values, n=100) for name, values in times.items()}
    table = []
    for what, index, target in (("median", 49, 1.05), ("99th percentile", 98, 1.1)):
        slow, fast = (percentiles[name][index] * 1000 for name in ("with", "without"))
        detail = f"{slow:.2f} ms against {fast:.2f} ms, {requests:,} requests each"
        table.append(Row(f"{what} with a shadow of 10 %", "without", slow / fast, target, False, detail))
    return table


def promote_under_load(server: Server, body: bytes, times: int) -> list[Row]:
    """Move the alias between two versions, and look for failed requests and late replies of the replaced version."""
    wrong, taken = 0, []
    with Load(server.port, body) as load:
        for number in range(times):
            version = str(2 - number % 2)
            start, moved = len(load.replies), time.monotonic()
            servers.promote(int(version))
            first = wait_until(lambda version=version, start=start: load.first(version, start))  # type: ignore[misc]
            wait_until(lambda: len(server.workers()) == PROCESSES)  # the replaced version has ended
            taken.append(first.came - moved)
            later = [reply for reply in load.replies[start:] if reply.sent > first.came]
            wrong += sum(reply.version not in (version, "") for reply in later)
    median = statistics.median(taken)
    detail = f"{times} promotions, {len(load.replies):,} requests, {median:.1f} s from alias to first reply"
    return [
        Row("failed requests, promotions under load", "", load.failed(), 0, False, detail),
        Row("replies of the replaced version after the switch", "", wrong, 0, False, detail),
    ]


def saturate(server: Server, body: bytes, folder: Path, seconds: int, connections: int) -> list[Row]:
    """Send as many requests as the connections allow, with wrk, and watch the memory of the server."""
    program = shutil.which("wrk")
    if program is None:
        raise RuntimeError("wrk is not installed (Debian: apt install wrk)")
    (folder / "body.json").write_bytes(body)
    (folder / "wrk.lua").write_text(WRK.format(body=folder / "body.json"))
    line = [program, "-t2", f"-c{connections}", f"-d{seconds}s", "--timeout", "120s", "-s", str(folder / "wrk.lua")]
    started = time.monotonic()
    wrk = subprocess.Popen([*line, f"http://127.0.0.1:{server.port}/invocations"], stdout=subprocess.PIPE, text=True)
    samples: list[tuple[float, int]] = []
    while wrk.poll() is None:
        samples.append((time.monotonic() - started, server.memory()))
        time.sleep(1)
    assert wrk.stdout is not None
    output = wrk.stdout.read()
    errors = sum(map(int, re.findall(r"(?:connect|read|write|timeout|responses:) (\d+)", output)))
    requests, rate = re.search(r"(\d+) requests in", output), re.search(r"Requests/sec:\s+([\d.]+)", output)
    if wrk.returncode or requests is None or rate is None:
        raise RuntimeError(f"wrk failed: {output}")
    minute = min(60, seconds / 2)
    early = statistics.median(used for when, used in samples if minute <= when < minute * 1.5)
    late = statistics.median(used for when, used in samples if when > seconds - minute / 2)
    detail = f"{connections} connections, {seconds} s, {int(requests[1]):,} requests, {float(rate[1]):.0f} a second"
    return [
        Row("errors at saturation", "", errors, 0, False, detail),
        Row("memory growth at saturation", "after the first minute", late / early - 1, 0.05, False, detail),
    ]


def restart_pods(body: bytes, folder: Path, rounds: int) -> list[Row]:
    """Restart servers without a supervisor one by one, as a Deployment does with its pods."""
    model = mlflow.artifacts.download_artifacts("models:/sign-digits/1", dst_path=str(folder / "model"))
    pods = {servers.free_port(): contextlib.ExitStack() for _ in range(PODS)}
    starts: list[float] = []

    def restart(port: int) -> None:
        pods[port].close()
        started = time.monotonic()
        pods[port].enter_context(servers.serve(folder, "--supervise", "false", "--model_uri", model, port=port))
        starts.append(time.monotonic() - started)

    with contextlib.ExitStack() as stack:
        for port, pod in pods.items():
            stack.enter_context(pod)
            restart(port)
        first, *others = pods
        with Load(first, body, more_ports=others) as load:
            for port in [*pods] * rounds:
                restart(port)
    detail = f"{PODS * rounds} restarts of {PODS} servers, {len(load.replies):,} requests"
    slowest = f"{len(starts)} starts, {max(starts):.1f} s at most, beside the other servers and the load"
    return [
        Row("failed requests, rolling restarts under load", "", load.failed(), 0, False, detail),
        Row("from start to first reply, median, in seconds", "", statistics.median(starts), 10, False, slowest),
    ]
