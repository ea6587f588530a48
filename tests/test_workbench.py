import dataclasses

import keras
import mlflow
import numpy as np
import pytest

from signdigits import train
from signdigits.hyperparameters import Hyperparameters
from signdigits.network.adjustable import AdjustableDropout
from signdigits.network.workbench import Workbench
from signdigits.photographs import data

FIRST = Hyperparameters(epochs=2, batch_size=16, initial_learning_rate=0.003, dropout=0.3)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("augmentation", [0.0, 1.0])
def test_a_used_network_trains_as_a_new_one(store: str, loaded: data.Data, precision: str, augmentation: float) -> None:
    second = dataclasses.replace(
        FIRST, initial_learning_rate=0.001, decay_rate=0.5, decay_steps=3, batch_size=8, epochs=3, seed=7, dropout=0.45,
        precision=precision, augmentation=augmentation,
    )  # fmt: skip
    bench = Workbench()
    with mlflow.start_run():
        train.fit(loaded.training, loaded.validation, 3, dataclasses.replace(second, seed=1), workbench=bench)
    with mlflow.start_run():
        used = train.fit(loaded.training, loaded.validation, 3, second, workbench=bench)
    with mlflow.start_run():
        new = train.fit(loaded.training, loaded.validation, 3, second)
    assert len(bench.networks) == 1
    assert used.trained is not new.trained
    assert used.history == new.history
    for one, two in zip(used.trained.get_weights(), new.trained.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert used.temperature == new.temperature


def test_other_architectures_are_other_networks_and_other_rates_are_not(store: str, loaded: data.Data) -> None:
    bench = Workbench()
    for changed in ({}, {"dropout": 0.4}, {"conv_blocks": 2}, {"decay_rate": 0.5, "epochs": 1}, {"dropout": 0.0}):
        with mlflow.start_run():
            train.fit(loaded.training, None, 3, dataclasses.replace(FIRST, **changed), workbench=bench)
    assert len(bench.networks) == 3, "two and three blocks with dropout, three without"


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_an_adjustable_dropout_is_keras_own_bit_for_bit(precision: str) -> None:
    x = np.random.default_rng(0).normal(size=(64, 33)).astype(np.float32)
    dropped = []
    for layer in (AdjustableDropout, keras.layers.Dropout):
        keras.utils.set_random_seed(5)
        dropout = layer(0.37, dtype=precision)
        dropped.append([np.asarray(dropout(x, training=True), np.float32) for _ in range(3)])
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert 0.3 < (dropped[0][0] == 0).mean() < 0.44
