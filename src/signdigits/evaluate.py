"""Score a model on the test images, or on a folder of other labelled photographs, with the artifact that is served.

python -m signdigits evaluate --data FOLDER --run_id RUN
mlflow run . -e evaluate -P data=FOLDER -P model_uri=models:/sign-digits@champion
"""

import io
import logging
import os
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import mlflow
import numpy as np
import pandas as pd
from mlflow.entities import LoggedModel
from PIL import Image
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import classification_report, roc_auc_score
from tqdm.contrib.concurrent import thread_map

from signdigits import files, plots
from signdigits.batch.scoring import Scorer, read_photograph
from signdigits.config import ModelParameters, SourceParameters
from signdigits.data import images, lineage, split
from signdigits.data.corruptions import CORRUPTIONS, corrupt_image
from signdigits.data.dataset import Dataset, scan_dataset
from signdigits.data.folders import NO_SIGN
from signdigits.data.names import Names
from signdigits.data.outlier_images import OUTLIER_IMAGES, find_no_sign, make_outlier_images
from signdigits.data.sources import HANDWRITTEN_DIGITS
from signdigits.errors import DataError, ModelError
from signdigits.model import calibration
from signdigits.packaging import reply
from signdigits.promotion.comparison import fold_interval, wilson_interval
from signdigits.promotion.predictions import find_fitted_checksums
from signdigits.tracking import registry, runs

log = logging.getLogger(__name__)

MAX_MISTAKES = 12  # mistakes in the picture


@dataclass(frozen=True)
class Scores:
    """The scores of a model on the test images."""

    test_images: int
    test_accuracy: float
    test_accuracy_low: float  # the ends of the 95 % confidence interval
    test_accuracy_high: float
    test_ece: float  # expected calibration error of the probabilities as served
    test_ece_uncalibrated: float  # without the temperature

    def __str__(self) -> str:
        return (
            f"test accuracy {self.test_accuracy:.4f} ({self.test_accuracy_low:.4f} to {self.test_accuracy_high:.4f} "
            f"with 95 % confidence) on {self.test_images} images; calibration error {self.test_ece:.4f}"
        )


def evaluate(parameters: SourceParameters, which: ModelParameters) -> Scores:
    """Score a model in a run of its own: on its test images if it was trained on `parameters.data`, else on all of these.

    Raises ModelError if there is no such model, and if it was trained on other photographs and `data` has its default.
    """
    model = registry.find_model(which.run_id, which.model_uri)
    dataset = scan_dataset(parameters)
    try:
        parts = split.repeat_split(dataset, parameters.data, model.tags)
    except (DataError, ModelError) as error:
        if parameters.data == SourceParameters().data:  # probably forgotten
            raise
        log.info("%s: scored as a folder of its own", str(error).partition(";")[0])
        return _score_folder(model, dataset, parameters)
    if parts.folds:
        raise ModelError(
            f"model {model.model_id}: was trained on all photographs of {dataset.name}, and its folds have tested it; pass --data other "
            "photographs"
        )
    with runs.start_run("evaluate", f"evaluate {model.model_id}"):
        runs.log_params(asdict(parameters))
        return score_model(model, dataset, parts)


def _score_folder(model: LoggedModel, dataset: Dataset, parameters: SourceParameters) -> Scores:
    """Score `model` on photographs that it was not trained on; the scores are those of the run, and not tags of the model.

    Raises ModelError if it was trained on all of them, or does not know a class.
    """
    scorer = Scorer(model.model_uri)
    known = Names(scorer.class_names)
    dataset = replace(dataset, class_names=tuple(known.find(name) or name for name in dataset.class_names))
    if unknown := sorted(set(dataset.class_names) - set(scorer.class_names)):
        raise ModelError(
            f"{dataset.folder / unknown[0]}: no class of the model, which knows {', '.join(scorer.class_names)}"
            f"{known.suggest(unknown[0])}; rename the folder, or remove it"
        )
    fitted = find_fitted_checksums(model.source_run_id)
    unseen = np.array([i for i, p in enumerate(dataset.photographs) if p.checksum not in (fitted or ())], int)
    n_known = len(dataset.photographs) - len(unseen)
    if not len(unseen):
        raise ModelError(
            f"data={parameters.data}: the model was trained on all of the {n_known} photographs; pass some that it has not seen"
        )
    overlap = f"{n_known} more are left out, because it was trained on them"
    if fitted is None:
        overlap = "whether it was trained on some of them is not recorded"
    with runs.start_run("evaluate", f"evaluate {model.model_id} on {dataset.name}"):
        runs.log_params(asdict(parameters))
        mlflow.set_tags({"dataset": dataset.name, "model_id": model.model_id})
        mlflow.log_input(lineage.dataset_input(dataset, unseen), context="external")
        if fitted is not None:
            mlflow.log_metric("external_trained_on", n_known)
        table = _predict_photographs(scorer, dataset, unseen)
        scores, per_class = _log_scores(table, scorer, dataset, model, "external")
        runs.set_description(
            f"{len(table)} photographs of `{dataset.name}`: {overlap}. {scores}.\n\n" + _to_markdown(per_class)
        )
    log.info("%s: %s; %s. What `register` compares is unchanged", dataset.name, scores, overlap)
    return scores


def score_model(model: LoggedModel, dataset: Dataset, parts: split.Split, scorer: Scorer | None = None) -> Scores:
    """Score `model`, or what `scorer` asks in its place, on the test images.

    Logs metrics, tables and pictures to the active run and the model.
    """
    tags = lineage.data_tags(dataset, parts)
    mlflow.set_tags(tags)
    mlflow.log_input(lineage.dataset_input(dataset, parts.testing), context="testing")
    scorer = scorer or Scorer(model.model_uri)
    table = _predict_photographs(scorer, dataset, parts.testing)
    mlflow.log_text(files.to_csv(_make_reference(scorer, dataset, table)), runs.REFERENCE)
    scores, per_class = _log_scores(table, scorer, dataset, model, "test")
    robustness = _score_robustness(scorer, dataset, table, float(model.tags["temperature"]))
    outliers = _score_outliers(scorer, dataset, table)
    sections = map(_to_markdown, (per_class, robustness, outliers))
    runs.set_description(f"Test images of `{dataset.name}`: {scores}.\n\n" + "\n\n".join(sections))
    active = mlflow.active_run()
    assert active is not None
    facts = {
        **asdict(scores),
        **_log_robustness(robustness, model),
        **_log_outliers(outliers, table, model),
        "test_digest": tags["test_digest"],
        "test_run_id": active.info.run_id,
    }
    registry.tag_model(model, {name: str(value) for name, value in facts.items()})
    log.info("%s", scores)
    return scores


def _log_scores(
    table: pd.DataFrame, scorer: Scorer, dataset: Dataset, model: LoggedModel, part: str
) -> tuple[Scores, pd.DataFrame]:
    """Log scores, tables and pictures of predictions to the active run, under `part`; return the scores, and those by class.

    The scores of the part `test` are also the model's.
    """
    class_names = tuple(scorer.class_names)
    scores = compute_scores(table, class_names, float(model.tags["temperature"]), folds=scorer.n_folds)
    metrics = {f"{part}{name.removeprefix('test')}": float(value) for name, value in asdict(scores).items()}
    mlflow.log_metrics(metrics, model_id=model.model_id if part == "test" else None)
    per_class = _score_classes(table)
    mlflow.log_text(files.to_csv(table), f"{part}/predictions.csv")
    mlflow.log_text(files.to_csv(per_class), f"{part}/per_class.csv")
    if table["label"].nunique() > 1:  # MLflow refuses a single class
        _log_mlflow_evaluation(table, part)
    bins = calibration.compute_reliability(*_to_arrays(table, class_names))
    runs.log_figure(
        f"{part}/reliability.png",
        lambda: plots.plot_reliability(bins.counts, bins.confidence, bins.accuracy, bins.error),
    )
    if not (wrong := table[table["label"] != table["prediction"]].nlargest(MAX_MISTAKES, "probability")).empty:
        runs.log_figure(f"{part}/worst_mistakes.png", lambda: _plot_mistakes(wrong, dataset, scorer))
    return scores, per_class


def _to_markdown(frame: pd.DataFrame) -> str:
    return runs.markdown_table([list(frame), *frame.round(4).itertuples(index=False)])


def _predict_photographs(scorer: Scorer, dataset: Dataset, indices: np.ndarray) -> pd.DataFrame:
    """Return a row per photograph: path, label, prediction, its probability, and `p(class)` of each class.

    Raises DataError if the model refuses a photograph.
    """
    chosen = {dataset.photographs[i].path: dataset.photographs[i] for i in indices}
    table = scorer.score_photographs(list(chosen), lambda path: dataset.read(chosen[path]))
    for row in table[table["label"].isna()].itertuples():
        raise DataError(f"{row.path}: the model refuses it: {row.reason}; replace the file")
    table = table.drop(columns="reason").rename(columns={"label": "prediction"}).assign(path=list(chosen))
    table.insert(1, "label", [dataset.class_names[photograph.label] for photograph in chosen.values()])
    return table


def _score_robustness(scorer: Scorer, dataset: Dataset, table: pd.DataFrame, temperature: float) -> pd.DataFrame:
    """Return the scores of the test images, in the row `none`, and under each corruption."""
    model = scorer.served.unwrap_python_model()
    seen = {
        path: model.images.decode_image(images.read_file(dataset.locate(path)), model.image_size, "rgb")
        for path in table["path"]
    }
    seeds = {path: seed for seed, path in enumerate(seen)}

    def score(name: str) -> pd.DataFrame:
        def read(path: str) -> bytes:
            return _to_bmp(corrupt_image(Image.fromarray(seen[path]), name, seeds[path]))

        predicted = scorer.score_photographs(list(seen), read).rename(columns={"label": "prediction"})
        return predicted.assign(label=table["label"])

    corrupted = thread_map(score, CORRUPTIONS, max_workers=os.cpu_count(), desc="robustness", disable=None)
    rows = []
    for name, predicted in zip(["none", *CORRUPTIONS], [table, *corrupted], strict=True):
        scores = compute_scores(predicted, dataset.class_names, temperature, folds=scorer.n_folds)
        wrong = predicted[predicted["label"] != predicted["prediction"]]
        rows.append(
            {
                "corruption": name,
                "accuracy": scores.test_accuracy,
                "accuracy_low": scores.test_accuracy_low,
                "accuracy_high": scores.test_accuracy_high,
                "ece": scores.test_ece,
                "probability_if_wrong": float(wrong["probability"].mean()),
                "outliers": float(predicted["is_outlier"].mean()),
            }
        )
    return pd.DataFrame(rows)


def _log_robustness(robustness: pd.DataFrame, model: LoggedModel) -> dict[str, Any]:
    """Log table, picture and metrics of the robustness; return its summary: mean and worst accuracy, mean ECE."""
    mlflow.log_text(files.to_csv(robustness), runs.ROBUSTNESS)
    runs.log_figure("test/robustness.png", lambda: plots.plot_robustness(robustness))
    corrupted = robustness.set_index("corruption").drop(index="none")
    metrics = {
        "robust_accuracy": float(corrupted["accuracy"].mean()),
        "worst_accuracy": float(corrupted["accuracy"].min()),
        "robust_ece": float(corrupted["ece"].mean()),
    }
    mlflow.log_metrics(metrics, model_id=model.model_id)
    worst = str(corrupted["accuracy"].idxmin())
    log.info("robust accuracy %.4f, the mean over %d corruptions; worst %.4f: %s",
        metrics["robust_accuracy"], len(corrupted), metrics["worst_accuracy"], worst)  # fmt: skip
    return {**metrics, "worst_corruption": worst}


def _score_outliers(scorer: Scorer, dataset: Dataset, table: pd.DataFrame) -> pd.DataFrame:
    """Return, for each kind of pictures of something else: number, fraction detected, and AUROC against the test images.

    The kind NO_SIGN is of the folders beside those of the photographs; files that the model refuses are left out.
    """
    kinds = set(OUTLIER_IMAGES) - ({"handwriting"} if dataset.origin == HANDWRITTEN_DIGITS else set())
    scored = {}
    for kind in sorted(kinds):
        contents = {str(number): _to_bmp(image) for number, image in enumerate(make_outlier_images(kind))}
        scored[kind] = scorer.score_photographs(list(contents), contents.__getitem__)
    if paths := [str(path) for path in find_no_sign(dataset.folders)]:
        pictures = scorer.score_photographs(paths, lambda path: read_photograph(Path(path)))
        for row in pictures[pictures["label"].isna()].itertuples():
            log.warning("%s: left out of the pictures of something else: %s", row.path, row.reason)
        if not (readable := pictures.dropna(subset="label")).empty:
            scored[NO_SIGN] = readable
    scored["all"] = pd.concat(scored.values())
    rows = []
    for kind, pictures in scored.items():
        labels = np.repeat([0, 1], [len(table), len(pictures)])
        scores = np.concatenate([table["outlier_score"], pictures["outlier_score"]])
        auroc = float(roc_auc_score(labels, scores))
        rows.append({"kind": kind, "images": len(pictures), "detected": pictures["is_outlier"].mean(), "auroc": auroc})
    return pd.DataFrame(rows)


def _log_outliers(outliers: pd.DataFrame, table: pd.DataFrame, model: LoggedModel) -> dict[str, Any]:
    """Log table and metrics of the outlier detection; return the metrics."""
    mlflow.log_text(files.to_csv(outliers), runs.OUTLIERS)
    every = outliers.to_dict("records")[-1]
    metrics = {
        "outlier_auroc": every["auroc"],
        "outliers_detected": every["detected"],
        "outliers_in_test": float(table["is_outlier"].mean()),
    }
    mlflow.log_metrics(metrics, model_id=model.model_id)
    log.info("outliers: AUROC %.4f; %.1f %% of %d pictures of something else detected, and %.1f %% of the test images",
        metrics["outlier_auroc"], 100 * metrics["outliers_detected"], every["images"],
        100 * metrics["outliers_in_test"])  # fmt: skip
    return metrics


def _to_bmp(image: Image.Image) -> bytes:
    """Encode an image without loss and without compression, which would take longer than the network."""
    file = io.BytesIO()
    image.save(file, "BMP")
    return file.getvalue()


def _make_reference(scorer: Scorer, dataset: Dataset, table: pd.DataFrame) -> pd.DataFrame:
    """Return the drift reference: the test images in the columns of the prediction log, by the model's own copy of it."""
    model = scorer.served.unwrap_python_model()
    rows = []
    for path in table["path"]:
        image = model.images.open_image(images.read_file(dataset.locate(path)))
        size = image.size  # as stored: to_array may decode it smaller
        pixels = model.images.to_array(image, model.image_size, model.color_mode)
        rows.append(model.image_statistics(size, pixels))
    return pd.DataFrame(rows).join(table.filter(regex=r"^p\(")).join(table.filter(items=reply.COMPARED))


def compute_scores(table: pd.DataFrame, class_names: tuple[str, ...], temperature: float, *, folds: int = 0) -> Scores:
    """Return the scores of a table of predictions, by one model or by those of `folds`."""
    right = int((table["label"] == table["prediction"]).sum())
    low, high = fold_interval(right, len(table), folds) if folds else wilson_interval(right, len(table))
    probabilities, labels = _to_arrays(table, class_names)
    before = calibration.at_temperature(probabilities, 1 / temperature)
    return Scores(
        len(table),
        right / len(table),
        low,
        high,
        calibration.compute_reliability(probabilities, labels).error,
        calibration.compute_reliability(before, labels).error,
    )


def _to_arrays(table: pd.DataFrame, class_names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities, of shape (n, classes), and labels, of shape (n,), of a table of predictions."""
    probabilities = table[[f"p({name})" for name in class_names]].to_numpy(float)
    return probabilities, np.array([class_names.index(label) for label in table["label"]])


def _score_classes(table: pd.DataFrame) -> pd.DataFrame:
    """Return precision, recall, F1 and number of images of each class, and their averages."""
    names = sorted(set(table["label"]) | set(table["prediction"]))
    numbers = [str(number) for number in range(len(names))]  # the report has an entry `accuracy`: no class name is safe
    report = classification_report(
        table["label"], table["prediction"], labels=names, target_names=numbers, output_dict=True, zero_division=0
    )
    per_class = pd.DataFrame(report).drop(columns="accuracy").T.rename(columns={"support": "images"})
    per_class.insert(0, "class", [*names, "macro average", "weighted average"])
    return per_class.astype({"images": int})


def _log_mlflow_evaluation(table: pd.DataFrame, part: str) -> None:
    """Log MLflow's evaluation of the predictions: accuracy, precision, recall, F1, confusion matrix."""
    read = table[["label", "prediction"]]
    with (
        matplotlib.rc_context({"text.parse_math": False}),  # MLflow leaves its style behind; $ may be in a name
        warnings.catch_warnings(action="ignore", category=UndefinedMetricWarning),  # of a class without predictions
    ):
        mlflow.models.evaluate(
            data=mlflow.data.from_pandas(read, name="predictions", targets="label", predictions="prediction"),
            model_type="classifier",
            evaluators="default",
            evaluator_config={"metric_prefix": f"{part}_", "log_model_explainability": False},
        )


def _plot_mistakes(wrong: pd.DataFrame, dataset: Dataset, scorer: Scorer) -> plots.Figure:
    """Plot the mistakes with the highest probabilities, over each what the model looked at."""
    contents = [images.read_file(dataset.locate(path)) for path in wrong["path"]]
    pictures = [images.decode_image(content, 200, "rgb") for content in contents]
    titles = [f"{row.label} read as {row.prediction}\n{row.probability:.0%}, {row.path}" for row in wrong.itertuples()]
    return plots.plot_photographs(pictures, titles, "Worst mistakes", columns=4, maps=scorer.explain(contents))
