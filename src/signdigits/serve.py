"""Serve the champion behind nginx, and follow its alias without downtime (blue/green).

python -m signdigits serve
scripts/serve
"""

import contextlib
import fcntl
import ipaddress
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion

from signdigits.errors import ModelError, UsageError
from signdigits.serving import nginx
from signdigits.serving.options import ServeParameters
from signdigits.serving.processes import worker_command, worker_environment
from signdigits.tracking import registry

log = logging.getLogger(__name__)


def serve(parameters: ServeParameters) -> None:
    """Serve until interrupted. Raises UsageError or ModelError if the server cannot start."""
    with _runtime_folder() as home:
        version = _find_version(parameters, home)
        _check_port(parameters)
        if not (parameters.token_file or is_loopback(parameters.host)):
            log.warning(
                "host=%s: listening without authentication; anyone who can reach this host can send requests",
                parameters.host,
            )
        if program := shutil.which("nginx"):
            _write_configuration(parameters, home)
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(home / "metrics")
            from signdigits.serving import supervisor  # with its metrics, which need the variable

            server = supervisor.Supervisor if parameters.supervise else supervisor.Unsupervised
            server(parameters, program, home).run(version)
            return
    _serve_alone(parameters, version)


def _find_version(parameters: ServeParameters, home: Path) -> ModelVersion:
    """Return the version to serve first, the model of `model_uri` copied to `home`. Raises ModelError if there is none."""
    if parameters.model_uri:
        version = registry.download_version(parameters.model_uri, home / "model")
        (home / "model").rename(nginx.model_folder(home, version.version))
        return version
    version = registry.find_alias(parameters.model_name, parameters.alias)
    if version is None:
        raise ModelError(registry.missing_alias(parameters.model_name, parameters.alias))
    return version


def _write_configuration(parameters: ServeParameters, home: Path) -> None:
    """Write nginx's configuration, which holds the token, and its files. Raises UsageError if a file cannot be read."""
    token = nginx.read_token(parameters.token_file) if parameters.token_file else ""
    for name in ("certificate", "key"):
        file = getattr(parameters, name)
        if file and not os.access(file, os.R_OK):
            raise UsageError(f"{name}={file}: cannot be read")
    nginx.make_home(home)
    configuration = home / "nginx.conf"
    configuration.touch(mode=0o600)
    configuration.write_text(nginx.render_configuration(parameters, home, token))


def _check_port(parameters: ServeParameters) -> None:
    """Raise UsageError unless the port can be listened on."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(parameters.host, parameters.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as nginx does
            probe.bind(address)
    except OSError as error:
        raise UsageError(
            f"{parameters.host}:{parameters.port}: {error.strerror}; stop the process that listens there, or pass another --port or --host"
        ) from error


def is_loopback(host: str) -> bool:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def _serve_alone(parameters: ServeParameters, version: ModelVersion) -> None:
    """Replace this process with a worker, which is all there is without nginx."""
    unsupported = [
        f"{name}={value}"
        for name in ("model_uri", "token_file", "certificate", "requests_per_second", "connections_per_client")
        if (value := getattr(parameters, name))
    ]
    if unsupported:
        raise UsageError(f"{', '.join(unsupported)}: needs nginx; install it (Debian: apt install nginx-light)")
    log.warning(
        "nginx is not installed, or not in PATH: serving version %s on %s without reverse proxy; no page, no limits per client, "
        "and a promotion needs a restart. Debian: apt install nginx-light",
        version.version,
        parameters.url,
    )
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}"))
    os.environ.update(worker_environment(str(version.version)))
    line = [
        *worker_command(str(version.version), folder, parameters),
        "--host",
        parameters.host,
        "--port",
        str(parameters.port),
    ]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    os.execvp(line[0], line)


@contextlib.contextmanager
def _runtime_folder() -> Iterator[Path]:
    """Create a temporary folder for sockets, configuration and nginx's files.

    It is locked, so that systemd's daily cleanup of /tmp leaves it alone.
    """
    with tempfile.TemporaryDirectory(prefix="sign-digits-") as name:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield Path(name).resolve()
        finally:
            os.close(descriptor)
