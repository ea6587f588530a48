"""Fixtures: generated photographs, a SQLite store per test, trained models, real servers on free ports."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlflow
import numpy as np
import pytest
from mlflow.models.model import ModelInfo
from PIL import Image

from signdigits import startup
from signdigits.config import (
    DataParameters,
    Hyperparameters,
    ModelParameters,
    RefitParameters,
    RegistryParameters,
    StudyParameters,
    VersionParameters,
)
from signdigits.data import loading
from signdigits.packaging import package
from signdigits.tracking import runs
from signdigits.tuning.space import Range, Space

if TYPE_CHECKING:
    import keras

    from signdigits.model.calibration import Calibration

T = TypeVar("T")
PROJECT = Path(__file__).parents[1]
PATIENCE = 600.0  # seconds: a busy machine is slow, and a failure is rare
SIZE = 16  # pixels: the smallest network that still has its three poolings
# Of `finished_job`.
SPACE = Space.of("notebook", epochs=Range(1, 2), batch_size=16)
STUDY = StudyParameters(n_trials=2, pruner="none", space="notebook")
TWO = RefitParameters(n_seeds=2, examples="true")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=int, default=1, help="repetitions of the injected faults")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "repetition" in metafunc.fixturenames:
        metafunc.parametrize("repetition", range(metafunc.config.getoption("--faults")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the second stage, then the files with slow tests: at the end, the others keep every process busy."""
    paths = [{item.path for item in items if item.get_closest_marker(name)} for name in ("image", "outage", "slow")]
    items.sort(key=lambda item: [item.path not in marked for marked in paths])


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """Use the environment of an activated .venv, and import TensorFlow as the command line does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        startup.import_tensorflow()
        yield


def write_photographs(folder: Path, classes: int = 3, each: int = 20) -> Path:
    """Write up to six class folders `0`, `1`, ... of JPEG files: a bright bar at a place per class, with noise."""
    random = np.random.default_rng(0)
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        at = label % 3 * 8
        for number in range(each):
            pixels = random.integers(0, 80, (24, 24, 3), dtype=np.uint8)
            bars = pixels if label < 3 else pixels.transpose(1, 0, 2)  # across, then upright
            bars[at : at + 6] += 150
            Image.fromarray(pixels).save(folder / str(label) / f"IMG_{number:04d}.JPG", quality=95)
    return folder


@pytest.fixture(scope="session")
def fill_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that fills a new folder once for all processes of pytest-xdist, and returns it."""
    folder = tmp_path_factory.getbasetemp()
    common = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def fill(name: str, write: Callable[[Path], object]) -> Path:
        with (common / f"{name}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if not lock.read():
                (common / name).mkdir()
                write(common / name)
                lock.write("filled")
        return common / name

    return fill


@pytest.fixture(scope="session")
def photographs(fill_once: Callable[..., Path]) -> Path:
    """A read-only folder of 60 photographs in 3 classes; `write_photographs` makes others."""
    return fill_once("photographs", lambda folder: write_photographs(folder / "bars")) / "bars"


@pytest.fixture(scope="session")
def source(photographs: Path) -> DataParameters:
    return DataParameters(data=str(photographs), image_size=SIZE)


@pytest.fixture(scope="session")
def loaded(source: DataParameters) -> loading.Data:
    return loading.load_data(source)


@pytest.fixture(scope="session")
def empty_store(fill_once: Callable[..., Path]) -> Path:
    """An empty MLflow database, to copy: creating its tables takes two seconds."""

    def create(folder: Path) -> None:
        with use_store(folder):
            mlflow.search_experiments()

    return fill_once("store", create) / "mlflow.db"


@contextmanager
def use_store(folder: Path) -> Iterator[str]:
    """Work in `folder` with its own tracking store, as if the project had been cloned there."""
    before = Path.cwd()
    os.chdir(folder)
    uri = f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    try:
        yield uri
    finally:
        while mlflow.active_run():
            mlflow.end_run()
        mlflow.tracking.fluent._active_experiment_id = None
        os.chdir(before)


@contextmanager
def store_like(database: Path, folder: Path) -> Iterator[str]:
    """Use a store that starts as a copy of `database`, without MLFLOW_ variables in the environment."""
    shutil.copy(database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch, use_store(folder) as uri:
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_experiment("tests")
        yield uri


@contextmanager
def copy_stores(source: Path, folder: Path) -> Iterator[str]:
    """Use copies, in `folder`, of the tracking store and the studies in `source`."""
    shutil.copy(source / "optuna.db", folder)
    with store_like(source / "mlflow.db", folder) as uri:
        yield uri


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> Iterator[str]:
    """Yield the URI of a tracking store; the test also has its own working directory."""
    with store_like(empty_store, tmp_path) as uri:
        yield uri


@pytest.fixture(scope="session")
def champion_store(fill_once: Callable[..., Path], loaded: loading.Data, empty_store: Path) -> Path:
    """An MLflow database, to copy, with a trained, evaluated and registered model."""

    from signdigits import (
        evaluate,
        register,
        train,
    )  # they import TensorFlow, which pytest-xdist's main process never needs

    def create(folder: Path) -> None:
        shutil.copy(empty_store, folder / "mlflow.db")
        with use_store(folder):
            mlflow.set_experiment("tests")
            run_id = train.train(loaded, Hyperparameters(epochs=8, batch_size=8, initial_learning_rate=0.003))
            evaluate.evaluate(loaded.parameters, ModelParameters(run_id=run_id))
            register.register(ModelParameters(run_id=run_id), VersionParameters())

    return fill_once("champion", create) / "mlflow.db"


@pytest.fixture
def champion(tmp_path: Path, champion_store: Path) -> Iterator[str]:
    """Yield a store with version 1 of the registered model as the champion."""
    with store_like(champion_store, tmp_path) as uri:
        yield uri


@pytest.fixture(scope="session")
def finished_job(fill_once: Callable[..., Path], loaded: loading.Data, empty_store: Path) -> Path:
    """The folder of the stores, to copy, of a job with two trials and two refits.

    It was interrupted once, between the first refit's training and its evaluation.
    """
    from signdigits import main

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    def run(folder: Path) -> None:
        with store_like(empty_store, folder):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(main.evaluate, "score_model", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    main.main(loaded, SPACE, STUDY, TWO, RegistryParameters())
            statuses = Counter(run.info.status for run in runs.search_runs(""))
            assert statuses == {"FINISHED": 2, "KILLED": 2}
            decision = main.main(loaded, SPACE, STUDY, TWO, RegistryParameters())
            assert (decision.version, decision.alias) == ("1", "champion")

    return fill_once("job", run)


def calibrate(network: "keras.Model", loaded: loading.Data, temperature: float = 1.0) -> "Calibration":
    """Return the outlier detector of a network that was not trained, with a temperature."""
    from signdigits.model import training

    fitted = training.Fit(network, {}, Hyperparameters())
    return replace(training.calibrate_network(fitted, loaded.training, loaded.validation), temperature=temperature)


@pytest.fixture(scope="session")
def model_files(fill_once: Callable[..., Path], loaded: loading.Data) -> Callable[[float], Path]:
    """Return a function from a temperature to the files of an untrained model: exporting one takes two seconds."""
    import keras

    from signdigits.model import architecture

    def write(folder: Path, temperature: float) -> None:
        keras.utils.set_random_seed(0)
        network = architecture.build_network(loaded.training.shape, 3)
        architecture.compile_network(network, Hyperparameters(), steps=1)
        package.write_files(network, calibrate(network, loaded, temperature), loaded, folder)

    return lambda temperature: fill_once(f"model-{temperature}", lambda folder: write(folder, temperature))


def log_untrained(files: Path, loaded: loading.Data, **facts: Any) -> ModelInfo:
    """Log a model with `files`, those of an untrained network, in a run of its own; `facts` become its tags."""
    with runs.start_run("train", "train"):
        return package.log_files(files, loaded, facts)


@pytest.fixture
def log_model(store: str, loaded: loading.Data, model_files: Callable[[float], Path]) -> Callable[..., Any]:
    """Return a function that logs an untrained network with its arguments as tags, and returns the logged model."""

    def log(temperature: float = 1.0, **tags: str) -> Any:
        facts = {"val_accuracy": 0.5, "temperature": temperature, **tags}
        return mlflow.get_logged_model(log_untrained(model_files(temperature), loaded, **facts).model_id)

    return log


def settings_of_others(folder: Path) -> dict[str, str]:
    """Return an environment as other projects, a Jupyter kernel and a company leave it, with their files in `folder`."""
    keras_json = {"backend": "torch", "floatx": "float16", "image_data_format": "channels_first", "epsilon": 1e-3}
    (folder / "keras.json").write_text(json.dumps(keras_json))
    (folder / "matplotlibrc").write_text("backend: TkAgg\ntext.usetex: True\nfont.family: Nowhere\n")
    return os.environ | {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(folder / "matplotlibrc"),
        "KERAS_BACKEND": "torch",
        "KERAS_HOME": str(folder),
        "KERAS_MAX_EPOCHS": "1",
        "TF_USE_LEGACY_KERAS": "1",
        "PYTHONOPTIMIZE": "2",
        "PYTHONWARNINGS": "ignore::UserWarning,error",
        "http_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
    }


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m signdigits` in a subprocess."""
    line = [sys.executable, "-m", "signdigits", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_command(port: int | str, *options: str) -> list[str]:
    """Return the command line of `python -m signdigits serve`."""
    return [sys.executable, "-m", "signdigits", "serve", "--port", str(port), *options]


@contextmanager
def serving(model_uri: str, log: Path) -> Iterator[str]:
    """Run `mlflow models serve` with unpickling forbidden, and yield its URL."""
    url = f"http://127.0.0.1:{free_port()}"
    line = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model_uri, "--env-manager", "local"]
    environment = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    with log.open("w") as file:
        server = subprocess.Popen(
            [*line, "--port", url.rpartition(":")[2]], stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        wait_until(lambda: answers(f"{url}/ping") or server.poll() is not None)
        assert server.poll() is None, log.read_text()
        yield url
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def wait_until(condition: Callable[[], T], seconds: float = PATIENCE, interval: float = 0.1) -> T:
    """Poll until `condition` holds, and return its value; fail the test if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(interval)
    return found


@pytest.fixture(scope="session")
def sign_digits() -> Path:
    """The folder of the real photographs; without SIGN_DIGITS_DATA the test is skipped."""
    folder = os.environ.get("SIGN_DIGITS_DATA")
    if not folder:
        pytest.skip("SIGN_DIGITS_DATA does not point at the real photographs")
    return Path(folder).resolve()
