"""Rolling restarts under load: three servers without supervisor, as pods of a Deployment, behind an nginx as the ingress."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
from tests.load import Load

from benchmarks import serving
from benchmarks.measure import Row, temporary_store, until
from benchmarks.untrained import log_untrained
from signdigits.config import DataParameters
from signdigits.data import loading

SERVERS = 3
LONGEST = 300.0  # seconds that anything may take

# As an ingress: the next pod, where one refuses the connection or closes it.
INGRESS = """
{user}
daemon off;
pid {folder}/ingress.pid;
error_log stderr crit;
events {{}}
http {{
    access_log off;
    client_body_buffer_size 1m;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream pods {{ {servers} keepalive 16; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://pods;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_next_upstream error timeout non_idempotent;
        }}
    }}
}}
"""


def rows(photographs: str, rounds: int = 3) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    body = json.dumps({"dataframe_records": [serving.encode(loaded, 0)]}).encode()
    with temporary_store("rollout") as name, contextlib.ExitStack() as servers:
        folder = Path(name)
        model = mlflow.artifacts.download_artifacts(log_untrained(loaded).model_uri, dst_path=str(folder / "model"))
        pods = [Pod(model, serving.free_port(), folder) for _ in range(SERVERS)]
        for pod in pods:
            servers.callback(pod.stop)
            pod.start()
        port = servers.enter_context(ingress(folder, [pod.port for pod in pods]))
        with Load(port, body) as load:
            for pod in pods * rounds:
                pod.stop()
                pod.start()
    took = [seconds for pod in pods for seconds in pod.starts]
    return [
        Row("failed requests, rolling restarts under load", "", load.failed(), 0, False,
            f"{SERVERS * rounds} restarts of {SERVERS} servers, {len(load.replies):,} requests"),
        Row("from start to first reply, median, in seconds", "", statistics.median(took), 10, False,
            f"{len(took)} starts, {max(took):.1f} s at most, beside the other servers and the load"),
    ]  # fmt: skip


class Pod:
    """A server of one version at a port, started and stopped as a container is."""

    def __init__(self, model: str, port: int, folder: Path) -> None:
        options = ["--supervise", "false", "--model_uri", model, "--port", str(port)]
        self.line = [sys.executable, "-m", "signdigits", "serve", *options]
        self.port, self.log = port, folder / f"{port}.log"
        self.starts: list[float] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        started = time.monotonic()
        with self.log.open("a") as file:
            process = self.process = subprocess.Popen(self.line, stdout=file, stderr=file)
        until(lambda: serving.answers(self.port) or process.poll() is not None, LONGEST)
        if process.poll() is not None:
            raise RuntimeError(self.log.read_text()[-2000:])
        self.starts.append(time.monotonic() - started)

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(LONGEST)


@contextlib.contextmanager
def ingress(folder: Path, ports: list[int]) -> Iterator[int]:
    """An nginx in front of the ports; yields its own."""
    port = serving.free_port()
    servers = " ".join(f"server 127.0.0.1:{other} max_fails=0;" for other in ports)
    user = "" if os.geteuid() else "user root;"  # else its workers could not write to the temporary folder
    (folder / "ingress.conf").write_text(INGRESS.format(user=user, folder=folder, servers=servers, port=port))
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "ingress.conf")])
    try:
        until(lambda: serving.answers(port), LONGEST)
        yield port
    finally:
        process.terminate()
        process.wait()
