import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import mlflow
import mlflow.tensorflow
import numpy as np
import pytest
from mlflow.entities import Metric, Run

from signdigits import train
from signdigits.config import DataParameters, Hyperparameters
from signdigits.data import loading
from signdigits.errors import TrainingDiverged
from signdigits.model import input_pipeline, training
from signdigits.model.augmentation import Augmentation

from .conftest import PROJECT, settings_of_others, store_like, wait_until

pytestmark = pytest.mark.slow

SHORT = Hyperparameters(epochs=3, batch_size=16, initial_learning_rate=0.003)
AUGMENTED = dataclasses.replace(SHORT, augmentation=1.0, dropout=0.3)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The run of a training, the names of its artifacts, the steps and last values of its metrics, and the model's files."""

    run: Run
    artifacts: set[str]
    histories: dict[str, list[Metric]]
    model: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, empty_store: Path, loaded: loading.Data) -> dict[str, Trained]:
    """The network trained once without augmentation and once with it."""
    made = {}
    for name, hyperparameters in (("plain", SHORT), ("augmented", AUGMENTED)):
        folder = tmp_path_factory.mktemp(name)
        with store_like(empty_store, folder):
            client = mlflow.MlflowClient()
            run = mlflow.get_run(train.train(loaded, hyperparameters))
            (model,) = mlflow.search_logged_models(output_format="list")
            assert model.source_run_id == run.info.run_id
            files = mlflow.artifacts.download_artifacts(f"models:/{model.model_id}", dst_path=str(folder / "model"))
            made[name] = Trained(
                run,
                {item.path for item in client.list_artifacts(run.info.run_id)},
                {metric: client.get_metric_history(run.info.run_id, metric) for metric in run.data.metrics},
                Path(files),
            )
    return made


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, empty_store: Path, loaded: loading.Data) -> training.Fit:
    """The network fitted with the hyperparameters of SHORT."""
    with store_like(empty_store, tmp_path_factory.mktemp("fitted")):
        return fit(loaded, SHORT)


def test_run_logs_everything_to_reproduce(trained: dict[str, Trained], loaded: loading.Data) -> None:
    run = trained["plain"].run
    assert run.info.status == "FINISHED"
    expected = dataclasses.asdict(loaded.parameters) | dataclasses.asdict(SHORT)
    assert {name: run.data.params[name] for name in expected} == {name: str(value) for name, value in expected.items()}
    assert run.data.params["opt_learning_rate"], "autologged"
    assert run.data.tags["dataset_digest"] == loaded.split.digest
    assert {"learning_curves.png", "model_summary.txt", "versions.json"} <= trained["plain"].artifacts
    inputs = {tag.value: used.dataset.digest for used in run.inputs.dataset_inputs for tag in used.tags}
    assert inputs == {
        "training": loaded.dataset.part_digest(loaded.split.training),
        "validation": loaded.dataset.part_digest(loaded.split.validation),
    }


@pytest.mark.parametrize("name", ["plain", "augmented"])
def test_every_epoch_is_logged(trained: dict[str, Trained], name: str) -> None:
    metrics = trained[name].run.data.metrics
    for metric in ("loss", "accuracy", "val_loss", "val_accuracy"):
        history = trained[name].histories[metric]
        assert [point.step for point in history] == [0, 1, 2]
        assert metrics[metric] == history[-1].value
    assert not [metric for metric in metrics if metric.startswith("validation_")], "val_accuracy is logged once"


def fit(loaded: loading.Data, hyperparameters: Hyperparameters) -> training.Fit:
    network = training.new_network(loaded, loaded.training, hyperparameters)
    return training.fit_network(network, loaded.training, loaded.validation, hyperparameters)


def test_same_seed_same_result(store: str, loaded: loading.Data, fitted: training.Fit) -> None:
    again = fit(loaded, SHORT)
    other = fit(loaded, dataclasses.replace(SHORT, seed=1))
    assert fitted.history == again.history
    assert fitted.history != other.history
    for one, two in zip(fitted.network.get_weights(), again.network.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def notebooks_network() -> keras.Sequential:
    """The notebook's own lines, for 16 pixels and three classes."""
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Rescaling(1.0 / 255, input_shape=(16, 16, 3)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(3),
        ]
    )


@pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`")
def test_training_equals_notebook_bit_for_bit(store: str, loaded: loading.Data, fitted: training.Fit) -> None:
    assert (SHORT.augmentation, SHORT.dropout, SHORT.precision) == (0, 0, "float32")
    keras.utils.set_random_seed(SHORT.seed)
    network = notebooks_network()
    schedule = keras.optimizers.schedules.ExponentialDecay(0.003, decay_steps=1500, decay_rate=0.96)
    network.compile(
        optimizer=keras.optimizers.Adam(schedule),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    mlflow.tensorflow.autolog(disable=True)
    history = network.fit(
        input_pipeline.training_batches(loaded.training, 16, Augmentation(), seed=SHORT.seed),
        steps_per_epoch=3,
        epochs=3,
        validation_data=(loaded.validation.x, loaded.validation.y),
        validation_batch_size=16,
        verbose=0,
    ).history
    assert fitted.history == history
    for one, two in zip(fitted.in_float32().get_weights(), network.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_augmented_training_is_reproducible(store: str, loaded: loading.Data) -> None:
    augmented = dataclasses.replace(AUGMENTED, precision="mixed_bfloat16")
    first = fit(loaded, augmented)
    again = fit(loaded, augmented)
    assert first.history == again.history
    assert len(first.history["loss"]) == SHORT.epochs


def test_bfloat16_training_is_saved_float32(store: str, loaded: loading.Data) -> None:
    fast = dataclasses.replace(SHORT, precision="mixed_bfloat16")
    with mlflow.start_run() as run:
        fitted = fit(loaded, fast)
    assert mlflow.get_run(run.info.run_id).data.tags["precision"] == "mixed_bfloat16"
    assert {layer.compute_dtype for layer in fitted.in_float32().layers} == {"float32"}
    logits = np.asarray(fitted.in_float32()(loaded.validation.x))
    accuracy = (logits.argmax(axis=1) == loaded.validation.y).mean()
    assert accuracy == pytest.approx(fitted.last("val_accuracy"), abs=0.11), "one of ten validation images"


def test_averaged_weights_are_kept(store: str, loaded: loading.Data, fitted: training.Fit) -> None:
    averaged = fit(loaded, dataclasses.replace(SHORT, ema_momentum=0.9))
    assert averaged.history["loss"] == pytest.approx(fitted.history["loss"], rel=1e-4), "the training is the same"
    assert averaged.history["val_loss"] != fitted.history["val_loss"]
    loss, accuracy = averaged.network.evaluate(loaded.validation.x, loaded.validation.y, batch_size=16, verbose=0)
    assert loss == pytest.approx(averaged.last("val_loss"))
    assert accuracy == pytest.approx(averaged.last("val_accuracy"))


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_detector_knows_mirror_images_if_trained_on_them(
    store: str, loaded: loading.Data, fitted: training.Fit, flip: float
) -> None:
    if flip:
        fitted = fit(loaded, dataclasses.replace(SHORT, horizontal_flip=flip))
    detector = training.fit_detector(fitted, loaded.training)
    assert len(detector.known) == len(loaded.training) * (2 if flip else 1)
    mirrored = loading.Images(np.asarray(loaded.training.x)[:, :, ::-1], loaded.training.y)
    _, features = training.compute_outputs(fitted, input_pipeline.validation_batches(mirrored, 16))
    assert (detector.score(features) < 1e-3).all() == bool(flip)


def test_saved_network_has_no_augmentation(trained: dict[str, Trained]) -> None:
    files = trained["augmented"].model
    network = keras.saving.load_model(files / "artifacts" / "network.keras")
    known = {"InputLayer", "Rescaling", "Conv2D", "MaxPooling2D", "Flatten", "Dropout", "Dense"}
    assert {type(layer).__name__ for layer in network.layers} == known
    served = mlflow.pyfunc.load_model(str(files)).unwrap_python_model()
    operations = {operation["op_name"] for operation in served.interpreters.get()._get_ops_details()}
    assert "CONV_2D" in operations
    shapes = {"SHAPE", "STRIDED_SLICE", "PACK", "RESHAPE"}
    lengths = {"MEAN", "SQUARE", "SUM", "MINIMUM", "RSQRT"}  # of the features of the outlier score
    layers = {"MUL", "CONCATENATION", "CONV_2D", "MAX_POOL_2D", "FULLY_CONNECTED", "DELEGATE"}
    assert operations <= layers | shapes | lengths


def test_nan_loss_fails_the_run(store: str, loaded: loading.Data) -> None:
    broken = loading.Images(np.full(loaded.fitting.x.shape, 1e38, np.float32), loaded.fitting.y)
    with pytest.raises(TrainingDiverged, match=r"loss became nan in epoch 1 .* lower it"):
        train.train(dataclasses.replace(loaded, fitting=broken), SHORT)
    run = mlflow.last_active_run()
    assert run.info.status == "FAILED"
    assert run.data.tags["failure_reason"].startswith("TrainingDiverged: loss became nan in epoch 1")


def interrupt(line: list[str], number: int) -> tuple[int, str]:
    """Start a training, send it a signal in the middle, and return its exit code and what it said."""
    environment = settings_of_others(Path.cwd())
    if "mlflow" in line:  # MLflow itself does not start with these
        del environment["PYTHONOPTIMIZE"], environment["PYTHONWARNINGS"]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment
    )
    wait_until(lambda: mlflow.search_runs(filter_string="metrics.val_loss > 0", search_all_experiments=True).size)
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def only_run() -> Run:
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return run


def test_interrupted_training_is_killed(store: str, photographs: Path) -> None:
    line = [sys.executable, "-m", "signdigits", "train", "--data", str(photographs), "--image_size", "16"]
    code, said = interrupt([*line, "--epochs", "10000"], signal.SIGTERM)
    assert code == 130
    assert "Traceback" not in said
    assert "interrupted" in said
    assert only_run().info.status == "KILLED"


def test_ctrl_c_ends_mlflow_run(store: str, photographs: Path) -> None:
    line = [sys.executable, "-m", "mlflow", "run", str(PROJECT), "-e", "train", "--env-manager", "local"]
    values = {"data": photographs, "image_size": 16, "epochs": 10000}
    code, _ = interrupt(
        line + [word for name, value in values.items() for word in ("-P", f"{name}={value}")], signal.SIGINT
    )
    assert code != 0
    wait_until(lambda: only_run().info.status in ("KILLED", "FAILED"))
    assert only_run().data.tags["failure_reason"] == "interrupted"


def test_fluctuation_matches_notebook_curves() -> None:
    """Validation losses of the notebook's three runs, from its own output."""
    constant = [
        2.2129, 1.4555, 0.7665, 0.6319, 0.5539, 0.4943, 0.4560, 0.5024, 0.3775, 0.4094,
        0.3838, 0.4281, 0.4085, 0.3687, 0.4104, 0.3912, 0.3219, 0.3256, 0.3040, 0.3312,
    ]  # fmt: skip
    decayed = [2.2455, 1.0810, 0.7610, 0.7087, 0.6989, 0.4881, 0.5718, 0.4507]
    slower = [2.2941, 2.2078, 1.8326, 1.1043, 0.7173, 0.6401, 0.5873, 0.5730]
    assert [round(training.loss_fluctuation(losses), 3) for losses in (constant, decayed, slower)] == [
        0.195,
        0.084,
        0.0,
    ]


def test_real_photographs_are_learned(store: str, sign_digits: Path) -> None:
    loaded = loading.load_data(DataParameters(data=str(sign_digits), image_size=32))
    run_id = train.train(loaded, Hyperparameters(epochs=2, batch_size=32, initial_learning_rate=0.002))
    assert mlflow.get_run(run_id).data.metrics["val_accuracy"] > 0.2, "chance is 0.1"
