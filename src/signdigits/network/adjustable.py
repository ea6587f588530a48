"""What differs from trial to trial, in variables: a traced training step follows when they are set."""

from collections.abc import Mapping
from typing import Any

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


class AdjustableDropout(keras.layers.Layer):
    """Keras' dropout, bit for bit: the same draws, the same rounding of the rate and of what it scales by.

    For training only; `Fit.network` holds Keras' own.
    """

    def __init__(self, rate: float, **options: Any) -> None:
        super().__init__(**options)
        self.seed_generator = keras.random.SeedGenerator()
        self.rate = keras.Variable(rate, trainable=False, dtype=self.compute_dtype)
        self.scale = keras.Variable(1 / (1 - rate), trainable=False, dtype=self.compute_dtype)

    def call(self, inputs: Any, training: bool = False) -> Any:
        if not training:
            return inputs
        drawn = keras.random.uniform(keras.ops.shape(inputs), dtype=self.compute_dtype, seed=self.seed_generator)
        return keras.ops.where(drawn >= self.rate, inputs * self.scale, 0)
