from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from signdigits.config import Hyperparameters
from signdigits.errors import UsageError
from signdigits.model import architecture
from signdigits.model.layers import FusedBatchNormalization, SingleReplicaAdam

EXTENDED = Hyperparameters(
    conv_blocks=4, filters=32, stem_stride=2, pooling="average_max", normalization="batch", dropout=0.2
)


def test_notebook_network_has_1204650_parameters() -> None:
    network = architecture.build_network((100, 100, 3), 10)
    assert network.count_params() == 1_204_650
    assert [type(layer).__name__ for layer in network.layers] == [
        "InputLayer", "Rescaling", "Conv2D", "MaxPooling2D", "Conv2D", "MaxPooling2D", "Conv2D", "MaxPooling2D",
        "Flatten", "Dense", "Dense",
    ]  # fmt: skip
    assert [layer.count_params() for layer in network.layers if layer.count_params()] == [
        448, 4640, 18496, 1179776, 1290,
    ]  # fmt: skip
    assert network.layers[-1].activation is keras.activations.linear, "logits"


def test_pixels_are_rescaled_once() -> None:
    rgb, grayscale = architecture.build_network((8, 8, 3), 2), architecture.build_network((8, 8, 1), 2)
    assert np.allclose(rgb.layers[1](np.full((1, 8, 8, 3), 255.0)), 1)
    assert np.allclose(grayscale.layers[1](np.full((1, 8, 8, 1), 1.0)), 1)


def rates(network: keras.Model, *steps: int) -> list[float]:
    """The optimizer's learning rate at some steps."""
    found = []
    for step in steps:
        network.optimizer.iterations.assign(step)
        found.append(float(network.optimizer.learning_rate))
    return found


def test_learning_rate_decays_exponentially() -> None:
    network = architecture.build_network((8, 8, 3), 2)
    chosen = Hyperparameters(initial_learning_rate=0.01, decay_rate=0.5, decay_steps=10)
    architecture.compile_network(network, chosen, steps=1000)
    assert np.allclose(rates(network, 0, 10, 20), [0.01, 0.005, 0.0025])


@pytest.mark.parametrize("schedule", ["exponential", "cosine"])
@pytest.mark.parametrize("steps", [80, 800])
def test_schedule_ends_with_the_training(schedule: str, steps: int) -> None:
    network = architecture.build_network((8, 8, 3), 2)
    chosen = Hyperparameters(initial_learning_rate=0.01, decay_rate=0.2, decay_steps=0, schedule=schedule)
    architecture.compile_network(network, chosen, steps)
    first, highest, last = rates(network, 0, steps // 8, steps)
    assert np.allclose(last, 0.002)
    if schedule == "cosine":
        assert np.allclose((first, highest), (0.001, 0.01)), "a warm-up over an eighth of the steps"
    else:
        assert np.allclose((first, highest), (0.01, 0.01 * 0.2 ** (1 / 8)))


def test_weight_decay_is_that_of_adamw() -> None:
    weights = []
    x, y = np.ones((4, 8, 8, 3), np.float32), np.zeros(4)
    for optimizer in (None, keras.optimizers.AdamW(0.01, weight_decay=0.1)):
        keras.utils.set_random_seed(0)
        network = architecture.build_network((8, 8, 3), 2)
        chosen = Hyperparameters(initial_learning_rate=0.01, decay_rate=1.0, weight_decay=0.1)
        architecture.compile_network(network, chosen, steps=2)
        if optimizer:
            network.compile(optimizer, network.loss)
        network.fit(x, y, epochs=2, verbose=0)
        weights.append(network.get_weights())
    for ours, adamw in zip(*weights, strict=True):
        np.testing.assert_array_equal(ours, adamw)


def test_average_of_weights_starts_with_a_short_memory() -> None:
    """Of the training so far, and not of a hundred steps before it."""
    network = architecture.build_network((8, 8, 3), 2)
    architecture.compile_network(network, Hyperparameters(ema_momentum=0.99), steps=40)
    assert network.optimizer.get_config()["ema_momentum"] == pytest.approx(0.99), "as MLflow logs it"
    found = []
    for step in (1, 40, 2000):
        network.optimizer.iterations.assign(step)
        found.append(float(network.optimizer.ema_momentum))
    assert found == pytest.approx([2 / 11, 41 / 50, 0.99])


def test_averaged_weights_follow_a_short_training() -> None:
    weights = keras.Variable([0.0])
    optimizer = SingleReplicaAdam(0.1, use_ema=True, ema_momentum=0.99)
    optimizer.build([weights])
    for _ in range(20):
        optimizer.apply([keras.ops.ones(1)])
    reached = float(weights[0])
    optimizer.finalize_variable_values([weights])
    assert reached == pytest.approx(-2, abs=0.01)
    assert -1.8 < float(weights[0]) < -1.5, "with 0.99 from the start -0.3"


def test_decay_rate_one_is_constant() -> None:
    network = architecture.build_network((8, 8, 3), 2)
    architecture.compile_network(network, Hyperparameters(initial_learning_rate=0.001, decay_rate=1.0), steps=1)
    assert np.allclose(rates(network, 10_000), 0.001)


def test_blocks_and_dropout_are_configurable() -> None:
    network = architecture.build_network((100, 100, 3), 10, Hyperparameters(conv_blocks=5, dropout=0.4))
    convolutions = [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D)]
    assert [layer.filters for layer in convolutions] == [16, 32, 64, 128, 256]
    assert [type(layer).__name__ for layer in network.layers[-4:]] == ["Flatten", "Dropout", "Dense", "Dense"]
    assert network.layers[-3].rate == 0.4


def test_stem_and_pooled_features_make_a_smaller_network() -> None:
    network = architecture.build_network((100, 100, 3), 10, EXTENDED)
    assert network.count_params() == 457_866
    convolution = next(layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D))
    assert (convolution.kernel_size, convolution.strides) == ((4, 4), (2, 2))
    assert architecture.with_features(network).output_shape == (None, 10 + 128 + 256)


def test_too_many_blocks_are_refused() -> None:
    with pytest.raises(UsageError, match="conv_blocks=5: each block halves the image, and 16 pixels are too few"):
        architecture.build_network((16, 16, 3), 3, Hyperparameters(conv_blocks=5))
    with pytest.raises(UsageError, match="conv_blocks=4, stem_stride=2: each block halves the image, and 31 pixels"):
        architecture.build_network((31, 31, 3), 3, EXTENDED)


def test_bfloat16_network_matches_float32() -> None:
    """The layers stand in another order, which changes neither the function nor its gradients."""
    fast = architecture.build_network((16, 16, 3), 3, Hyperparameters(dropout=0.5), "mixed_bfloat16")
    plain = architecture.build_network((16, 16, 3), 3, Hyperparameters(dropout=0.5))
    assert {layer.compute_dtype for layer in plain.layers} == {"float32"}
    plain.set_weights(fast.get_weights())
    x = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(plain(x), fast(x), atol=0.02)
    assert {weights.dtype for weights in fast.get_weights()} == {np.dtype("float32")}


def test_auto_precision_follows_the_hardware() -> None:
    expected = "mixed_bfloat16" if architecture.has_bfloat16() else "float32"
    assert architecture.resolve_precision("auto") == expected
    assert architecture.resolve_precision("float32") == "float32"


@pytest.mark.parametrize("light", [0.25, 0.5])
def test_standardized_network_ignores_light(light: float) -> None:
    network = architecture.build_network((16, 16, 3), 3, Hyperparameters(standardization="image"))
    x = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(network(x * [light, light / 2, light]), network(x), atol=0.02)
    assert network.count_params() == architecture.build_network((16, 16, 3), 3).count_params()


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_batch_normalization_replaces_biases(precision: str) -> None:
    chosen = Hyperparameters(normalization="batch")
    network = architecture.build_network((16, 16, 3), 3, chosen, precision)
    names = [type(layer).__name__ for layer in network.layers]
    assert names[2:6] == ["Conv2D", "MaxPooling2D", "BatchNormalization", "ReLU"]
    layers = [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert len(layers) == 4, "three blocks and the dense layer"
    assert {layer.compute_dtype for layer in layers} == {"float32"}
    biased = [layer for layer in network.layers if getattr(layer, "use_bias", False)]
    assert biased == network.layers[-1:]
    x = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(network(x), network.predict(x, verbose=0), atol=1e-2)


def test_fused_batch_normalization_is_that_of_keras() -> None:
    random = np.random.default_rng(0)
    x = tf.constant(random.normal(3, 2, (16, 5, 5, 4)).astype(np.float32))
    weights = [random.uniform(0.5, 1.5, 4).astype(np.float32) for _ in range(4)]
    results = []
    for layer in (FusedBatchNormalization(momentum=0.9), keras.layers.BatchNormalization(momentum=0.9)):
        layer.build(x.shape)
        layer.set_weights(weights)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**3)
        results.append(
            [y, *tape.gradient(loss, [x, layer.gamma.value, layer.beta.value]), layer(x), *layer.get_weights()]
        )
    for fused, keras_own in zip(*results, strict=True):
        np.testing.assert_allclose(fused, keras_own, rtol=1e-3, atol=1e-3)


def test_trained_network_is_saved_with_layers_of_keras_alone() -> None:
    chosen = Hyperparameters(normalization="batch")
    trained = architecture.build_network((16, 16, 3), 3, chosen, for_training=True)
    saved = architecture.build_network((16, 16, 3), 3, chosen)
    assert sum(isinstance(layer, FusedBatchNormalization) for layer in trained.layers) == 3
    assert {type(layer).__module__.partition(".")[0] for layer in saved.layers} == {"keras"}
    saved.set_weights(trained.get_weights())
    x = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(saved(x), trained(x), atol=1e-5)


@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_features_are_hidden_layer_and_block_mean(normalization: str) -> None:
    network = architecture.build_network((16, 16, 3), 3, Hyperparameters(normalization=normalization))
    x = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.float32)
    logits, hidden, block = np.split(np.asarray(architecture.with_features(network)(x)), [3, 3 + 128], axis=1)
    np.testing.assert_allclose(logits, network(x), rtol=1e-5)
    assert block.shape == (8, 64), "the filters of the third block"
    np.testing.assert_allclose(np.linalg.norm(hidden, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(block, axis=1), 1, rtol=1e-5)


def test_average_is_one_stock_network(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.keras" for number in range(2)]
    for file in files:
        architecture.build_network((16, 16, 3), 3).save(file)
        keras.utils.clear_session()  # both have the same names, as refits do
    networks = [keras.saving.load_model(file) for file in files]
    architecture.average_networks(networks).save(tmp_path / "mean.keras")
    mean = keras.saving.load_model(tmp_path / "mean.keras")
    assert {type(layer).__module__.partition(".")[0] for layer in mean.layers} == {"keras"}
    assert mean.count_params() == 2 * networks[0].count_params()
    x = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(mean(x), np.mean([network(x) for network in networks], axis=0), rtol=1e-5)
    each = [architecture.with_features(network)(x) for network in networks]
    np.testing.assert_allclose(architecture.with_features(mean)(x), np.mean(each, axis=0), rtol=1e-5)


def test_filters_are_configurable() -> None:
    network = architecture.build_network((16, 16, 3), 3, Hyperparameters(filters=24))
    convolutions = [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D)]
    assert [layer.filters for layer in convolutions] == [24, 48, 96]
