"""Put a model into the registry, and decide which version is the champion.

python -m signdigits register --run_id RUN
python -m signdigits register --version 1                  # move the alias back
mlflow run . -e register -P run_id=RUN
"""

import logging
from dataclasses import dataclass

import mlflow
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from signdigits import sources, tracking
from signdigits.errors import ModelError, ParameterError
from signdigits.hyperparameters import ModelParameters, VersionParameters

log = logging.getLogger(__name__)

REGISTERED_MODEL = "sign-digits"
CHAMPION = "champion"
CHALLENGER = "challenger"

DESCRIPTION = """\
Reads the digit (0 to 9) that a photographed hand signs. Takes rows with a column `image`, base64 text of a JPEG or
PNG; answers with `label`, `probability` and `probabilities`. `champion` is served; `challenger` was not better.
"""


@dataclass(frozen=True)
class Decision:
    """Which alias a version was given, and why."""

    version: str
    alias: str
    reason: str


def register(which: ModelParameters, parameters: VersionParameters) -> Decision:
    """Register a model, or move an alias to a version that is registered already, in a run of its own.

    Raises ModelError if there is no such model or version, or if the model was not evaluated.
    """
    given = [bool(which.run_id), bool(which.model_uri), bool(parameters.version)]
    if sum(given) != 1:
        raise ParameterError(
            f"run_id={which.run_id!r}, model_uri={which.model_uri!r}, version={parameters.version}: give one of the three"
        )
    with tracking.run("register", "register"):
        tracking.log_params({"run_id": which.run_id, "model_uri": which.model_uri})
        tracking.log_params({"version": parameters.version, "alias": parameters.alias})
        if parameters.version:
            decision = move_alias(str(parameters.version), parameters.alias)
        else:
            decision = promote(tracking.find_model(which.run_id, which.model_uri), parameters.alias)
        mlflow.set_tags({"version": decision.version, "alias": decision.alias, "reason": decision.reason})
        tracking.describe(f"`{REGISTERED_MODEL}` version {decision.version} is `{decision.alias}`: {decision.reason}.")
        return decision


def promote(model: LoggedModel, alias: str = CHAMPION) -> Decision:
    """Register `model` unless it is, and give it `alias` if it deserves it.

    It becomes the champion if there is none, or if it is not worse than the present one on the same test images;
    else the challenger. Any other alias is given without a question.
    """
    if "test_accuracy" not in model.tags:
        raise ModelError(
            f"model {model.model_id}: not evaluated yet; run `python -m signdigits evaluate --run_id "
            f"{model.source_run_id}` first"
        )
    version = find_version(model) or create_version(model)
    champion = find_alias(alias)
    if alias != CHAMPION:
        deserves, reason = True, "as asked"
    elif champion is not None and champion.version == version.version:
        deserves, reason = True, "it is the champion already"
    else:
        deserves, reason = compare(version.tags, champion)
    decision = Decision(str(version.version), alias if deserves else CHALLENGER, reason)
    give(decision)
    return decision


def compare(tags: dict[str, str], champion: ModelVersion | None) -> tuple[bool, str]:
    """Whether a version with `tags` may take the champion's place, and the reason."""
    if champion is None:
        return True, "there was no champion"
    theirs, mine = champion.tags, float(tags["test_accuracy"])
    if theirs.get("test_digest") != tags["test_digest"]:
        # The embedded data are a rehearsal: their model holds the place only until real photographs come.
        if theirs.get("data") == sources.HANDWRITTEN_DIGITS:
            return True, f"version {champion.version} was only trained on the embedded {sources.HANDWRITTEN_DIGITS}"
        return False, (
            f"version {champion.version} was tested on other images ({theirs.get('dataset')}, not {tags['dataset']}), "
            "so their accuracies cannot be compared"
        )
    best = float(theirs["test_accuracy"])
    relation = "is less than" if mine < best else "is not less than"
    return mine >= best, (
        f"test accuracy {mine:.4f} {relation} {best:.4f} of version {champion.version}, on the same "
        f"{tags['test_images']} images"
    )


def move_alias(version: str, alias: str) -> Decision:
    """Give `alias` to a registered version, forwards or back, without a question."""
    try:
        mlflow.MlflowClient().get_model_version(REGISTERED_MODEL, version)
    except MlflowException as error:
        raise ModelError(f"version={version}: {REGISTERED_MODEL} has no such version; look in the MLflow UI") from error
    previous = find_alias(alias)
    reason = f"moved by hand from version {previous.version}" if previous else "given by hand"
    decision = Decision(version, alias, reason)
    give(decision)
    return decision


def give(decision: Decision) -> None:
    """Set the alias and write the reason on the version; a champion is no longer a challenger."""
    client = mlflow.MlflowClient()
    client.set_model_version_tag(REGISTERED_MODEL, decision.version, "decision", f"{decision.alias}: {decision.reason}")
    client.set_registered_model_alias(REGISTERED_MODEL, decision.alias, decision.version)
    challenger = find_alias(CHALLENGER)
    if decision.alias == CHAMPION and challenger and str(challenger.version) == decision.version:
        client.delete_registered_model_alias(REGISTERED_MODEL, CHALLENGER)
    log.info("%s version %s is now %s: %s", REGISTERED_MODEL, decision.version, decision.alias, decision.reason)


def show() -> str:
    """What is served: the champion's version and what it was measured at. Raises ModelError if there is none."""
    champion = find_alias(CHAMPION)
    if champion is None:
        raise ModelError(f"{REGISTERED_MODEL} has no {CHAMPION} in {tracking.address()}; run scripts/quickstart")
    tags = champion.tags
    if "test_accuracy" not in tags:
        return f"{REGISTERED_MODEL} version {champion.version}, {CHAMPION}: registered by other means, never evaluated"
    return (
        f"{REGISTERED_MODEL} version {champion.version}, {CHAMPION}: test accuracy {float(tags['test_accuracy']):.4f} on "
        f"{tags['test_images']} images of {tags['dataset']}"
    )


def create_version(model: LoggedModel) -> ModelVersion:
    """Register `model` with the tags that lead back to its data, study and commit."""
    client = mlflow.MlflowClient()
    own = {name: value for name, value in model.tags.items() if not name.startswith("mlflow.")}
    version = mlflow.register_model(f"models:/{model.model_id}", REGISTERED_MODEL, tags=own)
    client.update_registered_model(REGISTERED_MODEL, DESCRIPTION)
    return client.get_model_version(REGISTERED_MODEL, version.version)


def find_version(model: LoggedModel) -> ModelVersion | None:
    """The version that `model` is registered as, if it is."""
    found = mlflow.MlflowClient().search_model_versions(f"name = '{REGISTERED_MODEL}'")
    return next((version for version in found if version.source == f"models:/{model.model_id}"), None)


def find_alias(alias: str) -> ModelVersion | None:
    """The version that has `alias`, if one has."""
    client = mlflow.MlflowClient()
    found = client.search_registered_models(f"name = '{REGISTERED_MODEL}'")
    if not found or alias not in found[0].aliases:
        return None
    return client.get_model_version(REGISTERED_MODEL, found[0].aliases[alias])
