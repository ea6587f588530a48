"""Trainings that start from another model: few photographs of new classes, tested by folds."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import keras
import mlflow
import numpy as np
import pandas as pd
import pytest

from signdigits import cli, files, main
from signdigits.config import (
    DataParameters,
    Hyperparameters,
    RefitParameters,
    RegistryParameters,
    StudyParameters,
)
from signdigits.data import loading
from signdigits.data.loading import Features
from signdigits.data.start import find_start
from signdigits.errors import DataError, ModelError, UsageError
from signdigits.model import architecture, training, transfer
from signdigits.search import open_study
from signdigits.tracking import registry, runs
from signdigits.tuning.folds import fit_folds
from signdigits.tuning.space import Space

from .conftest import copy_stores, store_like, write_photographs

CHAMPION = "models:/sign-digits@champion"
STUDY = StudyParameters(space="transfer", n_trials=2)
SPACE = Space.of("transfer", epochs=12, horizontal_flip=0.0, augmentation=0.3)


def few(folder: Path, each: int = 3) -> Path:
    """Return a folder with few photographs of three classes that the champion does not know: upright bars."""
    write_photographs(folder, classes=6, each=each)
    for label in range(3):
        shutil.rmtree(folder / str(label))
    return folder


@pytest.fixture(scope="module")
def gestures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few(tmp_path_factory.mktemp("few") / "gestures")


@pytest.fixture
def started(champion: str, gestures: Path) -> loading.Data:
    """The photographs of new classes, and the champion to start from."""
    return loading.load_data(DataParameters(data=str(gestures), start_from=CHAMPION))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, champion_store: Path, gestures: Path) -> Path:
    """The folder of the stores, to copy, of a whole job that started from the champion."""
    folder = tmp_path_factory.mktemp("job")
    with store_like(champion_store, folder):
        data = loading.load_data(DataParameters(data=str(gestures), start_from=CHAMPION))
        main.main(data, SPACE, STUDY, RefitParameters(examples="true"), RegistryParameters(model_name="gestures"))
    return folder


@pytest.fixture
def copied(tmp_path: Path, job: Path) -> Iterator[str]:
    with copy_stores(job, tmp_path) as uri:
        yield uri


@pytest.mark.slow
def test_each_photograph_is_tested_once(copied: str, gestures: Path) -> None:
    version = registry.find_alias("gestures", "champion")
    assert version is not None
    table = files.read_csv(mlflow.artifacts.load_text(f"runs:/{version.tags['test_run_id']}/{runs.PREDICTIONS}"))
    assert sorted(table["path"]) == sorted(path.relative_to(gestures).as_posix() for path in gestures.rglob("*.JPG"))
    assert (version.tags["split"], version.tags["test_images"], version.tags["n_seeds"]) == ("folds", "9", "1.0")
    assert float(version.tags["test_accuracy"]) == (table["label"] == table["prediction"]).mean()
    fitted = files.read_csv(mlflow.artifacts.load_text(f"runs:/{find_study().info.run_id}/{runs.FILES}"))
    assert set(fitted["part"]) == {f"fold {number}" for number in range(1, 4)}


def find_study() -> mlflow.entities.Run:
    (study,) = runs.search_runs("tags.role = 'study'")
    return study


@pytest.mark.slow
def test_trials_are_nested_runs(copied: str) -> None:
    trials = runs.nested_runs(find_study().info.run_id, "trial")
    assert [trial.data.tags["trial_state"] for trial in trials] == ["COMPLETE"] * 2
    for trial in trials:
        assert trial.data.params["frozen_blocks"] == "8"
        assert {"val_accuracy", "robust_brier", "temperature"} <= trial.data.metrics.keys()
        assert trial.data.metrics["folds"] == 3


@pytest.mark.slow
def test_run_links_to_the_model_that_it_starts_from(copied: str) -> None:
    source = registry.find_alias("sign-digits", "champion")
    version = registry.find_alias("gestures", "champion")
    assert source is not None and version is not None  # noqa: PT018
    refit = mlflow.get_run(version.run_id)
    assert [f"models:/{linked.model_id}" for linked in refit.inputs.model_inputs] == [source.source]
    assert refit.data.tags["start_from"] == version.tags["start_from"] == "sign-digits version 1"
    assert "| starts from | sign-digits version 1, trained on" in version.description
    assert "tested once" in version.description


@pytest.mark.slow
def test_source_may_be_deleted(copied: str, gestures: Path) -> None:
    source = find_start(CHAMPION)
    mlflow.MlflowClient().delete_logged_model(source.uri.removeprefix("models:/"))
    served = mlflow.pyfunc.load_model("models:/gestures@champion")
    photographs = sorted(gestures.rglob("*.JPG"))
    reply = served.predict(pd.DataFrame({"image": [path.read_bytes() for path in photographs]}))
    assert (reply["label"] == [path.parent.name for path in photographs]).mean() > 0.5
    assert not reply["is_outlier"].mean() > 0.2
    examples = served.unwrap_python_model().examples
    assert examples
    assert served.predict(pd.DataFrame({"image": list(examples.values())}))["label"].tolist() == list(examples)
    with pytest.raises(ModelError, match="no such model"):
        find_start(CHAMPION)


@pytest.mark.slow
def test_second_start_changes_nothing(copied: str, gestures: Path) -> None:
    data = loading.load_data(DataParameters(data=str(gestures), start_from=CHAMPION))
    before = len(runs.search_runs(""))
    main.main(data, SPACE, STUDY, RefitParameters(), RegistryParameters(model_name="gestures"))
    assert len(runs.search_runs("")) == before


@pytest.mark.slow
def test_two_models_are_compared_on_the_same_folds(copied: str, gestures: Path) -> None:
    data = loading.load_data(DataParameters(data=str(gestures), start_from=CHAMPION))
    study = replace(STUDY, n_trials=1, study_name="again")
    decision = main.main(data, SPACE, study, RefitParameters(), RegistryParameters(model_name="gestures"))
    assert decision.comparison is not None
    assert decision.comparison.contingency_table.images == 9
    assert (decision.version, decision.alias) == ("2", "challenger")


def test_fold_is_tested_by_others(copied: str, gestures: Path) -> None:
    data = loading.load_data(DataParameters(data=str(gestures), start_from=CHAMPION))
    with open_study(data, SPACE, STUDY) as search:
        tested = list[str]()
        for fold in fit_folds(search):
            trained = {data.dataset.photographs[number].path for number in fold.data.split.training}
            assert trained.isdisjoint(fold.paths)
            assert len(trained) + len(fold.paths) == 9
            tested += fold.paths
    assert len(set(tested)) == len(tested) == 9


def test_features_are_computed_once_with_copies(started: loading.Data) -> None:
    hyperparameters = SPACE.complete(SPACE.baseline())
    frozen = transfer.freeze_features(started, hyperparameters)
    assert isinstance(frozen.fitting, Features)
    assert frozen.fitting.x.shape[:2] == (9, 1 + transfer.COPIES)
    assert transfer.freeze_features(frozen, hyperparameters) is frozen
    np.testing.assert_allclose(np.linalg.norm(frozen.fitting.x, axis=2), 1, atol=1e-5)
    original, copy = np.asarray(frozen.fitting.x[:]).swapaxes(0, 1)[:2]
    assert not np.allclose(original, copy)


def test_head_joins_the_frozen_network(started: loading.Data) -> None:
    """A head on features and the network of images that it becomes give the same logits and features."""
    assert started.start is not None
    hyperparameters = replace(SPACE.complete(SPACE.baseline()), epochs=1)
    frozen = transfer.freeze_features(started, hyperparameters)
    head = training.new_network(frozen, frozen.fitting, hyperparameters)
    fitted = training.Fit(head, {}, hyperparameters)
    joined = fitted.in_float32(started.start)
    outputs = np.asarray(architecture.with_features(joined)(np.asarray(started.fitting.x[:], np.float32)))
    features = np.asarray(frozen.fitting.x[:])[:, 0]
    expected = np.concatenate([np.asarray(head(features)), features], axis=1)
    np.testing.assert_allclose(outputs, expected, atol=1e-4)


def test_started_model_can_be_started_from(started: loading.Data) -> None:
    """Also the mean of two, each of which has the blocks of a mean."""
    assert started.start is not None
    source = transfer.load_network(started.start)
    extractor = transfer.make_extractor(architecture.average_networks([source, keras.models.clone_model(source)]))
    heads = [transfer.new_head(extractor.output_shape[-1], 3, Hyperparameters()) for _ in range(2)]
    joined = [transfer.join(extractor, head) for head in heads]
    images = np.asarray(started.fitting.x[:2], np.float32)
    np.testing.assert_allclose(transfer.make_extractor(joined[0])(images), extractor(images), atol=1e-5)
    assert transfer.make_extractor(architecture.average_networks(joined)).output_shape == (None, 2 * 256)


@pytest.mark.parametrize("frozen_blocks", [0, 2])
def test_frozen_blocks_keep_their_weights(started: loading.Data, frozen_blocks: int) -> None:
    hyperparameters = Hyperparameters(epochs=1, batch_size=8, frozen_blocks=frozen_blocks)
    assert started.start is not None
    network = training.new_network(started, started.fitting, hyperparameters)
    convolutions = [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D)]
    source = transfer.load_network(started.start)
    before = [layer for layer in source.layers if isinstance(layer, keras.layers.Conv2D)]
    training.fit_network(network, started.fitting, None, hyperparameters)
    kept = [np.array_equal(a.kernel, b.kernel) for a, b in zip(convolutions, before, strict=True)]
    assert kept == [number < frozen_blocks for number in range(3)]


def test_same_classes_continue_the_whole_network(champion: str, photographs: Path) -> None:
    data = loading.load_data(DataParameters(data=str(photographs), start_from=CHAMPION))
    network = training.new_network(data, data.training, Hyperparameters())
    assert data.start is not None
    source = transfer.load_network(data.start)
    np.testing.assert_array_equal(network(data.fitting.x), source(data.fitting.x))


@pytest.mark.slow
def test_training_starts_from_a_keras_file(champion: str, gestures: Path, tmp_path: Path) -> None:
    """One training has a split, not folds; the run says from which file it started."""
    shutil.copy(find_start(CHAMPION).network, tmp_path / "seen.keras")
    options = ["--frozen_blocks", "8", "--epochs", "2", "--start_from", "seen.keras"]
    assert cli.main(["train", "--data", str(gestures), *options]) == 0
    run = mlflow.last_active_run()
    assert run.data.tags["start_from"] == "seen.keras"
    assert (run.data.tags["split"], run.data.params["image_size"]) == ("stratified", "16")


def test_unusable_start_is_refused(champion: str, gestures: Path, tmp_path: Path) -> None:
    keras.Sequential([keras.Input((8, 9, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]).save(tmp_path / "a.keras")
    (tmp_path / "b.keras").write_text("no archive")
    for start_from, message in (
        ("models:/nobody@champion", "no such model"),
        ("model", "neither models:/NAME@ALIAS"),
        ("missing.keras", "not a Keras file"),
        ("b.keras", "not a Keras file"),
        ("a.keras", "8x9x3, not square"),
        ("runs:/0123", "0123"),
    ):
        with pytest.raises((ModelError, UsageError), match=message):
            loading.load_data(DataParameters(data=str(gestures), start_from=start_from))
    with pytest.raises(UsageError, match="image_size=32"):
        loading.load_data(DataParameters(data=str(gestures), start_from=CHAMPION, image_size=32))
    with pytest.raises(UsageError, match="frozen_blocks=2"):
        transfer.freeze_features(
            loading.load_data(DataParameters(data=str(gestures))), Hyperparameters(frozen_blocks=2)
        )
    assert cli.main(["train", "--data", str(gestures), "--split", "folds"]) == 2


def test_groups_stay_in_one_fold(tmp_path: Path) -> None:
    folder = few(tmp_path / "people", each=6)
    paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.JPG"))]
    table = pd.DataFrame({"path": paths, "group": [f"person {int(path[-5]) // 2}" for path in paths]})
    table.to_csv(folder / "groups.csv", index=False)
    data = loading.load_data(DataParameters(data=str(folder), split="folds", image_size=16))
    assert len(data.split.folds) == 3
    for fold in data.split.folds:
        names = {data.dataset.photographs[number].path for number in fold}
        assert table[table["path"].isin(names)]["group"].nunique() == 1
    table.assign(group="one").to_csv(folder / "groups.csv", index=False)
    with pytest.raises(DataError, match="one group"):
        loading.load_data(DataParameters(data=str(folder), split="folds", image_size=16))


def test_main_names_a_champion_to_start_from(champion: str, gestures: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = loading.load_data(DataParameters(data=str(gestures), image_size=16))
    hint = main._suggest_start(data, "gestures")
    assert f"-P data={gestures} -P model_name=gestures -P start_from={CHAMPION}" in hint
    assert not main._suggest_start(
        loading.load_data(DataParameters(**asdict(data.parameters) | {"start_from": CHAMPION, "image_size": 0})),
        "gestures",
    )
