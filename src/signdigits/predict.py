"""Predict a folder of photographs, or a table of paths, with a registered model: a row per photograph, as Parquet and CSV.

python -m signdigits predict --images FOLDER --output predictions
mlflow run . -e predict -P images=TABLE.csv -P workers=8 -P ray_address=auto
"""

import contextlib
import logging
import time
from dataclasses import asdict
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource
from mlflow.entities import LoggedModel
from tqdm import tqdm

from signdigits import plots
from signdigits.batch import inputs, scoring
from signdigits.batch.inputs import BatchInput
from signdigits.batch.output import BatchJob, Output, lock_output
from signdigits.batch.scoring import Chunk
from signdigits.config import PredictParameters
from signdigits.data import images
from signdigits.data.names import locate
from signdigits.errors import ModelError
from signdigits.tracking import registry, runs

log = logging.getLogger(__name__)

CHUNK_SIZE = 256  # photographs; an interruption repeats one chunk per worker at most
MAX_PICTURES = 12
MAX_LOGGED_CSV_BYTES = 5_000_000  # a larger table is not copied into the run
PROGRESS_INTERVAL = 60  # seconds between log lines without a terminal


def predict(parameters: PredictParameters) -> Output:
    """Write the tables in a separate MLflow run, which the same command resumes after an interruption.

    Does nothing if the tables exist. Raises DataError if there are no photographs, ModelError if there is no such model,
    and UsageError if the folder is in use or belongs to another job.
    """
    folder = Path(parameters.output)
    photographs = inputs.find_inputs(parameters.images, folder)
    model = registry.find_model("", parameters.model_uri)
    job = BatchJob(
        model.model_id, registry.version_of(model), parameters.images, photographs.digest, len(photographs.paths)
    )
    with lock_output(folder, job) as output:
        if not output.is_finished:
            return _score_job(output, photographs, model, parameters)
        with contextlib.suppress(ModelError):  # the run was deleted for good; the tables are here
            runs.mark_resumed(runs.find_run(output.job.run_id))
        log.info("already finished, in run %s; the tables: %s and %s", output.job.run_id, output.parquet, output.csv)
        return output


def _score_job(output: Output, photographs: BatchInput, model: LoggedModel, parameters: PredictParameters) -> Output:
    job = output.job
    tags = {"model_id": model.model_id, "model_version": job.version, "images_digest": job.digest}
    name = f"predict {photographs.name} with version {job.version}"
    with runs.start_run("predict", name, run_id=job.run_id or None, tags=tags) as run:
        output = output.start(run.info.run_id)
        runs.log_params(asdict(parameters))
        source = LocalArtifactDatasetSource(str(photographs.folder))
        mlflow.log_input(MetaDataset(source, photographs.name, job.digest), "prediction")
        started = time.monotonic()
        scored = _score_missing(output, photographs, model, parameters)
        seconds = time.monotonic() - started
        output.write_csv()
        _log_summary(output, photographs, scored, seconds)
        output.finish()
    return output


def _score_missing(output: Output, photographs: BatchInput, model: LoggedModel, parameters: PredictParameters) -> int:
    """Score the chunks without a part file, and return the number of their photographs."""
    paths = photographs.paths
    chunks = [
        Chunk(number, str(photographs.folder), paths[start : start + CHUNK_SIZE])
        for number, start in enumerate(range(0, len(paths), CHUNK_SIZE))
    ]
    missing = [chunk for chunk in chunks if not output.part(chunk.number).exists()]
    if not missing:
        return 0
    n_total, n_missing = len(paths), sum(len(chunk.paths) for chunk in missing)
    model_folder = Path(mlflow.artifacts.download_artifacts(model.model_uri))
    logged = started = time.monotonic()
    with tqdm(total=n_total, initial=n_total - n_missing, unit=" images", disable=None) as bar:
        n_scored = 0
        for chunk, rows in scoring.score_chunks(model_folder, missing, parameters):
            rows.insert(len(rows.columns) - 1, "model_version", output.job.version)
            output.write_part(chunk.number, rows)
            bar.update(len(rows))
            n_scored += len(rows)
            if bar.disable and time.monotonic() - logged > PROGRESS_INTERVAL:
                logged = time.monotonic()
                n_left, rate = n_missing - n_scored, n_scored / (logged - started)
                time_left = tqdm.format_interval(n_left / rate)
                log.info("%d of %d images, %.0f a second, about %s left", n_total - n_left, n_total, rate, time_left)
    return n_missing


def _log_summary(output: Output, photographs: BatchInput, scored: int, seconds: float) -> None:
    """Log a summary of the tables to the active run.

    `seconds` and `images_per_second` cover the `scored` photographs, not those scored before an interruption.
    """
    table = pd.read_parquet(output.parts, columns=["path", "label", "probability", "is_outlier", "reason"])
    unreadable = table[table["label"].isna()]
    readable, outliers = len(table) - len(unreadable), int(table["is_outlier"].sum())
    metrics = {
        "images": len(table), "readable": readable, "unreadable": len(unreadable), "outliers": outliers,
        "repeated_paths": photographs.repeated, "junk_files": photographs.junk, "resumed_images": len(table) - scored, "seconds": seconds,
    }  # fmt: skip
    if scored:
        metrics["images_per_second"] = scored / seconds
    mlflow.log_metrics(metrics)
    if output.csv.stat().st_size <= MAX_LOGGED_CSV_BYTES:
        mlflow.log_artifact(str(output.csv))
    runs.log_figure("least_certain.png", lambda: _plot_least_certain(table, photographs))
    counts = table["label"].value_counts().sort_index()
    reasons = unreadable["reason"].value_counts().head(10)
    sections = [
        f"{len(table)} images of `{photographs.name}`, predicted with version {output.job.version}.",
        runs.markdown_table([("label", "images"), *counts.items()]),
    ]
    if len(reasons):
        sections.append(runs.markdown_table([("unreadable because", "images"), *reasons.items()]))
    runs.set_description("\n\n".join(sections))
    log.info(
        "%d images predicted with version %s, %d outliers, %d unreadable; the tables: %s and %s",
        readable, output.job.version, outliers, len(unreadable), output.parquet, output.csv,
    )  # fmt: skip


def _plot_least_certain(table: pd.DataFrame, photographs: BatchInput) -> plots.Figure:
    """Plot the photographs with the lowest probabilities."""
    pictures, titles = [], []
    for row in table.nsmallest(MAX_PICTURES, "probability").to_dict("records"):
        with contextlib.suppress(OSError, images.ImageError):  # removed in the meantime
            pictures.append(images.decode_image(images.read_file(locate(photographs.folder, row["path"])), 200, "rgb"))
            titles.append(f"{row['label']} with {row['probability']:.0%}\n{Path(row['path']).name}")
    return plots.plot_photographs(pictures, titles, "Least certain", columns=4)
