"""The recorder: a real server, and hostile requests."""

import io
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from PIL import Image

from signdigits import cli, record
from signdigits.config import NameParameters

from .conftest import PROJECT, free_port, write_photographs
from .endpoint import Endpoint, recording, short_of_space


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("record")
    with recording(folder / "my gestures", folder / "record.log") as opened:
        yield opened
    assert opened.process.returncode == 0, opened.said()
    *_, last = opened.said().splitlines()
    assert last.startswith("stopped; to train: mlflow run . -e main ")


@pytest.fixture
def folder(endpoint: Endpoint) -> Iterator[Path]:
    """The folder that the server records into, empty."""
    folder = endpoint.log.parent / "my gestures"
    yield folder
    for entry in folder.iterdir():
        entry.unlink() if entry.is_symlink() or entry.is_file() else shutil.rmtree(entry)


def jpeg(size: tuple[int, int] = (64, 64), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "tan").save(buffer, kind)
    return buffer.getvalue()


def ask(endpoint: Endpoint, method: str, class_name: str, name: str = "", body: bytes | None = None) -> Any:
    """Return status and content of the reply to a request of the recorder's own page."""
    query = urlencode({"class": class_name, "name": name})
    status, _, content = endpoint.ask(method, f"/photographs?{query}", body, {"Origin": endpoint.url})
    return status, content if isinstance(content, dict) else content.decode(errors="replace")


def keep(endpoint: Endpoint, name: str, body: bytes) -> Any:
    return ask(endpoint, "POST", name, body=body)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_frame_is_kept_and_deleted(endpoint: Endpoint, folder: Path) -> None:
    frame = jpeg()
    for count in (1, 2):
        status, shown = keep(endpoint, " open  hand", frame)
        assert (status, shown["class"], shown["counts"]) == (200, "open hand", {"open hand": count})
    newest, oldest = shown["recorded"]
    assert {path.read_bytes() for path in (folder / "open hand").iterdir()} == {frame}
    status, headers, content = endpoint.ask("GET", f"/photographs?{urlencode({'class': 'open hand', 'name': newest})}")
    assert (status, headers["Content-Type"], content) == (200, "image/jpeg", frame)
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    status, shown = ask(endpoint, "DELETE", "open hand", newest)
    assert (status, shown["recorded"]) == (200, [oldest])
    assert ask(endpoint, "DELETE", "open hand", newest)[0] == 404
    assert ask(endpoint, "DELETE", "open hand", oldest)[1]["counts"] == {}
    assert files(folder) == [], "a class without photographs would stop prepare"


def test_folder_of_classes_is_continued(endpoint: Endpoint, folder: Path) -> None:
    write_photographs(folder, classes=2, each=3)
    (folder / ".cache").mkdir()
    (folder / "0" / ".DS_Store").touch()
    assert keep(endpoint, "0", jpeg())[1]["counts"] == {"0": 4, "1": 3}
    shown = endpoint.ask("GET", "/folder.json?class=0")[2]
    assert (shown["folder"], shown["counts"], len(shown["recorded"])) == (str(folder), {"0": 4, "1": 3}, 1)


def test_name_that_looks_the_same_is_one_class(endpoint: Endpoint, folder: Path) -> None:
    (folder / "cafe\u0301").mkdir()
    assert keep(endpoint, "caf\u00e9\u200b", jpeg())[1]["counts"] == {"cafe\u0301": 1}


@pytest.mark.parametrize(
    "name",
    [
        *" ./\\",
        "",
        "..",
        ".hidden",
        "../fist",
        "/tmp/fist",
        "a/b",
        "a\\b",
        "a\0b",
        "~$a",
        "Thumbs.db",
        "@eaDir",
        "\u202e",
        61 * "a",
    ],
)
def test_unusable_name_is_refused(name: str, endpoint: Endpoint, folder: Path) -> None:
    status, words = keep(endpoint, name, jpeg())
    assert status == 400
    assert words.startswith(("Name the class first.", "The name of a class has 60", ascii(name))), words
    assert files(folder.parent) == ["my gestures", "record.log"]


def test_longest_name_fits(endpoint: Endpoint, folder: Path) -> None:
    assert keep(endpoint, "\U0001f44b" * 60, jpeg())[0] == 200


@pytest.mark.parametrize(
    ("frame", "status", "words"),
    [
        (b"", 400, "The frame cannot be read: not an image."),
        (b"no photograph", 400, "The frame cannot be read: not an image."),
        (jpeg((512, 512))[:-400], 400, "The frame cannot be read: truncated or damaged"),
        (jpeg((1025, 20)), 400, "The frame is no JPEG of at most 1024 pixels."),
        (jpeg(kind="PNG"), 400, "The frame is no JPEG"),
        (jpeg() + bytes(2_000_000), 413, "The frame has more than 2,000,000 bytes."),
    ],
)
def test_unusable_frame_is_refused(frame: bytes, status: int, words: str, endpoint: Endpoint, folder: Path) -> None:
    found, message = keep(endpoint, "fist", frame)
    assert (found, message[: len(words)]) == (status, words)
    assert files(folder) == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),  # another server of this machine
        ({"Origin": "https://{host}"}, 403),
        ({}, 403),
        ({"Origin": "http://{host}", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://evil.example", "Host": "evil.example"}, 400),  # DNS rebinding
        ({"Origin": "http://127.0.0.1.evil.example", "Host": "127.0.0.1.evil.example"}, 400),
        ({"Origin": "http://{host}", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://localhost", "Host": "localhost"}, 200),
    ],
)
def test_other_sites_change_nothing(headers: dict[str, str], status: int, endpoint: Endpoint, folder: Path) -> None:
    sent = {name: value.format(host=f"127.0.0.1:{endpoint.port}") for name, value in headers.items()}
    assert endpoint.ask("POST", "/photographs?class=fist", jpeg(), sent)[0] == status
    kept = files(folder)
    assert bool(kept) == (status == 200)
    if "Host" in headers:
        assert endpoint.ask("GET", "/folder.json", None, sent)[0] == status
    elif status == 403:
        (name,) = keep(endpoint, "fist", jpeg())[1]["recorded"]
        assert endpoint.ask("DELETE", f"/photographs?class=fist&name={name}", None, sent)[0] == 403
        assert (folder / "fist" / name).exists()


def test_only_recorded_photographs_are_shown_and_deleted(endpoint: Endpoint, folder: Path) -> None:
    """Neither the user's own, nor links, nor what lies elsewhere."""
    (name,) = keep(endpoint, "fist", jpeg())[1]["recorded"]
    other = name.replace("camera-2", "camera-1")
    (folder / "fist" / "IMG_1.jpeg").write_bytes(jpeg())
    (folder / name).write_bytes(jpeg())
    (folder / "fist" / other).symlink_to(folder / name)
    (folder / "link").symlink_to(folder / "fist")
    before = files(folder)
    for class_name, wanted, status in [
        ("fist", "IMG_1.jpeg", 404), ("fist", other, 404), ("fist", f"../{name}", 404), ("fist", "", 404),
        ("fist", f"{name}\n", 404), ("fist/..", name, 400), ("..", name, 400), ("", name, 400), ("link", name, 409),
    ]:  # fmt: skip
        for method in ("GET", "DELETE"):
            found, words = ask(endpoint, method, class_name, wanted)
            assert found == status, (method, class_name, wanted, words)
    assert keep(endpoint, "link", jpeg())[0] == 409
    assert files(folder) == before


def test_full_disk_leaves_nothing(endpoint: Endpoint, folder: Path) -> None:
    with short_of_space(endpoint):
        status, words = keep(endpoint, "fist", jpeg())
    assert (status, words) == (
        507,
        f"{folder}: File too large. Free some space, or make the folder writable; then record again.",
    )
    assert files(folder) == []
    assert keep(endpoint, "fist", jpeg())[0] == 200


def test_missing_folder_is_reported(endpoint: Endpoint, folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    try:
        status, words = keep(endpoint, "fist", jpeg())
    finally:
        folder.with_name("elsewhere").rename(folder)
    assert (status, words.split(". ")[0]) == (507, f"{folder}: No such file or directory")


@pytest.mark.parametrize("limit", ["MAX_CLASS", "MAX_FOLDER"])
def test_number_of_photographs_is_limited(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, limit, 2)
    recorder = record.Recorder(tmp_path)
    recorder.keep("fist", jpeg())
    recorder.keep("fist", jpeg())
    with pytest.raises(record.HTTPException, match="No more room"):
        recorder.keep("fist", jpeg())
    if limit == "MAX_FOLDER":
        with pytest.raises(record.HTTPException, match="No more room"):
            recorder.keep("ok", jpeg())
    assert recorder.count() == {"fist": 2}


@pytest.mark.parametrize("name", ["gestures", 'sam\'s "hands" a/b:c@d', "Zeichen für Ä, B", "\\"])
def test_shown_command_is_one_of_the_shell(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    command = record.Recorder(folder).command.replace("mlflow run", "printf '%s\\n'")
    words = subprocess.run(command, shell=True, capture_output=True, text=True).stdout.splitlines()
    values = dict(word.split("=", 1) for word in words if "=" in word)
    assert values["data"] == str(folder)
    assert NameParameters(values["model_name"]).model_name == values["model_name"]
    assert values["start_from"] == "models:/sign-digits@champion"


def test_unusable_folder_or_port_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("five")
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        for folder, message in [
            ("missing/gestures", f"{tmp_path / 'missing'} does not exist; create it first"),
            ("notes.txt", "not a folder; pass a folder of class folders"),
            ("notes.txt/gestures", "Not a directory; pass a folder that can be written"),
            ("gestures", f"port={port}: Address already in use; stop the process that listens there"),
        ]:
            assert cli.main(["record", "--data", str(tmp_path / folder), "--port", str(port)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert message in line
    assert cli.main(["record"]) == 2
    assert "data='': must be a folder to record into" in capsys.readouterr().err


def test_script_takes_folder_of_the_working_directory(tmp_path: Path) -> None:
    script = PROJECT / "scripts" / "record"
    ran = subprocess.run([script], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (2, "usage: scripts/record FOLDER\n")
    (tmp_path / "photo").touch()
    ran = subprocess.run([script, "photo"], capture_output=True, text=True, cwd=tmp_path)
    assert (ran.returncode, f"data={tmp_path / 'photo'}: not a folder" in ran.stderr) == (2, True), ran.stderr
