import re
import shlex

import mlflow
import pandas as pd
import pytest
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion

from signdigits import register
from signdigits.cli import make_parser
from signdigits.config import MODEL_NAME, ModelParameters, VersionParameters
from signdigits.data import loading
from signdigits.data.corruptions import CORRUPTIONS
from signdigits.promotion import model_card
from signdigits.tracking import registry
from signdigits.tuning.space import Space

pytestmark = pytest.mark.slow


def find_version() -> tuple[ModelVersion, LoggedModel]:
    version = registry.find_alias(MODEL_NAME, "champion")
    assert version is not None
    return version, mlflow.get_logged_model(version.source.removeprefix("models:/"))


def test_card_holds_what_was_measured(champion: str, loaded: loading.Data) -> None:
    version, model = find_version()
    (run,) = mlflow.search_runs(filter_string="tags.role = 'register'", output_format="list")
    card = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/MODEL_CARD.md")
    assert version.description == card, "short enough for a description"
    assert card.startswith("# Model card: sign-digits version 1\n")
    assert "tells which of 3 classes a photograph shows: `0`, `1`, `2`." in card
    for fact in ("dataset_digest", "test_digest", "test_images", "worst_corruption"):
        assert model.tags[fact] in card
    low, high = (float(model.tags[f"test_accuracy_{end}"]) for end in ("low", "high"))
    assert f"{float(model.tags['test_accuracy']):.4f} ({low:.4f} to {high:.4f} with 95 % confidence) on 12" in card
    assert "licence | not recorded" in card
    changes = card.partition("## Robustness")[2].partition("## Outliers")[0]
    assert [name for name in CORRUPTIONS if f"| {name.replace('_', chr(92) + '_')} |" in changes] == list(CORRUPTIONS)
    assert "| all | 160 |" in card
    assert not re.search(r"\b(hands?|digits?)\b", card.replace(MODEL_NAME, "")), "the classes are bars"


def test_accuracy_is_given_by_class(champion: str) -> None:
    version, model = find_version()
    text = model_card.render_card(version, model)
    predictions = mlflow.artifacts.download_artifacts(f"runs:/{model.tags['test_run_id']}/test/predictions.csv")
    table = pd.read_csv(predictions, dtype=str)
    for name, rows in table.groupby("label"):
        correct = (rows["label"] == rows["prediction"]).sum()
        assert f"| {name} | {len(rows)} | {correct} | {correct / len(rows):.3f} |" in text


def test_command_repeats_the_training(champion: str) -> None:
    version, model = find_version()
    (command,) = re.findall(r"```sh\n(.*)\n```", model_card.render_card(version, model))
    program, options = command.split(" --env-manager local ")
    assert program == "mlflow run . -e train"
    given = [word.partition("=") for word in shlex.split(options) if word != "-P"]
    parsed = vars(make_parser().parse_args(["train", *(f"--{name}={value}" for name, _, value in given)]))
    trained = mlflow.get_run(model.source_run_id).data.params
    assert {name: str(parsed[name]) for name in trained if name in parsed} == {
        n: trained[n] for n in trained if n in parsed
    }
    assert {name for name, _, _ in given} == {"data", "image_size", "epochs", "batch_size", "initial_learning_rate"}


def test_command_of_a_study_has_what_was_given(store: str) -> None:
    """The ranges that the embedded digits have of their own are no options: a given range has no start."""
    space = Space.of("extended", dropout=0.1).for_data_set("handwritten-digits")
    with mlflow.start_run() as active:
        mlflow.set_tag("dataset", "handwritten-digits+more")
        mlflow.log_params({"space": "extended", "n_trials": "2", "n_seeds": 0, "split": "auto", **space.values})
    run = mlflow.get_run(active.info.run_id)
    assert model_card._list_changed(run, model_card.MAIN_PARAMETERS) == {"n_trials": "2", "dropout": "0.1"}


def test_unmeasured_is_named(champion: str) -> None:
    """The run of the evaluation kept only its predictions."""
    version, model = find_version()
    predictions = mlflow.artifacts.load_text(f"runs:/{model.tags['test_run_id']}/test/predictions.csv")
    with mlflow.start_run() as run:
        mlflow.log_text(predictions, "test/predictions.csv")
    model.tags["test_run_id"] = run.info.run_id
    del model.tags["test_ece"]
    card = model_card.render_card(version, model)
    assert re.findall("^## (.*)$", card, re.MULTILINE) == ["Purpose", "Data", "Accuracy", "Limits", "Reproduce"]
    assert "\n- Not measured: accuracy by person, camera or place; calibration; robustness; outliers.\n" in card


def test_card_outlives_its_evaluation(champion: str) -> None:
    version, model = find_version()
    model.tags.update(test_run_id="0" * 32, git_commit="abc", split="grouped")
    card = model_card.render_card(version, model)
    assert re.findall("^## (.*)$", card, re.MULTILINE) == ["Data", "Calibration", "Limits", "Reproduce"]
    assert "place; purpose; accuracy; robustness; outliers.\n\n## Reproduce\n\nAt commit `abc`:\n\n```sh\n" in card


def test_description_by_hand_is_kept(champion: str) -> None:
    _, model = find_version()
    mlflow.MlflowClient().update_model_version(MODEL_NAME, "1", "Do not touch")
    register.register(ModelParameters(run_id=str(model.source_run_id)), VersionParameters())
    assert find_version()[0].description == "Do not touch"


def test_long_card_refers_to_artifact() -> None:
    card = model_card.shorten_card(
        "# Model card: a version 1\n\n## Purpose\n\nshort\n\n## Accuracy\n\n" + "long\n" * 2000
    )
    assert len(card) < model_card.MAX_DESCRIPTION
    assert "short" in card
    assert "## Accuracy\n\nSee `MODEL_CARD.md` among the artifacts" in card
