"""Register a model, and decide whether it becomes the champion.

python -m signdigits register --run_id RUN
python -m signdigits register --version 1                  # roll back
mlflow run . -e register -P run_id=RUN
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import mlflow
import pandas as pd
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from signdigits import tables
from signdigits.config import ModelParameters, NameParameters, RegistryParameters, VersionParameters
from signdigits.errors import ModelError, ParameterError
from signdigits.tracking import registry, runs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ContingencyTable:
    """The test images that both, one or neither of two models classify correctly."""

    both: int
    challenger_only: int
    champion_only: int
    neither: int

    @property
    def p_value(self) -> float:
        """The p-value of McNemar's test (1947), exact and one-sided.

        The null hypothesis: where only one of the two is right, each is so with probability 1/2.
        """
        from scipy.stats import binomtest  # takes a second to import, which a rollback does not need

        differing = self.challenger_only + self.champion_only
        return float(binomtest(self.challenger_only, differing, alternative="greater").pvalue) if differing else 1.0

    def to_markdown(self) -> str:
        return runs.markdown_table(
            [
                ("", "champion right", "champion wrong"),
                ("**challenger right**", self.both, self.challenger_only),
                ("**challenger wrong**", self.champion_only, self.neither),
            ]
        )


@dataclass(frozen=True)
class Decision:
    """The alias assigned to a version of a registered model, the reason, and the alias' previous version."""

    model_name: str
    version: str
    alias: str
    reason: str
    contingency_table: ContingencyTable | None = field(default=None)
    previous: str = ""


def register(which: ModelParameters, parameters: VersionParameters) -> Decision:
    """Register a model, or assign an alias to a registered version, in a run of its own.

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
            decision = _move_alias(parameters.model_name, str(parameters.version), parameters.alias)
        else:
            decision = promote_model(registry.find_model(which.run_id, which.model_uri), parameters)
        mlflow.set_tags({"version": decision.version, "alias": decision.alias})
        table = f"\n\n{decision.contingency_table.to_markdown()}" if decision.contingency_table else ""
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
    name = parameters.model_name
    version = registry.find_version(name, model) or registry.create_version(name, model)
    champion = registry.find_alias(name, parameters.alias)
    previous = str(champion.version) if champion else ""
    table = None
    if parameters.alias != registry.CHAMPION:
        deserves, reason = True, "as asked"
    elif champion is None:
        deserves, reason = True, "there was no champion"
    elif previous == str(version.version):
        deserves, reason = True, "it is the champion already"
    else:
        table, reason = _compare_versions(version, champion)
        deserves = table is not None and table.p_value < parameters.significance_level
        if parameters.force and not deserves:
            deserves, reason = True, f"forced, although {reason}"
    alias = parameters.alias if deserves else registry.CHALLENGER
    decision = Decision(name, str(version.version), alias, reason, table, previous)
    _assign_alias(decision)
    return decision


def _compare_versions(version: ModelVersion, champion: ModelVersion) -> tuple[ContingencyTable | None, str]:
    """Compare two versions on the same test images, both scored by `evaluate`; return the table and the result in words.

    There is no table if the versions cannot be compared.
    """
    mine, theirs = version.tags, champion.tags
    if theirs.get("test_digest") != mine["test_digest"]:
        return None, (
            f"version {champion.version} was tested on other images ({theirs.get('dataset')}, split "
            f"{theirs.get('split')}; not {mine['dataset']}, split {mine['split']}), and cannot be compared; "
            "--force true assigns the alias anyway"
        )
    table = _count_outcomes(_read_predictions(version), _read_predictions(champion))
    return table, (
        f"test accuracy {float(mine['test_accuracy']):.4f} against {float(theirs['test_accuracy']):.4f} of version "
        f"{champion.version} on the same {mine['test_images']} images: {table.challenger_only} classified correctly by the "
        f"challenger only, {table.champion_only} by the champion only, p = {table.p_value:.3g} (McNemar's exact test)"
        f"{_compare_robustness(mine, theirs)}"
    )


def _compare_robustness(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Return the robust accuracies of two versions in words; empty if one was evaluated before they were measured."""
    name = "robust_accuracy"
    if name not in mine or name not in theirs:
        return ""
    return f"; robust accuracy {float(mine[name]):.4f} against {float(theirs[name]):.4f}"


def _read_predictions(version: ModelVersion) -> pd.DataFrame:
    """Return the predictions that `evaluate` recorded for a version, a row per test image."""
    run_id = version.tags.get("test_run_id", "")
    try:
        text = mlflow.artifacts.load_text(f"runs:/{run_id}/{runs.PREDICTIONS}")
    except (MlflowException, OSError) as error:
        raise ModelError(
            f"version {version.version}: its predictions are missing from run {run_id!r}; evaluate it again "
            f"(python -m signdigits evaluate --model_uri {version.source}), or pass --force true"
        ) from error
    return tables.read_csv(text, tables.is_probability)


def _count_outcomes(challenger: pd.DataFrame, champion: pd.DataFrame) -> ContingencyTable:
    """Count the correct predictions of two tables of the same images."""
    both = challenger.merge(champion, on="path", validate="one_to_one", suffixes=("", "_champion"))
    mine, theirs = both["prediction"] == both["label"], both["prediction_champion"] == both["label_champion"]
    return ContingencyTable(
        int((mine & theirs).sum()),
        int((mine & ~theirs).sum()),
        int((~mine & theirs).sum()),
        int((~mine & ~theirs).sum()),
    )


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
    if decision.contingency_table is not None:
        facts |= {
            "p_value": str(decision.contingency_table.p_value),
            "contingency_table": json.dumps(asdict(decision.contingency_table)),
        }
        mlflow.log_metric("p_value", decision.contingency_table.p_value)
        mlflow.log_dict(asdict(decision.contingency_table), "gate/contingency_table.json")
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
    log.info("%s", describe_champion(parameters.model_name))


def describe_champion(model_name: str) -> str:
    champion = registry.find_alias(model_name, registry.CHAMPION)
    if champion is None:
        raise ModelError(registry.missing_alias(model_name, registry.CHAMPION))
    tags = champion.tags
    if "test_accuracy" not in tags:
        return (
            f"{model_name} version {champion.version}, {registry.CHAMPION}: registered by other means, never evaluated"
        )
    return (
        f"{model_name} version {champion.version}, {registry.CHAMPION}: test accuracy {float(tags['test_accuracy']):.4f} on "
        f"{tags['test_images']} images of {tags['dataset']}"
    )
