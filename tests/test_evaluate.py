from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.entities import LoggedModel
from PIL import Image

from signdigits import data, evaluate
from signdigits.errors import ModelError
from signdigits.hyperparameters import DataParameters

from .conftest import write_photographs


def download(run_id: str, name: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name))


def test_the_test_images_are_scored_through_the_served_artifact(
    store: str, loaded: data.Data, log_model: Callable[..., LoggedModel]
) -> None:
    model = log_model()
    scores = evaluate.evaluate(model, loaded.parameters)
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
    (used,) = [item for item in run.inputs.dataset_inputs if item.dataset.name == "bars"]
    assert used.dataset.digest == loaded.dataset.part_digest(loaded.split.testing) == scores.test_digest


def test_the_scores_follow_the_model(store: str, loaded: data.Data, log_model: Callable[..., LoggedModel]) -> None:
    scores = evaluate.evaluate(log_model(), loaded.parameters)
    (model,) = mlflow.search_logged_models(output_format="list")
    assert float(model.tags["test_accuracy"]) == pytest.approx(scores.accuracy)
    assert model.tags["test_images"] == "12"
    assert {metric.key: metric.value for metric in model.metrics}["test_accuracy"] == pytest.approx(scores.accuracy)


def test_the_worst_mistakes_are_shown(store: str, loaded: data.Data, log_model: Callable[..., LoggedModel]) -> None:
    """An untrained network is wrong about most of three classes."""
    evaluate.evaluate(log_model(), loaded.parameters)
    with Image.open(download(mlflow.last_active_run().info.run_id, "test/worst_mistakes.png")) as picture:
        assert picture.width > 500


def test_a_model_of_other_photographs_is_refused(
    store: str, tmp_path: Path, log_model: Callable[..., LoggedModel], source: DataParameters
) -> None:
    other = write_photographs(tmp_path / "other", each=21)
    with pytest.raises(ModelError, match="pass --data the photographs that the model was trained on"):
        evaluate.evaluate(log_model(), replace(source, data=str(other)))
