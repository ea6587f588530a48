import os
import signal
import time
from pathlib import Path

import mlflow
import pytest

from signdigits.batch import scoring
from signdigits.batch.scoring import Chunk, Scorer
from signdigits.config import PredictParameters
from signdigits.data import images
from signdigits.errors import DataError

pytestmark = pytest.mark.slow


@pytest.fixture
def scorer(champion: str) -> Scorer:
    return Scorer("models:/sign-digits@champion")


def test_bad_photograph_is_isolated(scorer: Scorer, photographs: Path) -> None:
    good = (photographs / "1" / "IMG_0000.JPG").read_bytes()
    alone = scorer.predict([good])[0]
    mixed = scorer.predict([good, b"five fingers", good, "cannot be read (gone)", good[:-100], good])
    assert [mixed[index] for index in (0, 2, 5)] == [alone] * 3
    assert mixed[1] == "not an image"
    assert mixed[3] == "cannot be read (gone)"
    assert str(mixed[4]).startswith("truncated or damaged")


def test_many_bad_photographs_have_reasons(scorer: Scorer) -> None:
    assert scorer.predict([b"five fingers"] * 32) == ["not an image"] * 32


def test_special_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert scoring.read_photograph(tmp_path / "pipe") == "cannot be read (not a file)"
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10 * images.MAX_BYTES)
    assert len(scoring.read_photograph(tmp_path / "large")) == images.MAX_BYTES + 1, (
        "enough for the decoder to refuse it"
    )
    assert scoring.read_photograph(tmp_path / ("n" * 300)) == "cannot be read (File name too long)"


def test_missing_folder_makes_no_row(scorer: Scorer) -> None:
    with pytest.raises(DataError, match=r"/nowhere: no such folder on .*; every worker needs it at the same path"):
        scorer.score(Chunk(0, "/nowhere", ("a.jpg",)))


def test_dead_worker_is_replaced(champion: str, photographs: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra .[cluster]")
    paths = tuple(path.relative_to(photographs).as_posix() for path in sorted(photographs.rglob("*.JPG")))
    chunks = [Chunk(number, str(photographs), paths * 10) for number in range(6)]
    folder = Path(mlflow.artifacts.download_artifacts("models:/sign-digits@champion"))
    found = {}
    for chunk, rows in scoring.score_chunks(folder, chunks, PredictParameters(images="some", workers=2)):
        found[chunk.number] = rows
        if len(found) == 1:
            kill_a_worker()
    assert sorted(found) == list(range(6))
    assert all(rows["path"].tolist() == list(paths * 10) for rows in found.values())


def kill_a_worker() -> None:
    """Kill one of the processes that Ray started for this one."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = status.read_bytes()
            except OSError:
                continue
            if line.startswith(b"ray::ScoringWorker") and is_ours(int(status.parent.name)):
                os.kill(int(status.parent.name), signal.SIGKILL)
                return
        time.sleep(0.01)
    raise AssertionError("no worker was found")


def is_ours(process: int) -> bool:
    """Tell whether this process is an ancestor: another search or prediction may run on the machine."""
    while process > 1 and process != os.getpid():
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return process == os.getpid()
