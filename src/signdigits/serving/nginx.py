"""nginx as the reverse proxy of the worker processes: its configuration, from nginx.conf.template, and its folder.

Two pools of workers (blue/green), each behind sockets of its own, are in the configuration; a request is sent to the pool
that the symbolic link `live` points to. A promotion moves the link.
"""

import grp
import json
import os
import pwd
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import jinja2

from signdigits.data import images
from signdigits.errors import UsageError
from signdigits.files import atomic_file
from signdigits.serving.options import KEEP_ALIVE, ServeParameters

POOLS = ("blue", "green")
NO_POOL = "none"
SHADOW = "shadow"  # the upstream of the copies of requests
SETTINGS = Path("artifacts", "settings.json")  # of a model's folder
METRICS = "metrics"  # the folder of the metrics' values

PAGE = Path(__file__).parent / "page"
TEMPLATE = Path(__file__).with_name("nginx.conf.template")

TOKEN = r"[A-Za-z0-9._~+/=-]{16,512}"

# The browser connects the page to no other host, and lets only this page use the camera.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob: mediastream:; object-src 'none'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # revalidated: 304 if it has not changed
}


@dataclass(frozen=True)
class ErrorReply:
    """A reply of nginx itself, in the form of MLflow's errors; `header` is a name and a value for `add_header`."""

    status: int
    code: str
    message: str
    header: str = ""

    @property
    def body(self) -> str:
        return json.dumps({"error_code": self.code, "message": self.message})


def _list_errors(parameters: ServeParameters) -> dict[int, ErrorReply]:
    """Return the error replies by nginx's number of the error; 494 is its own, for headers that are too large."""
    retry = 'Retry-After "1"'
    return {
        400: ErrorReply(400, "BAD_REQUEST", "malformed HTTP; send photographs to /invocations"),
        401: ErrorReply(
            401, "UNAUTHENTICATED", "missing or wrong token; send the header Authorization: Bearer TOKEN",
            'WWW-Authenticate "Bearer"',
        ),
        403: ErrorReply(403, "ENDPOINT_NOT_FOUND", "forbidden; send photographs to /invocations"),
        404: ErrorReply(404, "ENDPOINT_NOT_FOUND", "not found; send photographs to /invocations"),
        405: ErrorReply(405, "BAD_REQUEST", "method not allowed; send photographs to /invocations with POST"),
        411: ErrorReply(411, "BAD_REQUEST", "length required; send the header Content-Length"),
        413: ErrorReply(
            413, "BAD_REQUEST",
            f"the request is larger than {parameters.max_body_mb} MB; send fewer or smaller photographs",
        ),
        414: ErrorReply(414, "BAD_REQUEST", "the URL is too long; send photographs to /invocations, in the body"),
        415: ErrorReply(
            415, "BAD_REQUEST",
            "not JSON; send dataframe_records or dataframe_split, with the header Content-Type: application/json",
        ),
        416: ErrorReply(416, "BAD_REQUEST", "range not satisfiable; send no header Range"),
        429: ErrorReply(
            429, "REQUEST_LIMIT_EXCEEDED",
            "rate limit exceeded; wait, or send many photographs in one request", retry,
        ),
        494: ErrorReply(431, "BAD_REQUEST", "the headers are too large; send fewer and shorter ones"),
        497: ErrorReply(400, "BAD_REQUEST", "plain HTTP sent to an HTTPS port; use https://"),
        500: ErrorReply(500, "INTERNAL_ERROR", "the reverse proxy failed; see its log"),
        # For nginx 501 and 505 are the server's fault; here they are the client's.
        501: ErrorReply(400, "BAD_REQUEST", "unknown Transfer-Encoding; send a Content-Length, or chunked"),
        502: ErrorReply(503, "TEMPORARILY_UNAVAILABLE", "no worker is available; try again in a few seconds", retry),
        505: ErrorReply(400, "BAD_REQUEST", "unknown version of HTTP; use HTTP/1.1"),
        504: ErrorReply(
            504, "DEADLINE_EXCEEDED",
            f"no reply within {parameters.timeout} seconds; send fewer photographs in one request, or try again later",
        ),
    }  # fmt: skip


def socket_path(home: Path, pool: str, number: int) -> Path:
    """Return the Unix socket of a worker; `number` starts at 1."""
    return home / f"{pool}-{number}.sock"


def model_folder(home: Path, version: str) -> Path:
    """Return the folder of the copy of a version's model."""
    return home / f"model-{version}"


def make_home(home: Path) -> None:
    """Create the pools' folders in `home`, and a copy of the page that only nginx's worker processes can read.

    A copy, because these do not run as root, and may have no access to the project's folder.
    """
    for folder in (*POOLS, NO_POOL, METRICS, SHADOW):
        (home / folder).mkdir()
    shutil.copytree(PAGE, home / "page", copy_function=shutil.copyfile)
    for place in (home, *(home / "page").rglob("*"), home / "page"):
        _give_to_workers(place)
    point_live(home, NO_POOL)


def point_live(home: Path, pool: str) -> None:
    """Send all further requests to `pool`."""
    part = home / "live.part"
    part.unlink(missing_ok=True)
    part.symlink_to(pool)
    part.replace(home / "live")  # atomic: there is always a link


def _worker_account() -> pwd.struct_passwd:
    """Return the account of nginx's worker processes when root starts it: Debian's for web servers, or nobody."""
    known = {account.pw_name: account for account in pwd.getpwall()}
    for name in ("www-data", "nginx", "nobody"):
        if name in known:
            return known[name]
    raise UsageError(
        "no account for nginx's workers (www-data, nginx or nobody); start the server as another user than root"
    )


def read_token(path: str) -> str:
    """Return the bearer token in the file at `path`. Raises UsageError if it is not usable."""
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


def render_configuration(parameters: ServeParameters, home: Path, token: str = "") -> str:
    """Return the configuration of an nginx that runs in the foreground and keeps what it writes in `home`."""
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters["path"] = _quote_path
    template = environment.from_string(TEMPLATE.read_text())
    numbers = range(1, parameters.processes + 1)
    return template.render(
        options=parameters,
        home=home,
        user=_worker_user(),
        listen=parameters.address,
        shadow=socket_path(home, SHADOW, 1),
        pools={pool: [socket_path(home, pool, number) for number in numbers] for pool in POOLS},
        keep_alive=KEEP_ALIVE,
        token_pattern=re.sub(r"[.+/=~-]", lambda character: f"[{character[0]}]", token),
        errors=_list_errors(parameters),
        page_headers=PAGE_HEADERS,
    )


def _worker_user() -> str:
    """Return user and group of nginx's worker processes; nothing unless root starts it."""
    if os.geteuid() != 0:
        return ""
    account = _worker_account()
    return f"{account.pw_name} {grp.getgrgid(account.pw_gid).gr_name}"


def write_page_settings(home: Path, parameters: ServeParameters, model: Path) -> None:
    """Write what the page must know: the decoder's limits, whether corrections are taken, and whether `model` reads digits.

    Nothing else of the model, such as the names of its classes: the page is shown without the token.
    """
    settings = {
        "max_bytes": images.MAX_BYTES,
        "media_types": sorted(set(images.FORMATS.values())),
        "takes_corrections": bool(parameters.corrections),
        "reads_digits": _reads_digits(model),
    }
    path = home / "page" / "settings.json"
    with atomic_file(path) as partial_file:
        partial_file.write_text(json.dumps(settings))
        _give_to_workers(partial_file)


def _reads_digits(model: Path) -> bool:
    """Tell whether all classes of the model in the folder are single digits; not so for a model of another kind."""
    try:
        names = json.loads((model / SETTINGS).read_text())["class_names"]
    except (OSError, ValueError, KeyError):
        return False
    return all(re.fullmatch("[0-9]", name) for name in names)


def _give_to_workers(path: Path) -> None:
    """Let nginx's worker processes, which do not run as root, read a file or folder."""
    if os.geteuid() == 0:
        os.chown(path, 0, _worker_account().pw_gid)
        path.chmod(0o750 if path.is_dir() else 0o640)


def _quote_path(path: str) -> str:
    """Return an absolute path as one quoted word of the configuration."""
    escaped = str(Path(path).absolute()).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
