"""The start of commands without TensorFlow, and of an endpoint."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow

from benchmarks import serving
from benchmarks.measure import Row, in_turns, temporary_store
from benchmarks.untrained import log_untrained
from signdigits.config import DataParameters
from signdigits.data import loading

ROUNDS = 3
TELEPHONE = 100
LIGHT = ("show", "links", "register --version 1")


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    with temporary_store("start") as folder:
        uri = log_untrained(loaded).model_uri
        mlflow.register_model(uri, "sign-digits")
        mlflow.MlflowClient().set_registered_model_alias("sign-digits", "champion", "1")
        ways = {
            "help": process("-m", "signdigits", "--help"),
            "line": lambda: read_first_line("main", folder),
            "tensorflow": process("-c", "import tensorflow"),
            "endpoint": lambda: start(uri, Path(folder)),
        }
        seconds = in_turns(ways, ROUNDS)
        decoding = in_turns(starts_with_telephone_photographs(loaded, Path(folder)), ROUNDS)
        importing = [command for command in LIGHT if imports_tensorflow(command)]
    return [
        Row("`--help`, in seconds", "", seconds["help"], 0.5, False, f"{seconds['help']:.2f} s"),
        Row("first line of `main`, in seconds", "", seconds["line"], 1, False, f"{seconds['line']:.2f} s"),
        Row(
            "light commands that import TensorFlow", "", len(importing), 0, False,
            f"of {', '.join(LIGHT)}: {', '.join(importing) or 'none'}",
        ),
        Row(
            "an endpoint that answers, in seconds", "importing TensorFlow",
            seconds["endpoint"] - seconds["tensorflow"], 1.5, False,
            f"{seconds['endpoint']:.1f} s less {seconds['tensorflow']:.1f} s",
        ),
        Row(
            f"start of `main` after `prepare`, {TELEPHONE} JPEGs of 12 megapixels", "without the cache of `prepare`",
            decoding["second"] / decoding["first"], 0.5, False,
            f"{decoding['second']:.2f} s against {decoding['first']:.2f} s",
        ),
    ]  # fmt: skip


def starts_with_telephone_photographs(loaded: loading.Data, folder: Path) -> dict[str, Callable[[], object]]:
    """The first start, which decodes, and the second, which finds the photographs in the cache."""
    target = folder / "telephone"
    for index in range(TELEPHONE):
        photograph = loaded.dataset.photographs[index * len(loaded.dataset.photographs) // TELEPHONE]
        path = target / loaded.dataset.class_names[photograph.label] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(serving.enlarge(loaded.dataset.read(photograph)))

    def load(empty: bool) -> None:
        with contextlib.chdir(folder):
            if empty:
                shutil.rmtree("data", ignore_errors=True)
            loading.load_data(DataParameters(data=str(target)))

    return {"first": lambda: load(empty=True), "second": lambda: load(empty=False)}


def process(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def read_first_line(command: str, folder: str) -> None:
    """Start a command that needs TensorFlow, and end it when it has said what it is about to do."""
    line = [sys.executable, "-m", "signdigits", command]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder) as started:
        assert started.stdout is not None
        started.stdout.readline()
        started.kill()


def start(uri: str, folder: Path) -> None:
    with serving.serving(uri, folder):
        pass


def imports_tensorflow(command: str) -> bool:
    """Whether the process of the command loads TensorFlow, by Python's own list of imports."""
    line = [sys.executable, "-X", "importtime", "-m", "signdigits", *command.split()]
    environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    told = subprocess.run(line, check=True, capture_output=True, text=True, env=environment).stderr
    return any(row.rpartition("|")[2].strip() == "tensorflow" for row in told.splitlines())
