import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from signdigits.config import DataParameters
from signdigits.data import loading
from signdigits.errors import ModelError
from signdigits.model import architecture
from signdigits.packaging import package
from signdigits.tracking import registry, runs

from .conftest import SIZE, calibrate

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("color_mode", ["rgb", "grayscale"])
def test_logged_model_matches_network(store: str, photographs: Path, color_mode: str) -> None:
    loaded = loading.load_data(DataParameters(data=str(photographs), image_size=SIZE, color_mode=color_mode))
    network = architecture.build_network(loaded.training.shape, 3)
    with runs.start_run("train", "train"):
        info = package.log_model(network, calibrate(network, loaded), loaded, {})
    served = mlflow.pyfunc.load_model(info.model_uri)
    paths = [loaded.dataset.folder / loaded.dataset.photographs[i].path for i in loaded.split.training[:5]]
    reply = served.predict(pd.DataFrame({"image": [path.read_bytes() for path in paths]}))
    logits = network(loaded.training.x[:5].astype(np.float32)).numpy()
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    answered = [list(row.values()) for row in reply["probabilities"]]
    np.testing.assert_allclose(answered, expected, rtol=1e-4)


@pytest.mark.parametrize(("name", "content"), [("network.tflite", ""), ("settings.json", "NaN")])
def test_model_that_does_not_answer_fails(
    store: str,
    loaded: loading.Data,
    model_files: Callable[[float], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str,
) -> None:
    """A network that cannot be loaded, and one whose probabilities are not numbers."""

    files = model_files(1.0)

    def write_damaged(network: Any, calibration: Any, data: loading.Data, folder: Path) -> None:
        shutil.copytree(files, folder, dirs_exist_ok=True)
        whole = (folder / name).read_text(errors="replace")
        (folder / name).write_text(whole.replace('"temperature": 1.0', f'"temperature": {content}') if content else "")

    monkeypatch.setattr(package, "write_files", write_damaged)
    network = architecture.build_network(loaded.training.shape, 3)
    with runs.start_run("train", "train") as run, pytest.raises(ModelError, match="does not answer its input example"):
        package.log_model(network, calibrate(network, loaded), loaded, {})
    with pytest.raises(ModelError, match="no such model in"):
        registry.find_model(run.info.run_id, "")


def test_versions_keep_their_decoder(log_model: Callable[..., Any]) -> None:
    first, second = (mlflow.pyfunc.load_model(log_model().model_uri).unwrap_python_model() for _ in range(2))
    assert first.images is not second.images


def test_model_without_artifacts_is_reported(log_model: Callable[..., Any]) -> None:
    logged = log_model()
    shutil.rmtree(logged.artifact_location.removeprefix("file://"))
    with pytest.raises(ModelError, match=r"no such model in sqlite.*; restore it, or train it again"):
        registry.find_model(logged.source_run_id, "")


def test_tags_name_data_and_commit(log_model: Callable[..., Any], loaded: loading.Data) -> None:
    logged = log_model(study="bars-1234", trial="3")
    assert mlflow.get_run(logged.source_run_id).data.tags["role"] == "train"
    expected = {
        "study": "bars-1234",
        "trial": "3",
        "dataset_digest": loaded.split.digest,
        "split": "stratified",
    }
    assert expected.items() <= logged.tags.items()
    assert logged.tags["git_commit"]


def test_input_example_is_training_photograph(loaded: loading.Data) -> None:
    example = package.make_input_example(loaded)
    assert json.loads(example.to_json(orient="records"))[0]["image"].startswith("/9j/"), "JPEG in base64"


def test_mlflow_generates_dockerfile(log_model: Callable[..., Any], tmp_path: Path) -> None:
    import mlflow.cli  # takes a second, which no other test needs

    uri = log_model().model_uri
    line = ["models", "generate-dockerfile", "--model-uri", uri, "--output-directory", str(tmp_path / "image")]
    generated = CliRunner().invoke(mlflow.cli.cli, line)
    assert generated.exit_code == 0, generated.output
    assert "COPY model_dir /opt/ml/model" in (tmp_path / "image" / "Dockerfile").read_text()
    assert (tmp_path / "image" / "model_dir" / "MLmodel").is_file()
