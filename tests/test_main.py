"""The whole job; tests/test_home.py starts it with `mlflow run`, and serves its champion."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Run

from signdigits import main, register
from signdigits.config import (
    MODEL_NAME,
    SERVED_MODEL,
    ModelParameters,
    RefitParameters,
    RegistryParameters,
    VersionParameters,
)
from signdigits.data import loading
from signdigits.model import training
from signdigits.tracking import registry
from signdigits.tracking.runs import escape_cell

from .conftest import SPACE, STUDY, TWO, copy_stores

pytestmark = pytest.mark.slow

ONE = RefitParameters(n_seeds=1)


@pytest.fixture
def job(finished_job: Path, tmp_path: Path) -> Iterator[str]:
    """Yield the URI of a copy of the finished job's store."""
    with copy_stores(finished_job, tmp_path) as uri:
        yield uri


def runs() -> list[Run]:
    return list(mlflow.search_runs(search_all_experiments=True, output_format="list"))


def refits() -> dict[str, Run]:
    """The refits that were not killed, by seed."""
    return {
        run.data.tags["seed"]: run for run in runs() if run.data.tags["role"] == "refit" and run.info.status != "KILLED"
    }


def test_interrupted_job_is_resumed(job: str) -> None:
    roles = Counter((run.data.tags["role"], run.info.status) for run in runs())
    assert roles == {
        ("study", "FINISHED"): 1,
        ("trial", "FINISHED"): 2,
        ("refit", "KILLED"): 1,
        ("refit", "FINISHED"): 2,
        ("ensemble", "FINISHED"): 1,
    }


def test_refit_uses_training_and_validation(job: str, loaded: loading.Data) -> None:
    refit = refits()["1337"]
    used = [item for item in refit.inputs.dataset_inputs if item.dataset.name == "bars"]
    inputs = {tag.value: item.dataset.digest for item in used for tag in item.tags}
    assert inputs == {
        "fitting": loaded.dataset.part_digest(loaded.split.fitting),
        "testing": loaded.dataset.part_digest(loaded.split.testing),
    }
    (study,) = [run for run in runs() if run.data.tags["role"] == "study"]
    assert refit.data.tags["trial"] == study.data.tags["best_trial"]
    best = mlflow.get_run(study.data.tags["best_run_id"])
    for name in ("initial_learning_rate", "decay_rate", "epochs"):
        assert refit.data.params[name] == best.data.params[name]


def test_mean_of_refits_is_registered(job: str) -> None:
    assert set(refits()) == {"1337", "1338"}
    accuracies = [run.data.metrics["test_accuracy"] for run in refits().values()]
    (study,) = [run for run in runs() if run.data.tags["role"] == "study"]
    assert study.data.metrics["test_accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert study.data.metrics["test_accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
    champion = mlflow.MlflowClient().get_model_version_by_alias(MODEL_NAME, "champion")
    assert champion.tags["seeds"] == "1337, 1338"
    assert float(champion.tags["test_accuracy_mean"]) == pytest.approx(np.mean(accuracies))
    (ensemble,) = [run for run in runs() if run.data.tags["role"] == "ensemble"]
    assert ensemble.data.tags["mlflow.parentRunId"] == study.info.run_id
    assert float(champion.tags["test_accuracy"]) == ensemble.data.metrics["test_accuracy"]
    each = f"{float(champion.tags['test_accuracy_mean']):.4f} ± {float(champion.tags['test_accuracy_std']):.4f}"
    assert f"mean of 2 networks, trained with the seeds 1337, 1338; each alone: {each}." in champion.description
    assert "mlflow run . -e main --env-manager local -P data=" in champion.description


def test_served_mean_is_the_mean_of_the_refits(job: str, photographs: Path) -> None:
    image = pd.DataFrame({"image": [(photographs / "1" / "IMG_0007.JPG").read_bytes()]})

    def predict(uri: str) -> np.ndarray:
        (reply,) = mlflow.pyfunc.load_model(uri).predict(image)["probabilities"]
        return np.array(list(reply.values()))

    models = [registry.find_model(run.info.run_id, "") for run in refits().values()]
    product = np.prod([predict(model.model_uri) for model in models], axis=0) ** (1 / len(models))
    np.testing.assert_allclose(predict(SERVED_MODEL), product / product.sum(), rtol=1e-4)


def test_champion_reads_its_examples(job: str, photographs: Path) -> None:
    served = mlflow.pyfunc.load_model(SERVED_MODEL)
    examples = served.unwrap_python_model().examples
    reply = served.predict(pd.DataFrame({"image": list(examples.values())}))
    assert reply["label"].tolist() == list(examples)
    assert not reply["is_outlier"].any()
    champion = mlflow.MlflowClient().get_model_version_by_alias(MODEL_NAME, "champion")
    assert int(champion.tags["examples"]) == len(examples) > 0
    shown = f"{len(examples)} of the training photographs of {escape_cell(photographs)}, at most one of each class"
    assert shown in champion.description


def test_examples_of_earlier_start_are_named(job: str, loaded: loading.Data, caplog: pytest.LogCaptureFixture) -> None:
    """A later start without them neither removes them nor makes the model again."""
    before = len(runs())
    caplog.set_level("INFO", "signdigits")
    main.main(loaded, SPACE, STUDY, dataclasses.replace(TWO, examples="auto"), RegistryParameters())
    assert len(runs()) == before
    (ensemble,) = [run for run in runs() if run.data.tags["role"] == "ensemble"]
    expected = "examples=auto: the model was logged with examples before; delete its run, `mlflow runs delete --run-id "
    assert f"{expected}{ensemble.info.run_id}`" in caplog.text


def test_deleted_model_is_refitted(job: str) -> None:
    """Of the refit with the first seed: the run is left, and its model is not found."""
    (study,) = [run for run in runs() if run.data.tags["role"] == "study"]
    search = SimpleNamespace(run_id=study.info.run_id)
    model = main._find_model(search, "refit", {"seed": 1337})  # type: ignore[arg-type]
    assert model is not None
    mlflow.MlflowClient().delete_logged_model(model.model_id)
    assert main._find_model(search, "refit", {"seed": 1337}) is None  # type: ignore[arg-type]
    assert main._find_model(search, "refit", {"seed": 1338}) is not None  # type: ignore[arg-type]


def test_first_seed_is_registered_without_ensemble(job: str, loaded: loading.Data) -> None:
    alone = RefitParameters(n_seeds=2, ensemble=False)
    decision = main.main(loaded, SPACE, STUDY, alone, RegistryParameters(force=True))
    version = mlflow.MlflowClient().get_model_version(MODEL_NAME, decision.version)
    assert (decision.version, version.tags["seed"], version.tags["n_seeds"]) == ("2", "1337", "2.0")
    assert len(runs()) == 7, "no further run"


def test_second_start_keeps_rollback(job: str, loaded: loading.Data) -> None:
    other = dataclasses.replace(STUDY, n_trials=1, study_name="other")
    assert main.main(loaded, SPACE, other, ONE, RegistryParameters(force=True)).version == "2"
    register.register(ModelParameters(), VersionParameters(version=1))
    again = main.main(loaded, SPACE, other, ONE, RegistryParameters(force=True))
    assert (again.version, again.alias) == ("2", "champion"), "what was decided then"
    champion = mlflow.MlflowClient().get_model_version_by_alias(MODEL_NAME, "champion")
    assert str(champion.version) == "1"


@pytest.mark.parametrize("alias", ["champion", "challenger"])
def test_deleted_alias_names_remedy(
    job: str, loaded: loading.Data, caplog: pytest.LogCaptureFixture, alias: str
) -> None:
    if alias == "challenger":  # the job itself assigned the other
        register.register(ModelParameters(), VersionParameters(version=1, alias=alias))
    mlflow.MlflowClient().delete_registered_model_alias(MODEL_NAME, alias)
    with caplog.at_level("INFO", "signdigits"):
        main.main(loaded, SPACE, STUDY, TWO, RegistryParameters(alias=alias))
    remedy = f"python -m signdigits register --version 1 --alias {alias}"
    standing = "no alias" if alias == "champion" else "champion"
    assert f"version 1, {standing}; it was {alias}, and `{remedy}` assigns it again" in caplog.text
    assert remedy in registry.missing_alias(MODEL_NAME, alias)
    register.register(ModelParameters(), VersionParameters(version=1, alias=alias))
    assert registry.list_aliases(MODEL_NAME, "1") == sorted({"champion", alias})


def test_refit_that_learns_nothing_is_skipped(
    job: str, loaded: loading.Data, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def collapse(original: Callable[..., training.Fit]) -> Callable[..., training.Fit]:
        def fit(network: Any, images: Any, validation: Any, hyperparameters: Any, **options: Any) -> training.Fit:
            fitted = original(network, images, validation, hyperparameters, **options)
            if validation is None and hyperparameters.seed == 1339:
                fitted.history["accuracy"][-1] = 0.0
            return fitted

        return fit

    monkeypatch.setattr(training, "fit_network", collapse(training.fit_network))
    main.main(loaded, SPACE, STUDY, RefitParameters(n_seeds=3), RegistryParameters())
    statuses = {seed: run.info.status for seed, run in refits().items()}
    assert statuses == {"1337": "FINISHED", "1338": "FINISHED", "1339": "FAILED", "1340": "FINISHED"}
    assert refits()["1339"].data.tags["failure_reason"].startswith("TrainingDiverged: training accuracy 0.0000")
    assert "refit with seed 1339 skipped" in caplog.text
    (ensemble,) = [run for run in runs() if run.data.tags.get("seeds") == "1337, 1338, 1340"]
    assert ensemble.data.tags["role"] == "ensemble"
