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

from signdigits import files, plots
from signdigits.config import MonitorParameters
from signdigits.drift import Drift, measure_drift, pair_predictions
from signdigits.errors import DataError, DriftFound, ModelError, TooFewPredictions
from signdigits.notify import notify
from signdigits.packaging import prediction_log
from signdigits.tracking import registry, runs

log = logging.getLogger(__name__)

# Of a complete entry of the log.
NEEDED = {"time", "version", "request_id", "seconds", "row", "probabilities", "is_outlier", *prediction_log.STATISTICS}


def monitor(parameters: MonitorParameters) -> Drift | None:
    """Compare the most recent predictions of a model with those of its test images, in a run of its own.

    With `shadow`, compare them with those of the shadow for the same requests instead, and return None.

    Raises DriftFound, after logging, if the fraction `drift_share` of the columns has drifted; TooFewPredictions; DataError
    if there is no log; ModelError if there is no such model, or if it was not evaluated.
    """
    folder = Path(parameters.prediction_log)
    if not folder.is_dir():
        raise DataError(
            f"prediction_log={folder}: no such folder; serve with {prediction_log.FOLDER}={folder} in the environment"
        )
    model = registry.find_model("", parameters.model_uri)
    version = registry.version_of(model)
    if parameters.shadow:
        _compare_with_shadow(folder, version, parameters)
        return None
    tested = _read_reference(model)
    window = _read_window(folder, version, parameters)
    reference, recent = _select_columns(tested), _select_columns(_to_table(window, tested.columns))
    tags = {"model_id": model.model_id, "model_version": version}
    with runs.start_run("monitor", f"monitor version {version}", tags=tags):
        runs.log_params(asdict(parameters))
        drift = measure_drift(reference, recent, parameters)
        outliers = sum(record["is_outlier"] for record in window) / len(window)
        outcome = (
            f"{drift}, from the test images of version {version} to its {len(window)} predictions "
            f"from {window[0]['time']} to {window[-1]['time']}"
        )
        rates = f"{outliers:.1%} of the predictions are outliers ({float(model.tags['outliers_in_test']):.1%} of the test images)"
        has_drifted = drift.share >= parameters.drift_share
        mlflow.set_tag("outcome", "drift" if has_drifted else "no drift")
        mlflow.log_metrics({f"drift_{name}": distance for name, distance in drift.distances.items()})
        mlflow.log_metrics({"drifted_columns": len(drift.drifted), "drifted_share": drift.share})
        mlflow.log_metrics({"predictions": len(window), "outlier_share": outliers})
        runs.log_figure("drift.png", lambda: plots.plot_drift(reference, recent, drift))
        runs.set_description(f"{outcome}; {rates}.\n\n{_drift_table(reference, recent, drift)}")
    if has_drifted:
        if parameters.notify:
            notify(parameters.notify, "drift", outcome, {"model_uri": parameters.model_uri, "version": version})
        raise DriftFound(f"{outcome}; {rates}; see the run, and evaluate the model on recent photographs")
    log.info("no drift: %s; %s", outcome, rates)
    return drift


def _compare_with_shadow(folder: Path, version: str, parameters: MonitorParameters) -> None:
    """Log the agreement of a version with its shadow, in a run of its own. Raises TooFewPredictions."""
    agreement = pair_predictions(_read_records(folder, parameters), version)
    count = 0 if agreement is None else len(agreement.predictions)
    if agreement is None or count < parameters.min_predictions:
        raise TooFewPredictions(
            f"prediction_log={folder}: {count} photographs of version {version} and a shadow, {parameters.min_predictions} "
            "needed; serve with --shadow challenger, wait for more, or lower --min_predictions"
        )
    tags = {"model_version": version, "shadow_version": agreement.versions[1]}
    with runs.start_run("monitor", f"shadow version {agreement.versions[1]}", tags=tags):
        runs.log_params(asdict(parameters))
        latencies = agreement.latencies()
        mlflow.log_metrics({"agreement": agreement.share, "predictions": count, **latencies})
        disagreements = agreement.count_disagreements()
        outcome = (
            f"version {version} and its shadow, version {agreement.versions[1]}, agree on {agreement.share:.2%} of {count} photographs; "
            f"median latency {1000 * latencies['live_latency_median']:.1f} and {1000 * latencies['shadow_latency_median']:.1f} ms"
        )
        rows = [("label", *disagreements), *((str(label), *row) for label, *row in disagreements.itertuples())]
        runs.log_figure(
            "disagreements.png", lambda: plots.plot_disagreements(agreement.predictions, agreement.versions)
        )
        runs.set_description(f"{outcome}.\n\n{runs.markdown_table(rows)}")
    log.info("%s", outcome)


def _read_reference(model: LoggedModel) -> pd.DataFrame:
    """Return the drift reference that `evaluate` logged for `model`. Raises ModelError if there is none."""
    again = (
        f"run `python -m signdigits evaluate --model_uri models:/{model.model_id}` with the --data it was trained on"
    )
    if "test_run_id" not in model.tags:
        raise ModelError(f"model {model.model_id}: not evaluated; {again}")
    try:
        text = mlflow.artifacts.load_text(f"runs:/{model.tags['test_run_id']}/{runs.REFERENCE}")
    except (MlflowException, OSError) as error:
        raise ModelError(f"model {model.model_id}: no reference in run {model.tags['test_run_id']}; {again}") from error
    return files.read_csv(text, lambda column: True)


def _read_window(folder: Path, version: str, parameters: MonitorParameters) -> list[dict[str, Any]]:
    """Return the most recent predictions, oldest first. Raises TooFewPredictions.

    A prediction without a version counts as one of `version`: its server did not know the version.
    """
    versions: Counter[str] = Counter()

    def wanted() -> Iterator[tuple[str, int, dict[str, Any]]]:
        for number, record in enumerate(_read_records(folder, parameters)):
            versions[record["version"]] += 1
            if record["version"] in ("", version):
                yield record["time"], number, record

    window = [record for _, _, record in sorted(heapq.nlargest(parameters.max_predictions, wanted()))]
    if len(window) < parameters.min_predictions:
        held = ", ".join(f"{count} of version {name or 'unknown'}" for name, count in versions.items()) or "none"
        recent = f" of the last {parameters.window_hours:g} hours" if parameters.window_hours else ""
        raise TooFewPredictions(
            f"prediction_log={folder}: {len(window)} predictions{recent} of version {version}, {parameters.min_predictions} needed "
            f"(it holds {held}); wait for more, or lower --min_predictions"
        )
    return window


def _read_records(folder: Path, parameters: MonitorParameters) -> Iterator[dict[str, Any]]:
    """Yield the complete entries of the log within the window; a killed process or a full disk may have left a partial line."""
    since = ""
    if parameters.window_hours:
        start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=parameters.window_hours)
        since = start.isoformat(timespec="milliseconds")
    for file in prediction_log.list_log_files(folder):
        try:
            lines = file.read_text(errors="replace").splitlines()
        except FileNotFoundError:  # removed in the meantime, to limit the size
            continue
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and set(record) >= NEEDED and record["time"] >= since:
                yield record


def _to_table(window: list[dict[str, Any]], columns: pd.Index) -> pd.DataFrame:
    """Return the predictions as a table with the columns of the reference."""
    rows = [record | {f"p({name})": value for name, value in record["probabilities"].items()} for record in window]
    return pd.DataFrame(rows, columns=columns)


def _select_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Select the compared columns: the statistics, the label and its probability.

    Width and height become one `size`, so that a new camera is one drifted column and not two.
    """
    probabilities = table.filter(regex=r"^p\(")
    columns = table.drop(columns=probabilities.columns).astype(float)
    columns.insert(0, "size", (columns.pop("width") * columns.pop("height")) ** 0.5)
    return columns.assign(probability=probabilities.max(axis=1), label=probabilities.idxmax(axis=1).str[2:-1])


def _drift_table(reference: pd.DataFrame, window: pd.DataFrame, drift: Drift) -> str:
    """Return the distance of each column, and its mean and standard deviation, or its most frequent label, in both tables."""
    rows: list[tuple[Any, ...]] = [("column", "distance", "drifted", "test images", "predictions")]
    for name, distance in drift.distances.items():
        columns = (reference[name], window[name])
        if name == "label":
            values = [f"mostly {column.mode()[0]}" for column in columns]
        else:
            values = [f"{column.mean():.3f} ± {column.std():.3f}" for column in columns]
        rows.append((name, f"{distance:.3f}", "yes" if name in drift.drifted else "no", *values))
    return runs.markdown_table(rows)
