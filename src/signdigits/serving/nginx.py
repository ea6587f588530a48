"""The front: nginx before the processes that answer, its configuration made from the parameters.

Two pools of processes, each behind sockets of its own, are always named in it; a request goes to the one that the link
`live` points to. Moving the link is all that a promotion does here: nginx is not reloaded, which would close
connections that clients are just writing to.
"""

import grp
import json
import os
import pwd
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from signdigits.data import images
from signdigits.errors import ServingError
from signdigits.serving.options import ServeParameters

POOLS = ("blue", "green")
NO_POOL = "none"

PAGE = Path(__file__).parent / "page"
KEEP_ALIVE = 60  # seconds that nginx keeps an idle connection to a process; the process must keep it for longer

TOKEN = r"[A-Za-z0-9._~+/=-]{16,512}"

# What a browser may do with the page: nothing with other hosts, and only this page may use the camera.
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
    "Cache-Control": "no-cache",  # asked for again, and answered with 304 while it is the same
}

TYPES = "text/html html; text/css css; text/javascript js; image/svg+xml svg; image/png png; image/x-icon ico;"


@dataclass(frozen=True)
class Refusal:
    """What the front says itself, in the form of MLflow's errors."""

    status: int
    code: str
    message: str
    headers: str = ""

    @property
    def reply(self) -> str:
        return f"return {self.status} '{json.dumps({'error_code': self.code, 'message': self.message})}';"


def refusals(parameters: ServeParameters) -> dict[int, Refusal]:
    """What the front says, by the number that an error has in nginx; 494 is its own, for headers that are too large."""
    later = 'add_header Retry-After "1" always;'
    return {
        400: Refusal(400, "BAD_REQUEST", "not HTTP that can be read here; send photographs to /invocations"),
        401: Refusal(
            401, "UNAUTHENTICATED", "no token, or a wrong one; send the header Authorization: Bearer TOKEN",
            'add_header WWW-Authenticate "Bearer" always;',
        ),
        403: Refusal(403, "ENDPOINT_NOT_FOUND", "nothing is here that may be read; send photographs to /invocations"),
        404: Refusal(404, "ENDPOINT_NOT_FOUND", "nothing is here; send photographs to /invocations"),
        405: Refusal(405, "BAD_REQUEST", "not with this method; send photographs to /invocations, with POST"),
        411: Refusal(411, "BAD_REQUEST", "the length of the request is missing; send the header Content-Length"),
        413: Refusal(
            413, "BAD_REQUEST",
            f"the request has more than the {parameters.max_body_mb} megabytes allowed; send fewer or smaller photographs",
        ),
        414: Refusal(414, "BAD_REQUEST", "the address is too long; send photographs to /invocations, in the body"),
        415: Refusal(
            415, "BAD_REQUEST",
            "not JSON; send dataframe_records or dataframe_split, with the header Content-Type: application/json",
        ),
        416: Refusal(416, "BAD_REQUEST", "no such part of the file; send no header Range"),
        429: Refusal(
            429, "REQUEST_LIMIT_EXCEEDED",
            "more requests than one client may send; wait, or send many photographs in one request", later,
        ),
        494: Refusal(431, "BAD_REQUEST", "the headers are too large; send fewer and shorter ones"),
        497: Refusal(400, "BAD_REQUEST", "HTTP, where HTTPS is spoken; begin the address with https://"),
        500: Refusal(500, "INTERNAL_ERROR", "the front failed; its log says why"),
        # What nginx takes for its own lack is the client's fault here.
        501: Refusal(400, "BAD_REQUEST", "an unknown Transfer-Encoding; send the length of the request, or in chunks"),
        502: Refusal(503, "TEMPORARILY_UNAVAILABLE", "no process answers yet; try again in a few seconds", later),
        505: Refusal(400, "BAD_REQUEST", "an unknown version of HTTP; speak HTTP/1.1"),
        504: Refusal(
            504, "DEADLINE_EXCEEDED",
            f"no answer within {parameters.timeout} seconds; send fewer photographs in one request, or try again later",
        ),
    }  # fmt: skip


# MLflow answers 500 only where it cannot parse JSON; what goes wrong in a model is 400 already.
UNREADABLE = Refusal(
    400, "BAD_REQUEST", "the JSON is nested too deeply, or a number has too many digits; send one table"
)


def socket_path(home: Path, pool: str, number: int) -> Path:
    """Where a process of a pool listens; `number` from 1."""
    return home / f"{pool}-{number}.sock"


def make_home(home: Path) -> None:
    """Lay out `home`: the pools' folders and a copy of the page, its reader being nginx's workers and nobody else.

    A copy, since the workers are not root even if root starts nginx, and may not be let into where the project lies.
    """
    for pool in (*POOLS, NO_POOL):
        (home / pool).mkdir()
    shutil.copytree(PAGE, home / "page", copy_function=shutil.copyfile)
    if os.geteuid() == 0:
        account = worker_account()
        for place in (home, *(home / "page").rglob("*"), home / "page"):
            os.chown(place, 0, account.pw_gid)
            place.chmod(0o750 if place.is_dir() else 0o640)
    point_live(home, NO_POOL)


def point_live(home: Path, pool: str) -> None:
    """Send every request from now on to `pool`."""
    part = home / "live.part"
    part.unlink(missing_ok=True)
    part.symlink_to(pool)
    part.replace(home / "live")  # at once: there is no moment without a link


def live_pool(home: Path) -> str:
    return (home / "live").readlink().name


def worker_account() -> pwd.struct_passwd:
    """Who nginx's workers are when root starts it: Debian's account for web servers, or the one for nothing."""
    known = {account.pw_name: account for account in pwd.getpwall()}
    for name in ("www-data", "nginx", "nobody"):
        if name in known:
            return known[name]
    raise ServingError("no account for nginx's workers (www-data, nginx or nobody); start it as another user than root")


def read_token(path: str) -> str:
    """The token in the file at `path`. Raises ServingError if there is none that will do."""
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(f"token_file={path}: cannot be read ({error}); write a token into it") from error
    if not re.fullmatch(TOKEN, token):
        raise ServingError(
            f"token_file={path}: the token must be 16 letters, digits or ._~+/=- or more; one can be made with "
            "python -c 'import secrets; print(secrets.token_hex(24))'"
        )
    return token


def configuration(parameters: ServeParameters, home: Path, token: str = "") -> str:
    """The whole configuration of an nginx that is started in the foreground and keeps what it writes in `home`."""
    return f"""\
{user()}
daemon off;
pid {home}/nginx.pid;
error_log stderr error;
worker_processes 1;
worker_shutdown_timeout {parameters.timeout}s;
events {{ worker_connections 4096; }}
http {{
    client_body_temp_path {home}/temporary-body;
    proxy_temp_path {home}/temporary-proxy;
    fastcgi_temp_path {home}/temporary-fastcgi;
    uwsgi_temp_path {home}/temporary-uwsgi;
    scgi_temp_path {home}/temporary-scgi;
    server_tokens off;
    types {{ {TYPES} }}
    default_type application/json;
    {access_log(parameters)}

    {upstream(parameters, home, "blue")}
    {upstream(parameters, home, "green")}

    # The folder that {home}/live points to, looked up once a request. The second is for a request whose pool
    # went away while it was sent, and asks where the link points now.
    map $realpath_root $pool {{ "~/blue$" blue; "~/green$" green; }}
    map $realpath_root $pool_now {{ "~/blue$" blue; "~/green$" green; }}
    # What MLflow takes for JSON. Its readers of other types would put stack traces into replies.
    map $content_type $is_json {{ default 0; "~*^application/json\\s*(;\\s*charset=utf-8\\s*)?$" 1; }}
    {bearer(token)}
    {zones(parameters)}

    server {{
        listen {listen(parameters)};
        {tls(parameters)}
        recursive_error_pages on; # of `@again`, too
        {errors(parameters)}
        client_header_timeout {parameters.client_timeout}s;
        client_body_timeout {parameters.client_timeout}s;
        send_timeout {parameters.client_timeout}s;
        client_max_body_size {parameters.max_body_mb}m;
        client_body_buffer_size 256k;
        large_client_header_buffers 4 8k;

        # Of what the client sends only the body reaches a process. A prediction changes nothing, so that it may be
        # asked of another process when one goes away.
        root {home}/live;
        proxy_http_version 1.1;
        proxy_pass_request_headers off;
        proxy_set_header Host localhost;
        proxy_set_header Connection "";
        proxy_set_header Content-Type application/json;
        proxy_hide_header Server;
        proxy_buffers 16 16k;
        proxy_max_temp_file_size 0;
        proxy_connect_timeout {min(5, parameters.timeout)}s;
        proxy_send_timeout {parameters.timeout}s;
        proxy_read_timeout {parameters.timeout}s;
        proxy_next_upstream error timeout non_idempotent;
        proxy_next_upstream_timeout {parameters.timeout}s;

        location = /invocations {{
            if ($request_method != POST) {{ return 405; }}
            {protected(token)}
            if ($is_json = 0) {{ return 415; }}
            {limits(parameters)}
            {intercepted(parameters)}
            error_page 502 = @again;
            proxy_pass http://$pool;
        }}
        location @again {{
            {intercepted(parameters)}
            error_page 502 = /.front/502;
            proxy_pass http://$pool_now;
        }}
        location = /version {{
            {protected(token)}
            proxy_pass http://$pool;
        }}
        location ~ ^/(ping|health)$ {{
            proxy_pass http://$pool;
        }}
        location = /limits.json {{
            {page_headers()}
            return 200 '{limits_of_images()}';
        }}
        location / {{
            root {home}/page;
            gzip on;
            gzip_types text/css text/javascript image/svg+xml;
            {page_headers()}
        }}
        {replies(parameters)}
    }}
}}
"""


def user() -> str:
    """Workers are not root, even if root starts them."""
    if os.geteuid() != 0:
        return ""
    account = worker_account()
    return f"user {account.pw_name} {grp.getgrgid(account.pw_gid).gr_name};"


def access_log(parameters: ServeParameters) -> str:
    if not parameters.access_log:
        return "access_log off;"
    line = (
        '$remote_addr $time_iso8601 "$request" $status $request_length $body_bytes_sent $request_time '
        "version=$upstream_http_model_version"
    )
    return f"log_format front '{line}';\n    access_log {path(parameters.access_log)} front;"


def upstream(parameters: ServeParameters, home: Path, pool: str) -> str:
    """A pool: who has the fewest requests is asked, and who was away, again as soon as it is back (max_fails=0)."""
    sockets = [socket_path(home, pool, number) for number in range(1, parameters.processes + 1)]
    servers = " ".join(f"server unix:{socket} max_fails=0;" for socket in sockets)
    return f"upstream {pool} {{ least_conn; {servers} keepalive 64; keepalive_timeout {KEEP_ALIVE}s; }}"


def bearer(token: str) -> str:
    """Whether a request bears the token; compared by a regular expression, as nginx ignores case in a plain text."""
    pattern = re.sub(r"[.+/=~-]", lambda found: f"[{found[0]}]", token)
    return f'map $http_authorization $authorized {{ default 0; "~^(?i:bearer) {pattern}$" 1; }}' if token else ""


def protected(token: str) -> str:
    return "if ($authorized = 0) { return 401; }" if token else ""


def zones(parameters: ServeParameters) -> str:
    rate, connections = parameters.requests_per_second, parameters.connections_per_client
    lines = [f"limit_req_zone $binary_remote_addr zone=rate:10m rate={rate}r/s;"] if rate else []
    lines += ["limit_conn_zone $binary_remote_addr zone=connections:10m;"] if connections else []
    return " ".join(lines)


def limits(parameters: ServeParameters) -> str:
    rate, connections = parameters.requests_per_second, parameters.connections_per_client
    burst = f" burst={parameters.burst} nodelay" if parameters.burst else ""  # nginx refuses a burst of 0
    lines = [f"limit_req zone=rate{burst}; limit_req_status 429;"] if rate else []
    lines += [f"limit_conn connections {connections}; limit_conn_status 429;"] if connections else []
    return " ".join(lines)


def listen(parameters: ServeParameters) -> str:
    host = f"[{parameters.host}]" if ":" in parameters.host else parameters.host
    return f"{host}:{parameters.port}{' ssl' if parameters.certificate else ''}"


def tls(parameters: ServeParameters) -> str:
    if not parameters.certificate:
        return ""
    return (
        f"ssl_certificate {path(parameters.certificate)}; ssl_certificate_key {path(parameters.key)}; "
        "ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache shared:tls:1m;"
    )


def errors(parameters: ServeParameters) -> str:
    """Which error is told by which reply; MLflow's own pass unless `intercepted`."""
    return "\n        ".join(f"error_page {number} = /.front/{number};" for number in refusals(parameters))


def intercepted(parameters: ServeParameters) -> str:
    """As `errors`, MLflow's included, but for its 400, which names the row, and 502."""
    others = [number for number in refusals(parameters) if number not in (400, 502)]
    return " ".join(["proxy_intercept_errors on;", *(f"error_page {number} = /.front/{number};" for number in others)])


def replies(parameters: ServeParameters) -> str:
    lines = []
    for number, refusal in refusals(parameters).items():
        unreadable = f'if ($upstream_status ~ "500$") {{ {UNREADABLE.reply} }} ' if number == 500 else ""
        version = "add_header Model-Version $upstream_http_model_version always;"  # none where no process answered
        lines += [
            f"location = /.front/{number} {{ internal; {version} {refusal.headers} {unreadable}{refusal.reply} }}"
        ]
    return "\n        ".join(lines)


def limits_of_images() -> str:
    """What the decoder takes, for the page."""
    return json.dumps({"max_bytes": images.MAX_BYTES, "media_types": sorted(set(images.FORMATS.values()))})


def page_headers() -> str:
    return "\n            ".join(f'add_header {name} "{value}";' for name, value in PAGE_HEADERS.items())


def path(given: str) -> str:
    """A file as one word of the configuration, whatever its name holds."""
    escaped = str(Path(given).absolute()).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
