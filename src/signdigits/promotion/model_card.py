"""The model card of a registered version, made from what was measured.

After Mitchell et al., "Model cards for model reporting", 2019, arXiv:1810.03993. What was not measured is named as such.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields

import mlflow
import pandas as pd
from mlflow.entities import LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from signdigits import files
from signdigits.config import DataParameters, Hyperparameters, NameParameters, RefitParameters, StudyParameters
from signdigits.data.sources import LICENCES, name_original
from signdigits.promotion.comparison import wilson_interval
from signdigits.promotion.predictions import list_classes
from signdigits.tracking import runs
from signdigits.tuning.space import AUTO, Space

FILE = "MODEL_CARD.md"
MAX_DESCRIPTION = 5000  # characters of a description in MLflow's database
MAX_CLASSES = 50  # names in a sentence
FEW_IMAGES = 10  # test images of a class, below which its accuracy is hardly known

# Parameters that say where and how fast a job runs; the storage's address may hold a password.
NOT_REPRODUCED = {
    "memory_budget", "storage", "study_name", "timeout", "workers", "ray_address", "cpus_per_trial", "gpus_per_trial",
}  # fmt: skip
MAIN_PARAMETERS = (DataParameters, Hyperparameters, StudyParameters, RefitParameters, NameParameters)
TRAIN_PARAMETERS = (DataParameters, Hyperparameters)


def publish_card(version: ModelVersion, model: LoggedModel) -> None:
    """Log the model card to the active run, and make it the version's description; a description by hand is kept."""
    sections = write_sections(version, model)
    title = f"# Model card: {version.name} version {version.version}"
    mlflow.log_text(_join_sections(title, sections), FILE)
    client = mlflow.MlflowClient()
    present = client.get_model_version(version.name, version.version).description
    if not present or present.startswith("# Model card"):
        client.update_model_version(version.name, version.version, _shorten_card(title, sections))


def write_sections(version: ModelVersion, model: LoggedModel) -> dict[str, str]:
    """Return the sections of the card by title, in Markdown."""
    tags = model.tags
    predictions = _read_table(tags, runs.PREDICTIONS)
    robustness = _read_table(tags, runs.ROBUSTNESS, "accuracy", "accuracy_low", "accuracy_high", "ece")
    outliers = _read_table(tags, runs.OUTLIERS, "images", "detected", "auroc")
    sections = {
        "Purpose": _describe_purpose(predictions),
        "Data": _describe_data(tags),
        "Accuracy": _describe_accuracy(tags, predictions),
        "Calibration": _describe_calibration(tags),
        "Robustness": _describe_robustness(tags, robustness),
        "Outliers": _describe_outliers(tags, outliers),
    }
    missing = [title.lower() for title, text in sections.items() if not text]
    sections["Limits"] = "\n".join(f"- {limit}" for limit in _list_limits(tags, predictions, missing))
    sections["Reproduce"] = _describe_command(version, model)
    return {title: text for title, text in sections.items() if text}


def _join_sections(title: str, sections: Mapping[str, str]) -> str:
    return "\n\n".join([title, *(f"## {name}\n\n{text}" for name, text in sections.items())]) + "\n"


def _shorten_card(title: str, sections: Mapping[str, str]) -> str:
    """Return the card with its longest sections replaced by a reference, until it fits into a description."""
    kept = dict(sections)
    while len(card := _join_sections(title, kept)) > MAX_DESCRIPTION:
        longest = max(kept, key=lambda name: len(kept[name]))
        kept[longest] = f"See `{FILE}` among the artifacts of the run that registered this version."
    return card


def _read_table(tags: Mapping[str, str], name: str, *numbers: str) -> pd.DataFrame | None:
    """Return a table that the evaluation logged, `numbers` of its columns as such; None if there is none."""
    try:
        text = mlflow.artifacts.load_text(f"runs:/{tags.get('test_run_id')}/{name}")
    except (MlflowException, OSError):
        return None
    return files.read_csv(text, numbers.__contains__)


def _describe_purpose(predictions: pd.DataFrame | None) -> str:
    if predictions is None:
        return ""
    names = list_classes(predictions)
    return (
        f"It tells which of {len(names)} classes a photograph shows: {_quote_names(names)}.\n\nIt is not for other classes, and not for "
        "photographs that differ from those of its data in more than the changes that are measured below: a photograph of "
        "anything else also gets one of these labels."
    )


def _describe_data(tags: Mapping[str, str]) -> str:
    data = tags["data"]
    rows = [
        ("data", f"{data} ({tags['dataset']})" if data != tags["dataset"] else data),
        ("licence", _describe_licences(data)),
        ("split", tags["split"]),
        ("digest of photographs and split", tags["dataset_digest"]),
        ("test images", tags["test_images"]),
        ("digest of the test images", tags["test_digest"]),
    ]
    return runs.markdown_table([("what", "value"), *rows])


def _describe_licences(data: str) -> str:
    """Return the licence of each joined folder, once."""
    unknown = "not recorded"
    return "; ".join(dict.fromkeys(LICENCES.get(part, unknown) for part in data.split(",")))


def _describe_accuracy(tags: Mapping[str, str], predictions: pd.DataFrame | None) -> str:
    """Return the accuracy with Wilson's 95 % confidence interval (1927), in all and by class."""
    if predictions is None:
        return ""
    right = predictions["label"] == predictions["prediction"]
    low, high = wilson_interval(int(right.sum()), len(right))
    text = f"{right.mean():.4f} ({low:.4f} to {high:.4f} with 95 % confidence) on {len(right)} test images."
    if float(tags.get("n_seeds", 0)) > 1:
        text += (
            f" Trained with {float(tags['n_seeds']):.0f} seeds: {float(tags['test_accuracy_mean']):.4f} ± "
            f"{float(tags['test_accuracy_std']):.4f}."
        )
    rows: list[tuple[object, ...]] = [("class", "test images", "correct", "accuracy", "95 % confidence")]
    for name, of_class in right.groupby(predictions["label"]):
        low, high = wilson_interval(int(of_class.sum()), len(of_class))
        rows.append((name, len(of_class), of_class.sum(), f"{of_class.mean():.3f}", f"{low:.3f} to {high:.3f}"))
    return f"{text}\n\n{runs.markdown_table(rows)}"


def _describe_calibration(tags: Mapping[str, str]) -> str:
    if "test_ece" not in tags:
        return ""
    text = f"Expected calibration error {float(tags['test_ece']):.4f}"
    if "test_ece_uncalibrated" in tags:
        text += (
            f"; {float(tags['test_ece_uncalibrated']):.4f} without the temperature of {float(tags['temperature']):.3g}"
        )
    if "robust_ece" in tags:
        text += f"; {float(tags['robust_ece']):.4f} in the mean over the changes below"
    return f"{text}."


def _describe_robustness(tags: Mapping[str, str], robustness: pd.DataFrame | None) -> str:
    if robustness is None or "robust_accuracy" not in tags:
        return ""
    rows: list[tuple[object, ...]] = [("change", "accuracy", "95 % confidence", "calibration error")]
    rows += [
        (row.corruption, f"{row.accuracy:.3f}", f"{row.accuracy_low:.3f} to {row.accuracy_high:.3f}", f"{row.ece:.3f}")
        for row in robustness.itertuples()
    ]
    mean = f"The mean over {len(robustness) - 1} changes of the test images is {float(tags['robust_accuracy']):.4f}."
    return f"{mean}\n\n{runs.markdown_table(rows)}"


def _describe_outliers(tags: Mapping[str, str], outliers: pd.DataFrame | None) -> str:
    if outliers is None or "outliers_in_test" not in tags:
        return ""
    rows: list[tuple[object, ...]] = [("pictures of something else", "number", "marked as outliers", "AUROC")]
    rows += [
        (row["kind"], f"{row['images']:.0f}", f"{100 * row['detected']:.1f} %", f"{row['auroc']:.4f}")
        for row in outliers.to_dict("records")
    ]
    marked = f"{100 * float(tags['outliers_in_test']):.1f} % of the test images are marked as outliers (`is_outlier`)."
    return f"{marked}\n\n{runs.markdown_table(rows)}"


def _list_limits(tags: Mapping[str, str], predictions: pd.DataFrame | None, missing: list[str]) -> Iterator[str]:
    if tags["split"] == "grouped":
        yield "No group of `groups.csv`, such as a person, is in training and test; other likenesses may be."
    else:
        yield "Photographs of the same person, place or series may be in training and test, which flatters the accuracy."
    if predictions is not None:
        counts = predictions["label"].value_counts()
        if few := sorted(counts.index[counts < FEW_IMAGES]):
            yield f"Fewer than {FEW_IMAGES} test images, and therefore a wide interval: {_quote_names(few)}."
    if "worst_corruption" in tags:
        worst = float(tags["worst_accuracy"])
        yield f"Of the measured changes, `{tags['worst_corruption']}` does most harm: accuracy {worst:.4f}."
    yield "The confidence intervals assume independent photographs."
    yield "Not measured: accuracy by person, camera or place" + "".join(f"; {title}" for title in missing) + "."


def _quote_names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:MAX_CLASSES]) + (", ..." if len(names) > MAX_CLASSES else "")


def _describe_command(version: ModelVersion, model: LoggedModel) -> str:
    """Return the command that trains the model again, from the parameters that its run or its study recorded."""
    try:
        run = mlflow.get_run(model.source_run_id)
        role = run.data.tags.get("role")
        if role == "refit":
            run = mlflow.get_run(run.data.tags["mlflow.parentRunId"])
            given = _list_changed(run, MAIN_PARAMETERS) | {"model_name": version.name}
        elif role == "train":
            given = _list_changed(run, TRAIN_PARAMETERS)
        else:
            return ""
    except MlflowException:  # deleted for good
        return ""
    if version.name == NameParameters().model_name:
        given.pop("model_name", None)
    options = "".join(f" -P {name}={shlex.quote(value)}" for name, value in given.items())
    commit = model.tags.get("git_commit", "unknown")
    where = "" if commit == "unknown" else f"At commit `{commit}`:\n\n"
    return f"{where}```sh\nmlflow run . -e {'main' if role == 'refit' else 'train'} --env-manager local{options}\n```"


def _list_changed(run: Run, groups: tuple[type, ...]) -> dict[str, str]:
    """Return the parameters of a run that differ from their defaults; in a study, from those of its space and data set."""
    declared = [f for group in groups for f in fields(group) if f.name not in NOT_REPRODUCED]
    defaults = {f.name: f.default for f in declared}
    params = {name: value for name, value in run.data.params.items() if name in defaults}
    if name := params.get("space"):
        defaults |= Space.of(name).for_data_set(name_original(run.data.tags["dataset"])).values
        params = {name: value for name, value in params.items() if value != AUTO}
    return {name: value for name, value in params.items() if value.lower() != str(defaults[name]).lower()}
