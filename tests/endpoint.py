"""A real server, of `python -m signdigits serve` or `record`, on a free port."""

import contextlib
import http.client
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conftest import answers, free_port, serve_command, wait_until
from .load import JSON


@dataclass(frozen=True)
class Endpoint:
    """A server that answers."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def said(self) -> str:
        return self.log.read_text()

    def ask(
        self, method: str, target: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, Any]:
        """Return status, headers and content of a reply; JSON is read."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, target, body, dict(headers or {}))
            reply = connection.getresponse()
            content = reply.read()
            return reply.status, reply.headers, json.loads(content) if content.startswith(b"{") else content

    def post(self, body: Any, **headers: str) -> tuple[int, http.client.HTTPMessage, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", "/invocations", body, JSON | named)

    def version(self, body: bytes) -> str:
        """Return the version that answers `body`."""
        status, headers, reply = self.post(body)
        assert status == 200, reply
        return str(headers["Model-Version"])

    def metrics(self) -> dict[str, float]:
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def workers(self) -> list[int]:
        """Return the processes that answer requests."""
        return [pid for pid in descendants(self.process.pid) if "multiprocessing.spawn" in command_line(pid)]


@contextmanager
def serving_endpoint(log: Path, *options: str, cwd: Path | None = None, **environment: str) -> Iterator[Endpoint]:
    """Run a server until the block is left; its output goes to the file `log`."""
    port = free_port()
    line = serve_command(port, "--poll_interval", "0.2", "--start_timeout", "600", *options)
    with log.open("w") as file:
        process = subprocess.Popen(
            line, stdout=file, stderr=file, cwd=cwd, env=os.environ | environment, start_new_session=True
        )
    scheme = "https" if "--certificate" in options else "http"
    endpoint = Endpoint(process, port, log)
    try:
        if scheme == "http":
            wait_until(lambda: answers(f"{endpoint.url}/ping") or process.poll() is not None)
        else:
            wait_until(lambda: "ready after" in endpoint.said() or "is live" in endpoint.said() or process.poll())
        assert process.poll() is None, endpoint.said()
        yield endpoint
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


@contextmanager
def recording(folder: Path, log: Path) -> Iterator[Endpoint]:
    """Run the recorder on a folder until the block is left; its output goes to the file `log`."""
    port = free_port()
    line = [sys.executable, "-m", "signdigits", "record", "--data", folder.name, "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=file, cwd=folder.parent, start_new_session=True)
    endpoint = Endpoint(process, port, log)
    try:
        wait_until(lambda: answers(f"{endpoint.url}/folder.json") or process.poll() is not None)
        assert process.poll() is None, endpoint.said()
        yield endpoint
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@contextmanager
def short_of_space(endpoint: Endpoint) -> Iterator[None]:
    """Let the server write no file of more than 100 bytes."""
    before = resource.prlimit(endpoint.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(endpoint.process.pid, resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.prlimit(endpoint.process.pid, resource.RLIMIT_FSIZE, before)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def descendants(pid: int) -> set[int]:
    """Return the processes below one, without those that are dead and not asked for yet."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, waiting = set(), [pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
