"""Check recent predictions of the endpoint for drift from the test images.

python -m signdigits monitor --prediction_log FOLDER     # exit code 3: drift, 4: too few predictions
mlflow run . -e monitor -P prediction_log=FOLDER -P window_hours=24
"""

import datetime
import heapq
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException

from signdigits import plots, tables
from signdigits.config import MonitorParameters
from signdigits.drift import Drift, measure_drift
from signdigits.errors import DataError, DriftFound, ModelError, TooFewPredictions
from signdigits.packaging import prediction_log
from signdigits.tracking import registry, runs

log = logging.getLogger(__name__)


def monitor(parameters: MonitorParameters) -> Drift:
    """Compare the latest answers of a model with its test images, in a run of its own.

    Raises DriftFound, once all is written, if so many columns have drifted; TooFewAnswers, before, if there are not
    enough; DataError if there is no log, and ModelError if the model is none, or was not evaluated.
    """
    folder = Path(parameters.prediction_log)
    if not folder.is_dir():
        raise DataError(
            f"prediction_log={folder}: no such folder; serve with {prediction_log.FOLDER}={folder} in the environment"
        )
    model = registry.find_model("", parameters.model_uri)
    version = registry.version_of(model)
    reference = _select_columns(_read_reference(model))
    window = _read_window(folder, version, parameters)
    tags = {"model_id": model.model_id, "model_version": version}
    with runs.start_run("monitor", f"monitor version {version}", tags=tags):
        runs.log_params(asdict(parameters))
        found = _log_drift(reference, _select_columns(_to_table(window)), parameters)
        share, drifted = found.share, ", ".join(found.drifted) or "none"
        outcome = (
            f"{len(found.drifted)} of {len(found.distances)} columns have drifted ({drifted}), from the test images of "
            f"version {version} to its {len(window)} predictions from {window[0]['time']} to {window[-1]['time']}"
        )
        mlflow.set_tag("outcome", "drift" if share >= parameters.drift_share else "no drift")
        mlflow.log_metrics({"predictions": len(window), "drifted_columns": len(found.drifted), "drifted_share": share})
        runs.set_description(f"{outcome}.\n\n{_drift_table(reference, _select_columns(_to_table(window)), found)}")
    if share >= parameters.drift_share:
        raise DriftFound(f"{outcome}; look at the run, and evaluate the model on photographs such as these")
    log.info("no drift: %s", outcome)
    return found


def _read_reference(model: LoggedModel) -> pd.DataFrame:
    """The test images of `model`, as `evaluate` left them. Raises ModelError if it did not."""
    again = (
        f"run `python -m signdigits evaluate --model_uri models:/{model.model_id}` with the --data it was trained on"
    )
    if "test_run_id" not in model.tags:
        raise ModelError(f"model {model.model_id}: not evaluated yet; {again}")
    try:
        text = mlflow.artifacts.load_text(f"runs:/{model.tags['test_run_id']}/{runs.REFERENCE}")
    except (MlflowException, OSError) as error:
        raise ModelError(f"model {model.model_id}: no reference in run {model.tags['test_run_id']}; {again}") from error
    return tables.read_csv(text, lambda column: True)


def _read_window(folder: Path, version: str, parameters: MonitorParameters) -> list[dict[str, Any]]:
    """The latest answers, in the order of their time. Raises TooFewAnswers.

    An answer without a version is taken for one of `version`: whoever served it did not say.
    """
    since = ""
    if parameters.window_hours:
        begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=parameters.window_hours)
        since = begin.isoformat(timespec="milliseconds")
    versions: Counter[str] = Counter()

    def wanted() -> Iterator[tuple[str, int, dict[str, Any]]]:
        for number, record in enumerate(_read_records(folder)):
            if record["time"] >= since:
                versions[record["version"]] += 1
                if record["version"] in ("", version):
                    yield record["time"], number, record

    found = [record for _, _, record in sorted(heapq.nlargest(parameters.max_predictions, wanted()))]
    if len(found) < parameters.min_predictions:
        held = ", ".join(f"{count} of version {name or 'unknown'}" for name, count in versions.items()) or "none"
        recent = f" of the last {parameters.window_hours:g} hours" if parameters.window_hours else ""
        raise TooFewPredictions(
            f"prediction_log={folder}: {len(found)} predictions{recent} of version {version}, {parameters.min_predictions} needed "
            f"(it holds {held}); wait for more, or lower --min_predictions"
        )
    return found


def _read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of the log; a process that was killed, or a full disk, may have left half of one."""
    for file in prediction_log.list_log_files(folder):
        try:
            lines = file.read_text(errors="replace").splitlines()
        except FileNotFoundError:  # removed meanwhile, to make room
            continue
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and {"time", "version", "probabilities", *prediction_log.STATISTICS} <= set(
                record
            ):
                yield record


def _to_table(window: list[dict[str, Any]]) -> pd.DataFrame:
    """The answers in the columns of the reference."""
    return pd.DataFrame(
        {name: record[name] for name in prediction_log.STATISTICS}
        | {f"p({name})": probability for name, probability in record["probabilities"].items()}
        for record in window
    )


def _select_columns(found: pd.DataFrame) -> pd.DataFrame:
    """What is compared: the statistics, the label, and how probable the model found it.

    Width and height become one `size`, so that another camera is one column that drifts and not two.
    """
    shares = found.filter(regex=r"^p\(")
    seen = found[list(prediction_log.STATISTICS)].astype(float)
    seen.insert(0, "size", (seen.pop("width") * seen.pop("height")) ** 0.5)
    return seen.assign(probability=shares.max(axis=1), label=shares.idxmax(axis=1).str[2:-1])


def _log_drift(reference: pd.DataFrame, window: pd.DataFrame, parameters: MonitorParameters) -> Drift:
    """Measure the drift, and log its distances and its picture to the active run."""
    found = measure_drift(reference, window, parameters)
    mlflow.log_metrics({f"drift_{name}": distance for name, distance in found.distances.items()})
    runs.log_figure("drift.png", lambda: plots.plot_drift(reference, window, found))
    return found


def _drift_table(reference: pd.DataFrame, window: pd.DataFrame, found: Drift) -> str:
    rows: list[tuple[Any, ...]] = [("column", "distance", "drifted", "test images", "answers")]
    for name, distance in found.distances.items():
        ends = [_describe_column(part[name]) for part in (reference, window)]
        rows.append((name, f"{distance:.3f}", "yes" if name in found.drifted else "no", *ends))
    return runs.markdown_table(rows)


def _describe_column(column: pd.Series) -> str:
    """The middle of a column: its mean, or its most frequent label."""
    return f"mostly {column.mode()[0]}" if column.name == "label" else f"{column.mean():.3f} ± {column.std():.3f}"
