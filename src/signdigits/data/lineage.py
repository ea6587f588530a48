"""The photographs that a run used: digests and parts on its page and, with `log_data`, the photographs themselves.

They are kept as a zip file, once per digest; `data=runs:/RUN` reads them again (sources.py).
"""

import hashlib
import logging
import platform
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource
from mlflow.entities import LoggedModelInput

from signdigits.config import DataParameters
from signdigits.data.dataset import Dataset
from signdigits.data.loading import Data, load_data
from signdigits.data.names import locate
from signdigits.data.sources import ARCHIVE, HANDWRITTEN_DIGITS, PHOTOGRAPHS, PHOTOGRAPHS_DIGEST, split_source
from signdigits.data.split import GROUPS, Split
from signdigits.errors import DataError
from signdigits.files import compute_digest
from signdigits.tracking import runs, store

log = logging.getLogger(__name__)


def log_data(data: Data, *, parts: tuple[str, ...]) -> None:
    """Log the data of the active run: digests as tags, and `parts` of the split as dataset inputs."""
    mlflow.set_tags(data_tags(data.dataset, data.split))
    if data.start:
        mlflow.set_tags(data.start.facts())
        if model_id := data.start.model_id:
            run = mlflow.active_run()
            assert run is not None
            mlflow.MlflowClient().log_inputs(run.info.run_id, models=[LoggedModelInput(model_id)])
    for part in parts:
        if len(indices := getattr(data.split, part)):  # with folds, none is for validation only
            mlflow.log_input(dataset_input(data.dataset, indices), context=part)


def data_tags(dataset: Dataset, split: Split) -> dict[str, str]:
    """Return the tags that identify the photographs and their split."""
    return {
        "dataset": dataset.name,
        "dataset_digest": split.digest,
        "split": split.name,
        "test_digest": split.test_digest,
        "test_images": str(len(split.testing)),
    }


def dataset_input(dataset: Dataset, indices: np.ndarray | None = None) -> MetaDataset:
    """Return the data set, or some of its photographs, as an MLflow dataset."""
    source = LocalArtifactDatasetSource(dataset.source)
    digest = dataset.digest if indices is None else dataset.part_digest(indices)
    return MetaDataset(source, name=dataset.name, digest=digest)


def log_photographs(dataset: Dataset, run_id: str) -> None:
    """Log the photographs to a run, unless it or another run holds the same.

    The URI of their zip file, the digest and the name of the data set become tags of the run.
    """
    digest = _archive_digest(dataset)
    logged = runs.search_runs(
        f"{store.equals(f'tags.{PHOTOGRAPHS_DIGEST}', digest)} and tags.{PHOTOGRAPHS} LIKE 'runs:/%'"
    )
    uris = [run.data.tags[PHOTOGRAPHS] for run in logged if run.info.run_id in run.data.tags[PHOTOGRAPHS]]
    uri = uris[0] if uris else _upload_archive(dataset, run_id)  # not that of a run which was deleted
    for tag, value in {"dataset": dataset.name, PHOTOGRAPHS_DIGEST: digest, PHOTOGRAPHS: uri}.items():
        mlflow.MlflowClient().set_tag(run_id, tag, value)


def _archive_digest(dataset: Dataset) -> str:
    """Return the `folder_digest` of what the zip file contains: the readable photographs, and groups.csv if there is one."""
    entries = [(photograph.path, photograph.checksum) for photograph in dataset.photographs]
    if (file := dataset.folder / GROUPS).is_file():
        entries.append((GROUPS, hashlib.sha256(file.read_bytes()).hexdigest()))
    return compute_digest(entries)


def _upload_archive(dataset: Dataset, run_id: str) -> str:
    """Upload the photographs as an artifact of the run, and return its URI."""
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder, ARCHIVE)
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:  # photographs are compressed
            for photograph in dataset.photographs:
                archive.writestr(photograph.path, dataset.read(photograph))
            if (dataset.folder / GROUPS).is_file():
                archive.write(dataset.folder / GROUPS, GROUPS)
        mlflow.MlflowClient().log_artifact(run_id, str(packed))
    uri = f"runs:/{run_id}/{ARCHIVE}"
    log.info("%d photographs logged as %s", len(dataset.photographs), uri)
    return uri


def upload_photographs(loaded: Data, run_id: str) -> None:
    """Log the photographs of a study to its run, for workers on other machines, unless they are logged or embedded."""
    if loaded.parameters.data != HANDWRITTEN_DIGITS:
        log_photographs(loaded.dataset, run_id)


def load_study_data(parameters: DataParameters, digest: str, run_id: str) -> Data:
    """Load the photographs of the study `run_id` on this machine: from the same path, or from the study's run.

    Raises DataError if their digest differs from the study's.
    """
    is_here = all(part == HANDWRITTEN_DIGITS or locate(Path(), part).is_dir() for part in split_source(parameters.data))
    source = parameters if is_here else replace(parameters, data=f"runs:/{run_id}")
    loaded = load_data(source)
    if loaded.split.digest != digest:
        raise DataError(
            f"{platform.node()}: {source.data} differs from the study's photographs (digest {loaded.split.digest}, "
            f"not {digest}); copy the same photographs to every machine, or remove that folder to download them"
        )
    return loaded
