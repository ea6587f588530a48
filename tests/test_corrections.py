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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image

from signdigits import cli

from .conftest import PROJECT, store_like, wait_until
from .endpoint import serving_endpoint

pytestmark = pytest.mark.slow

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


@dataclass(frozen=True)
class Home:
    """A folder with a store that has a champion, and a folder for temporary files."""

    folder: Path
    temporary: Path

    def files(self) -> set[Path]:
        """All files but SQLite's own journal, which comes and goes beside the registry's database, and the metrics' values."""
        return {
            path
            for folder in (self.folder, self.temporary)
            for path in folder.rglob("*")
            if path.is_file() and not path.name.endswith(("-journal", "-wal", "-shm")) and path.parent.name != "metrics"
        }

    @contextmanager
    def served(self, *options: str) -> Iterator[str]:
        """Run `serve` in the folder, and yield its URL."""
        environment = {"TMPDIR": str(self.temporary), "HOME": str(self.folder)}
        log = self.folder / "serve.log"
        with serving_endpoint(log, "--drain_timeout", "1", *options, cwd=self.folder, **environment) as endpoint:
            yield endpoint.url


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, champion_store: Path) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("corrections")
    with store_like(champion_store, folder), tempfile.TemporaryDirectory() as temporary:
        yield Home(folder, Path(temporary))


@pytest.fixture(scope="module")
def url(home: Home) -> Iterator[str]:
    """The URL of a server that keeps corrections."""
    with home.served("--corrections", "corrections") as found:
        yield found


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


def send_photographs(url: str, photographs: Path, folder: Path) -> list[Path]:
    """Send two photographs, the second a large one."""
    large = folder / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)).save(large)
    sent = [photographs / "2" / "IMG_0000.JPG", large]
    assert {read(url, photograph) for photograph in sent} <= set("012")
    return sent


def find_content(sent: list[Path], files: set[Path]) -> list[Path]:
    """Return the files that hold a part of a photograph that was sent, encoded or not."""
    texts = [encode(photograph).encode()[:200] for photograph in sent] + [path.read_bytes()[100:300] for path in sent]
    return [path for path in files if any(text in path.read_bytes() for text in texts)]


def test_nothing_is_kept_by_default(home: Home, photographs: Path, tmp_path: Path) -> None:
    with home.served() as plain:
        before = home.files()
        sent = send_photographs(plain, photographs, tmp_path)
        assert post(plain, "corrections", {"image": encode(sent[0]), "label": "1"})[0] == 404
        assert home.files() == before
        assert find_content(sent, before) == []


def test_only_corrections_are_kept(url: str, home: Home, photographs: Path, tmp_path: Path) -> None:
    before = home.files()
    sent = send_photographs(url, photographs, tmp_path)
    assert home.files() == before
    assert post(url, "corrections", {"image": encode(sent[0]), "label": 1})[0] == 204
    kept = home.files() - before
    assert {path.suffix for path in kept} == {".jpeg", ".json"}
    assert {path.parent for path in kept} == {home.folder / "corrections" / "pending" / "1"}
    assert find_content(sent, before) == []
    for path in kept:
        path.unlink()


def test_loop_trains_only_if_needed(home: Home, empty_store: Path, tmp_path: Path) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")

    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        store = {"SIGN_DIGITS_HOME": str(folder), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        line = [str(PROJECT / "scripts" / "loop"), "no-photographs", "--n_trials", "1"]
        return subprocess.run(line, env=os.environ | store, capture_output=True, text=True)

    idle = run(home.folder)
    assert (idle.returncode, idle.stdout) == (0, "nothing to do: no drift, 0 of 20 accepted corrections\n")
    without_champion = run(tmp_path)
    assert without_champion.returncode == 2, "there is no such folder"
    assert "main: data=no-photographs" in without_champion.stdout


def test_loop_closes(url: str, home: Home, photographs: Path, tmp_path: Path) -> None:
    *corrected, new = write_variant(tmp_path / "variant", 41)
    environment = os.environ | {"SIGN_DIGITS_HOME": str(home.folder), "MIN_CORRECTIONS": "30"}
    loop = [str(PROJECT / "scripts" / "loop"), str(photographs), *SMALLEST]
    assert read(url, new) != "1"
    for photograph in corrected:
        assert post(url, "corrections", {"image": encode(photograph), "label": "1"})[0] == 204
    assert len(list(home.folder.glob("corrections/pending/1/*.jpeg"))) == 40
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
    wait_until(lambda: read(url, new) == "1")

    before = len(mlflow.search_runs(search_all_experiments=True))
    assert cli.main(["main", "--data", version.tags["data"], *SMALLEST]) == 0, "what the loop calls the next time"
    assert len(mlflow.search_runs(search_all_experiments=True)) == before
    champion_now = mlflow.MlflowClient().get_model_version_by_alias("sign-digits", "champion")
    assert int(champion_now.version) == 2
