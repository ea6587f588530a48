import io
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

import signdigits.files
from signdigits.config import SourceParameters
from signdigits.data import dataset, sources
from signdigits.errors import DataError, DownloadError

ROOT = "Sign-Language-Digits-Dataset-4b09433"


class Archive(BaseHTTPRequestHandler):
    """Serves one archive: whole, cut short, or not at all."""

    content: ClassVar[bytes] = b""
    behaviour: ClassVar[str] = "whole"

    def do_GET(self) -> None:
        if self.behaviour == "missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) // 2] if self.behaviour == "cut" else self.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """A real HTTP server on loopback that serves `Archive.content`."""
    Archive.behaviour = "whole"
    running = ThreadingHTTPServer(("127.0.0.1", 0), Archive)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/archive/4b09433.zip"
    running.shutdown()
    running.server_close()


def pack(folder: Path, extra: dict[str, bytes] | None = None) -> bytes:
    """An archive of the layout that GitHub serves, with `folder` as its Dataset."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{ROOT}/README.md", "The README of the repository")
        for path in sorted(folder.rglob("*.JPG")):
            archive.write(path, f"{ROOT}/Dataset/{path.relative_to(folder).as_posix()}")
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_embedded_digits_have_1797_images(tmp_path: Path) -> None:
    (folder,) = sources.resolve_source("handwritten-digits", tmp_path)
    files = sorted(folder.rglob("*.png"))
    assert len(files) == 1797
    assert sorted(path.name for path in folder.iterdir()) == [str(digit) for digit in range(10)]
    with Image.open(files[0]) as first:
        assert first.size == (100, 100)
        assert np.asarray(first).min() < 50, "ink"
        assert np.asarray(first).max() == 255, "paper"


def test_embedded_digits_are_written_once(tmp_path: Path) -> None:
    (folder,) = sources.resolve_source("handwritten-digits", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    sources.resolve_source("handwritten-digits", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_failed_folder_is_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with signdigits.files.atomic_folder(tmp_path / "digits") as folder:
            (folder / "0").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_other_names_are_paths() -> None:
    assert sources.resolve_source("some/folder") == (Path("some/folder"),)


def test_download_makes_class_folders(server: str, photographs: Path, tmp_path: Path) -> None:
    Archive.content = pack(photographs)
    digest = sources.folder_digest(photographs)
    folder = sources.download_sign_language_digits(tmp_path / "signs", server, digest)
    assert sources.folder_digest(folder) == digest
    assert [path.name for path in tmp_path.iterdir()] == ["signs"]
    Archive.behaviour = "missing"
    assert sources.download_sign_language_digits(folder, server, digest) == folder, "it is not fetched again"


@pytest.mark.parametrize(
    ("behaviour", "message"), [("missing", "HTTP Error 404"), ("cut", "got only"), ("garbage", "not a zip file")]
)
def test_failed_download_leaves_nothing(
    server: str, photographs: Path, tmp_path: Path, behaviour: str, message: str
) -> None:
    Archive.content = b"not an archive" if behaviour == "garbage" else pack(photographs)
    Archive.behaviour = behaviour
    with pytest.raises(DownloadError, match=message):
        sources.download_sign_language_digits(tmp_path / "signs", server)
    assert list(tmp_path.iterdir()) == []


def test_changed_archive_is_refused(server: str, photographs: Path, tmp_path: Path) -> None:
    Archive.content = pack(photographs, {f"{ROOT}/Dataset/0/another.JPG": b"?"})
    with pytest.raises(DownloadError, match="holds other files than expected"):
        sources.download_sign_language_digits(tmp_path / "signs", server, sources.folder_digest(photographs))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../escaped.txt", "/tmp/signdigits-escaped.txt", f"{ROOT}/../../escaped.txt"])
def test_archive_paths_stay_inside(server: str, photographs: Path, tmp_path: Path, name: str) -> None:
    Archive.content = pack(photographs, {name: b"out"})
    home = tmp_path / "a" / "b" / "data"
    sources.download_sign_language_digits(home / "signs", server, sources.folder_digest(photographs))
    assert list(tmp_path.rglob("*escaped*")) == []
    assert not Path("/tmp/signdigits-escaped.txt").exists()


def test_real_photographs_match_digest(server: str, sign_digits: Path, tmp_path: Path) -> None:
    Archive.content = pack(sign_digits)
    folder = sources.download_sign_language_digits(tmp_path / "sign-language-digits", server)
    assert len(list(folder.rglob("*.JPG"))) == 2062


def test_changed_download_is_noticed(sign_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(sign_digits, tmp_path / "data" / "sign-language-digits"))
    assert (
        dataset.scan_dataset(SourceParameters(data="sign-language-digits")).digest
        == sources.SIGN_LANGUAGE_DIGITS_DIGEST
    )
    next(folder.rglob("*.JPG")).unlink()
    with pytest.raises(DataError, match="has changed since the download"):
        dataset.scan_dataset(SourceParameters(data="sign-language-digits"))
