"""Put a model into the registry, and decide which version is the champion.

python -m signdigits register --run_id RUN
python -m signdigits register --version 1                  # move the alias back
mlflow run . -e register -P run_id=RUN
"""

import json
import logging
from dataclasses import asdict, dataclass, field

import mlflow
import pandas as pd
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from signdigits import tables
from signdigits.config import ModelParameters, RegistryParameters, VersionParameters
from signdigits.errors import ModelError, ParameterError
from signdigits.tracking import registry, runs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ContingencyTable:
    """Two models on the same test images: how many of them both, one, or neither read correctly."""

    both: int
    challenger_only: int
    champion_only: int
    neither: int

    @property
    def p_value(self) -> float:
        """How often chance alone would favour the challenger at least this much.

        McNemar's test (1947), exact and one-sided: where only one of the two is right, each is so with probability 1/2.
        """
        from scipy.stats import binomtest  # takes a second to import, which rolling back need not wait for

        differing = self.challenger_only + self.champion_only
        return float(binomtest(self.challenger_only, differing, alternative="greater").pvalue) if differing else 1.0

    def table(self) -> str:
        return runs.markdown_table(
            [
                ("", "champion right", "champion wrong"),
                ("**challenger right**", self.both, self.challenger_only),
                ("**challenger wrong**", self.champion_only, self.neither),
            ]
        )


@dataclass(frozen=True)
class Decision:
    """Which alias a version was given, why, and from which version it took it."""

    version: str
    alias: str
    reason: str
    agreement: ContingencyTable | None = field(default=None)
    previous: str = ""


def register(which: ModelParameters, parameters: VersionParameters) -> Decision:
    """Register a model, or move an alias to a version that is registered already, in a run of its own.

    Raises ModelError if there is no such model or version, or if the model was not evaluated.
    """
    given = [bool(which.run_id), bool(which.model_uri), bool(parameters.version)]
    if sum(given) != 1:
        raise ParameterError(
            f"run_id={which.run_id!r}, model_uri={which.model_uri!r}, version={parameters.version}: give one of the three"
        )
    with runs.start_run("register", "register"):
        runs.log_params({"run_id": which.run_id, "model_uri": which.model_uri, **asdict(parameters)})
        if parameters.version:
            decision = _move_alias(str(parameters.version), parameters.alias)
        else:
            decision = promote_model(registry.find_model(which.run_id, which.model_uri), parameters)
        mlflow.set_tags({"version": decision.version, "alias": decision.alias})
        agreement = f"\n\n{decision.agreement.table()}" if decision.agreement else ""
        runs.set_description(
            f"`{registry.REGISTERED_MODEL}` version {decision.version} is `{decision.alias}`: {decision.reason}.{agreement}"
        )
        return decision


def promote_model(model: LoggedModel, parameters: RegistryParameters) -> Decision:
    """Register `model` unless it is, and give it the alias if it deserves it; note the decision on the active run.

    It becomes the champion if there is none, if it reads the same test images better beyond chance, or if forced; else
    the challenger. Any other alias is given without a question.
    """
    if "test_accuracy" not in model.tags:
        raise ModelError(
            f"model {model.model_id}: not evaluated yet; run `python -m signdigits evaluate --run_id "
            f"{model.source_run_id}` first"
        )
    version = registry.find_version(model) or registry.create_version(model)
    champion = registry.find_alias(parameters.alias)
    previous = str(champion.version) if champion else ""
    agreement = None
    if parameters.alias != registry.CHAMPION:
        deserves, reason = True, "as asked"
    elif champion is None:
        deserves, reason = True, "there was no champion"
    elif previous == str(version.version):
        deserves, reason = True, "it is the champion already"
    else:
        agreement, reason = _compare_versions(version, champion)
        deserves = agreement is not None and agreement.p_value < parameters.significance_level
        if parameters.force and not deserves:
            deserves, reason = True, f"forced, although {reason}"
    alias = parameters.alias if deserves else registry.CHALLENGER
    decision = Decision(str(version.version), alias, reason, agreement, previous)
    _assign_alias(decision)
    return decision


def _compare_versions(version: ModelVersion, champion: ModelVersion) -> tuple[ContingencyTable | None, str]:
    """How the two versions read the same test images, and the outcome in words.

    Both were scored by `evaluate`, with the artifact that is served. No agreement where they cannot be compared.
    """
    mine, theirs = version.tags, champion.tags
    if theirs.get("test_digest") != mine["test_digest"]:
        return None, (
            f"version {champion.version} was tested on other images ({theirs.get('dataset')}, split "
            f"{theirs.get('split')}; not {mine['dataset']}, split {mine['split']}), so the two cannot be compared; "
            "--force true gives the place all the same"
        )
    found = _count_agreement(_read_predictions(version), _read_predictions(champion))
    return found, (
        f"test accuracy {float(mine['test_accuracy']):.4f} against {float(theirs['test_accuracy']):.4f} of version "
        f"{champion.version} on the same {mine['test_images']} images: {found.challenger_only} read correctly by the "
        f"challenger only, {found.champion_only} by the champion only, p = {found.p_value:.3g}"
    )


def _read_predictions(version: ModelVersion) -> pd.DataFrame:
    """What `evaluate` recorded of a version: one row a test image."""
    run_id = version.tags.get("test_run_id", "")
    try:
        text = mlflow.artifacts.load_text(f"runs:/{run_id}/{runs.PREDICTIONS}")
    except (MlflowException, OSError) as error:
        raise ModelError(
            f"version {version.version}: its predictions are not in run {run_id!r} any more; evaluate it again "
            f"(python -m signdigits evaluate --model_uri {version.source}), or pass --force true"
        ) from error
    return tables.read_csv(text, tables.is_probability)


def _count_agreement(challenger: pd.DataFrame, champion: pd.DataFrame) -> ContingencyTable:
    """Count what two tables of predictions of the same images have right."""
    both = challenger.merge(champion, on="path", validate="one_to_one", suffixes=("", "_champion"))
    mine, theirs = both["prediction"] == both["label"], both["prediction_champion"] == both["label_champion"]
    return ContingencyTable(
        int((mine & theirs).sum()),
        int((mine & ~theirs).sum()),
        int((~mine & theirs).sum()),
        int((~mine & ~theirs).sum()),
    )


def _move_alias(version: str, alias: str) -> Decision:
    """Give `alias` to a registered version, forwards or back, without a question."""
    try:
        mlflow.MlflowClient().get_model_version(registry.REGISTERED_MODEL, version)
    except MlflowException as error:
        raise ModelError(
            f"version={version}: {registry.REGISTERED_MODEL} has no such version; look in the MLflow UI"
        ) from error
    holder = registry.find_alias(alias)
    previous = str(holder.version) if holder else ""
    reason = f"moved by hand from version {previous}" if previous else "given by hand"
    decision = Decision(version, alias, reason, None, previous)
    _assign_alias(decision)
    return decision


def previous_decision(model: LoggedModel) -> Decision | None:
    """The decision that was made on `model` before, if one was."""
    version = registry.find_version(model)
    if version is None or "decision" not in version.tags:
        return None
    alias, _, reason = version.tags["decision"].partition(": ")
    return Decision(str(version.version), alias, reason)


def describe_standing(decision: Decision) -> str:
    """What a version is now: somebody may have moved or deleted its alias since the decision."""
    present = registry.list_aliases(decision.version)
    if decision.alias in present:
        return ", ".join(present)
    was = f"{', '.join(present) or 'no alias'}; it was {decision.alias}"
    return f"{was}, and `python -m signdigits register --version {decision.version} --alias {decision.alias}` makes it so again"


def _assign_alias(decision: Decision) -> None:
    """Set the alias, and write why on the version and the active run; a champion is no longer a challenger."""
    client = mlflow.MlflowClient()
    facts = {"decision": f"{decision.alias}: {decision.reason}", "previous_version": decision.previous}
    if decision.agreement is not None:
        facts |= {"p_value": str(decision.agreement.p_value), "agreement": json.dumps(asdict(decision.agreement))}
        mlflow.log_metric("p_value", decision.agreement.p_value)
        mlflow.log_dict(asdict(decision.agreement), "gate/agreement.json")
    for name, value in facts.items():
        client.set_model_version_tag(registry.REGISTERED_MODEL, decision.version, name, value)
    mlflow.set_tags(facts)
    client.set_registered_model_alias(registry.REGISTERED_MODEL, decision.alias, decision.version)
    challenger = registry.find_alias(registry.CHALLENGER)
    if decision.alias == registry.CHAMPION and challenger and str(challenger.version) == decision.version:
        client.delete_registered_model_alias(registry.REGISTERED_MODEL, registry.CHALLENGER)
    log.info(
        "%s version %s is now %s: %s", registry.REGISTERED_MODEL, decision.version, decision.alias, decision.reason
    )


def show_champion() -> None:
    """Print the champion's version and its test accuracy. Raises ModelError if there is none."""
    log.info("%s", describe_champion())


def describe_champion() -> str:
    champion = registry.find_alias(registry.CHAMPION)
    if champion is None:
        raise ModelError(registry.missing_alias(registry.CHAMPION))
    tags = champion.tags
    if "test_accuracy" not in tags:
        return f"{registry.REGISTERED_MODEL} version {champion.version}, {registry.CHAMPION}: registered by other means, never evaluated"
    return (
        f"{registry.REGISTERED_MODEL} version {champion.version}, {registry.CHAMPION}: test accuracy {float(tags['test_accuracy']):.4f} on "
        f"{tags['test_images']} images of {tags['dataset']}"
    )
