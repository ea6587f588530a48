"""The study's photographs on another machine: from the same path, or once from the artifacts of the study's run."""

import platform
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import filelock
import mlflow

import signdigits.files
from signdigits.config import DataParameters
from signdigits.data import groups, loading, sources
from signdigits.data.loading import Data
from signdigits.errors import DataError

FOLDER = "photographs"  # among the artifacts


def upload_photographs(loaded: Data, run_id: str) -> None:
    """Put the photographs among the artifacts of the study's run, unless they are there or every machine has them."""
    client, dataset = mlflow.MlflowClient(), loaded.dataset
    if loaded.parameters.data == sources.HANDWRITTEN_DIGITS or client.list_artifacts(run_id, FOLDER):
        return
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder, f"{dataset.name}.zip")
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:  # they are compressed already
            for photograph in dataset.photographs:
                archive.write(dataset.folder / photograph.path, photograph.path)
            if (dataset.folder / groups.FILE).is_file():
                archive.write(dataset.folder / groups.FILE, groups.FILE)
        client.log_artifact(run_id, str(packed), FOLDER)


def load_study_data(parameters: DataParameters, digest: str, run_id: str) -> Data:
    """The photographs of the study `run_id`, ready for training on this machine.

    Raises DataError if what this machine has, or was sent, is not what the study's `digest` says.
    """
    here = parameters.data == sources.HANDWRITTEN_DIGITS or Path(parameters.data).is_dir()
    found = (
        parameters
        if here
        else replace(parameters, data=str(_download_photographs(Path(parameters.data).name, digest, run_id)))
    )
    loaded = loading.load_data(found)
    if loaded.split.digest != digest:
        raise DataError(
            f"{platform.node()}: {found.data} holds other photographs than the study's (digest {loaded.split.digest}, "
            f"not {digest}); give every machine the same, or remove that folder to have them sent"
        )
    return loaded


def _download_photographs(name: str, digest: str, run_id: str, home: Path = Path("data", "cache")) -> Path:
    """The folder of that name as the study's run keeps it, fetched if this machine has not done so yet."""
    target = home / digest / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_name(f"{name}.lock")):
        if not target.exists():
            with signdigits.files.atomic_folder(target) as folder, tempfile.TemporaryDirectory() as place:
                packed = mlflow.artifacts.download_artifacts(
                    run_id=run_id, artifact_path=f"{FOLDER}/{name}.zip", dst_path=place
                )
                with zipfile.ZipFile(packed) as archive:
                    archive.extractall(folder)
    return target
