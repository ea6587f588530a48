"""The notebook's network, its optimizer and its loss."""

from typing import TYPE_CHECKING

from signdigits.hyperparameters import Hyperparameters

if TYPE_CHECKING:
    import keras


def build(image_shape: tuple[int, int, int], n_classes: int) -> "keras.Sequential":
    """The notebook's network: images of shape (n, *image_shape) in, logits of shape (n, n_classes) out.

    Three channels are RGB from 0 to 255 and are rescaled to 0 to 1; one channel is the grayscale reader's, which
    lies there already. With 100x100 RGB images and ten classes it has 1,204,650 parameters.
    """
    from keras import Input, Sequential, layers

    return Sequential(
        [
            Input(image_shape),
            layers.Rescaling(1 / 255 if image_shape[-1] == 3 else 1.0),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(n_classes),
        ]
    )


def compile_network(network: "keras.Sequential", hyperparameters: Hyperparameters) -> None:
    """Give the network Adam with an exponentially decaying rate, cross-entropy from logits, and accuracy."""
    from keras import losses, optimizers

    schedule = optimizers.schedules.ExponentialDecay(
        hyperparameters.initial_learning_rate,
        decay_steps=hyperparameters.decay_steps,
        decay_rate=hyperparameters.decay_rate,
    )
    network.compile(
        optimizer=optimizers.Adam(schedule),
        loss=losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
