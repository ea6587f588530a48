"""A load that saturates an endpoint, and its memory during it."""

import re
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local file = io.open("{body}", "rb")
wrk.body = file:read("*a")
"""


@dataclass(frozen=True)
class Saturation:
    """What `wrk` says, and how the memory grew after the first minute, as a share of it."""

    errors: int
    requests: int
    requests_per_second: float
    growth: float


def saturate(port: int, body: bytes, folder: Path, seconds: int, connections: int, server: int) -> Saturation:
    """All that `connections` connections can ask in so many seconds, with the memory of `server`, a process, watched."""
    program = shutil.which("wrk")
    if program is None:
        raise RuntimeError("no wrk to make the load with; install it (Debian: apt install wrk)")
    (folder / "body.json").write_bytes(body)
    (folder / "wrk.lua").write_text(SCRIPT.format(body=folder / "body.json"))
    line = [program, "-t2", f"-c{connections}", f"-d{seconds}s", "--timeout", "120s", "-s", str(folder / "wrk.lua")]
    started = time.monotonic()
    wrk = subprocess.Popen([*line, f"http://127.0.0.1:{port}/invocations"], stdout=subprocess.PIPE, text=True)
    samples: list[tuple[float, int]] = []
    while wrk.poll() is None:
        samples.append((time.monotonic() - started, memory(server)))
        time.sleep(1)
    assert wrk.stdout is not None
    told = wrk.stdout.read()
    errors = sum(map(int, re.findall(r"(?:connect|read|write|timeout|responses:) (\d+)", told)))
    requests, rate = re.search(r"(\d+) requests in", told), re.search(r"Requests/sec:\s+([\d.]+)", told)
    if wrk.returncode or requests is None or rate is None:
        raise RuntimeError(f"wrk failed: {told}")
    minute = min(60, seconds / 2)
    # A sample is a moment: one between two requests, or in the middle of forty.
    early = [taken for when, taken in samples if minute <= when < minute * 1.5]
    late = [taken for when, taken in samples if when > seconds - minute / 2]
    growth = statistics.median(late) / statistics.median(early) - 1
    return Saturation(errors, int(requests[1]), float(rate[1]), growth)


def memory(server: int) -> int:
    """What the processes below `server` hold, in bytes."""

    def held(process: psutil.Process) -> int:
        try:
            return int(process.memory_info().rss)
        except psutil.Error:  # ended meanwhile
            return 0

    return sum(map(held, psutil.Process(server).children(recursive=True)))
