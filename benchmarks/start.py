"""The start of commands, with and without TensorFlow, and of an endpoint."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
from tests.conftest import serving

from benchmarks import servers
from benchmarks.measure import Row, in_turns, temporary_store
from benchmarks.serving import enlarge
from signdigits.config import DataParameters
from signdigits.data import loading

ROUNDS = 3
LARGE = 100  # photographs of 12 megapixels


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    with temporary_store("start") as name:
        folder = Path(name)
        servers.register_versions(loaded)
        ways = {
            "help": lambda: run("-m", "signdigits", "--help"),
            "line": lambda: read_first_line("main", folder),
            "register": lambda: run("-m", "signdigits", "register", "--version", "1"),
            "tensorflow": lambda: run("-c", "import tensorflow"),
            "endpoint": lambda: start_endpoint(folder),
        }
        seconds = in_turns(ways, ROUNDS)
        before = cpu_seconds()
        ways["register"]()
        register = cpu_seconds() - before
        loads = in_turns(load_large_photographs(loaded, folder), ROUNDS)
    endpoint = seconds["endpoint"] - seconds["tensorflow"]
    return [
        Row("`--help`, in seconds", "", seconds["help"], 0.5, False, ""),
        Row("first line of `main`, in seconds", "", seconds["line"], 1, False, ""),
        Row("`register --version 1`, in CPU seconds", "", register, 3, False, f"{seconds['register']:.1f} s elapsed"),
        Row(
            "an endpoint that answers, in seconds", "importing TensorFlow", endpoint, 1.5, False,
            f"{seconds['endpoint']:.1f} s less {seconds['tensorflow']:.1f} s",
        ),
        Row(
            f"start of `main` after `prepare`, {LARGE} JPEGs of 12 megapixels", "without the cache of `prepare`",
            loads["second"] / loads["first"], 0.5, False, f"{loads['second']:.2f} s against {loads['first']:.2f} s",
        ),
    ]  # fmt: skip


def run(*arguments: str) -> None:
    environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)


def cpu_seconds() -> float:
    """Return the CPU time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read_first_line(command: str, folder: Path) -> None:
    """Start a command that needs TensorFlow, and end it after its first line of output."""
    line = [sys.executable, "-m", "signdigits", command]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()


def start_endpoint(folder: Path) -> None:
    with serving("models:/sign-digits/1", folder / "mlflow.log"):
        pass


def load_large_photographs(loaded: loading.Data, folder: Path) -> dict[str, Callable[[], object]]:
    """Return the first load of a folder of large photographs, which decodes them, and the second, from the cache."""
    target = folder / "large"
    for index in range(LARGE):
        photograph = loaded.dataset.photographs[index * len(loaded.dataset.photographs) // LARGE]
        path = target / loaded.dataset.class_names[photograph.label] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(enlarge(loaded.dataset.read(photograph)))

    def load(clear_cache: bool) -> None:
        with contextlib.chdir(folder):
            if clear_cache:
                shutil.rmtree("data", ignore_errors=True)
            loading.load_data(DataParameters(data=str(target)))

    return {"first": lambda: load(clear_cache=True), "second": lambda: load(clear_cache=False)}
