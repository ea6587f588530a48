"""Keras' exponential decay, with its three values in variables: a traced training step follows when they are set."""

from collections.abc import Mapping

import keras

from signdigits.hyperparameters import Hyperparameters


class AdjustableDecay(keras.optimizers.schedules.ExponentialDecay):
    """`initial_learning_rate * decay_rate ** (step / decay_steps)`."""

    def __init__(self, hyperparameters: Hyperparameters) -> None:
        super().__init__(
            keras.Variable(0.0, trainable=False, dtype="float32"),
            keras.Variable(1.0, trainable=False, dtype="float32"),
            keras.Variable(1.0, trainable=False, dtype="float32"),
        )
        self.set(hyperparameters)

    def set(self, hyperparameters: Hyperparameters) -> None:
        self.initial_learning_rate.assign(hyperparameters.initial_learning_rate)
        self.decay_steps.assign(hyperparameters.decay_steps)
        self.decay_rate.assign(hyperparameters.decay_rate)

    def get_config(self) -> Mapping[str, object]:
        values = ("initial_learning_rate", "decay_steps", "decay_rate")
        return {**{name: float(getattr(self, name).numpy()) for name in values}, "name": self.name}
