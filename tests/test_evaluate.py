"""The evaluation. Evaluating a model takes seconds: the tests look at one, in copies of its store."""

import base64
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.entities import Run
from PIL import Image

from signdigits import evaluate
from signdigits.batch.scoring import Scorer
from signdigits.config import ModelParameters, SourceParameters
from signdigits.data import loading
from signdigits.data.corruptions import CORRUPTIONS
from signdigits.errors import ModelError
from signdigits.promotion.predictions import find_fitted_checksums
from signdigits.tracking import registry

from .conftest import log_untrained, store_like, write_photographs

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Evaluation:
    """An untrained model, registered and then evaluated: its scores, its run and its database, to copy."""

    model_id: str
    scores: evaluate.Scores
    run_id: str
    database: Path

    @property
    def run(self) -> Run:
        return mlflow.get_run(self.run_id)

    def read_csv(self, name: str, index: str | None = None) -> pd.DataFrame:
        return pd.read_csv(self.download(name), index_col=index)

    def download(self, name: str) -> str:
        return str(mlflow.artifacts.download_artifacts(run_id=self.run_id, artifact_path=name))


@pytest.fixture(scope="module")
def evaluation(
    tmp_path_factory: pytest.TempPathFactory,
    empty_store: Path,
    loaded: loading.Data,
    model_files: Callable[[float], Path],
) -> Evaluation:
    folder = tmp_path_factory.mktemp("evaluated")
    with store_like(empty_store, folder):
        logged = log_untrained(model_files(3.0), loaded, temperature=3.0)
        version = mlflow.register_model(logged.model_uri, "bars")
        scores = evaluate.evaluate(loaded.parameters, ModelParameters(model_uri=version.source))
        run = mlflow.last_active_run()
        assert run is not None
        return Evaluation(version.source.removeprefix("models:/"), scores, run.info.run_id, folder / "mlflow.db")


@pytest.fixture
def evaluated(evaluation: Evaluation, tmp_path: Path) -> Iterator[Evaluation]:
    with store_like(evaluation.database, tmp_path):
        yield evaluation


def test_evaluate_uses_served_artifact(evaluated: Evaluation, loaded: loading.Data) -> None:
    scores, run = evaluated.scores, evaluated.run
    assert scores.test_images == 12
    predictions = evaluated.read_csv("test/predictions.csv")
    assert predictions["path"].tolist() == [loaded.dataset.photographs[i].path for i in loaded.split.testing]
    accuracy = (predictions["label"] == predictions["prediction"]).mean()
    assert run.data.metrics["test_accuracy"] == pytest.approx(accuracy)
    assert run.data.metrics["test_accuracy_score"] == pytest.approx(accuracy), "MLflow's own"
    assert {"test_precision_score", "test_recall_score", "test_f1_score"} <= set(run.data.metrics)
    artifacts = {
        item.path for path in ("", "test") for item in mlflow.MlflowClient().list_artifacts(run.info.run_id, path)
    }
    assert {"test_confusion_matrix.png", "test/reliability.png"} <= artifacts
    assert scores.test_accuracy_low < accuracy < scores.test_accuracy_high
    assert run.data.metrics["test_ece"] == scores.test_ece
    (used,) = [item for item in run.inputs.dataset_inputs if item.dataset.name == "bars"]
    assert used.dataset.digest == loaded.dataset.part_digest(loaded.split.testing)


def test_classes_are_scored(evaluated: Evaluation) -> None:
    predictions = evaluated.read_csv("test/predictions.csv")
    table = evaluated.read_csv("test/per_class.csv", "class")
    assert table.index.tolist() == ["0", "1", "2", "macro average", "weighted average"]
    assert table["images"].tolist() == [4, 4, 4, 12, 12]
    for label, rows in predictions.groupby("label"):
        assert table.loc[str(label), "recall"] == (rows["prediction"] == label).mean()
    assert table.loc["macro average", "f1-score"] == pytest.approx(table["f1-score"][:3].mean())
    assert table.loc["weighted average", "recall"] == pytest.approx(evaluated.scores.test_accuracy)


def test_robustness_is_measured(evaluated: Evaluation) -> None:
    table = evaluated.read_csv("test/robustness.csv", "corruption")
    assert table.index.tolist() == ["none", *CORRUPTIONS]
    assert table.loc["none", "accuracy"] == evaluated.scores.test_accuracy
    assert ((table["accuracy_low"] <= table["accuracy"]) & (table["accuracy"] <= table["accuracy_high"])).all()
    corrupted = table.drop(index="none")["accuracy"]
    assert evaluated.run.data.metrics["robust_accuracy"] == pytest.approx(corrupted.mean())
    tags = mlflow.get_logged_model(evaluated.model_id).tags
    assert float(tags["worst_accuracy"]) == pytest.approx(corrupted.min())
    assert corrupted[tags["worst_corruption"]] == corrupted.min()
    with Image.open(evaluated.download("test/robustness.png")) as picture:
        assert picture.height > 500


def test_outliers_are_measured(evaluated: Evaluation) -> None:
    table = evaluated.read_csv("test/outliers.csv", "kind")
    assert table.index.tolist() == ["charts", "handwriting", "photographs", "text", "all"]
    assert table.loc["all", "images"] == 160
    assert table["auroc"].between(0, 1).all()
    metrics = evaluated.run.data.metrics
    assert metrics["outliers_in_test"] == pytest.approx(evaluated.read_csv("test/predictions.csv")["is_outlier"].mean())
    assert metrics["outlier_auroc"] == pytest.approx(table.loc["all", "auroc"])
    tags = mlflow.get_logged_model(evaluated.model_id).tags
    assert float(tags["outliers_detected"]) == table.loc["all", "detected"]


def test_pictures_of_no_sign_are_outliers(
    evaluated: Evaluation, photographs: Path, loaded: loading.Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of a folder beside one of the data set's folders; a third that cannot be read is named."""
    folder = tmp_path / "not-a-sign"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        Image.new("RGB", (20, 20), "green").save(folder / name)
    (folder / "3.png").write_bytes((folder / "1.png").read_bytes()[:50])
    dataset = replace(loaded.dataset, folders=(photographs, tmp_path / "accepted"))
    scorer = Scorer(f"models:/{evaluated.model_id}")
    table = scorer.score_photographs(list(map(str, photographs.glob("*/*.JPG"))), lambda path: Path(path).read_bytes())
    outliers = evaluate._score_outliers(scorer, dataset, table).set_index("kind")
    assert outliers["images"].to_dict() == {
        "charts": 40, "handwriting": 40, "photographs": 40, "text": 40, "not-a-sign": 2, "all": 162,
    }  # fmt: skip
    assert f"{folder / '3.png'}: left out of the pictures of something else" in caplog.text


def test_scores_are_logged_with_model(evaluated: Evaluation) -> None:
    """Also with a version that was registered before."""
    model = mlflow.get_logged_model(evaluated.model_id)
    tags = mlflow.MlflowClient().get_model_version("bars", "1").tags
    assert tags["test_run_id"] == model.tags["test_run_id"] == evaluated.run_id
    assert float(model.tags["test_accuracy"]) == pytest.approx(evaluated.scores.test_accuracy)
    assert model.tags["test_images"] == "12"
    metrics = {metric.key: metric.value for metric in model.metrics}
    assert metrics["test_accuracy"] == pytest.approx(evaluated.scores.test_accuracy)


def test_worst_mistakes_are_plotted(evaluated: Evaluation) -> None:
    """An untrained network is wrong about most of three classes."""
    with Image.open(evaluated.download("test/worst_mistakes.png")) as picture:
        assert picture.width > 500


def test_uncalibrated_error_is_logged(
    evaluated: Evaluation, loaded: loading.Data, model_files: Callable[[float], Path]
) -> None:
    """The same network at a temperature of 1 and of 3."""
    scorer = Scorer(log_untrained(model_files(1.0), loaded, temperature=1.0).model_uri)
    table = evaluate._predict_photographs(scorer, loaded.dataset, loaded.split.testing)
    plain, cooled = evaluate.compute_scores(table, loaded.dataset.class_names, 1.0), evaluated.scores
    assert plain.test_ece == pytest.approx(plain.test_ece_uncalibrated, abs=1e-6)
    assert cooled.test_ece_uncalibrated == pytest.approx(plain.test_ece, abs=1e-6)
    assert cooled.test_ece != pytest.approx(plain.test_ece, abs=1e-3)


def test_own_folder_is_scored(champion: str, photographs: Path, tmp_path: Path) -> None:
    """One of the classes, with the champion's own photographs, of which 16 are not for its test, and three new ones."""
    own = tmp_path / "own"
    shutil.copytree(photographs / "2", own / "2")
    for path in sorted((write_photographs(tmp_path / "others", each=3) / "2").iterdir()):
        shutil.copy(path, own / "2" / f"new_{path.name}")
    parameters, model = SourceParameters(data=str(own)), ModelParameters(model_uri="models:/sign-digits@champion")
    before = mlflow.MlflowClient().get_model_version_by_alias("sign-digits", "champion").tags
    scores = evaluate.evaluate(parameters, model)
    assert scores.test_images == 4 + 3
    assert scores.test_accuracy_low < scores.test_accuracy <= scores.test_accuracy_high
    run = mlflow.last_active_run()
    assert run is not None
    run = mlflow.get_run(run.info.run_id)
    assert run.data.metrics["external_trained_on"] == 16
    assert run.data.metrics["external_accuracy"] == scores.test_accuracy
    assert not [name for name in run.data.metrics if name.startswith("test_")]
    assert "16 more are left out, because it was trained on them" in run.data.tags["mlflow.note.content"]
    assert mlflow.MlflowClient().get_model_version_by_alias("sign-digits", "champion").tags == before
    (own / "2").rename(own / "palm")
    with pytest.raises(ModelError, match="palm: no class of the model, which knows 0, 1, 2"):
        evaluate.evaluate(parameters, model)


def test_trained_images_alone_are_not_scored(champion: str, photographs: Path, tmp_path: Path) -> None:
    own = shutil.copytree(photographs, tmp_path / "own")
    model = registry.find_model("", "models:/sign-digits@champion")
    fitted = find_fitted_checksums(model.source_run_id) or set()
    for path in own.rglob("*.JPG"):
        if hashlib.sha256(path.read_bytes()).hexdigest() not in fitted:
            path.unlink()
    with pytest.raises(ModelError, match="the model was trained on all of the 48 photographs"):
        evaluate.evaluate(SourceParameters(data=str(own)), ModelParameters(model_uri=model.model_uri))


def test_mlflow_evaluates_labels(champion: str, photographs: Path) -> None:
    """As in docs/registry.md; the labels come back with the rows that they belong to."""
    model = mlflow.pyfunc.load_model("models:/sign-digits@champion")
    paths = sorted(photographs.glob("*/*.JPG"))
    table = pd.DataFrame(
        {"image": [path.read_bytes() for path in paths], "class": [path.parent.name for path in paths]}
    )
    chosen = table[table["class"] != "0"].sample(frac=1, random_state=0)
    chosen["label"] = model.predict(chosen[["image"]])["label"]
    assert (chosen["label"] == chosen["class"]).mean() > 0.9
    table["image"] = [base64.b64encode(image).decode() for image in table["image"]]
    result = mlflow.models.evaluate(
        model=lambda rows: model.predict(rows[["image"]])["label"],
        data=table.loc[chosen.index, ["image", "class"]],
        targets="class",
        model_type="classifier",
        evaluator_config={"log_model_explainability": False},
    )
    assert result.metrics["accuracy_score"] == (chosen["label"] == chosen["class"]).mean()


def test_confidence_interval_is_wilsons() -> None:
    """407 of 412: centre and half-width from the formula in Wilson's paper, worked out by hand."""
    table = pd.DataFrame({"label": ["0"] * 412, "prediction": ["0"] * 407 + ["1"] * 5})
    table["p(0)"], table["p(1)"] = 0.9, 0.1
    scores = evaluate.compute_scores(table, ("0", "1"), 1.0)
    n, p, z = 412, 407 / 412, 1.959964
    centre, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert scores.test_accuracy_low == pytest.approx((centre - half) / (1 + z * z / n))
    assert scores.test_accuracy_high == pytest.approx((centre + half) / (1 + z * z / n))
