"""The model card of a registered version, made from what was measured; its text is in model_card.md.j2.

After Mitchell et al., "Model cards for model reporting", 2019, arXiv:1810.03993. What was not measured is named as such.
"""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2
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
from signdigits.tuning.space import AUTO, Space, resolve_space

FILE = "MODEL_CARD.md"
TEMPLATE = Path(__file__).with_name("model_card.md.j2")
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
    card = render_card(version, model)
    mlflow.log_text(card, FILE)
    client = mlflow.MlflowClient()
    present = client.get_model_version(version.name, version.version).description
    if not present or present.startswith("# Model card"):
        client.update_model_version(version.name, version.version, shorten_card(card))


def render_card(version: ModelVersion, model: LoggedModel) -> str:
    """Return the card, in Markdown."""
    predictions = _read_table(model, runs.PREDICTIONS)
    scores = _score_classes(predictions)
    environment = jinja2.Environment(
        trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    environment.filters["cell"] = runs.escape_cell
    environment.filters["decimals"] = lambda value, digits: f"{float(value):.{digits}f}"
    environment.filters["names"] = _quote_names
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        version=version,
        tags=model.tags,
        licence=_find_licence(model.tags["data"]),
        start_licence=_find_licence(model.tags.get("start_data", "")),
        class_names=list_classes(predictions),
        scores=scores,
        rare_classes=[score["name"] for score in scores if score["images"] < FEW_IMAGES],
        few_images=FEW_IMAGES,
        robustness=_read_table(model, runs.ROBUSTNESS).to_dict("records"),
        outliers=_read_table(model, runs.OUTLIERS).to_dict("records"),
        command=_find_command(version, model),
    )


def _find_licence(data: str) -> str:
    return "; ".join(dict.fromkeys(LICENCES.get(root, "not recorded") for root in data.split(",")))


def shorten_card(card: str) -> str:
    """Return the card with its longest sections replaced by a reference, until it fits into a description."""
    sections = card.split("\n## ")
    while len(shortened := "\n## ".join(sections)) > MAX_DESCRIPTION:
        longest = max(sections, key=len)
        title, _, _ = longest.partition("\n")
        reference = f"{title}\n\nSee `{FILE}` among the artifacts of the run that registered this version.\n"
        sections[sections.index(longest)] = reference
    return shortened


def _read_table(model: LoggedModel, name: str) -> pd.DataFrame:
    """Return a table that the model's evaluation logged; an empty one if there is none."""
    try:
        return files.read_csv(mlflow.artifacts.load_text(f"runs:/{model.tags.get('test_run_id')}/{name}"))
    except (MlflowException, OSError):
        return pd.DataFrame()


def _score_classes(predictions: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the accuracy of each class, with Wilson's 95 % confidence interval (1927)."""
    if predictions.empty:
        return []
    scores = []
    for name, rows in predictions.groupby("label"):
        images, correct = len(rows), int((rows["label"] == rows["prediction"]).sum())
        low, high = wilson_interval(correct, images)
        score = {"name": name, "images": images, "correct": correct, "accuracy": correct / images}
        scores.append({**score, "low": low, "high": high})
    return scores


def _quote_names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:MAX_CLASSES]) + (", ..." if len(names) > MAX_CLASSES else "")


def _find_command(version: ModelVersion, model: LoggedModel) -> str:
    """Return the command that trains the model again, from the parameters that its run or its study recorded."""
    try:
        run = mlflow.get_run(model.source_run_id)
        role = run.data.tags.get("role")
        if role in ("refit", "ensemble"):
            run = mlflow.get_run(run.data.tags["mlflow.parentRunId"])
            entry_point, given = "main", _list_changed(run, MAIN_PARAMETERS) | {"model_name": version.name}
        elif role == "train":
            entry_point, given = "train", _list_changed(run, TRAIN_PARAMETERS)
        else:
            return ""
    except MlflowException:  # deleted for good
        return ""
    if version.name == NameParameters().model_name:
        given.pop("model_name", None)
    options = "".join(f" -P {name}={shlex.quote(value)}" for name, value in given.items())
    return f"mlflow run . -e {entry_point} --env-manager local{options}"


def _list_changed(run: Run, groups: tuple[type, ...]) -> dict[str, str]:
    """Return the parameters of a run that differ from their defaults; in a study, from those of its space and data set."""
    declared = [f for group in groups for f in fields(group) if f.name not in NOT_REPRODUCED]
    defaults = {f.name: f.default for f in declared}
    params = {name: value for name, value in run.data.params.items() if name in defaults}
    if name := params.get("space"):
        defaults["space"] = resolve_space(AUTO, params.get("start_from", ""))
        defaults |= Space.of(name).for_data_set(name_original(run.data.tags["dataset"])).values
        params = {name: value for name, value in params.items() if value != AUTO}
    return {name: value for name, value in params.items() if value.lower() != str(defaults[name]).lower()}
