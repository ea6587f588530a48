from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.entities import LoggedModel
from PIL import Image

from signdigits import evaluate
from signdigits.config import DataParameters, ModelParameters
from signdigits.data import loading
from signdigits.data.corruptions import CORRUPTIONS
from signdigits.errors import ModelError

from .conftest import write_photographs

pytestmark = pytest.mark.slow


def download(run_id: str, name: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name))


def test_evaluate_uses_served_artifact(store: str, loaded: loading.Data, log_model: Callable[..., LoggedModel]) -> None:
    model = log_model()
    scores = evaluate.evaluate(loaded.parameters, ModelParameters(model_uri=model.model_uri))
    run = mlflow.last_active_run()
    assert scores.test_images == 12
    predictions = pd.read_csv(download(run.info.run_id, "test/predictions.csv"))
    assert predictions["path"].tolist() == [loaded.dataset.photographs[i].path for i in loaded.split.testing]
    accuracy = (predictions["label"] == predictions["prediction"]).mean()
    assert run.data.metrics["test_accuracy"] == pytest.approx(accuracy)
    assert run.data.metrics["test_accuracy_score"] == pytest.approx(accuracy), "MLflow's own"
    assert {"test_precision_score", "test_recall_score", "test_f1_score"} <= set(run.data.metrics)
    files = {item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert "test_confusion_matrix.png" in files
    per_class = pd.read_csv(download(run.info.run_id, "test/per_class.csv"), index_col="class")
    assert {"0", "1", "2"} <= set(per_class.index)
    assert "reliability.png" in {
        Path(item.path).name for item in mlflow.MlflowClient().list_artifacts(run.info.run_id, "test")
    }
    assert scores.test_accuracy_low < accuracy < scores.test_accuracy_high
    assert run.data.metrics["test_ece"] == scores.test_ece
    (used,) = [item for item in run.inputs.dataset_inputs if item.dataset.name == "bars"]
    assert used.dataset.digest == loaded.dataset.part_digest(loaded.split.testing)


def test_robustness_is_measured(store: str, loaded: loading.Data, log_model: Callable[..., LoggedModel]) -> None:
    model = log_model()
    scores = evaluate.evaluate(loaded.parameters, ModelParameters(model_uri=model.model_uri))
    run = mlflow.last_active_run()
    table = pd.read_csv(download(run.info.run_id, "test/robustness.csv"), index_col="corruption")
    assert table.index.tolist() == ["none", *CORRUPTIONS]
    assert table.loc["none", "accuracy"] == scores.test_accuracy
    assert ((table["accuracy_low"] <= table["accuracy"]) & (table["accuracy"] <= table["accuracy_high"])).all()
    corrupted = table.drop(index="none")["accuracy"]
    assert run.data.metrics["robust_accuracy"] == pytest.approx(corrupted.mean())
    tags = mlflow.get_logged_model(model.model_id).tags
    assert float(tags["worst_accuracy"]) == pytest.approx(corrupted.min())
    assert corrupted[tags["worst_corruption"]] == corrupted.min()
    with Image.open(download(run.info.run_id, "test/robustness.png")) as picture:
        assert picture.height > 500


def test_outliers_are_measured(store: str, loaded: loading.Data, log_model: Callable[..., LoggedModel]) -> None:
    model = log_model()
    evaluate.evaluate(loaded.parameters, ModelParameters(model_uri=model.model_uri))
    run = mlflow.last_active_run()
    table = pd.read_csv(download(run.info.run_id, "test/outliers.csv"), index_col="kind")
    assert table.index.tolist() == ["charts", "handwriting", "photographs", "text", "all"]
    assert table.loc["all", "images"] == 160
    assert table["auroc"].between(0, 1).all()
    predictions = pd.read_csv(download(run.info.run_id, "test/predictions.csv"))
    assert run.data.metrics["outliers_in_test"] == pytest.approx(predictions["is_outlier"].mean())
    assert run.data.metrics["outlier_auroc"] == pytest.approx(table.loc["all", "auroc"])
    assert float(mlflow.get_logged_model(model.model_id).tags["outliers_detected"]) == table.loc["all", "detected"]


def test_scores_are_logged_with_model(store: str, loaded: loading.Data, log_model: Callable[..., LoggedModel]) -> None:
    version = mlflow.register_model(log_model().model_uri, "bars")
    scores = evaluate.evaluate(loaded.parameters, ModelParameters(model_uri=version.source))
    (model,) = mlflow.search_logged_models(output_format="list")
    tags = mlflow.MlflowClient().get_model_version("bars", version.version).tags
    assert tags["test_run_id"] == model.tags["test_run_id"] == mlflow.last_active_run().info.run_id
    assert float(model.tags["test_accuracy"]) == pytest.approx(scores.test_accuracy)
    assert model.tags["test_images"] == "12"
    assert {metric.key: metric.value for metric in model.metrics}["test_accuracy"] == pytest.approx(
        scores.test_accuracy
    )


def test_worst_mistakes_are_plotted(store: str, loaded: loading.Data, log_model: Callable[..., LoggedModel]) -> None:
    """An untrained network is wrong about most of three classes."""
    evaluate.evaluate(loaded.parameters, ModelParameters(model_uri=log_model().model_uri))
    with Image.open(download(mlflow.last_active_run().info.run_id, "test/worst_mistakes.png")) as picture:
        assert picture.width > 500


def test_other_dataset_is_refused(
    store: str, tmp_path: Path, log_model: Callable[..., LoggedModel], source: DataParameters
) -> None:
    other = write_photographs(tmp_path / "other", each=21)
    with pytest.raises(ModelError, match="pass --data the photographs that the model was trained on"):
        evaluate.evaluate(replace(source, data=str(other)), ModelParameters(model_uri=log_model().model_uri))


def test_uncalibrated_error_is_logged(store: str, loaded: loading.Data, log_model: Callable[..., LoggedModel]) -> None:
    """The same network at a temperature of 1 and of 3."""
    plain, cooled = (
        evaluate.evaluate(loaded.parameters, ModelParameters(model_uri=log_model(temperature=t).model_uri))
        for t in (1.0, 3.0)
    )
    assert plain.test_ece == pytest.approx(plain.test_ece_uncalibrated, abs=1e-6)
    assert cooled.test_ece_uncalibrated == pytest.approx(plain.test_ece, abs=1e-6)
    assert cooled.test_ece != pytest.approx(plain.test_ece, abs=1e-3)


def test_confidence_interval_is_wilsons() -> None:
    """407 of 412: centre and half-width from the formula in Wilson's paper, worked out by hand."""
    table = pd.DataFrame({"label": ["0"] * 412, "prediction": ["0"] * 407 + ["1"] * 5})
    table["p(0)"], table["p(1)"] = 0.9, 0.1
    scores = evaluate.compute_scores(table, ("0", "1"), 1.0)
    n, p, z = 412, 407 / 412, 1.959964
    centre, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert scores.test_accuracy_low == pytest.approx((centre - half) / (1 + z * z / n))
    assert scores.test_accuracy_high == pytest.approx((centre + half) / (1 + z * z / n))
