"""The network, its optimizer, its learning rate schedule and its loss."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from signdigits.config import Hyperparameters
from signdigits.errors import UsageError

if TYPE_CHECKING:
    import keras

FEATURES = "features"  # name of the layer
BATCH_MOMENTUM = 0.9  # Keras' 0.99 needs 300 steps to forget where it began: more than small data sets give


def build_network(
    image_shape: tuple[int, int, int],
    n_classes: int,
    hyperparameters: Hyperparameters = Hyperparameters(),  # noqa: B008, it is frozen
    precision: str = "float32",
    *,
    for_training: bool = False,
) -> "keras.Model":
    """Build the network: images of shape (n, *image_shape) in, float32 logits of shape (n, n_classes) out.

    Three channels are RGB from 0 to 255 and are rescaled to 0 to 1; one channel is grayscale and
    rescaled already. With 100x100 RGB images, ten classes and the default hyperparameters it is the notebook's, with 1,204,650
    parameters. `precision` is the Keras dtype policy that the layers compute in. With `for_training`, TensorFlow's fused kernel
    normalizes the blocks; without it all layers are Keras' own, to be saved. Raises UsageError if the images are too small for
    the blocks.
    """
    from keras import Input, Model, layers

    from signdigits.model.layers import FusedBatchNormalization

    check_blocks(hyperparameters, image_shape[0])
    inputs = Input(image_shape)
    x = layers.Rescaling(1 / 255 if image_shape[-1] == 3 else 1.0)(inputs)
    if hyperparameters.standardization == "image":
        # Each channel of each image gets mean 0 and variance 1: independent of brightness, contrast and white balance.
        x = layers.LayerNormalization(axis=(1, 2), epsilon=1e-5, center=False, scale=False)(x)
    normalized = hyperparameters.normalization == "batch"
    block_normalization, dtype = (
        (FusedBatchNormalization, precision) if for_training else (layers.BatchNormalization, "float32")
    )
    # ReLU before or after max pooling is the same function with the same gradients. The notebook has it before; in bfloat16
    # (mixed precision) it takes half the time after.
    first = "relu" if precision == "float32" and not normalized else None
    for block in range(hyperparameters.conv_blocks):
        strides = hyperparameters.stem_stride if block == 0 else 1
        x = layers.Conv2D(
            hyperparameters.filters * 2**block, 2 + strides if strides > 1 else 3, strides, padding="same",
            activation=first, use_bias=not normalized, dtype=precision,
        )(x)  # fmt: skip
        x = layers.MaxPooling2D(dtype=precision)(x)
        if normalized:
            x = block_normalization(momentum=BATCH_MOMENTUM, dtype=dtype)(x)
        if first is None:
            x = layers.ReLU(dtype=precision)(x)
    if hyperparameters.pooling == "average_max":
        pools = [layers.GlobalAveragePooling2D(dtype=precision)(x), layers.GlobalMaxPooling2D(dtype=precision)(x)]
        x = layers.Concatenate(dtype=precision)(pools)
    else:
        x = layers.Flatten(dtype=precision)(x)
    if hyperparameters.dropout:
        x = layers.Dropout(hyperparameters.dropout, dtype=precision)(x)
    x = layers.Dense(128, activation=None if normalized else "relu", use_bias=not normalized, dtype=precision)(x)
    if normalized:
        x = layers.BatchNormalization(momentum=BATCH_MOMENTUM, dtype="float32")(x)
        x = layers.ReLU(dtype=precision)(x)
    return Model(inputs, layers.Dense(n_classes)(x))


def with_features(network: "keras.Model") -> "keras.Model":
    """Return a model that shares the network's layers; output: logits and features, of shape (n, n_classes + features).

    The features are those in which the outlier detector measures distances: the last hidden layer, and the mean of the last
    convolution block over its positions, each at unit length. Those of `average_networks` are the mean of its networks'.
    """
    from keras import Model, layers

    if own := [layer for layer in network.layers if layer.name == FEATURES]:  # of transfer.py
        return Model(network.inputs[0], layers.Concatenate(name="outputs")([network.outputs[0], own[0].output]))
    if averaged := [layer for layer in network.layers if isinstance(layer, Model)]:
        return average_networks([with_features(each) for each in averaged])
    hidden, logits = network.layers[-2].output, network.layers[-1].output
    blocks = next(layer.output for layer in reversed(network.layers) if len(layer.output.shape) == 4)
    # A network that was loaded has names that Keras would give again.
    parts = {"hidden": hidden, "block": layers.GlobalAveragePooling2D(name="block_mean")(blocks)}
    features = [layers.UnitNormalization(dtype="float32", name=f"unit_{name}")(part) for name, part in parts.items()]
    return Model(network.inputs[0], layers.Concatenate(dtype="float32", name=FEATURES)([logits, *features]))


def average_networks(networks: Sequence["keras.Model"]) -> "keras.Model":
    """Return a model that shares the layers of the networks; output: the mean of their outputs.

    The mean of logits is that of the logarithms of probabilities. It is as accurate as the mean of the probabilities
    themselves, and needs less correction by a temperature (docs/decisions.md).
    """
    from keras import Input, Model, layers

    inputs = Input(networks[0].input_shape[1:])
    named = [
        Model(each.inputs[0], each.outputs[0], name=f"network_{number}")
        for number, each in enumerate(networks, start=1)
    ]
    return Model(inputs, layers.Average(name="mean")([each(inputs) for each in named]))


def with_probabilities(network: "keras.Model", temperature: float) -> "keras.Model":
    """Return a model that shares the network's layers; output: probabilities at `temperature`, (n, n_classes)."""
    from keras import Model, layers

    scaled = layers.Rescaling(1 / temperature, name="temperature")(network.outputs[0])
    return Model(network.inputs[0], layers.Softmax(name="probabilities")(scaled), name="sign_digits")


def check_blocks(hyperparameters: Hyperparameters, image_size: int) -> None:
    """Raise UsageError if the poolings and the stride of the blocks cannot halve `image_size` pixels so often."""
    conv_blocks, stem_stride = hyperparameters.conv_blocks, hyperparameters.stem_stride
    if image_size < stem_stride * 2**conv_blocks:
        stride = f", stem_stride={stem_stride}" if stem_stride > 1 else ""
        raise UsageError(
            f"conv_blocks={conv_blocks}{stride}: each block halves the image, and {image_size} pixels are too few; "
            "choose fewer blocks, or a larger image_size"
        )


def compile_network(
    network: "keras.Model", hyperparameters: Hyperparameters, steps: int, steps_per_execution: int = 1
) -> None:
    """Compile the network with Adam, a decaying learning rate, cross-entropy from logits, and accuracy.

    `steps` is the number of steps of the whole training, over which the learning rate decays if `decay_steps` is 0. With a
    weight decay, Adam is AdamW.
    """
    from keras import losses, metrics

    from signdigits.model.layers import SingleReplicaAdam

    averaged = {"use_ema": True, "ema_momentum": hyperparameters.ema_momentum} if hyperparameters.ema_momentum else {}
    optimizer = SingleReplicaAdam(
        make_schedule(hyperparameters, steps), weight_decay=hyperparameters.weight_decay or None, **averaged
    )
    # TensorFlow traces a training step twice if its first call creates variables, those of an optimizer that is not built or of
    # a metric that is only named: half of the time of a short training.
    optimizer.build(network.trainable_variables)
    # On a GPU, Keras would compile each new network with XLA: 47 s on an H100, to save 0.06 s of an epoch of 0.48 s.
    network.compile(
        optimizer=optimizer,
        loss=losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=False,
        steps_per_execution=steps_per_execution,
    )


def make_schedule(hyperparameters: Hyperparameters, steps: int) -> "keras.optimizers.schedules.LearningRateSchedule":
    """Return the learning rate by step: ExponentialDecay, or a warm-up and CosineDecay.

    With decay_steps=0 either ends the `steps` of the training at decay_rate times the initial learning rate.
    """
    from keras.optimizers import schedules

    rate, decay_rate = hyperparameters.initial_learning_rate, hyperparameters.decay_rate
    decay_steps = hyperparameters.decay_steps or steps
    if hyperparameters.schedule == "exponential":
        return schedules.ExponentialDecay(rate, decay_steps, decay_rate)
    warmup = decay_steps // 8
    return schedules.CosineDecay(rate / 10, decay_steps - warmup, decay_rate, warmup_target=rate, warmup_steps=warmup)


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
