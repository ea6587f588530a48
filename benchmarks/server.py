"""The server: promotions, hostile and slow clients, killed processes and restarts, as another client sees them."""

import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from PIL import Image
from tests.conftest import serving, wait_until
from tests.endpoint import Endpoint, descendants, is_alive, serving_endpoint
from tests.load import JSON, Load

from benchmarks import servers
from benchmarks.measure import Row, in_turns, temporary_store
from benchmarks.servers import make_client, make_request
from signdigits.config import DataParameters
from signdigits.data import loading

LARGE = 60_000_000  # bytes of a hostile body; the limit is 64 MB
SECRET = b"OpenSesame0123456789"  # in each hostile body, and in no reply
SLOW_CLIENTS, ABANDONING_CLIENTS = 200, 8
PATIENCE = 5.0  # seconds after which a client abandons its request
# Begin and end of a body whose photograph is whatever is between them.
FRAMES = {
    "/invocations": (b'{"dataframe_records": [{"image": "', b'"}]}'),
    "/corrections": (b'{"image": "', b'", "label": "0"}'),
}


class Others(Load):
    """Two clients that behave, and the largest memory of a process that answers them."""

    def __init__(self, server: Endpoint, body: bytes) -> None:
        super().__init__(server.port, body, 2)
        self.server, self.memory = server, 0
        self.threads.append(threading.Thread(target=self.watch_memory))

    def watch_memory(self) -> None:
        while not self.ended.wait(0.05):
            self.memory = max(self.memory, *measure_memory(self.server))

    @property
    def longest(self) -> float:
        return max(reply.seconds for reply in self.replies)

    def __str__(self) -> str:
        waits = [reply.seconds * 1000 for reply in self.replies]
        return f"{len(waits):,} requests of others, {self.failed()} failed, median {statistics.median(waits):.0f} ms"


class Visitors(Others):
    """The same, with a new connection for each request."""

    def ask(self, connection: http.client.HTTPConnection) -> tuple[int, str]:
        with contextlib.closing(connection):
            return super().ask(connection)


class Retrying(Others):
    """The same; a request whose connection breaks is sent again, over a new connection."""

    def ask(self, connection: http.client.HTTPConnection) -> tuple[int, str]:
        status, version = super().ask(connection)
        return (status, version) if status else super().ask(connection)


def rows(
    photographs: str, promotions: int = 100, rounds: int = 200, seconds: float = 20, hostile: int = 2000, times: int = 5
) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    request = make_request(servers.read_photograph(loaded, 0))
    body = json.dumps(request).encode()
    with temporary_store("server") as name:
        folder = Path(name)
        servers.register_versions(loaded)
        table = [measure_start(folder, body, times)]
        with serve(folder, "--corrections", str(folder / "corrections")) as server:
            table.append(promote_quietly(server, body, 2 * times))
            with serving("models:/sign-digits/1", folder / "mlflow.log") as direct:
                table.append(measure_overhead(server.url, direct, request, rounds))
            table += [row for target in FRAMES for row in send_large_bodies(server, body, target)]
            table += send_slowly(server, body, seconds)
            table += send_hostile_bodies(server, hostile)
        table += promote_under_load(folder, body, promotions)
        table += kill_processes(folder, body, times)
        return table + restart_under_load(folder, body)


@contextlib.contextmanager
def serve(folder: Path, *options: str) -> Iterator[Endpoint]:
    """Run the server in `folder`, which keeps its runtime files, too."""
    servers.promote(1)
    with serving_endpoint(
        folder / "serve.log", "--poll_interval", "1", *options, cwd=folder, TMPDIR=str(folder)
    ) as server:
        yield server


def measure_memory(server: Endpoint) -> list[int]:
    """Return the resident bytes of each process that answers requests."""
    found = [0]
    for pid in server.workers():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            found.append(psutil.Process(pid).memory_info().rss)
    return found


def measure_start(folder: Path, body: bytes, times: int) -> Row:
    taken = []
    for _ in range(times):
        started = time.monotonic()
        with serve(folder) as server:
            server.version(body)
            taken.append(time.monotonic() - started)
    detail = f"{times} starts, {max(taken):.1f} s at most"
    return Row("from start to first reply, median, in seconds", "", statistics.median(taken), 4, False, detail)


def promote_quietly(server: Endpoint, body: bytes, times: int) -> Row:
    taken = []
    for number in range(times):
        version = 2 - number % 2
        time.sleep(random.random())  # at any time between two looks
        moved = time.monotonic()
        servers.promote(version)
        wait_until(lambda version=version: server.version(body) == str(version), interval=0.02)  # type: ignore[misc]
        taken.append(time.monotonic() - moved)
    detail = f"{times} promotions, median {statistics.median(taken):.1f} s"
    return Row("promotion, from alias to first reply, longest, in seconds", "", max(taken), 2, False, detail)


def measure_overhead(url: str, direct: str, request: dict[str, object], rounds: int) -> Row:
    ways = {"ours": make_client(url, request), "direct": make_client(direct, request)}
    taken = {name: seconds * 1000 for name, seconds in in_turns(ways, rounds).items()}
    detail = f"{taken['ours']:.2f} ms against {taken['direct']:.2f} ms"
    overhead = taken["ours"] - taken["direct"]
    return Row("one photograph, median, in ms beyond", "`mlflow models serve`", overhead, 0.5, False, detail)


def promote_under_load(folder: Path, body: bytes, times: int) -> list[Row]:
    """Move the alias between two versions, and look for failed requests and late replies of the replaced version."""
    wrong, taken = 0, []
    servers.promote(2, "challenger")
    with serve(folder, "--shadow", "challenger") as server:
        wait_until(lambda: "as a shadow" in server.said())
        before = max(measure_memory(server))
        with Others(server, body) as load:
            for number in range(times):
                version = str(2 - (number + 1) % 2)
                start, moved = len(load.replies), time.monotonic()
                servers.promote(int(version))
                first = wait_until(
                    lambda version=version, start=start: load.first(version, start),  # type: ignore[misc]
                    interval=0.02,
                )
                assert first
                time.sleep(0.5)
                taken.append(first.came - moved)
                later = [reply for reply in load.replies[start:] if reply.sent > first.came]
                wrong += sum(reply.version not in (version, "") for reply in later)
        after = max(measure_memory(server))
    detail = f"{times} promotions with a shadow, {load}, {statistics.median(taken):.1f} s from alias to first reply"
    return [
        Row("promotions under load: failed requests", "", load.failed(), 0, False, detail),
        Row("promotions under load: replies of the replaced version", "", wrong, 0, False, detail),
        Row("promotions under load: a client's longest wait, in seconds", "", load.longest, 0.5, False, detail),
        Row(
            "memory of the process during them, in MB", "", load.memory / 1e6, 300, False, f"{before / 1e6:.0f} before"
        ),
        Row("memory of the process after them, in MB", "", after / 1e6, 300, False, ""),
    ]


def send_large_bodies(server: Endpoint, body: bytes, target: str) -> list[Row]:
    """Send one body of 60 MB of each kind, and return the rows of the worst."""
    head, end = FRAMES[target]
    kinds = {
        "empty lists": lambda: b"[" + b"[]," * (LARGE // 3) + b"[]]",
        "spaces": lambda: b" " * LARGE + body,
        "empty rows": lambda: b'{"dataframe_records": [' + b"{}," * (LARGE // 3) + b"{}]}",
        "escapes": lambda: head + b"\\n" * (LARGE // 2) + end,
        "no base64": lambda: head + b"-" * LARGE + end,
        "base64": lambda: head + b"QUJD" * (LARGE // 4) + end,
        "a number": lambda: b'{"dataframe_records": ' + b"9" * LARGE + b"}",
    }
    longest, memory, failed = {}, {}, 0
    for kind, make in kinds.items():
        large = make()
        with Others(server, body) as load:
            time.sleep(1)
            status, _ = post(server.port, large, target=target)
            time.sleep(1)
        longest[f"{kind} ({status})"], memory[kind] = load.longest, load.memory
        failed += load.failed()
    worst, heaviest = max(longest, key=longest.__getitem__), max(memory, key=memory.__getitem__)
    detail = ", ".join(f"{kind} {wait:.2f} s" for kind, wait in longest.items()) + f"; {failed} failed"
    what = f"one body of 60 MB to {target}"
    return [
        Row(f"{what}: others' longest wait, in seconds", "", longest[worst], 1, False, detail),
        Row(f"{what}: memory of the process, in MB", "", memory[heaviest] / 1e6, 600, False, heaviest),
    ]


def post(port: int, body: bytes, timeout: float = 70, target: str = "/invocations") -> tuple[int, bytes]:
    """Return status and content of the reply; 0 if none comes."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)) as connection:
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # rejected before all was sent
                connection.request("POST", target, body, JSON)
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            return 0, b""


def send_slowly(server: Endpoint, body: bytes, seconds: float) -> list[Row]:
    """Observe other clients beside large requests that are abandoned, slow heads and slow bodies."""
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    attacks = {
        "nothing": lambda ended: None,
        f"{ABANDONING_CLIENTS} abandoned requests, 100 large PNGs each": lambda ended: abandon(server, 100, ended),
        f"{ABANDONING_CLIENTS} abandoned requests, 4 large PNGs each": lambda ended: abandon(server, 4, ended),
        f"{SLOW_CLIENTS} slow heads": lambda ended: drip(server, head + b"X: ", ended),
        f"{SLOW_CLIENTS} slow bodies": lambda ended: drip(server, head + b"Content-Length: 9999\r\n\r\n{", ended),
        f"{SLOW_CLIENTS} slow bodies, of which each has sent 1 MB": lambda ended: drip(
            server, head + b"Content-Length: 2000000\r\n\r\n" + b"a" * 1_000_000, ended
        ),
    }  # fmt: skip
    table: list[Row] = []
    quiet = 0.0
    for what, attack in attacks.items():
        ended = threading.Event()
        attacker = threading.Thread(target=attack, args=(ended,))
        with Others(server, body) as load:
            attacker.start()
            time.sleep(seconds)
        ended.set()
        attacker.join()
        quiet = quiet or load.longest
        detail = f"{load}, memory {load.memory / 1e6:.0f} MB"
        against = f"{quiet:.2f} s quiet"
        table.append(Row(f"{what}: others' longest wait, in seconds", against, load.longest, 1, False, detail))
        table.append(Row(f"{what}: others' failed requests", "", load.failed(), 0, False, detail))
    return table


def abandon(server: Endpoint, count: int, ended: threading.Event) -> None:
    """Send PNG files of 7,000 x 7,000 pixels and 80 KB, `count` in a request, and disconnect before the reply."""
    buffer = io.BytesIO()
    Image.new("L", (7000, 7000), 90).save(buffer, "PNG")
    bombs = json.dumps(make_request(*[buffer.getvalue()] * count)).encode()

    def send() -> None:
        while not ended.is_set():
            post(server.port, bombs, timeout=PATIENCE)

    threads = [threading.Thread(target=send) for _ in range(ABANDONING_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def drip(server: Endpoint, start: bytes, ended: threading.Event) -> None:
    """Begin requests, and continue each with a byte a second; a client that is disconnected begins again."""
    clients: list[socket.socket | None] = [None] * SLOW_CLIENTS
    while not ended.is_set():
        for number, client in enumerate(clients):
            try:
                if client is None:
                    client = clients[number] = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
                    client.sendall(start)
                client.sendall(b"a")
            except OSError:
                clients[number] = None
        ended.wait(1)
    for client in filter(None, clients):
        client.close()


def send_hostile_bodies(server: Endpoint, count: int) -> list[Row]:
    """Send bodies of all sizes up to the limit, and look at the replies."""
    numbers, longest, repeated, statuses = random.Random(0), 0, 0, set()
    for _ in range(count):
        status, content = post(server.port, make_hostile_body(numbers), target=numbers.choice([*FRAMES]))
        longest = max(longest, len(content))
        repeated += SECRET[:10] in content
        statuses.add(status)
    detail = f"statuses {sorted(statuses)}"
    return [
        Row(f"longest reply to {count:,} hostile bodies, in KB", "", longest / 1000, 1, False, detail),
        Row("replies to them that repeat a secret of the request", "", repeated, 0, False, detail),
    ]


def make_hostile_body(numbers: random.Random) -> bytes:
    size = int(10 ** numbers.uniform(2, 7.79))  # to 62 MB
    text = SECRET * (size // len(SECRET) + 1)
    head, end = FRAMES[numbers.choice([*FRAMES])]
    kinds: list[Callable[[], bytes]] = [
        lambda: SECRET + numbers.randbytes(size),
        lambda: text,
        lambda: b'"' + text + b'"',
        lambda: b'"' + text + b"\xff",
        lambda: head + text,
        lambda: head + text + end,
        lambda: head + text + b"\xff" + end,
        lambda: b'{"dataframe_records": [{"' + text + b'": 1}]}',
        lambda: b'{"' + text + b'": 1}',
        lambda: b'{"image": 1, "label": "' + text + b'"}',
        lambda: b'{"dataframe_split": {"columns": ["' + text + b'"], "data": []}}',
        lambda: b'{"dataframe_records": [' + b'{"image": ""},' * (size // 14) + b"{}]}",
        lambda: b"[" * size,
        lambda: b'{"dataframe_records": ' + b"9" * size + b"}",
        lambda: b'{"inputs": "' + text + b'"}',
        lambda: b'{"dataframe_records": [{"image": "x"}], "params": {"' + text + b'": 1}}',
    ]
    return numbers.choice(kinds)()


def kill_processes(folder: Path, body: bytes, times: int) -> list[Row]:
    """Kill each process below the server's parent under load."""
    taken: dict[str, list[float]] = {"answering": [], "other": []}
    with serve(folder, "--processes", "2") as server, Retrying(server, body) as load:
        answering = next(folder.glob("sign-digits-*/processes"))  # a file for each process that answers

        def are_back() -> bool:
            pids = server.workers()
            return len(pids) == 2 and {str(pid) for pid in pids} <= {file.name for file in answering.iterdir()}

        for _ in range(times):
            for victim in sorted(descendants(server.process.pid)):
                if not is_alive(victim):
                    continue
                kind = "answering" if victim in server.workers() else "other"
                killed = time.monotonic()
                os.kill(victim, signal.SIGKILL)
                wait_until(lambda victim=victim: not is_alive(victim) and are_back(), interval=0.02)  # type: ignore[misc]
                taken[kind].append(time.monotonic() - killed)
        servers.promote(2)
        wait_until(lambda: {server.version(body) for _ in range(8)} == {"2"})
    kills = ", ".join(f"{len(found)} of {kind} processes" for kind, found in taken.items())
    detail = f"kills: {kills}; {load}; then a promotion succeeds"
    median = f"median {statistics.median(taken['answering']):.1f} s"
    return [
        Row("kill -9 of a process, two of them: requests that fail twice", "", load.failed(), 0, False, detail),
        Row("kill -9: a client's longest wait, in seconds", "", load.longest, 1, False, detail),
        Row(
            "kill -9: longest time until all are back, in seconds", "", max(map(max, taken.values())), 5, False, median
        ),
    ]


def restart_under_load(folder: Path, body: bytes) -> list[Row]:
    """Replace the token, then the server, under requests with a connection each; those without the token are refused."""
    token = folder / "token"
    token.write_text("first-token-0123456789")
    with serve(folder, "--token_file", str(token)) as server:

        def status(secret: str) -> int:
            return server.post(body, Authorization=f"Bearer {secret}")[0]

        with Visitors(server, body) as load:
            token.write_text("other-token-0123456789")
            started = time.monotonic()
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: status("other-token-0123456789") == 200 and status("first-token-0123456789") == 401)
            seconds = time.monotonic() - started
            time.sleep(1)
        table = [make_row("new token with SIGHUP", load, seconds)]
        with Visitors(server, body) as load, (folder / "new.log").open("w") as file:
            started = time.monotonic()
            new = subprocess.Popen(server.process.args, stdout=file, stderr=file, cwd=folder)
            server.process.wait(120)
            seconds = time.monotonic() - started
            time.sleep(1)
            load.ended.set()
        new.terminate()
        new.wait(60)
    return [*table, make_row("new server on the same port", load, seconds)]


def make_row(what: str, load: Load, seconds: float) -> Row:
    refused = sum(reply.status == 0 for reply in load.replies)
    detail = f"{len(load.replies):,} connections, {seconds:.1f} s"
    return Row(f"{what}: refused or broken connections", "", refused, 0, False, detail)
