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

FORWARDS = [2 * 9 * channels * filters * size**2 for size, channels, filters in LAYERS]
CONVOLUTIONS = 3 * sum(FORWARDS) - FORWARDS[0]  # operations for one image


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    images = loaded.fitting  # what the notebook trains on: 1,650
    auto = architecture.resolve_precision("auto")
    ways = {
        "notebook": notebooks_epoch(loaded.dataset.folder),
        "float32": epoch(images, "float32"),
        "auto": epoch(images, auto),
        "augmented": epoch(images, auto, Augmentation(geometric=1.4, horizontal_flip=0.5, photometric=1.0)),
        "float32 limit": product("float32"),
        "auto limit": product(auto.removeprefix("mixed_")),
        "float32 kernels": convolutions("float32"),
        "auto kernels": convolutions(auto.removeprefix("mixed_")),
    }
    seconds = in_turns(ways, ROUNDS)
    work = operations(len(images))
    rate = {name: 2 * MATRIX**3 / seconds[f"{name} limit"] for name in ("float32", "auto")}
    # What would be reached if nothing but the convolutions took any time.
    kernels = {name: CONVOLUTIONS * BATCH / seconds[f"{name} kernels"] / rate[name] for name in rate}
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
                0.70, True, f"{work / 1e9:.0f} GFLOP in {shown[name]}; product: {rate[name] / 1e9:.0f} GFLOP/s; "
                f"TensorFlow's convolutions alone: {kernels[name]:.2f}",
            )
            for name in rate
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


def epoch(
    images: loading.Images,
    precision: str,
    augmentation: Augmentation = Augmentation(),  # noqa: B008, frozen
) -> Callable[[], object]:
    """This project's epoch, one a call."""
    network = architecture.build_network((100, 100, 3), 10, precision=precision)
    architecture.compile_network(network, Hyperparameters())
    batches = input_pipeline.training_batches(images, BATCH, augmentation, seed=0)
    steps = input_pipeline.steps_per_epoch(images, BATCH)
    return lambda: network.fit(batches, steps_per_epoch=steps, epochs=1, verbose=0)


def product(dtype: str) -> Callable[[], object]:
    """A matrix product as large as the machine does best."""
    one = tf.cast(tf.random.uniform([MATRIX, MATRIX]), dtype)
    return lambda: tf.linalg.matmul(one, one).numpy()


def convolutions(dtype: str) -> Callable[[], object]:
    """The convolutions of one training step, forwards and backwards, with nothing around them."""
    work = [passes(*layer, dtype) for layer in LAYERS]
    return lambda: [tensor.numpy() for one in work for tensor in one()]


def passes(size: int, channels: int, filters: int, dtype: str) -> Callable[[], list[tf.Tensor]]:
    """A convolution and its gradients for a batch; the first layer needs none for what comes in."""
    image, weights, result = (
        tf.cast(tf.random.normal(shape), dtype)
        for shape in ([BATCH, size, size, channels], [3, 3, channels, filters], [BATCH, size, size, filters])
    )
    given: dict[str, object] = {"strides": [1, 1, 1, 1], "padding": "SAME"}

    @tf.function
    def run() -> list[tf.Tensor]:
        forwards = tf.nn.conv2d(image, weights, **given)
        backwards = [
            tf.raw_ops.Conv2DBackpropFilter(input=image, filter_sizes=weights.shape, out_backprop=result, **given)
        ]
        if channels != LAYERS[0][1]:
            backwards.append(
                tf.raw_ops.Conv2DBackpropInput(input_sizes=image.shape, filter=weights, out_backprop=result, **given)
            )
        return [tensor[0, 0, 0, 0] for tensor in (forwards, *backwards)]

    return run


def operations(images: int) -> float:
    """Floating-point operations of one epoch: multiplications and additions of convolutions and dense layers.

    Forwards once, backwards once for the weights and, but for the first layer, once for what comes in.
    """
    dense = 2 * 9216 * 128 + 2 * 128 * 10
    return float(images * (CONVOLUTIONS + 3 * dense))
