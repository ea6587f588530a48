"""Register a model, and decide whether it becomes the champion.

python -m signdigits register --run_id RUN
python -m signdigits register --version 1                  # roll back
mlflow run . -e register -P run_id=RUN

What a comparison needs is imported where it is used: a rollback does not wait for it.
"""

import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import mlflow
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from signdigits import files
from signdigits.config import ModelParameters, NameParameters, RegistryParameters, VersionParameters
from signdigits.errors import IncomparableError, ModelError, UsageError
from signdigits.tracking import registry, runs

if TYPE_CHECKING:
    from signdigits.promotion.comparison import Comparison

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """The alias assigned to a version of a registered model, the reason, and the alias' previous version."""

    model_name: str
    version: str
    alias: str
    reason: str
    comparison: "Comparison | None" = None
    previous: str = ""


def register(which: ModelParameters, parameters: VersionParameters) -> Decision:
    """Register a model, or assign an alias to a registered version, in a run of its own.

    Raises ModelError if there is no such model or version, or if the model was not evaluated.
    """
    given = [bool(which.run_id), bool(which.model_uri), bool(parameters.version)]
    if sum(given) != 1:
        raise UsageError(
            f"run_id={which.run_id!r}, model_uri={which.model_uri!r}, version={parameters.version}: give one of the three"
        )
    with runs.start_run("register", "register"):
        runs.log_params({"run_id": which.run_id, "model_uri": which.model_uri, **asdict(parameters)})
        if parameters.version:
            decision = _move_alias(parameters.model_name, str(parameters.version), parameters.alias)
        else:
            decision = promote_model(registry.find_model(which.run_id, which.model_uri), parameters)
        mlflow.set_tags({"version": decision.version, "alias": decision.alias})
        comparison = decision.comparison
        table = f"\n\n{comparison.contingency_table.to_markdown()}" if comparison else ""
        runs.set_description(
            f"`{decision.model_name}` version {decision.version} is `{decision.alias}`: {decision.reason}.{table}"
        )
        return decision


def promote_model(model: LoggedModel, parameters: RegistryParameters) -> Decision:
    """Register `model` if it is not, decide on its alias, and record the decision on the active run.

    It becomes the champion if there is none, if it is significantly better on the same test images, or if forced; else
    the challenger. Any other alias is assigned without a comparison.
    """
    if "test_accuracy" not in model.tags:
        raise ModelError(
            f"model {model.model_id}: not evaluated; run `python -m signdigits evaluate --run_id "
            f"{model.source_run_id}` first"
        )
    from signdigits.promotion import model_card

    name = parameters.model_name
    version = registry.find_version(name, model) or registry.create_version(name, model)
    champion = registry.find_alias(name, parameters.alias)
    previous = str(champion.version) if champion else ""
    comparison = None
    if parameters.alias != registry.CHAMPION:
        deserves, reason = True, "as asked"
    elif champion is None:
        deserves, reason = True, "there was no champion"
    elif previous == str(version.version):
        deserves, reason = True, "it is the champion already"
    else:
        deserves, reason, comparison = _challenge(version, champion, parameters)
        if parameters.force and not deserves:
            deserves, reason = True, f"forced, although {reason}"
    alias = parameters.alias if deserves else registry.CHALLENGER
    decision = Decision(name, str(version.version), alias, reason, comparison, previous)
    model_card.publish_card(version, model)
    _assign_alias(decision)
    return decision


def _challenge(
    version: ModelVersion, champion: ModelVersion, rules: RegistryParameters
) -> tuple[bool, str, "Comparison | None"]:
    """Compare a version with the champion; return whether it passes the gate, the result in words and the comparison.

    There is no comparison if the versions cannot be compared. Raises ModelError if predictions, photographs or the
    champion's artifact cannot be read, unless the promotion is forced.
    """
    from signdigits.promotion import comparison, predictions

    try:
        collected = predictions.collect_predictions(version, champion)
    except ModelError as error:
        if not isinstance(error, IncomparableError) and not rules.force:
            raise
        return False, str(error), None
    result = comparison.compare_predictions(collected.challenger, collected.champion, rules)
    mlflow.log_text(files.to_csv(collected.to_table()), "gate/predictions.csv")
    mlflow.set_tag("champion_trained_on", collected.n_known)
    table, new, old = result.contingency_table, version.tags, champion.tags
    reason = (
        f"test accuracy {table.accuracy:.4f} against {table.champion_accuracy:.4f} of version {champion.version} on "
        f"{collected.description}; {result}"
    )
    if new["test_digest"] == old.get("test_digest") and "robust_accuracy" in new.keys() & old.keys():
        reason += f"; robust accuracy {float(new['robust_accuracy']):.4f} against {float(old['robust_accuracy']):.4f}"
    return result.passes, reason, result


def _move_alias(model_name: str, version: str, alias: str) -> Decision:
    """Assign `alias` to a registered version, without a comparison."""
    try:
        mlflow.MlflowClient().get_model_version(model_name, version)
    except MlflowException as error:
        raise ModelError(
            f"version={version}: {model_name} has no such version; see the registry in the MLflow UI"
        ) from error
    holder = registry.find_alias(model_name, alias)
    previous = str(holder.version) if holder else ""
    reason = f"moved manually from version {previous}" if previous else "assigned manually"
    decision = Decision(model_name, version, alias, reason, None, previous)
    _assign_alias(decision)
    return decision


def previous_decision(model_name: str, model: LoggedModel) -> Decision | None:
    """Return the earlier decision on `model`, if there is one."""
    version = registry.find_version(model_name, model)
    if version is None or "decision" not in version.tags:
        return None
    alias, _, reason = version.tags["decision"].partition(": ")
    return Decision(model_name, str(version.version), alias, reason)


def describe_standing(decision: Decision) -> str:
    """Return the present aliases of a version, and a command if the decided alias was moved or deleted."""
    present = registry.list_aliases(decision.model_name, decision.version)
    if decision.alias in present:
        return ", ".join(present)
    was = f"{', '.join(present) or 'no alias'}; it was {decision.alias}"
    return f"{was}, and `{registry.assign_command(decision.model_name, decision.version, decision.alias)}` assigns it again"


def _assign_alias(decision: Decision) -> None:
    """Assign the alias, record the reason on the version and the active run, and let a new champion be no challenger."""
    client = mlflow.MlflowClient()
    facts = {"decision": f"{decision.alias}: {decision.reason}", "previous_version": decision.previous}
    if decision.comparison is not None:
        facts |= decision.comparison.facts()
        mlflow.log_metrics({name: float(value) for name, value in facts.items() if name.startswith("p_")})
        mlflow.log_dict(asdict(decision.comparison.contingency_table), "gate/contingency_table.json")
    for name, value in facts.items():
        client.set_model_version_tag(decision.model_name, decision.version, name, value)
    mlflow.set_tags(facts)
    client.set_registered_model_alias(decision.model_name, decision.alias, decision.version)
    challenger = registry.find_alias(decision.model_name, registry.CHALLENGER)
    if decision.alias == registry.CHAMPION and challenger and str(challenger.version) == decision.version:
        client.delete_registered_model_alias(decision.model_name, registry.CHALLENGER)
    log.info("%s version %s is now %s: %s", decision.model_name, decision.version, decision.alias, decision.reason)


def show_champion(parameters: NameParameters) -> None:
    """Print the champion's version and its test accuracy. Raises ModelError if there is none."""
    name = parameters.model_name
    champion = registry.find_alias(name, registry.CHAMPION)
    if champion is None:
        raise ModelError(registry.missing_alias(name, registry.CHAMPION))
    tags = champion.tags
    if "test_accuracy" in tags:
        accuracy = float(tags["test_accuracy"])
        result = f"test accuracy {accuracy:.4f} on {tags['test_images']} images of {tags['dataset']}"
    else:
        result = "registered by other means, never evaluated"
    log.info("%s version %s, %s: %s", name, champion.version, registry.CHAMPION, result)
