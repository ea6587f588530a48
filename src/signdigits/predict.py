"""Read a folder of photographs, or a table of paths, with a served model: one row a photograph, as Parquet and CSV.

python -m signdigits predict --images FOLDER --output predictions
mlflow run . -e predict -P images=TABLE.csv -P workers=8 -P ray_address=auto
"""

import contextlib
import logging
import time
from collections.abc import Sequence
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
from signdigits.tracking import registry, runs

log = logging.getLogger(__name__)

CHUNK = 256  # photographs that a kill costs at most, for each that works
LEAST_CERTAIN = 12  # photographs that are shown
SMALL = 5_000_000  # bytes of the CSV that are worth a second copy in the run
SILENCE = 60  # seconds between two lines of progress where there is no terminal


def predict(parameters: PredictParameters) -> Output:
    """Write the tables, in a run of its own, which the same command goes on with after a kill.

    Does nothing if they are there. Raises DataError if there are no photographs, ModelError if there is no such model,
    and OutputError if the folder is in use or another job's.
    """
    folder = Path(parameters.output)
    found = inputs.find_inputs(parameters.images, folder)
    model = registry.find_model("", parameters.model_uri)
    job = BatchJob(model.model_id, registry.version_of(model), parameters.images, found.digest, len(found.paths))
    with lock_output(folder, job) as output:
        if output.is_finished:
            runs.mark_resumed(runs.find_run(output.job.run_id))
            log.info("finished before, in run %s; the tables: %s and %s", output.job.run_id, *output.tables)
        else:
            output = _score_job(output, found, model, parameters)
        output.clear()
        return output


def _score_job(output: Output, found: BatchInput, model: LoggedModel, parameters: PredictParameters) -> Output:
    job = output.job
    tags = {"model_id": model.model_id, "model_version": job.version, "images_digest": job.digest}
    name = f"predict {found.name} with version {job.version}"
    with runs.start_run("predict", name, run_id=job.run_id or None, tags=tags) as run:
        output = output.note(run_id=run.info.run_id)
        runs.log_params(asdict(parameters))
        mlflow.log_input(
            MetaDataset(LocalArtifactDatasetSource(str(found.folder)), found.name, job.digest), "prediction"
        )
        chunks = split_into_chunks(found)
        began = time.monotonic()
        scored = score_missing(output, chunks, model, parameters)
        seconds = time.monotonic() - began
        output.assemble(len(chunks))
        _log_summary(output, found, scored, seconds)
    return output.note(finished=True)


def split_into_chunks(found: BatchInput) -> list[Chunk]:
    starts = range(0, len(found.paths), CHUNK)
    return [Chunk(number, str(found.folder), found.paths[start : start + CHUNK]) for number, start in enumerate(starts)]


def score_missing(output: Output, chunks: Sequence[Chunk], model: LoggedModel, parameters: PredictParameters) -> int:
    """Answer the chunks that no part file holds yet; returns the number of photographs in them."""
    missing = [chunk for chunk in chunks if not output.part(chunk.number).exists()]
    if not missing:
        return 0
    total, left = _count_paths(chunks), _count_paths(missing)
    model_folder = Path(mlflow.artifacts.download_artifacts(model.model_uri))
    told = began = time.monotonic()
    with tqdm(total=total, initial=total - left, unit=" images", disable=None) as bar:
        for chunk, rows in scoring.score_chunks(model_folder, missing, parameters):
            output.keep(chunk.number, rows.assign(model_version=output.job.version)[_order_columns(rows)])
            bar.update(len(rows))
            left -= len(rows)
            if bar.disable and time.monotonic() - told > SILENCE:
                told = time.monotonic()
                rate = (_count_paths(missing) - left) / (told - began)
                time_left = tqdm.format_interval(left / rate)
                log.info("%d of %d images, %.0f a second, about %s left", total - left, total, rate, time_left)
    return _count_paths(missing)


def _count_paths(chunks: Sequence[Chunk]) -> int:
    return sum(len(chunk.paths) for chunk in chunks)


def _order_columns(rows: pd.DataFrame) -> list[str]:
    """The columns of the tables."""
    return [*rows.columns.drop("reason"), "model_version", "reason"]


def _log_summary(output: Output, found: BatchInput, scored: int, seconds: float) -> None:
    """Write on the active run what the tables hold.

    `seconds` and `images_per_second` are of the `scored` photographs; the others were answered before an interruption.
    """
    parquet, csv = output.tables
    table = pd.read_parquet(parquet, columns=["path", "label", "probability", "reason"])
    unreadable = table[table["label"].isna()]
    facts = {
        "images": len(table), "readable": len(table) - len(unreadable), "unreadable": len(unreadable),
        "repeated_paths": found.repeated, "resumed_images": len(table) - scored, "seconds": seconds,
    }  # fmt: skip
    if scored:
        facts["images_per_second"] = scored / seconds
    mlflow.log_metrics(facts)
    if csv.stat().st_size <= SMALL:
        mlflow.log_artifact(str(csv))
    runs.log_figure("least_certain.png", lambda: _plot_least_certain(table, found))
    runs.set_description(_describe_tables(output, found, table, unreadable))
    log.info(
        "%d images read with version %s, %d unreadable; the tables: %s and %s",
        len(table) - len(unreadable), output.job.version, len(unreadable), parquet, csv,
    )  # fmt: skip


def _describe_tables(output: Output, found: BatchInput, table: pd.DataFrame, unreadable: pd.DataFrame) -> str:
    counts = table["label"].value_counts().sort_index()
    reasons = unreadable["reason"].value_counts().head(10)
    tables = [runs.markdown_table([("label", "images"), *counts.items()])]
    if len(reasons):
        tables.append(runs.markdown_table([("unreadable because", "images"), *reasons.items()]))
    return "\n\n".join([f"{len(table)} images of `{found.name}`, read with version {output.job.version}.", *tables])


def _plot_least_certain(table: pd.DataFrame, found: BatchInput) -> plots.Figure:
    """The photographs with the smallest probabilities."""
    pictures, titles = [], []
    for row in table.nsmallest(LEAST_CERTAIN, "probability").to_dict("records"):
        with contextlib.suppress(OSError, images.ImageError):  # gone meanwhile
            pictures.append(images.decode_image(images.read_file(found.folder / row["path"]), 200, "rgb"))
            titles.append(f"{row['label']} with {row['probability']:.0%}\n{Path(row['path']).name}")
    return plots.plot_photographs(pictures, titles, "Least certain", columns=4)
