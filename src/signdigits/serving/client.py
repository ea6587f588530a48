"""Send photographs to a served model, and print a table of its predictions.

python -m signdigits.serving.client photograph.jpg another.png
scripts/ask photograph.jpg another.png

The bearer token, if the server needs one, is read from the environment variable SIGN_DIGITS_TOKEN or from --token_file.
"""

import argparse
import base64
import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from signdigits.errors import UsageError, escape_undecodable
from signdigits.packaging.reply import FIELDS

URL = "http://127.0.0.1:5001"  # where scripts/serve listens
TOKEN = "SIGN_DIGITS_TOKEN"
SHOWN = [field for field in FIELDS if field.is_shown]
ROWS = 32  # photographs in one request, at most
BYTES = 40_000_000  # of photographs in one request, at most, unless one is larger: 53 megabytes as base64 text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ask", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a photograph")
    parser.add_argument("--url", default=URL, help="where the model is served (default: %(default)s)")
    parser.add_argument("--token_file", type=Path, help="file with the bearer token")
    parsed = parser.parse_args(arguments)
    width = max(len(escape_undecodable(str(file))) for file in parsed.files)
    try:
        token = _read_content(parsed.token_file).decode().strip() if parsed.token_file else os.environ.get(TOKEN, "")
        names = [field.name for field in SHOWN if field.type is not bool]
        print(f"{'file':{width}}", *names, "next", sep="  ")
        for file, reply in _request_predictions(parsed.files, parsed.url, token):
            print(f"{escape_undecodable(str(file)):{width}}", *_format_cells(reply), sep="  ", flush=True)
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UsageError as error:
        print(f"ask: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _format_cells(reply: Mapping[str, Any]) -> Iterator[str]:
    """Yield the shown fields of a reply, and at the end the second most probable class and the marks, such as `outlier`."""
    marks = ""
    for field in SHOWN:
        value = reply.get(field.name)  # an earlier version of the model may not have it
        if field.type is bool:
            marks += f"   {field.name.removeprefix('is_')}" if value else ""
        elif isinstance(value, float):
            yield f"{value:{len(field.name)}.4f}"
        else:
            yield f"{value or '':{len(field.name)}}"
    others = sorted(reply["probabilities"].items(), key=lambda item: -item[1])[1:2]
    yield "".join(f"{label} {probability:.4f}" for label, probability in others) + marks


def _request_predictions(
    files: Sequence[Path], url: str = URL, token: str = ""
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield each file with the reply to it, whose fields are declared in packaging/reply.py.

    Raises UsageError if a file cannot be read, or if the server does not reply or rejects a photograph.
    """
    for chunk in _split_requests(files):
        rows = [{"image": base64.b64encode(_read_content(file)).decode()} for file in chunk]
        try:
            answers = _post_json(f"{url.rstrip('/')}/invocations", {"dataframe_records": rows}, token)["predictions"]
        except UsageError as error:
            raise UsageError(_name_rows(str(error), chunk)) from error
        yield from zip(chunk, answers, strict=True)


def _split_requests(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield the files of each request, within ROWS and BYTES."""
    chunk, size = list[Path](), 0
    for file in files:
        bytes_of_file = file_size(file)
        if chunk and (len(chunk) == ROWS or size + bytes_of_file > BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(file)
        size += bytes_of_file
    if chunk:
        yield chunk


def file_size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error


def _name_rows(message: str, files: Sequence[Path]) -> str:
    """Replace each `row N` of a message with the file."""
    return re.sub(r"row (\d+)", lambda found: str(files[int(found[1])]), message)


def _read_content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error


def _post_json(url: str, body: Any, token: str = "") -> Any:
    """Post `body` as JSON and return the reply."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        # `urlopen` would keep the proxies of its first call in this process.
        with urllib.request.build_opener().open(request, timeout=60) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise UsageError(f"{url} rejected the request{_name_proxy(url)}: {_error_message(error.read())}") from error
    except (urllib.error.URLError, ValueError, OSError) as error:
        raise UsageError(
            f"{url} does not reply{_name_proxy(url)} ({error}); start scripts/serve, or pass --url"
        ) from error


def _name_proxy(url: str) -> str:
    """Return the proxy of the environment through which `url` was requested, for a message; empty without one."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return ""
    shown = re.sub("//[^/@]*@", "//", proxy)  # without its password
    return f" through the proxy {shown} ({parts.scheme}_proxy; for a direct request, add {parts.hostname} to no_proxy)"


def _error_message(reply: bytes) -> str:
    """Return the message of MLflow's error reply, without the repeated request."""
    try:
        return str(json.loads(reply)["message"]).rpartition("Error: ")[2]
    except (ValueError, KeyError):
        return reply.decode(errors="replace")[:500]


if __name__ == "__main__":
    sys.exit(main())
