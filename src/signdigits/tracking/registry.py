"""The model registry: the registered model, its versions and their aliases."""

import mlflow
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from signdigits.errors import ModelError
from signdigits.tracking import store
from signdigits.tracking.runs import find_run


def find_model(run_id: str, model_uri: str) -> LoggedModel:
    """Return the logged model that `run_id` trained, or that `model_uri` names. Raises ModelError if there is none."""
    if bool(run_id) == bool(model_uri):
        raise ModelError(f"run_id={run_id!r}, model_uri={model_uri!r}: give one of the two")
    if run_id:
        outputs = find_run(run_id).outputs
        if not outputs or not outputs.model_outputs:
            raise ModelError(f"run_id={run_id}: the run has no model; pass a run with the role train or refit")
        return _get_model(outputs.model_outputs[-1].model_id, f"run_id={run_id}")
    try:
        info = mlflow.models.get_model_info(model_uri)
    except (MlflowException, OSError) as error:
        raise ModelError(f"model_uri={model_uri}: no such model ({error})") from error
    if info.model_id is None:
        raise ModelError(f"model_uri={model_uri}: not a logged model of this tracking store")
    return _get_model(info.model_id, f"model_uri={model_uri}")


def _get_model(model_id: str, given: str) -> LoggedModel:
    try:
        return mlflow.get_logged_model(model_id)
    except MlflowException as error:  # deleted, or of another store
        raise ModelError(f"{given}: its model {model_id} is not in {store.store_address()}; train it again") from error


def find_alias(alias: str) -> ModelVersion | None:
    """Return the version with `alias`, if there is one."""
    client = mlflow.MlflowClient()
    found = client.search_registered_models(f"name = '{REGISTERED_MODEL}'")
    if not found or alias not in found[0].aliases:
        return None
    return client.get_model_version(REGISTERED_MODEL, found[0].aliases[alias])


def version_of(model: LoggedModel) -> str:
    """Return the version number of `model`, or its id if it is not registered."""
    version = find_version(model)
    return str(model.model_id) if version is None else str(version.version)


def find_version(model: LoggedModel) -> ModelVersion | None:
    """Return the registered version of `model`, if there is one."""
    found = mlflow.MlflowClient().search_model_versions(f"name = '{REGISTERED_MODEL}'")
    return next((version for version in found if version.source == f"models:/{model.model_id}"), None)


def create_version(model: LoggedModel) -> ModelVersion:
    """Register `model` with the tags that identify its data, study and commit."""
    client = mlflow.MlflowClient()
    own = {name: value for name, value in model.tags.items() if not name.startswith("mlflow.")}
    version = mlflow.register_model(f"models:/{model.model_id}", REGISTERED_MODEL, tags=own)
    client.update_registered_model(REGISTERED_MODEL, DESCRIPTION)
    return client.get_model_version(REGISTERED_MODEL, version.version)


def missing_alias(alias: str) -> str:
    """Return the error message for a missing alias, with the command that assigns it."""
    versions = mlflow.MlflowClient().search_model_versions(f"name = '{REGISTERED_MODEL}'")
    newest = max((int(version.version) for version in versions), default=0)
    remedy = f"python -m signdigits register --version {newest} --alias {alias}" if newest else "scripts/quickstart"
    found = f"none of its {len(versions)} versions has it" if newest else "no version is registered"
    return f"{REGISTERED_MODEL} has no {alias} in {store.store_address()}, {found}; run {remedy}"


def list_aliases(version: str) -> list[str]:
    """Return the aliases of a version."""
    return sorted(mlflow.MlflowClient().get_model_version(REGISTERED_MODEL, version).aliases)


DESCRIPTION = """\
Reads the digit (0 to 9) that a photographed hand signs. Takes rows with a column `image`, base64 text of a JPEG or
PNG; answers with `label`, `probability` and `probabilities`. `champion` is served; a `challenger` did not beat it.
"""
CHALLENGER = "challenger"
CHAMPION = "champion"
REGISTERED_MODEL = "sign-digits"
