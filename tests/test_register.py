import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.entities import LoggedModel

from signdigits import register
from signdigits.config import MODEL_NAME, ModelParameters, NameParameters, RegistryParameters, VersionParameters
from signdigits.data import lineage, loading
from signdigits.errors import ModelError, UsageError
from signdigits.tracking import runs

from .conftest import log_untrained, store_like

pytestmark = pytest.mark.slow

Log = Callable[..., LoggedModel]


@pytest.fixture(scope="module")
def two_models(
    tmp_path_factory: pytest.TempPathFactory,
    empty_store: Path,
    loaded: loading.Data,
    model_files: Callable[[float], Path],
) -> Path:
    """An MLflow database, to copy, with two untrained models: logging one takes a second."""
    folder = tmp_path_factory.mktemp("models")
    with store_like(empty_store, folder):
        for _ in range(2):
            log_untrained(model_files(1.0), loaded, val_accuracy=0.5, temperature=1.0)
    return folder / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, two_models: Path) -> Iterator[str]:
    with store_like(two_models, tmp_path) as uri:
        yield uri


@pytest.fixture
def log_model(store: str) -> Log:
    """Return a function that gives the next of the two models its arguments as tags, and returns it."""
    models = iter(mlflow.search_logged_models(output_format="list"))

    def log(**tags: str) -> LoggedModel:
        model_id = next(models).model_id
        mlflow.set_logged_model_tags(model_id, tags)
        return mlflow.get_logged_model(model_id)

    return log


def scored(log_model: Log, right: int, **tags: str) -> LoggedModel:
    """A model that reads the first `right` of twelve test images correctly, as if `evaluate` had scored it."""
    table = pd.DataFrame({"path": [f"0/{n}.jpg" for n in range(12)], "label": "0"})
    table["prediction"] = ["0"] * right + ["1"] * (12 - right)
    table["p(0)"], table["p(1)"], table["p(2)"] = [0.8] * right + [0.1] * (12 - right), 0.1, 0.1
    with runs.start_run("evaluate", "evaluate") as run:
        mlflow.log_text(table.to_csv(index=False), runs.PREDICTIONS)
    found = dict.fromkeys(("test_accuracy", "test_accuracy_low", "test_accuracy_high"), str(right / 12))
    found |= {"test_images": "12", "test_digest": "d", "test_run_id": run.info.run_id}
    return log_model(**found | tags)


def promote(model: LoggedModel, **rules: Any) -> register.Decision:
    with runs.start_run("register", "register"):
        return register.promote_model(model, RegistryParameters(**rules))


def aliases() -> dict[str, str]:
    found = mlflow.MlflowClient().get_registered_model(MODEL_NAME).aliases
    return {alias: str(version) for alias, version in found.items()}


def version_tags(version: str) -> dict[str, str]:
    return dict(mlflow.MlflowClient().get_model_version(MODEL_NAME, version).tags)


def test_first_model_becomes_champion(store: str, log_model: Log) -> None:
    decision = promote(scored(log_model, 8, study="s", trial="3"))
    assert (decision.version, decision.alias) == ("1", "champion")
    wanted = {"study", "trial", "dataset_digest", "split", "git_commit", "val_accuracy"}
    assert wanted | {"test_accuracy", "test_images", "test_digest"} <= set(version_tags("1"))
    assert version_tags("1")["decision"] == "champion: there was no champion"


@pytest.mark.parametrize(
    ("right", "p_value", "alias"),
    [(11, 1 / 32, "champion"), (10, 1 / 16, "challenger"), (4, 1, "challenger")],
)
def test_challenger_must_be_significantly_better(
    store: str, log_model: Log, right: int, p_value: float, alias: str
) -> None:
    """Against a champion with 6 of 12: one-sided, k of k images that only the challenger reads have p = 1 / 2^k."""
    promote(scored(log_model, 6))
    decision = promote(scored(log_model, right), significance_test="mcnemar")
    assert decision.alias == alias
    assert decision.comparison is not None
    assert decision.comparison.p_values["mcnemar"] == pytest.approx(p_value)
    assert aliases() == ({"champion": "2"} if alias == "champion" else {"champion": "1", "challenger": "2"})
    tags = version_tags("2")
    assert float(tags["p_value"]) == float(tags["p_mcnemar"]) == pytest.approx(p_value)
    assert (tags["gate"], tags["gate_test"]) == ("better", "mcnemar")
    assert float(tags["p_log_loss"]) == pytest.approx(p_value), "losses differ by the same where they differ"
    counts = json.loads(version_tags("2")["contingency_table"])
    assert counts["challenger_only"] == max(right - 6, 0)
    assert counts["champion_only"] == max(6 - right, 0)
    assert sum(counts.values()) == 12
    run = mlflow.last_active_run()
    assert run.data.metrics["p_value"] == pytest.approx(p_value)
    assert run.data.tags["decision"].startswith(f"{alias}: test accuracy")
    assert run.data.tags["previous_version"] == "1"


def test_gate_can_be_set(store: str, log_model: Log) -> None:
    worse, better = scored(log_model, 6), scored(log_model, 8)
    promote(worse)
    assert promote(better).alias == "challenger", "p = 0.25"
    assert promote(better, significance_level=0.3).alias == "champion"
    decision = promote(worse, gate="not_worse", margin=0.5)
    assert decision.alias == "champion"
    assert "score test that the accuracy is not lower by 0.5) decides" in decision.reason
    assert version_tags("1")["gate_test"] == "not_worse"


def test_force_skips_the_comparison(store: str, log_model: Log) -> None:
    promote(scored(log_model, 6))
    decision = promote(scored(log_model, 5), force=True)
    assert decision.reason.startswith("forced, although test accuracy 0.4167 against 0.5000")
    assert aliases() == {"champion": "2"}


def test_champion_of_other_images_is_challenged(store: str, log_model: Log, loaded: loading.Data) -> None:
    """The champion's artifact is asked; it is untrained, and knows at most some of the challenger's test images."""
    promote(scored(log_model, 12, test_digest="another"))
    dataset, indices = loaded.dataset, loaded.split.testing
    labels = [dataset.class_names[label] for label in dataset.labels[indices]]
    table = pd.DataFrame(
        {"path": [dataset.photographs[i].path for i in indices], "label": labels, "prediction": labels}
    )
    table[[f"p({name})" for name in dataset.class_names]] = np.eye(3)[dataset.labels[indices]]
    with runs.start_run("evaluate", "evaluate") as run:
        mlflow.log_text(table.to_csv(index=False), runs.PREDICTIONS)
        mlflow.log_input(lineage.dataset_input(dataset, indices), context="testing")
    tags = dict.fromkeys(("test_accuracy", "test_accuracy_low", "test_accuracy_high"), "1")
    tags |= {"test_images": "12", "test_digest": loaded.split.test_digest}
    decision = promote(log_model(**tags, test_run_id=run.info.run_id))
    assert (decision.version, decision.alias) == ("2", "champion")
    assert "about which the champion (tested on bars, split stratified) was asked" in decision.reason
    last = mlflow.last_active_run()
    assert last.data.tags["champion_trained_on"] == "unknown"
    assert {"p_value", "p_mcnemar", "p_log_loss", "p_not_worse"} <= set(last.data.metrics)
    answers = mlflow.artifacts.load_text(f"runs:/{last.info.run_id}/gate/predictions.csv")
    assert len(answers.splitlines()) == 1 + 12
    assert "MODEL_CARD.md" in {item.path for item in mlflow.MlflowClient().list_artifacts(last.info.run_id)}


def test_missing_predictions_name_remedy(store: str, log_model: Log) -> None:
    champion = scored(log_model, 6)
    promote(champion)
    other = scored(log_model, 12)
    mlflow.MlflowClient().set_model_version_tag(MODEL_NAME, "1", "test_run_id", "0" * 32)
    with pytest.raises(ModelError, match=r"evaluate it again \(python -m signdigits evaluate --model_uri models:/m-"):
        promote(other)
    assert aliases() == {"champion": "1"}
    assert promote(other, force=True).reason.startswith("forced, although version 1: its predictions are missing")


def test_registering_twice_makes_one_version(store: str, log_model: Log) -> None:
    model = scored(log_model, 8)
    assert promote(model).version == promote(model).version == "1"
    assert len(mlflow.MlflowClient().search_model_versions(f"name = '{MODEL_NAME}'")) == 1


def test_rollback_is_recorded(store: str, log_model: Log) -> None:
    for right in (6, 12):
        promote(scored(log_model, right))
    assert aliases() == {"champion": "2"}
    decision = register.register(ModelParameters(), VersionParameters(version=1))
    assert decision.reason == "moved manually from version 2"
    assert aliases() == {"champion": "1"}
    run = mlflow.last_active_run()
    assert run.data.params["version"] == "1"
    assert run.data.tags["role"] == "register"
    assert run.data.tags["decision"] == "champion: moved manually from version 2" == version_tags("1")["decision"]
    assert run.data.tags["previous_version"] == "2"


def test_champion_is_no_longer_challenger(store: str, log_model: Log) -> None:
    for right in (8, 7):
        promote(scored(log_model, right))
    register.register(ModelParameters(), VersionParameters(version=2))
    assert aliases() == {"champion": "2"}


def test_other_alias_needs_no_comparison(store: str, log_model: Log) -> None:
    model = scored(log_model, 1)
    decision = register.register(ModelParameters(run_id=str(model.source_run_id)), VersionParameters(alias="candidate"))
    assert decision.alias == "candidate"
    assert aliases() == {"candidate": "1"}


def test_unevaluated_model_is_refused(store: str, log_model: Log) -> None:
    with pytest.raises(ModelError, match="not evaluated; run `python -m signdigits evaluate --run_id"):
        promote(log_model())


@pytest.mark.parametrize(
    ("which", "version", "error", "message"),
    [
        ({}, {}, UsageError, "give one of the three"),
        ({"run_id": "a"}, {"version": 1}, UsageError, "give one of the three"),
        ({}, {"version": 7}, ModelError, "version=7: sign-digits has no such version"),
    ],
)
def test_impossible_request_is_refused(
    store: str, which: dict[str, Any], version: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        register.register(ModelParameters(**which), VersionParameters(**version))


@pytest.mark.parametrize("alias", ["latest", "v1", "a b", ""])
def test_invalid_alias_is_refused(alias: str) -> None:
    with pytest.raises(UsageError, match=f"alias='{alias}': must be letters, digits"):
        VersionParameters(alias=alias)


def test_show_prints_the_champion(store: str, log_model: Log, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "signdigits")
    with pytest.raises(ModelError, match=r"has no champion in .*; run scripts/quickstart"):
        register.show_champion(NameParameters())
    promote(scored(log_model, 9))
    register.show_champion(NameParameters())
    assert caplog.messages[-1] == "sign-digits version 1, champion: test accuracy 0.7500 on 12 images of bars"


@pytest.mark.parametrize("name", ["Ann's hands", 'the "best"'])
def test_names_have_champions_of_their_own(store: str, log_model: Log, name: str) -> None:
    """The better model of one name is no rival of another name's champion."""
    promote(scored(log_model, 6))
    model = scored(log_model, 12, test_digest="other")
    decision = promote(model, model_name=name)
    assert (decision.model_name, decision.version, decision.alias) == (name, "1", "champion")
    assert aliases() == {"champion": "1"}
    assert register.previous_decision(name, model) == dataclasses.replace(decision, previous="")
    assert register.previous_decision(MODEL_NAME, model) is None
    moved = register.register(ModelParameters(), VersionParameters(model_name=name, version=1, alias="best"))
    assert set(mlflow.MlflowClient().get_registered_model(name).aliases) == {"champion", "best"}
    assert "--model_name" in register.describe_standing(dataclasses.replace(moved, alias="gone"))


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a@b"])
def test_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"model_name='{name}': must be up to 200 characters"):
        VersionParameters(model_name=name)
