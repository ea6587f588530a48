"""The notebook's network, its optimizer and its loss."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from signdigits.config import Hyperparameters
from signdigits.errors import UsageError

if TYPE_CHECKING:
    import keras

BATCH_MOMENTUM = 0.9  # Keras' 0.99 needs 300 steps to forget where it began: more than small data sets give


def build_network(
    image_shape: tuple[int, int, int],
    n_classes: int,
    hyperparameters: Hyperparameters = Hyperparameters(),  # noqa: B008, it is frozen
    precision: str = "float32",
    *,
    for_training: bool = False,
) -> "keras.Sequential":
    """Build the notebook's network: images of shape (n, *image_shape) in, float32 logits of shape (n, n_classes) out.

    Three channels are RGB from 0 to 255 and are rescaled to 0 to 1; one channel is grayscale and
    rescaled already. With 100x100 RGB images, ten classes and the default hyperparameters it has 1,204,650 parameters.
    `precision` is the Keras dtype policy that the layers compute in. With `for_training`, TensorFlow's fused kernel normalizes
    the blocks; without it all layers are Keras' own, to be saved. Raises UsageError if the images are too small for the
    blocks.
    """
    from keras import Input, Sequential, layers

    from signdigits.model.layers import FusedBatchNormalization

    conv_blocks, dropout = hyperparameters.conv_blocks, hyperparameters.dropout
    check_blocks(conv_blocks, image_shape[0])
    network = Sequential([Input(image_shape), layers.Rescaling(1 / 255 if image_shape[-1] == 3 else 1.0)])
    if hyperparameters.standardization == "image":
        # Each channel of each image gets mean 0 and variance 1: independent of brightness, contrast and white balance.
        network.add(layers.LayerNormalization(axis=(1, 2), epsilon=1e-5, center=False, scale=False))
    normalized = hyperparameters.normalization == "batch"
    block_normalization, dtype = (
        (FusedBatchNormalization, precision) if for_training else (layers.BatchNormalization, "float32")
    )
    # ReLU before or after max pooling is the same function with the same gradients. The notebook has it before; in bfloat16
    # (mixed precision) it takes half the time after.
    first = "relu" if precision == "float32" and not normalized else None
    for block in range(conv_blocks):
        filters = hyperparameters.filters * 2**block
        network.add(
            layers.Conv2D(filters, 3, padding="same", activation=first, use_bias=not normalized, dtype=precision)
        )
        network.add(layers.MaxPooling2D(dtype=precision))
        if normalized:
            network.add(block_normalization(momentum=BATCH_MOMENTUM, dtype=dtype))
        if first is None:
            network.add(layers.ReLU(dtype=precision))
    network.add(layers.Flatten(dtype=precision))
    if dropout:
        network.add(layers.Dropout(dropout, dtype=precision))
    network.add(layers.Dense(128, activation=None if normalized else "relu", use_bias=not normalized, dtype=precision))
    if normalized:
        network.add(layers.BatchNormalization(momentum=BATCH_MOMENTUM, dtype="float32"))
        network.add(layers.ReLU(dtype=precision))
    network.add(layers.Dense(n_classes))
    return network


def with_features(network: "keras.Sequential") -> "keras.Model":
    """Return a model that shares the network's layers; output: logits and features, of shape (n, n_classes + features).

    The features are those in which the outlier detector measures distances: the last hidden layer, and the mean of the last
    convolution block over its positions, each at unit length.
    """
    from keras import Model, layers

    hidden, logits = network.layers[-2].output, network.layers[-1].output
    blocks = next(layer.input for layer in network.layers if isinstance(layer, layers.Flatten))
    parts = [
        layers.UnitNormalization(dtype="float32")(part) for part in (hidden, layers.GlobalAveragePooling2D()(blocks))
    ]
    return Model(network.inputs[0], layers.Concatenate(dtype="float32")([logits, *parts]))


def with_probabilities(network: "keras.Sequential", temperature: float) -> "keras.Model":
    """Return a model that shares the network's layers; output: probabilities at `temperature`, (n, n_classes)."""
    from keras import Model, layers

    scaled = layers.Rescaling(1 / temperature, name="temperature")(network.outputs[0])
    return Model(network.inputs[0], layers.Softmax(name="probabilities")(scaled), name="sign_digits")


def check_blocks(conv_blocks: int, image_size: int) -> None:
    """Raise UsageError if `conv_blocks` poolings cannot halve `image_size` pixels."""
    if image_size < 2**conv_blocks:
        raise UsageError(
            f"conv_blocks={conv_blocks}: each block halves the image, and {image_size} pixels are too few; "
            "choose fewer blocks, or a larger image_size"
        )


def compile_network(network: "keras.Sequential", hyperparameters: Hyperparameters) -> None:
    """Compile the network with Adam, an exponentially decaying learning rate, cross-entropy from logits, and accuracy."""
    from keras import losses, metrics, optimizers

    from signdigits.model.layers import SingleReplicaAdam

    schedule = optimizers.schedules.ExponentialDecay(
        hyperparameters.initial_learning_rate, hyperparameters.decay_steps, hyperparameters.decay_rate
    )
    averaged = {"use_ema": True, "ema_momentum": hyperparameters.ema_momentum} if hyperparameters.ema_momentum else {}
    optimizer = SingleReplicaAdam(schedule, **averaged)
    # TensorFlow traces a training step twice if its first call creates variables, those of an optimizer that is not built or of
    # a metric that is only named: half of the time of a short training.
    optimizer.build(network.trainable_variables)
    # On a GPU, Keras would compile each new network with XLA: 47 s on an H100, to save 0.06 s of an epoch of 0.48 s.
    network.compile(
        optimizer=optimizer,
        loss=losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=False,
    )


def resolve_precision(precision: str) -> str:
    """Return the precision of this machine for `auto`: mixed_bfloat16 if the hardware has bfloat16, else float32.

    Emulated bfloat16 is slower than float32.
    """
    if precision != "auto":
        return precision
    return "mixed_bfloat16" if has_bfloat16() else "float32"


def has_bfloat16() -> bool:
    """Tell whether the GPU, or without one the CPU, multiplies bfloat16 matrices in hardware."""
    import tensorflow as tf

    if gpus := tf.config.list_physical_devices("GPU"):
        found = [tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0)) for gpu in gpus]
        return all(capability >= (8, 0) for capability in found)  # NVIDIA Ampere and later
    if platform.system() != "Linux":
        return False
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16"})
