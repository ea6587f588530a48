"""A training step, against the notebook's pipeline and against the arithmetic limit of the machine."""

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from benchmarks.measure import Row, in_turns
from signdigits import batches, data, model
from signdigits.hyperparameters import DataParameters, Hyperparameters

ROUNDS = 5
BATCH = 128
MATRIX = 4096


def rows(photographs: str) -> list[Row]:
    loaded = data.load(DataParameters(data=photographs))
    images = loaded.fitting  # what the notebook trains on: 1,650
    auto = model.resolve_precision("auto")
    ways = {
        "notebook": notebooks_epoch(loaded.dataset.folder),
        "float32": epoch(images, "float32"),
        "auto": epoch(images, auto),
        "augmented": epoch(images, auto, augmentation=1.0),
        "float32 limit": product("float32"),
        "auto limit": product(auto.removeprefix("mixed_")),
    }
    seconds = in_turns(ways, ROUNDS)
    work = operations(len(images))
    rate = {name: 2 * MATRIX**3 / seconds[f"{name} limit"] for name in ("float32", "auto")}
    shown = {name: f"{value:.2f} s" for name, value in seconds.items()}
    return [
        Row(
            "training step, float32", "the notebook's pipeline", seconds["notebook"] / seconds["float32"], 1.15, True,
            f"an epoch of 1,650: {shown['float32']} against {shown['notebook']}",
        ),
        Row(
            f"training step, precision=auto ({auto})", "the notebook's pipeline",
            seconds["notebook"] / seconds["auto"], 2.0, True,
            f"an epoch of 1,650: {shown['auto']} against {shown['notebook']}",
        ),
        *(
            Row(
                f"fraction of the arithmetic limit, {name}", "a large matrix product", work / seconds[name] / rate[name],
                0.70, True, f"{work / 1e9:.0f} GFLOP in {shown[name]}; product: {rate[name] / 1e9:.0f} GFLOP/s",
            )
            for name in ("float32", "auto")
        ),
        Row(
            "augmented epoch", "the same without augmentation", seconds["augmented"] / seconds["auto"], 1.2, False,
            f"{shown['augmented']} against {shown['auto']}",
        ),
    ]  # fmt: skip


def notebooks_epoch(folder: Path) -> Callable[[], object]:
    """The notebook's loader, network and optimizer as it wrote them, one epoch a call."""
    batches = keras.utils.image_dataset_from_directory(
        folder,
        validation_split=0.2,
        subset="training",
        seed=1337,
        image_size=(100, 100),
        batch_size=BATCH,
        verbose=False,
    )
    network = keras.Sequential(
        [
            keras.layers.Rescaling(1.0 / 255),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    return lambda: network.fit(batches, epochs=1, verbose=0)


def epoch(images: data.Images, precision: str, augmentation: float = 0.0) -> Callable[[], object]:
    """This project's epoch, one a call."""
    network = model.build((100, 100, 3), 10, precision=precision)
    model.compile_network(network, Hyperparameters())
    fed = batches.training(images, BATCH, augmentation, seed=0)
    return lambda: network.fit(**fed, epochs=1, verbose=0)


def product(dtype: str) -> Callable[[], object]:
    """A matrix product as large as the machine does best."""
    one = tf.cast(tf.random.uniform([MATRIX, MATRIX]), dtype)
    return lambda: tf.linalg.matmul(one, one).numpy()


def operations(images: int) -> float:
    """Floating-point operations of one epoch: multiplications and additions of convolutions and dense layers.

    Forwards once, backwards once for the weights and, but for the first layer, once for what comes in.
    """
    forward = np.array(
        [2 * 9 * 3 * 16 * 100**2, 2 * 9 * 16 * 32 * 50**2, 2 * 9 * 32 * 64 * 25**2, 2 * 9216 * 128, 2 * 128 * 10]
    )
    return float(images * (3 * forward.sum() - forward[0]))
