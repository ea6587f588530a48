"""Record photographs of one's own classes with the camera: a page for the browser of this machine, and no other.

python -m signdigits record --data FOLDER
scripts/record FOLDER

FOLDER/CLASS/camera-TIME-ID.jpeg      a frame of the camera, which `prepare` and training read like any photograph
"""

import asyncio
import contextlib
import datetime
import logging
import os
import re
import secrets
import shlex
import socket
import threading
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from signdigits.config import SERVED_MODEL
from signdigits.data.folders import describe_file, is_junk, list_folders
from signdigits.data.images import ImageError, open_image, to_array
from signdigits.data.names import normalize_text
from signdigits.errors import UsageError, escape_undecodable
from signdigits.files import atomic_file
from signdigits.serving.options import RecordParameters
from signdigits.serving.pages import PAGE, PAGE_HEADERS, RECORD_PAGE, route_files

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
HOSTS = (HOST, "localhost")  # by other names, a page of another site could reach this server (DNS rebinding)
MAX_BYTES, MAX_SIDE = 2_000_000, 1024  # of a frame; record.js sends 512 pixels, 50 kB
BODY_TIMEOUT = 10.0  # seconds that a frame may take to arrive
MAX_CLASS, MAX_FOLDER = 1_000, 10_000  # photographs
MAX_NAME = 60  # characters of a class; as UTF-8 they fit into the name of a file
SHOWN = 20  # recorded photographs of a class, the last ones
RECORDED = r"camera-[0-9]{8}-[0-9]{9}-[0-9a-f]{8}\.jpeg"  # only these are shown and deleted


def record(parameters: RecordParameters) -> None:
    """Serve the page until interrupted. Raises UsageError if the folder or the port cannot be used."""
    recorder = Recorder(_open_folder(parameters.data))
    counts = recorder.count()
    try:
        listening = socket.create_server((HOST, parameters.port))
    except OSError as error:
        raise UsageError(
            f"port={parameters.port}: {os.strerror(error.errno or 0)}; stop the process that listens there, or choose another port: "
            "PORT=... scripts/record, or --port"
        ) from error
    log.info("recording into %s: %d photographs in %d classes", recorder.folder, sum(counts.values()), len(counts))
    log.info("open http://%s:%d in a browser on this machine; Ctrl-C ends it", HOST, parameters.port)
    config = uvicorn.Config(
        create_app(recorder), ws="none", lifespan="off", log_config=None, log_level="warning", access_log=False,
        server_header=False, proxy_headers=False, limit_concurrency=64, timeout_graceful_shutdown=2,
    )  # fmt: skip
    with listening, contextlib.suppress(KeyboardInterrupt):  # uvicorn repeats the signal that has stopped it
        uvicorn.Server(config).run([listening])
    log.info("stopped; to train: %s", recorder.command)


def _open_folder(path: str) -> Path:
    """Return the folder, absolute and created if it is missing. Raises UsageError if nothing can be recorded into it."""
    folder = Path(path).absolute()
    try:
        if not folder.is_dir():
            folder.mkdir()
        list_folders(folder)
    except FileExistsError:
        raise UsageError(
            f"data={folder}: {describe_file(folder) or 'not a folder'}; pass a folder of class folders"
        ) from None
    except FileNotFoundError:
        raise UsageError(f"data={folder}: {folder.parent} does not exist; create it first") from None
    except OSError as error:
        raise UsageError(f"data={folder}: {error.strerror}; pass a folder that can be written") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"data={folder}: may not be written; make it writable, or pass another folder")
    return folder


class Recorder:
    """The photographs in a folder of class folders. Methods raise HTTPException for what a client can mend, and OSError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()  # from the count to the photograph that is kept

    @property
    def command(self) -> str:
        """The command that trains on the folder, under a name of its own."""
        name = re.sub(r"[/:@'\"\\]", "-", self.folder.name)[:200] or "signs"
        data, model_name = shlex.quote(f"data={self.folder}"), shlex.quote(f"model_name={name}")
        return escape_undecodable(
            f"mlflow run . -e main --env-manager local -P {data} -P {model_name} -P start_from={SERVED_MODEL}"
        )

    def count(self) -> dict[str, int]:
        """Return the number of photographs of each class, without those in folders of their own."""
        return {
            folder.name: sum(not is_junk(entry) and entry.is_file() for entry in folder.iterdir())
            for folder in list_folders(self.folder)
        }

    def describe(self, folder: Path | None) -> dict[str, Any]:
        """Return what the page shows, with the last photographs that were recorded of a class."""
        names = (entry.name for entry in folder.iterdir()) if folder and folder.is_dir() else ()
        recorded = sorted((name for name in names if re.fullmatch(RECORDED, name)), reverse=True)
        return {
            "folder": escape_undecodable(str(self.folder)), "command": self.command,
            "counts": {escape_undecodable(name): count for name, count in self.count().items()},
            "class": folder.name if folder else "", "recorded": recorded[:SHOWN],
        }  # fmt: skip

    def find_class(self, name: str) -> Path:
        """Return the folder of a class, the existing one whose name looks the same, if there is one."""
        label = normalize_text(name)
        folder = self.folder / label
        if not label:
            raise HTTPException(400, "Name the class first.")
        if len(label) > MAX_NAME:
            raise HTTPException(400, f"The name of a class has {MAX_NAME} characters at most.")
        if folder.name != label or "\\" in label or not label.isprintable() or is_junk(folder):
            raise HTTPException(
                400, f"{label!a} cannot be a class: its folder would not be read. Use letters, digits and spaces."
            )
        for existing in list_folders(self.folder):
            if normalize_text(existing.name) == label:
                folder = existing
        if folder.is_symlink():
            raise HTTPException(409, f"{label} is a link to another folder. Record into that one.")
        return folder

    def find_photograph(self, class_name: str, name: str) -> Path:
        """Return a photograph that was recorded."""
        path = self.find_class(class_name) / (name if re.fullmatch(RECORDED, name) else "")
        if path.is_symlink() or not path.is_file():
            raise HTTPException(404, "There is no such photograph any more.")
        return path

    def keep(self, class_name: str, content: bytes) -> dict[str, Any]:
        """Keep a frame of a class."""
        folder = self.find_class(class_name)
        try:
            image = open_image(content)
            if image.format != "JPEG" or max(image.size) > MAX_SIDE:
                raise HTTPException(400, f"The frame is no JPEG of at most {MAX_SIDE} pixels.")
            to_array(image, 100, "rgb")
        except ImageError as error:
            raise HTTPException(400, f"The frame cannot be read: {error}.") from error
        with self.lock:
            counts = self.count()
            if counts.get(folder.name, 0) >= MAX_CLASS or sum(counts.values()) >= MAX_FOLDER:
                raise HTTPException(
                    409, f"No more room: {MAX_CLASS:,} photographs of a class and {MAX_FOLDER:,} of all are the most."
                )
            time = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S%f")[:-3]
            folder.mkdir(exist_ok=True)
            try:
                with atomic_file(folder / f"camera-{time}-{secrets.token_hex(4)}.jpeg") as partial_file:
                    partial_file.write_bytes(content)
            finally:
                _remove_empty(folder)
        return self.describe(folder)

    def remove(self, class_name: str, name: str) -> dict[str, Any]:
        """Delete a photograph that was recorded, and the class with its last one."""
        path = self.find_photograph(class_name, name)
        with self.lock:
            path.unlink(missing_ok=True)
            _remove_empty(path.parent)
        return self.describe(path.parent)


def _remove_empty(folder: Path) -> None:
    """Remove a class folder without files, which `prepare` would refuse."""
    with contextlib.suppress(OSError):  # it has files
        folder.rmdir()


def create_app(recorder: Recorder) -> Starlette:
    def query(request: Request, name: str) -> str:
        return request.query_params.get(name, "")

    def show(request: Request) -> Response:
        name = query(request, "class")
        return JSONResponse(recorder.describe(recorder.find_class(name) if name else None))

    def photograph(request: Request) -> Response:
        return FileResponse(recorder.find_photograph(query(request, "class"), query(request, "name")))

    def remove(request: Request) -> Response:
        return JSONResponse(recorder.remove(query(request, "class"), query(request, "name")))

    async def keep(request: Request) -> Response:
        content = await _read_body(request)
        return JSONResponse(await asyncio.to_thread(recorder.keep, query(request, "class"), content))

    async def reply_to_failure(request: Request, error: Exception) -> Response:
        assert isinstance(error, OSError)
        log.warning("%s: %s", error.filename or recorder.folder, error.strerror)
        words = f"{recorder.folder}: {error.strerror}. Free some space, or make the folder writable; then record again."
        return PlainTextResponse(escape_undecodable(words), 507)

    return Starlette(
        routes=[
            Route("/folder.json", show),
            Route("/photographs", photograph),
            Route("/photographs", keep, methods=["POST"]),
            Route("/photographs", remove, methods=["DELETE"]),
            *route_files(RECORD_PAGE),
            *route_files(PAGE, "camera.js", "style.css", "icon.svg"),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
            Middleware(BaseHTTPMiddleware, dispatch=_guard),
        ],
        exception_handlers={OSError: reply_to_failure},
    )


async def _guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Refuse changes that another site's page asks for, and send the headers of a page."""
    is_own = request.headers.get("origin") == f"http://{request.headers['host']}"
    is_own &= request.headers.get("sec-fetch-site", "same-origin") == "same-origin"  # of browsers that send it
    if request.method in ("GET", "HEAD") or is_own:
        response = await call_next(request)
    else:
        response = PlainTextResponse("Only the page of this server may change the folder.", 403)
    response.headers.update(PAGE_HEADERS)
    return response


async def _read_body(request: Request) -> bytes:
    """Return the body, at most MAX_BYTES."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise HTTPException(413, f"The frame has more than {MAX_BYTES:,} bytes.")
    except (TimeoutError, ClientDisconnect):
        raise HTTPException(408, "The frame did not arrive.") from None
    return bytes(body)
