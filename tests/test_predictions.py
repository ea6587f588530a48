import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from signdigits.config import MODEL_NAME, DataParameters
from signdigits.data import lineage
from signdigits.data.dataset import Dataset, scan_dataset
from signdigits.errors import IncomparableError, ModelError
from signdigits.promotion import predictions
from signdigits.tracking import registry, runs

from .conftest import write_photographs

pytestmark = pytest.mark.slow


def evaluated(dataset: Dataset, indices: np.ndarray) -> ModelVersion:
    """A challenger that predicts every one of these test images correctly, as if `evaluate` had scored it."""
    chosen = [dataset.photographs[i] for i in indices]
    table = pd.DataFrame({"path": [photograph.path for photograph in chosen]})
    table["label"] = table["prediction"] = [dataset.class_names[photograph.label] for photograph in chosen]
    for name in dataset.class_names:
        table[f"p({name})"] = (table["label"] == name).astype(float)
    with runs.start_run("evaluate", "evaluate") as run:
        mlflow.log_text(table.to_csv(index=False), runs.PREDICTIONS)
        mlflow.log_input(lineage.dataset_input(dataset, indices), context="testing")
    tags = {"test_digest": dataset.part_digest(indices), "test_run_id": run.info.run_id}
    found = [ModelVersionTag(name, value) for name, value in tags.items()]
    return ModelVersion(MODEL_NAME, "2", 0, source="models:/m-2", tags=found)


def scan_copy(photographs: Path, target: Path) -> Dataset:
    """The photographs of the champion in another folder, with files of other names and content among them."""
    shutil.copytree(photographs, target)
    write_photographs(target.with_name("others"), each=4)
    for path in sorted(target.with_name("others").rglob("*.JPG")):
        path.with_name(f"new-{path.name}").write_bytes(path.read_bytes() + b"other")
        shutil.move(path.with_name(f"new-{path.name}"), target / path.parent.name)
    return scan_dataset(DataParameters(data=str(target)))


def find_champion() -> ModelVersion:
    champion = registry.find_alias(MODEL_NAME, "champion")
    assert champion is not None
    return champion


def test_same_images_need_no_model(champion: str) -> None:
    version = find_champion()
    collected = predictions.collect_predictions(version, version)
    assert collected.challenger.equals(collected.champion)
    assert collected.description == "the same 12 images"


def test_champion_is_asked_about_other_images(champion: str, photographs: Path, tmp_path: Path) -> None:
    """Those that it was trained on are left out, whatever their names are now; a class may have an invisible character."""
    scan_copy(photographs, tmp_path / "more")
    (tmp_path / "more" / "1").rename(tmp_path / "more" / "1\u200b")
    dataset = scan_dataset(DataParameters(data=str(tmp_path / "more")))
    version = evaluated(dataset, np.arange(len(dataset.photographs)))
    collected = predictions.collect_predictions(version, find_champion())
    assert collected.n_known == "48"
    assert len(collected.champion) == 12 + 12, "its own test images, and the new ones"
    assert collected.champion["path"].tolist() == collected.challenger["path"].tolist()
    assert sum(path.split("/")[1].startswith("new-") for path in collected.champion["path"]) == 12
    assert (collected.champion["label"] == collected.champion["prediction"]).mean() > 0.6, "it has learned the bars"
    assert np.allclose(collected.champion.filter(regex=r"^p\(").sum(axis=1), 1)
    assert "24 test images of the challenger" in collected.description
    assert "tested on bars, split stratified" in collected.description
    assert "48 more are left out, because it was trained on them" in collected.description
    assert collected.to_table()["champion_trained_on"].value_counts().to_dict() == {True: 48, False: 24}


def test_trained_images_alone_are_not_compared(champion: str, photographs: Path) -> None:
    dataset = scan_dataset(DataParameters(data=str(photographs)))
    fitted = predictions.find_fitted_checksums(find_champion().run_id)
    assert fitted is not None
    known = np.array([i for i, photograph in enumerate(dataset.photographs) if photograph.checksum in fitted])
    with pytest.raises(IncomparableError, match="was trained on all of the 48 test images"):
        predictions.collect_predictions(evaluated(dataset, known), find_champion())


def test_other_classes_are_not_compared(champion: str, tmp_path: Path) -> None:
    dataset = scan_dataset(DataParameters(data=str(write_photographs(tmp_path / "two", classes=2, each=4))))
    with pytest.raises(IncomparableError, match=r"other classes \(0, 1, 2; not 0, 1\).*--model_name NAME"):
        predictions.collect_predictions(evaluated(dataset, np.arange(8)), find_champion())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("remove", "are missing or have changed; restore them"),
        ("change", "are missing or have changed; restore them"),
        ("move", "no such folder.*evaluate it again"),
    ],
)
def test_missing_photographs_name_remedy(champion: str, tmp_path: Path, damage: str, message: str) -> None:
    folder = write_photographs(tmp_path / "gone", each=4)
    version = evaluated(scan_dataset(DataParameters(data=str(folder))), np.arange(12))
    path = folder / "1" / "IMG_0002.JPG"
    if damage == "remove":
        path.unlink()
    elif damage == "change":
        shutil.copy(path.with_name("IMG_0001.JPG"), path)
    else:
        folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=f"{message}.*or pass --force true"):
        predictions.collect_predictions(version, find_champion())


def test_refused_photograph_is_a_mistake(champion: str, photographs: Path) -> None:
    """Its decoder may know fewer formats, or smaller limits, than the challenger's."""
    dataset = scan_dataset(DataParameters(data=str(photographs)))
    table = pd.DataFrame({"path": [photograph.path for photograph in dataset.photographs[:3]], "label": "0"})
    contents = dict(zip(table["path"], [b"no image", *map(dataset.read, dataset.photographs[1:3])], strict=True))
    predicted = predictions._predict_images(predictions._load_scorer(find_champion()), table, contents.__getitem__)
    assert predicted["prediction"].isna().tolist() == [True, False, False]
    assert np.allclose(predicted.filter(regex=r"^p\(").to_numpy()[0], 1 / 3)
