"""The pages: their files, and the headers of every reply. Imports neither MLflow nor the model."""

from pathlib import Path

from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

PAGE = Path(__file__).parent / "page"
RECORD_PAGE = Path(__file__).parent / "record_page"  # uses some files of the other

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
    "Cache-Control": "no-cache",  # the page is revalidated: 304 if it has not changed
}
ENCODED_HEADERS = [(name.lower().encode(), value.encode()) for name, value in PAGE_HEADERS.items()]


def route_files(folder: Path, *names: str) -> list[Route]:
    """Return the routes to these files of a folder, by default to all, and then also from / to index.html."""
    files = GZipMiddleware(StaticFiles(directory=folder, html=True))
    return [Route(f"/{name}", files) for name in names or ("", *(file.name for file in folder.iterdir()))]
