"""Corrections, from a visitor to the next champion; tests/test_page.py sends one with the page."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image

from signdigits import cli

from .conftest import PROJECT, answers, free_port, serve_command, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx")]

SMALLEST = [
    "--image_size", "16", "--space", "notebook", "--n_trials", "1", "--n_seeds", "1", "--epochs", "8",
    "--batch_size", "8", "--initial_learning_rate", "0.003",
]  # fmt: skip


def write_variant(folder: Path, count: int) -> list[Path]:
    """Write photographs of class 1 as no folder has them: with a bar at the places of 0 and 2, and none at its own."""
    random = np.random.default_rng(1)
    folder.mkdir()
    for number in range(count):
        pixels = random.integers(0, 80, (24, 24, 3), dtype=np.uint8)
        pixels[:6] += 150
        pixels[16:22] += 150
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg", quality=95)
    return sorted(folder.iterdir())


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files that nginx's account may enter, too."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def served(folder: Path, temporary: Path, *options: str) -> Iterator[str]:
    """Run `serve` in `folder`, and yield its URL."""
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    line = serve_command(port, "--poll_interval", "0.2", "--drain_timeout", "1", *options)
    environment = os.environ | {"TMPDIR": str(temporary), "HOME": str(folder)}
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(line, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(f"{url}/ping") or server.poll() is not None, seconds=120)
        assert server.poll() is None, (folder / "serve.log").read_text()
        yield url
    finally:
        server.terminate()
        server.wait(60)


def post(url: str, target: str, value: Any) -> tuple[int, Any]:
    """Status and JSON of a reply."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/{target}", json.dumps(value).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, None


def encode(photograph: Path) -> str:
    return base64.b64encode(photograph.read_bytes()).decode()


def read(url: str, photograph: Path) -> str:
    """The label that the server gives a photograph."""
    _, reply = post(url, "invocations", {"dataframe_records": [{"image": encode(photograph)}]})
    return str(reply["predictions"][0]["label"])


def test_loop_closes(champion: str, photographs: Path, tmp_path: Path, temporary: Path) -> None:
    *corrected, new = write_variant(tmp_path / "variant", 41)
    environment = os.environ | {"SIGN_DIGITS_HOME": str(tmp_path), "MIN_CORRECTIONS": "30"}
    loop = [str(PROJECT / "scripts" / "loop"), str(photographs), *SMALLEST]
    with served(tmp_path, temporary, "--corrections", "corrections") as url:
        assert read(url, new) != "1"
        for photograph in corrected:
            assert post(url, "corrections", {"image": encode(photograph), "label": "1"})[0] == 204
        assert len(list(tmp_path.glob("corrections/pending/1/*.jpeg"))) == 40
        assert cli.main(["review", "--corrections", "corrections", "--accept", "all"]) == 0

        done = subprocess.run(loop, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        version = mlflow.MlflowClient().get_model_version_by_alias("sign-digits", "champion")
        assert int(version.version) == 2, done.stdout
        assert version.tags["data"] == f"{photographs},corrections/accepted"
        assert f" -P data={version.tags['data']} " in version.description, "the card says how to train it again"
        (study,) = mlflow.search_runs(
            filter_string="tags.role = 'study'", search_all_experiments=True, output_format="list"
        )
        assert study.data.tags["champion_trained_on"] == "0", "the test images are still those of before, and more"
        wait_until(lambda: read(url, new) == "1", seconds=60)

    before = len(mlflow.search_runs(search_all_experiments=True))
    assert cli.main(["main", "--data", version.tags["data"], *SMALLEST]) == 0, "what the loop calls the next time"
    assert len(mlflow.search_runs(search_all_experiments=True)) == before
    champion_now = mlflow.MlflowClient().get_model_version_by_alias("sign-digits", "champion")
    assert int(champion_now.version) == 2


def find_files(*folders: Path) -> set[Path]:
    """All files but SQLite's own journal, which comes and goes beside the registry's database."""
    return {
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(("-journal", "-wal", "-shm"))
    }


@pytest.mark.parametrize("switched_on", [False, True])
def test_nothing_is_kept_by_default(
    champion: str, photographs: Path, tmp_path: Path, temporary: Path, switched_on: bool
) -> None:
    """The second photograph is so large that nginx buffers the request in a file."""
    large = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)).save(large)
    sent = [photographs / "2" / "IMG_0000.JPG", large]
    with served(tmp_path, temporary, *(["--corrections", "corrections"] if switched_on else [])) as url:
        before = find_files(tmp_path, temporary)
        for photograph in sent:
            assert read(url, photograph) in "012"
        assert find_files(tmp_path, temporary) == before
        status, _ = post(url, "corrections", {"image": encode(sent[0]), "label": "1"})
        assert status == (204 if switched_on else 404)
        kept = find_files(tmp_path, temporary) - before
        assert {path.suffix for path in kept} == ({".jpeg", ".json"} if switched_on else set())
        assert {path.parent for path in kept} == (
            {tmp_path / "corrections" / "pending" / "1"} if switched_on else set()
        )
        texts = [encode(photograph).encode()[:200] for photograph in sent] + [p.read_bytes()[100:300] for p in sent]
        for path in find_files(tmp_path, temporary) - kept - {large}:
            assert not any(text in path.read_bytes() for text in texts), path
