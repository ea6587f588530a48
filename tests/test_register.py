from collections.abc import Callable
from typing import Any

import mlflow
import pytest
from mlflow.entities import LoggedModel

from signdigits import register
from signdigits.errors import ModelError, ParameterError
from signdigits.hyperparameters import ModelParameters, VersionParameters

NAME = register.REGISTERED_MODEL
Log = Callable[..., LoggedModel]


def scored(log_model: Log, accuracy: float, **tags: str) -> LoggedModel:
    return log_model(**{"test_accuracy": str(accuracy), "test_images": "12", "test_digest": "d", **tags})


def aliases() -> dict[str, str]:
    found = mlflow.MlflowClient().get_registered_model(NAME).aliases
    return {alias: str(version) for alias, version in found.items()}


def test_the_first_model_becomes_the_champion_with_tags_that_lead_back(store: str, log_model: Log) -> None:
    decision = register.promote(scored(log_model, 0.8, study="s", trial="3"))
    assert (decision.version, decision.alias) == ("1", "champion")
    version = mlflow.MlflowClient().get_model_version_by_alias(NAME, "champion")
    wanted = {"study", "trial", "dataset_digest", "split", "git_commit", "val_accuracy"}
    assert wanted | {"test_accuracy", "test_images", "test_digest"} <= set(version.tags)
    assert version.tags["decision"] == "champion: there was no champion"


@pytest.mark.parametrize(("accuracy", "alias"), [(0.81, "champion"), (0.8, "champion"), (0.79, "challenger")])
def test_a_model_that_is_not_worse_takes_the_place(store: str, log_model: Log, accuracy: float, alias: str) -> None:
    register.promote(scored(log_model, 0.8))
    decision = register.promote(scored(log_model, accuracy))
    assert decision.alias == alias
    assert "on the same 12 images" in decision.reason
    assert aliases() == ({"champion": "2"} if alias == "champion" else {"champion": "1", "challenger": "2"})


def test_accuracies_on_other_images_are_not_compared(store: str, log_model: Log) -> None:
    register.promote(scored(log_model, 0.8))
    decision = register.promote(scored(log_model, 0.9, test_digest="another"))
    assert decision.alias == "challenger"
    assert "was tested on other images" in decision.reason
    assert aliases() == {"champion": "1", "challenger": "2"}


def test_a_model_of_the_embedded_data_gives_way_to_one_of_photographs_but_not_back(store: str, log_model: Log) -> None:
    register.promote(scored(log_model, 0.99, data="handwritten-digits", test_digest="embedded"))
    assert register.promote(scored(log_model, 0.5)).alias == "champion"
    again = register.promote(scored(log_model, 1.0, data="handwritten-digits", test_digest="embedded"))
    assert again.alias == "challenger"


def test_registering_twice_makes_one_version(store: str, log_model: Log) -> None:
    model = scored(log_model, 0.8)
    assert register.promote(model).version == register.promote(model).version == "1"
    assert len(mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'")) == 1


def test_one_command_moves_the_alias_back(store: str, log_model: Log) -> None:
    for accuracy in (0.8, 0.9):
        register.promote(scored(log_model, accuracy))
    assert aliases() == {"champion": "2"}
    decision = register.register(ModelParameters(), VersionParameters(version=1))
    assert decision.reason == "moved by hand from version 2"
    assert aliases() == {"champion": "1"}
    run = mlflow.last_active_run()
    assert run.data.params["version"] == "1"
    assert run.data.tags["reason"] == "moved by hand from version 2"


def test_a_challenger_that_becomes_champion_is_no_longer_challenger(store: str, log_model: Log) -> None:
    for accuracy in (0.8, 0.7):
        register.promote(scored(log_model, accuracy))
    register.register(ModelParameters(), VersionParameters(version=2))
    assert aliases() == {"champion": "2"}


def test_any_other_alias_is_given_without_a_question(store: str, log_model: Log) -> None:
    model = scored(log_model, 0.1)
    decision = register.register(ModelParameters(run_id=str(model.source_run_id)), VersionParameters(alias="candidate"))
    assert decision.alias == "candidate"
    assert aliases() == {"candidate": "1"}


def test_a_model_that_was_not_evaluated_is_refused_with_the_command_to_run(store: str, log_model: Log) -> None:
    with pytest.raises(ModelError, match="not evaluated yet; run `python -m signdigits evaluate --run_id"):
        register.promote(log_model())


@pytest.mark.parametrize(
    ("which", "version", "error", "message"),
    [
        ({}, {}, ParameterError, "give one of the three"),
        ({"run_id": "a"}, {"version": 1}, ParameterError, "give one of the three"),
        ({}, {"version": 7}, ModelError, "version=7: sign-digits has no such version"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    store: str, which: dict[str, Any], version: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        register.register(ModelParameters(**which), VersionParameters(**version))


@pytest.mark.parametrize("alias", ["latest", "v1", "a b", ""])
def test_an_alias_that_mlflow_would_refuse_is_refused_at_once(alias: str) -> None:
    with pytest.raises(ParameterError, match=f"alias='{alias}': must be letters, digits"):
        VersionParameters(alias=alias)


def test_show_says_what_is_served(store: str, log_model: Log) -> None:
    with pytest.raises(ModelError, match=r"has no champion in .*; run scripts/quickstart"):
        register.show()
    register.promote(scored(log_model, 0.8))
    assert register.show() == "sign-digits version 1, champion: test accuracy 0.8000 on 12 images of bars"
