"""The prediction log, in this process and in one with limited files; test_pyfunc_model.py has it behind HTTP."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest

from signdigits import predict
from signdigits.config import PredictParameters
from signdigits.packaging import prediction_log
from signdigits.packaging.prediction_log import PredictionLog, image_statistics
from signdigits.packaging.reply import LOGGED

pytestmark = pytest.mark.slow

RANDOM = np.random.default_rng(0)
PHOTOGRAPH = RANDOM.integers(0, 256, (16, 16, 3)).astype(np.float32)
SHARES = {"0": 0.25, "1": 0.75}
REPLY = dict.fromkeys(LOGGED, 0.5) | {"probabilities": SHARES, "is_outlier": False}
KEYS = {
    "request_id",
    "row",
    "seconds",
    "time",
    "version",
    "width",
    "height",
    "brightness",
    "contrast",
    "sharpness",
    *LOGGED,
}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for file in prediction_log.list_log_files(folder) for line in file.read_text().splitlines()
    ]


def test_log_is_off_by_default() -> None:
    assert PredictionLog.from_environ({}) is None
    assert PredictionLog.from_environ({"SIGN_DIGITS_PREDICTION_LOG": "", "SIGN_DIGITS_VERSION": "3"}) is None


@pytest.mark.parametrize("limit", ["many", "0", "-1", "nan", "inf"])
def test_invalid_limit_is_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=f"SIGN_DIGITS_PREDICTION_LOG_MB={limit}: must be a number of megabytes"):
        PredictionLog.from_environ({"SIGN_DIGITS_PREDICTION_LOG": "log", "SIGN_DIGITS_PREDICTION_LOG_MB": limit})


def test_entry_holds_no_picture(tmp_path: Path) -> None:
    PredictionLog(tmp_path, 64_000_000, "3").add(
        [((640, 480), PHOTOGRAPH)], [REPLY | {"probabilities": {"0": 0.1234567}, "is_outlier": True}]
    )
    (line,) = lines(tmp_path)
    assert set(line) == KEYS
    assert line["time"].endswith("+00:00")
    assert (line["version"], line["width"], line["height"]) == ("3", 640, 480)
    assert (line["probabilities"], line["is_outlier"]) == ({"0": 0.123457}, True)
    assert all(isinstance(line[name], int | float) for name in prediction_log.STATISTICS)


def test_statistics_match_picture() -> None:
    """Statistics of known images, computed by hand; grayscale is inverted."""
    half = np.zeros((10, 10, 3), np.uint8)
    half[:, 5:] = 255
    assert image_statistics((1, 2), half) == {
        "width": 1, "height": 2, "brightness": 0.5, "contrast": 0.5, "sharpness": round((1 / 9) ** 0.5, 5),
    }  # fmt: skip
    gray = (1 - half[..., :1] / 255).astype(np.float32)
    assert image_statistics((1, 2), gray) == image_statistics((1, 2), half)
    assert image_statistics((1, 2), half.astype(np.float32)) == image_statistics((1, 2), half)


def test_log_size_is_bounded(tmp_path: Path) -> None:
    limit = 200_000
    first, second = PredictionLog(tmp_path, limit, "1"), PredictionLog(tmp_path, limit, "1")
    for _ in range(400):
        for log in (first, second):
            log.add([((1, 1), PHOTOGRAPH)] * 4, [REPLY] * 4)
        assert sum(file.stat().st_size for file in prediction_log.list_log_files(tmp_path)) <= limit
    assert len(prediction_log.list_log_files(tmp_path)) == prediction_log.FILES
    assert sum(file.stat().st_size for file in prediction_log.list_log_files(tmp_path)) > limit / 2
    assert all(set(line) == KEYS for line in lines(tmp_path))


def test_other_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("mine")
    log = PredictionLog(tmp_path, 100_000, "1")
    for _ in range(2000):
        log.add([((1, 1), PHOTOGRAPH)], [REPLY])
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path, 64_000_000, "1")

    def ask(number: int) -> None:
        for _ in range(200):
            log.add([((number, number), PHOTOGRAPH)] * 3, [REPLY] * 3)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    widths = [line["width"] for line in lines(tmp_path)]
    assert sorted(widths) == sorted(number for number in range(8) for _ in range(600))


def test_unwritable_log_keeps_predicting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    log = PredictionLog(tmp_path / "file", 64_000_000, "1")
    log.add([((1, 1), PHOTOGRAPH)], [REPLY])
    assert log.paused_until > time.monotonic(), "it is left alone for a while"
    log.paused_until = 0.0
    log.folder = tmp_path / "folder"
    log.add([((1, 1), PHOTOGRAPH)], [REPLY])
    assert len(lines(tmp_path / "folder")) == 1


def test_full_disk_leaves_separate_lines(tmp_path: Path) -> None:
    """A process that may write no more than 1,000 bytes to a file, as where a disk is full: the last line is cut."""
    script = f"""
import resource, signal
import numpy as np
from pathlib import Path
from signdigits.packaging.prediction_log import PredictionLog
log = PredictionLog(Path({str(tmp_path)!r}), 64_000_000, "1")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for number in range(20):
    log.add([((number, 1), np.zeros((16, 16, 3)))], [{REPLY!r}])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.paused_until = 0.0
log.add([((77, 1), np.zeros((16, 16, 3)))], [{REPLY!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("paused for") == 1
    first, second = prediction_log.list_log_files(tmp_path)
    whole, cut = first.read_text().splitlines()[:-1], first.read_text().splitlines()[-1]
    assert [json.loads(line)["width"] for line in whole] == list(range(len(whole)))
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut)
    assert [line["width"] for line in map(json.loads, second.read_text().splitlines())] == [77]


def test_removed_file_is_recreated(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path, 64_000_000, "1")
    log.add([((1, 1), PHOTOGRAPH)], [REPLY])
    prediction_log.list_log_files(tmp_path)[0].unlink()
    log.add([((2, 1), PHOTOGRAPH)], [REPLY])
    assert [line["width"] for line in lines(tmp_path)] == [2]


def test_batch_prediction_is_unlogged(
    champion: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(prediction_log.FOLDER, str(tmp_path / "log"))
    predict.predict(PredictParameters(images=str(photographs / "0")))
    assert not (tmp_path / "log").exists()
    assert os.environ[prediction_log.FOLDER] == str(tmp_path / "log")
    mlflow.pyfunc.load_model("models:/sign-digits@champion").predict(
        pd.DataFrame({"image": [(photographs / "0" / "IMG_0000.JPG").read_bytes()]})
    )
    assert len(lines(tmp_path / "log")) == 1


def test_unwritable_log_keeps_the_reply(
    champion: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(prediction_log.FOLDER, str(tmp_path / "file"))
    model = mlflow.pyfunc.load_model("models:/sign-digits@champion")
    reply = model.predict(pd.DataFrame({"image": [(photographs / "0" / "IMG_0000.JPG").read_bytes()]}))
    assert len(reply) == 1
