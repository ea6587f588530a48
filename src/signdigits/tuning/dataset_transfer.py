"""Photographs for workers on other machines: from the same path, or from the artifacts of the study's run."""

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
    """Upload the photographs as an artifact of the study's run, unless they are uploaded or embedded."""
    client, dataset = mlflow.MlflowClient(), loaded.dataset
    if loaded.parameters.data == sources.HANDWRITTEN_DIGITS or client.list_artifacts(run_id, FOLDER):
        return
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder, f"{dataset.name}.zip")
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:  # photographs are compressed
            for photograph in dataset.photographs:
                archive.write(dataset.folder / photograph.path, photograph.path)
            if (dataset.folder / groups.FILE).is_file():
                archive.write(dataset.folder / groups.FILE, groups.FILE)
        client.log_artifact(run_id, str(packed), FOLDER)


def load_study_data(parameters: DataParameters, digest: str, run_id: str) -> Data:
    """Load the photographs of the study `run_id` on this machine.

    Raises DataError if their digest differs from the study's.
    """
    here = parameters.data == sources.HANDWRITTEN_DIGITS or Path(parameters.data).is_dir()
    source = (
        parameters
        if here
        else replace(parameters, data=str(_download_photographs(Path(parameters.data).name, digest, run_id)))
    )
    loaded = loading.load_data(source)
    if loaded.split.digest != digest:
        raise DataError(
            f"{platform.node()}: {source.data} differs from the study's photographs (digest {loaded.split.digest}, "
            f"not {digest}); copy the same photographs to every machine, or remove that folder to download them"
        )
    return loaded


def _download_photographs(name: str, digest: str, run_id: str, home: Path = Path("data", "cache")) -> Path:
    """Return the folder of photographs of the study's run, downloaded on first use."""
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
