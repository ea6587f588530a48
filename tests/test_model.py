import keras
import numpy as np

from signdigits import model
from signdigits.hyperparameters import Hyperparameters


def test_the_network_is_the_notebooks_with_1204650_parameters() -> None:
    network = model.build((100, 100, 3), 10)
    assert network.count_params() == 1_204_650
    assert [type(layer).__name__ for layer in network.layers] == [
        "Rescaling", "Conv2D", "MaxPooling2D", "Conv2D", "MaxPooling2D", "Conv2D", "MaxPooling2D",
        "Flatten", "Dense", "Dense",
    ]  # fmt: skip
    assert [layer.count_params() for layer in network.layers if layer.count_params()] == [
        448, 4640, 18496, 1179776, 1290,
    ]  # fmt: skip
    assert network.layers[-1].activation is keras.activations.linear, "logits"


def test_pixels_are_rescaled_once_whatever_the_reader() -> None:
    rgb, grayscale = model.build((8, 8, 3), 2), model.build((8, 8, 1), 2)
    assert np.allclose(rgb.layers[0](np.full((1, 8, 8, 3), 255.0)), 1)
    assert np.allclose(grayscale.layers[0](np.full((1, 8, 8, 1), 1.0)), 1)


def test_the_rate_falls_by_decay_rate_every_decay_steps() -> None:
    network = model.build((8, 8, 3), 2)
    model.compile_network(network, Hyperparameters(initial_learning_rate=0.01, decay_rate=0.5, decay_steps=10))
    schedule = network.optimizer._learning_rate
    assert np.allclose([schedule(0), schedule(10), schedule(20)], [0.01, 0.005, 0.0025])


def test_a_decay_rate_of_one_keeps_the_rate() -> None:
    network = model.build((8, 8, 3), 2)
    model.compile_network(network, Hyperparameters(initial_learning_rate=0.001, decay_rate=1.0))
    assert np.allclose(network.optimizer._learning_rate(10_000), 0.001)
