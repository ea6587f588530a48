"""The options of the server, declared as those in config.py."""

import re
from dataclasses import dataclass
from pathlib import Path

from signdigits.config import ALIAS, URL, Checked, NameParameters, parameter
from signdigits.errors import UsageError

# In the server's folder: the versions to serve, a file per process with the one that it serves, and the metrics' values.
LIVE, SHADOW, PROCESSES, METRICS = "live", "shadow", "processes", "metrics"
TOKEN = r"[A-Za-z0-9._~+/=-]{16,512}"


@dataclass(frozen=True)
class ServeParameters(NameParameters):
    """The served model and alias, the address, the processes and the limits of the server."""

    host: str = parameter(
        "127.0.0.1",
        "address to listen on; 0.0.0.0: all interfaces",
        pattern=(r"[0-9A-Za-z:.-]+", "a host name or an address"),
    )
    port: int = parameter(5001, "port to listen on", low=1, high=65_535)
    alias: str = parameter("champion", "alias of the version to serve", pattern=ALIAS)
    supervise: bool = parameter(
        True,
        "restart what exits, and follow the alias; false: serve one version in this process, for a platform that restarts "
        "containers",
    )
    model_uri: str = parameter(
        "", "with supervise=false, URI or folder of the model to serve; empty: the alias's version at the start"
    )
    wait_for_version: bool = parameter(
        False, "wait for the alias while no version has it, for a platform that starts the server first; false: exit"
    )
    shadow: str = parameter(
        "",
        "alias of the version that gets a copy of some requests, such as challenger; its replies are discarded; empty: none",
        pattern=(rf"|{ALIAS[0]}", ALIAS[1]),
    )
    shadow_share: float = parameter(0.1, "fraction of the requests that the shadow gets", above=0, high=1)
    notify: str = parameter(
        "",
        "webhook URL for promotions and refusals (POST, JSON); SIGN_DIGITS_NOTIFY_TOKEN is sent as bearer token",
        pattern=URL,
    )
    processes: int = parameter(1, "processes that answer requests", low=1, high=256)
    poll_interval: float = parameter(2.0, "polling interval of the alias in seconds", above=0)
    start_timeout: float = parameter(120.0, "startup timeout of a version in seconds", above=0)
    timeout: int = parameter(60, "request timeout in seconds", low=1)
    drain_timeout: float = parameter(60.0, "seconds that open requests have to end when the server is stopped", low=0)
    client_timeout: int = parameter(10, "seconds without progress after which a client is disconnected", low=1)
    max_waiting: int = parameter(
        256, "maximum number of requests that wait in a process; further ones are refused at once (503)", low=1
    )
    max_body_mb: int = parameter(64, "maximum size of a request body in megabytes", low=1)
    corrections: str = parameter(
        "",
        "folder of visitors' corrections (photographs with their right labels), for `review`; empty: corrections are off",
    )
    corrections_mb: int = parameter(64, "maximum size in megabytes of the corrections that wait for `review`", low=1)
    token_file: str = parameter("", "file with the bearer token that clients must send; empty: no authentication")
    certificate: str = parameter("", "TLS certificate chain (PEM file)")
    key: str = parameter("", "private key of the certificate (PEM file)")
    access_log: str = parameter("", "access log file, a line of JSON per request; -: standard output; empty: none")
    trusted_proxy: str = parameter(
        "", "addresses or networks, separated by commas, whose X-Forwarded-For names the client; empty: none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.certificate) != bool(self.key):
            raise UsageError(f"certificate={self.certificate!r}, key={self.key!r}: give both, or neither")
        if self.model_uri and self.supervise:
            raise UsageError(
                f"model_uri={self.model_uri!r}: a supervised server follows an alias; pass --supervise false as well"
            )
        if self.shadow and not self.supervise:
            raise UsageError(f"shadow={self.shadow!r}: needs the supervisor; leave out --supervise false")
        if self.processes > 1 and not self.supervise:
            raise UsageError(f"processes={self.processes}: needs the supervisor; leave out --supervise false")

    @property
    def address(self) -> str:
        """Host and port, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://{self.address}"


@dataclass(frozen=True)
class RecordParameters(Checked):
    """The folder that is recorded into, and the port of the page on this machine."""

    data: str = parameter(
        "",
        "folder of class folders to record into; it is created, or continued if it exists",
        pattern=(r"(?s).+", "a folder to record into"),
    )
    port: int = parameter(5002, "port of the page, on the loopback interface", low=1, high=65_535)


def read_token(path: str) -> str:
    """Return the bearer token in the file at `path`, empty without a path. Raises UsageError if it is not usable."""
    if not path:
        return ""
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"token_file={path}: cannot be read ({error}); write a token into it") from error
    if not re.fullmatch(TOKEN, token):
        raise UsageError(
            f"token_file={path}: the token must have 16 or more letters, digits or ._~+/=-; generate one with "
            "python -c 'import secrets; print(secrets.token_hex(24))'"
        )
    return token
