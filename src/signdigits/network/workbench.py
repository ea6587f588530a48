"""Networks that are traced once and trained many times, each time as if they were new.

Building, compiling and tracing cost a trial more than a second, and TensorFlow keeps the graphs of all that it traced.
What differs from trial to trial, the learning rate, its decay and the dropout, is kept in variables, so that the traced step
stays as it is; weights, optimizer and random numbers start again from where those of a new network would.
"""

import keras

from signdigits.hyperparameters import Hyperparameters
from signdigits.network import model


class Workbench:
    """Lends out networks, one for each architecture. One that is lent again was trained in between: keep its weights."""

    def __init__(self) -> None:
        self.networks: dict[tuple[object, ...], keras.Sequential] = {}

    def network(
        self, image_shape: tuple[int, int, int], n_classes: int, hyperparameters: Hyperparameters, precision: str
    ) -> keras.Sequential:
        """A compiled network in the state that the present random seed gives to a new one."""
        blocks, dropout = hyperparameters.conv_blocks, hyperparameters.dropout
        new = model.build(
            image_shape, n_classes, conv_blocks=blocks, dropout=dropout, precision=precision, adjustable=True
        )
        key = (image_shape, n_classes, blocks, dropout > 0, precision)
        if key in self.networks:
            renew(self.networks[key], new, hyperparameters)
        else:
            model.compile_network(new, hyperparameters)
            self.networks[key] = new
        return self.networks[key]


def renew(used: keras.Sequential, new: keras.Sequential, hyperparameters: Hyperparameters) -> None:
    """Bring a compiled network back to the state of a new one, with other hyperparameters."""
    for mine, theirs in zip(used.layers, new.layers, strict=True):
        for variable, value in zip(mine.variables, theirs.variables, strict=True):
            variable.assign(value)
    for variable in used.optimizer.variables:  # steps and moments; Adam's all start from zero
        variable.assign(keras.ops.zeros_like(variable))
    used.optimizer._learning_rate.set(hyperparameters)
