"""Score a model on the test images, through the very artifact that will be served.

python -m signdigits evaluate --data FOLDER --run_id RUN
mlflow run . -e evaluate -P data=FOLDER -P model_uri=models:/sign-digits@champion
"""

import base64
import logging
from dataclasses import asdict, dataclass

import mlflow
import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.entities import LoggedModel
from sklearn.metrics import classification_report

from signdigits import images, plots, tracking
from signdigits.data import Dataset, scan, split_photographs
from signdigits.errors import ModelError
from signdigits.hyperparameters import SourceParameters

log = logging.getLogger(__name__)

CHUNK = 256  # photographs that are in memory at once
WORST = 12  # mistakes that are shown


@dataclass(frozen=True)
class Scores:
    """What a model made of the test images."""

    accuracy: float
    test_images: int
    test_digest: str


def evaluate(model: LoggedModel, parameters: SourceParameters) -> Scores:
    """Score `model` in a run of its own.

    Raises ModelError if it was trained on other photographs than `parameters.data`: their split would not keep its
    training images out of the test.
    """
    dataset = scan(parameters)
    if model.tags.get("dataset_digest") != dataset.digest:
        raise ModelError(
            f"model {model.model_id}: trained on data={model.tags.get('data')} with digest "
            f"{model.tags.get('dataset_digest')}, but data={parameters.data} has {dataset.digest}; "
            "pass --data the photographs that the model was trained on"
        )
    with tracking.run("evaluate", f"evaluate {model.model_id}"):
        tracking.log_params(asdict(parameters))
        tracking.describe(f"Test images of `{parameters.data}`, scored with model `{model.model_id}`.")
        return score(model, dataset)


def score(model: LoggedModel, dataset: Dataset) -> Scores:
    """Score `model` on the test images; metrics, tables and pictures go to the active run and to the model."""
    split = split_photographs(dataset)
    tags = tracking.data_tags(dataset, split)
    served = mlflow.pyfunc.load_model(model.model_uri)
    table = predict(served, dataset, split.testing)
    accuracy = float((table["label"] == table["prediction"]).mean())
    mlflow.set_tags(tags)
    mlflow.log_input(tracking.dataset_input(dataset, split.testing), context="testing")
    mlflow.log_metrics({"test_accuracy": accuracy, "test_images": len(table)}, model_id=model.model_id)
    log_mlflow_evaluation(table)
    log_mistakes(table, dataset)
    found = {"test_accuracy": str(accuracy), "test_images": str(len(table)), "test_digest": tags["test_digest"]}
    mlflow.set_logged_model_tags(model.model_id, found)
    log.info("test accuracy %.4f on %d test images", accuracy, len(table))
    return Scores(accuracy, len(table), tags["test_digest"])


def predict(served: mlflow.pyfunc.PyFuncModel, dataset: Dataset, indices: np.ndarray) -> pd.DataFrame:
    """One row a photograph: path, label, prediction, and the probability of each."""
    chunks = []
    for start in range(0, len(indices), CHUNK):
        chosen = [dataset.photographs[i] for i in indices[start : start + CHUNK]]
        encoded = [base64.b64encode((dataset.folder / photograph.path).read_bytes()).decode() for photograph in chosen]
        reply = served.predict(pd.DataFrame({"image": encoded}))
        labels = [dataset.class_names[photograph.label] for photograph in chosen]
        chunks.append(
            pd.DataFrame(
                {
                    "path": [photograph.path for photograph in chosen],
                    "label": labels,
                    "prediction": reply["label"],
                    "probability": reply["probability"],
                    "label_probability": [
                        row[label] for row, label in zip(reply["probabilities"], labels, strict=True)
                    ],
                }
            )
        )
    return pd.concat(chunks, ignore_index=True)


def log_mlflow_evaluation(table: pd.DataFrame) -> None:
    """MLflow's own evaluation of the predictions (accuracy, precision, recall, F1, confusion matrix), and per class."""
    answers = table[["label", "prediction"]]
    mlflow.models.evaluate(
        data=mlflow.data.from_pandas(answers, name="predictions", targets="label", predictions="prediction"),
        model_type="classifier",
        evaluators="default",
        evaluator_config={"metric_prefix": "test_", "log_model_explainability": False},
    )
    per_class = classification_report(table["label"], table["prediction"], output_dict=True, zero_division=0)
    mlflow.log_text(pd.DataFrame(per_class).T.rename_axis("class").to_csv(), "test/per_class.csv")
    mlflow.log_text(table.to_csv(index=False), "test/predictions.csv")


def log_mistakes(table: pd.DataFrame, dataset: Dataset) -> None:
    """Show the photographs that the model was surest about and wrong."""
    wrong = table[table["label"] != table["prediction"]].nlargest(WORST, "probability")
    if wrong.empty:
        return
    pictures = [images.decode((dataset.folder / path).read_bytes(), 200, "rgb") for path in wrong["path"]]
    titles = [f"{row.label} read as {row.prediction}\n{row.probability:.0%}, {row.path}" for row in wrong.itertuples()]
    mlflow.log_figure(plots.photographs(pictures, titles, "Worst mistakes", columns=4), "test/worst_mistakes.png")
