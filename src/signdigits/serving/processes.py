"""Child processes of the supervisor, and HTTP over their Unix sockets."""

import collections
import contextlib
import ctypes
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from signdigits.packaging import prediction_log
from signdigits.serving.options import KEEP_ALIVE, ServeParameters
from signdigits.startup import NOISE

PR_SET_CHILD_SUBREAPER = 36  # from Linux' prctl.h
TAIL = 200  # last lines of output kept, for the reason of a failure


def adopt_orphans() -> None:
    """Make this process the subreaper of its descendants, so that it sees their end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def worker_command(version: str, folder: Path, parameters: ServeParameters) -> list[str]:
    """Return the command of a worker process that serves the model in `folder`; without an address."""
    limits: dict[str, object] = {
        "timeout": parameters.timeout,
        "max_waiting": parameters.max_waiting,
        "keep_alive": KEEP_ALIVE + 15,
    }
    if parameters.corrections:
        limits |= {"corrections": parameters.corrections, "corrections_mb": parameters.corrections_mb}
    options = [text for name, value in limits.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "signdigits.serving.worker", "--model", str(folder), "--version", version, *options]


def worker_environment(version: str) -> dict[str, str]:
    return {"MLFLOW_LOGGING_LEVEL": "WARNING", prediction_log.VERSION: version}  # a model does not know its own version


class Process:
    """A command in its own session, which Ctrl-C does not reach, and which dies with this process.

    Its output is forwarded to standard error, without start-up noise. Start it in the main thread: for Linux, the end of
    the starting thread is the end of the parent.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.started = time.monotonic()
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "signdigits.serving.die_with_parent", str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            text=True,
            errors="replace",
        )
        threading.Thread(target=self.forward_output, args=(self.popen.stdout,), daemon=True).start()

    def forward_output(self, output: IO[str]) -> None:
        for line in output:
            if not re.search(NOISE, line):
                self.tail.append(line.rstrip())
                with contextlib.suppress(OSError):  # standard error is closed
                    print(f"{self.name}: {line.rstrip()}", file=sys.stderr, flush=True)

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def exit_reason(self) -> str:
        """Return the reason for the exit: the signal, the last error, or the last line of output."""
        if self.popen.returncode and self.popen.returncode < 0:
            return f"killed by signal {-self.popen.returncode}"
        errors = [line for line in self.tail if re.match(r"[\w.]*(Error|Exception)\b", line)]
        lines = errors or self.tail or [f"exit code {self.popen.returncode} without output"]
        return lines[-1].strip()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and its descendants."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def has_exited(self) -> bool:
        """Tell whether the process and all its descendants have exited."""
        if self.running:
            return False
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-self.popen.pid, os.WNOHANG)  # adopted descendants
        try:
            os.killpg(self.popen.pid, 0)  # signal 0 only checks
        except ProcessLookupError:
            return True
        return False


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    content: bytes


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def send_request(
    path: Path,
    method: str,
    target: str,
    body: bytes | None = None,
    timeout: float = 60,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Send a request to the server at a Unix socket. Raises OSError or HTTPException if it does not reply."""
    with contextlib.closing(UnixConnection(path, timeout)) as connection:
        content_type = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, target, body, {**content_type, **(headers or {})})
        reply = connection.getresponse()
        return Reply(reply.status, dict(reply.getheaders()), reply.read())
