"""The model registry: the registered model, its versions and their aliases."""

import shlex
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import mlflow
import yaml
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from signdigits import files
from signdigits.config import MODEL_NAME
from signdigits.errors import ModelError
from signdigits.tracking import runs, store


def find_model(run_id: str, model_uri: str) -> LoggedModel:
    """Return the logged model that `run_id` trained, or that `model_uri` names.

    Raises ModelError if there is none, or if it was deleted or has lost its artifacts, and UsageError for a deleted run.
    """
    if bool(run_id) == bool(model_uri):
        raise ModelError(f"run_id={run_id!r}, model_uri={model_uri!r}: give one of the two")
    given = f"model_uri={model_uri}"
    if run_id:
        outputs = runs.find_run(run_id).outputs
        if runs.is_deleted(run_id):
            raise runs.deleted_error(run_id)
        if not outputs or not outputs.model_outputs:
            raise ModelError(f"run_id={run_id}: the run has no model; pass a run with the role train or refit")
        given, model_uri = f"run_id={run_id}", f"models:/{outputs.model_outputs[-1].model_id}"
    try:
        model_id = mlflow.models.get_model_info(model_uri).model_id
        if model_id is None:
            raise ModelError(f"{given}: not a logged model of this tracking store")
        return mlflow.get_logged_model(model_id)
    except (MlflowException, OSError) as error:  # deleted, without its artifacts, or of another store
        raise ModelError(
            f"{given}: no such model in {store.store_address()} ({error}); restore it, or train it again"
        ) from error


def find_alias(model_name: str, alias: str) -> ModelVersion | None:
    """Return the version of a registered model with `alias`, if there is one."""
    client = mlflow.MlflowClient()
    found = client.search_registered_models(store.equals("name", model_name))
    if not found or alias not in found[0].aliases:
        return None
    return client.get_model_version(model_name, found[0].aliases[alias])


def list_versions(model_name: str) -> list[ModelVersion]:
    """Return the versions of a registered model."""
    return list(mlflow.MlflowClient().search_model_versions(store.equals("name", model_name)))


def copy_model(version: ModelVersion, folder: Path) -> None:
    """Copy the version's model from the artifact store to `folder`, unless it is there. Raises whatever the store raises."""
    if not folder.exists():
        with files.atomic_folder(folder) as partial_folder:
            uri = f"models:/{version.name}/{version.version}"
            mlflow.artifacts.download_artifacts(uri, dst_path=str(partial_folder))
            mlflow.models.Model.load(partial_folder)  # a folder that was moved downloads as an empty one


def download_version(model_uri: str, folder: Path) -> ModelVersion:
    """Copy the model that `model_uri`, a URI or a folder, names to `folder`, and return its version.

    A folder needs no tracking store. Its version is in the file that MLflow adds to a downloaded version; it is 0 for a model
    that is not registered. Raises ModelError if there is no model.
    """
    try:
        if Path(model_uri).is_dir():
            shutil.copytree(model_uri, folder)
        else:
            mlflow.artifacts.download_artifacts(model_uri, dst_path=str(folder))
        model = mlflow.models.Model.load(folder)
    except Exception as error:  # of MLflow, a driver or the network
        raise ModelError(f"model_uri={model_uri}: no such model ({error})") from error
    file = folder / "registered_model_meta"
    meta = yaml.safe_load(file.read_text()) if file.exists() else {}
    name, number = meta.get("model_name") or MODEL_NAME, meta.get("model_version") or 0
    created = datetime.fromisoformat(str(model.utc_time_created)).replace(tzinfo=UTC)
    return ModelVersion(name, str(number), int(created.timestamp() * 1000))


def describe_model(model: LoggedModel) -> str:
    """Return the registered name and version of `model`, or its id if it is not registered."""
    found = _find_versions(model)
    return f"{found[0].name} version {found[0].version}" if found else f"model {model.model_id}"


def version_of(model: LoggedModel) -> str:
    """Return the version number of `model`, or its id if it is not registered."""
    found = _find_versions(model)
    return str(found[0].version) if found else str(model.model_id)


def find_version(model_name: str, model: LoggedModel) -> ModelVersion | None:
    """Return the version of the registered model that is `model`, if there is one."""
    return next((version for version in _find_versions(model) if version.name == model_name), None)


def _find_versions(model: LoggedModel) -> list[ModelVersion]:
    """Return the versions of any registered model that are `model`."""
    return list(mlflow.MlflowClient().search_model_versions(store.equals("source_path", f"models:/{model.model_id}")))


def create_version(model_name: str, model: LoggedModel) -> ModelVersion:
    """Register `model` as a version of `model_name`, with the tags that identify its data, study and commit."""
    client = mlflow.MlflowClient()
    own = {name: value for name, value in model.tags.items() if not name.startswith("mlflow.")}
    version = mlflow.register_model(f"models:/{model.model_id}", model_name, tags=own)
    client.update_registered_model(model_name, DESCRIPTION)
    return client.get_model_version(model_name, version.version)


def tag_model(model: LoggedModel, tags: Mapping[str, str]) -> None:
    """Set tags of a logged model and of its registered versions, which would otherwise keep those of an earlier evaluation."""
    mlflow.set_logged_model_tags(model.model_id, dict(tags))
    for version in _find_versions(model):
        for name, value in tags.items():
            mlflow.MlflowClient().set_model_version_tag(version.name, version.version, name, value)


def missing_alias(model_name: str, alias: str) -> str:
    """Return the error message for a missing alias, with the command that assigns it."""
    versions = list_versions(model_name)
    newest = max((int(version.version) for version in versions), default=0)
    remedy = assign_command(model_name, str(newest), alias) if newest else "scripts/quickstart"
    found = f"none of its {len(versions)} versions has it" if newest else "no version is registered"
    return f"{model_name} has no {alias} in {store.store_address()}, {found}; run {remedy}"


def list_aliases(model_name: str, version: str) -> list[str]:
    """Return the aliases of a version."""
    return sorted(mlflow.MlflowClient().get_model_version(model_name, version).aliases)


def assign_command(model_name: str, version: str, alias: str) -> str:
    """Return the command that assigns `alias` to a version."""
    return f"python -m signdigits register --version {version} --alias {alias}{name_option(model_name)}"


def name_option(model_name: str) -> str:
    """Return the option of a command that names the registered model; empty for the default."""
    return "" if model_name == MODEL_NAME else f" --model_name {shlex.quote(model_name)}"


DESCRIPTION = """\
Classifies photographs. Takes rows with a column `image`, base64 text of a JPEG or
PNG; answers with `label`, `probability` and `probabilities`. `champion` is served; a `challenger` did not beat it.
"""
CHALLENGER = "challenger"
CHAMPION = "champion"
