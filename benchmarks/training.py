"""The time of a training step, against the notebook's pipeline and the arithmetic limit of the machine."""

from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

from benchmarks.measure import Row, in_turns
from signdigits.config import DataParameters, Hyperparameters
from signdigits.data import loading
from signdigits.model import architecture, input_pipeline
from signdigits.model.augmentation import Augmentation

ROUNDS = 9
BATCH = 128
MATRIX = 4096
LAYERS = ((100, 3, 16), (50, 16, 32), (25, 32, 64))  # height and width, channels in, channels out


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    images = loaded.fitting  # the notebook's training images: 1,650
    auto = architecture.resolve_precision("auto")
    none, strong = Augmentation(), Augmentation(geometric=1.4, horizontal_flip=0.5, photometric=1.0)
    ways = {
        "notebook": notebook_epoch(loaded.dataset.folder),
        "float32": project_epoch(images, "float32", none),
        "auto": project_epoch(images, auto, none),
        "augmented": project_epoch(images, auto, strong),
        "float32 product": matrix_product("float32"),
        "auto product": matrix_product(auto.removeprefix("mixed_")),
    }
    seconds = in_turns(ways, ROUNDS)
    text = {name: f"{value:.2f} s" for name, value in seconds.items()}
    work = count_operations(len(images))
    table = []
    for name, target in (("float32", 1.15), ("auto", 2.0)):
        what = "training step, float32" if name == "float32" else f"training step, precision=auto ({auto})"
        detail = f"an epoch of {len(images):,}: {text[name]} against {text['notebook']}"
        faster = seconds["notebook"] / seconds[name]
        table.append(Row(what, "the notebook's pipeline", faster, target, True, detail))
    for name in ("float32", "auto"):
        rate = 2 * MATRIX**3 / seconds[f"{name} product"]
        detail = f"{work / 1e9:.0f} GFLOP in {text[name]}; product: {rate / 1e9:.0f} GFLOP/s"
        what = f"fraction of the arithmetic limit, {name}"
        table.append(Row(what, "a large matrix product", work / seconds[name] / rate, 0.7, True, detail))
    slower = seconds["augmented"] / seconds["auto"]
    detail = f"{text['augmented']} against {text['auto']}"
    return [*table, Row("augmented epoch", "the same without augmentation", slower, 1.2, False, detail)]


def notebook_epoch(folder: Path) -> Callable[[], object]:
    """Return a function that trains the notebook's loader, network and optimizer, as written there, for an epoch."""
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


def project_epoch(images: loading.Images, precision: str, augmentation: Augmentation) -> Callable[[], object]:
    """Return a function that trains this project's pipeline for an epoch."""
    network = architecture.build_network((100, 100, 3), 10, precision=precision)
    architecture.compile_network(network, Hyperparameters(), steps=1)
    batches = input_pipeline.training_batches(images, BATCH, augmentation, seed=0)
    steps = input_pipeline.steps_per_epoch(images, BATCH)
    return lambda: network.fit(batches, steps_per_epoch=steps, epochs=1, verbose=0)


def matrix_product(dtype: str) -> Callable[[], object]:
    """Return a function that multiplies two matrices of the size that the machine multiplies fastest."""
    matrix = tf.cast(tf.random.uniform([MATRIX, MATRIX]), dtype)
    return lambda: tf.linalg.matmul(matrix, matrix).numpy()


def count_operations(images: int) -> float:
    """Floating-point operations of one epoch: multiplications and additions of convolutions and dense layers.

    Forwards once, backwards once for the weights and, except in the first layer, once for the input.
    """
    forwards = [2 * 9 * channels * filters * size**2 for size, channels, filters in LAYERS]
    dense = 2 * 9216 * 128 + 2 * 128 * 10
    return float(images * (3 * (sum(forwards) + dense) - forwards[0]))
