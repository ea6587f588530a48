"""Serve the champion with its page, and follow its alias without downtime.

python -m signdigits serve
scripts/serve
"""

import contextlib
import fcntl
import ipaddress
import logging
import os
import resource
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from signdigits.errors import UsageError
from signdigits.serving import handover
from signdigits.serving.options import METRICS, PROCESSES, ServeParameters, read_token

log = logging.getLogger(__name__)

LONGEST_FOLDER = 70  # characters of TMPDIR: multiprocessing listens at a socket below it, whose path may have 107
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client


def check(parameters: ServeParameters) -> None:
    """Say where the server will be. Raises UsageError if a file cannot be read, or the port cannot be listened on."""
    read_token(parameters.token_file)
    if parameters.certificate:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(parameters.certificate, parameters.key)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(
                f"certificate={parameters.certificate}, key={parameters.key}: {error.strerror or error}; give the PEM files of "
                "one pair"
            ) from error
    if taken := handover.take_socket(parameters.address):
        for connection in taken:
            connection.close()
    else:
        listen(parameters).close()
    log.info("starting on %s%s", parameters.url, ", in place of the server that runs there" if taken else "")
    if not (parameters.token_file or is_loopback(parameters.host)):
        log.warning(
            "host=%s: listening without authentication; anyone who can reach it can send requests", parameters.host
        )


def serve(parameters: ServeParameters) -> None:
    """Serve until interrupted. Raises UsageError or ModelError if the server cannot start."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection is a file
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # in the processes that answer
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")  # there, glibc gives back what a large body took
    if len(tempfile.gettempdir()) > LONGEST_FOLDER:
        tempfile.tempdir = "/tmp"
    with _runtime_folder() as home:
        from signdigits.serving import server  # with its metrics, which need the folder's variable

        taken = handover.take_socket(parameters.address)
        listening, former = taken or (listen(parameters), None)
        with listening:
            run = server.run_supervised if parameters.supervise else server.run_one
            run(parameters, home, listening, former)
    log.info("stopped")


def listen(parameters: ServeParameters) -> socket.socket:
    """Return a listening socket. Raises UsageError if there is none to be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(parameters.host, parameters.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise UsageError(
            f"{parameters.address}: {error.strerror}; stop the process that listens there, or pass another --port or --host"
        ) from error
    return listening


def is_loopback(host: str) -> bool:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


@contextlib.contextmanager
def _runtime_folder() -> Iterator[Path]:
    """Create a temporary folder for the copies of models, and for what the processes tell each other.

    It is locked, so that systemd's daily cleanup of /tmp leaves it alone.
    """
    with tempfile.TemporaryDirectory(prefix="sign-digits-") as name:
        home = Path(name).resolve()
        for folder in (METRICS, PROCESSES):
            (home / folder).mkdir()
        os.environ[METRICS_VARIABLE] = str(home / METRICS)
        descriptor = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield home
        finally:
            os.close(descriptor)
            del os.environ[METRICS_VARIABLE]
