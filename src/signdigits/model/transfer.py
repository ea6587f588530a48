"""Transfer learning: networks that begin with the weights of another, with a new head on its features.

Yosinski et al., "How transferable are features in deep neural networks?", 2014, arXiv:1411.1792. The features are average and
maximum of the last convolution block over its positions, at unit length; those of a mean of networks lie side by side.
"""

from dataclasses import replace

import keras
import numpy as np
from keras import layers

from signdigits.config import Hyperparameters
from signdigits.data.loading import Data, Features, Images
from signdigits.data.start import Start
from signdigits.errors import ModelError, UsageError
from signdigits.model import input_pipeline
from signdigits.model.architecture import FEATURES
from signdigits.model.augmentation import Augmentation
from signdigits.model.input_pipeline import CHUNK

ALL_BLOCKS = 8
COPIES = 8  # changed copies of a photograph


def load_network(start: Start) -> keras.Model:
    """Return the network that trainings start from. Raises ModelError if it cannot be loaded or has no convolution block."""
    try:
        network = keras.saving.load_model(start.network, compile=False)
    except Exception as error:  # of Keras, or of what the file holds
        raise ModelError(
            f"start_from={start.uri}: its network cannot be loaded ({str(error).splitlines()[0]})"
        ) from error
    if not all(_list_blocks(each) for each in _list_networks(network)):
        raise ModelError(f"start_from={start.uri}: a network without convolution blocks")
    return network


def new_network(start: Start, class_names: tuple[str, ...], hyperparameters: Hyperparameters) -> keras.Model:
    """Return a network with the weights of `start`, of which the first `frozen_blocks` blocks are not trained.

    Of other classes, it has a new head; of the same, the whole network is trained further.
    """
    network = load_network(start)
    for each in _list_networks(network):
        n_blocks = 0
        for layer in each.layers:
            n_blocks += isinstance(layer, layers.Conv2D)
            layer.trainable = n_blocks > hyperparameters.frozen_blocks
    if start.class_names == class_names:
        return network
    extractor = make_extractor(network)
    return join(extractor, new_head(extractor.output_shape[-1], len(class_names), hyperparameters))


def make_extractor(network: keras.Model) -> keras.Model:
    """Return a model that shares the network's blocks; output: the features, of shape (n, features)."""
    networks = _list_networks(network)
    parts = []
    for number, each in enumerate(networks, start=1):
        block = _list_blocks(each)[-1].output
        pools = layers.Concatenate()([layers.GlobalAveragePooling2D()(block), layers.GlobalMaxPooling2D()(block)])
        unit = layers.UnitNormalization(name=FEATURES if len(networks) == 1 else None)(pools)
        parts.append(keras.Model(each.inputs[0], unit, name=f"blocks_{number}"))
    if len(parts) == 1:
        return parts[0]
    inputs = keras.Input(network.input_shape[1:])
    return keras.Model(inputs, layers.Concatenate(name=FEATURES)([part(inputs) for part in parts]))


def new_head(n_features: int, n_classes: int, hyperparameters: Hyperparameters) -> keras.Model:
    """Return a network from features to logits, of shape (n, n_classes)."""
    features = keras.Input((n_features,), name=FEATURES)
    x = layers.Rescaling(n_features**0.5, name="scale")(features)  # each feature of unit length, in the mean
    if hyperparameters.dropout:
        x = layers.Dropout(hyperparameters.dropout, name="dropout")(x)
    return keras.Model(features, layers.Dense(n_classes, name="logits")(x))


def join_head(start: Start, head: keras.Model) -> keras.Model:
    """Return the network of images that has the blocks of `start` and the layers of `head`."""
    return join(make_extractor(load_network(start)), head)


def join(extractor: keras.Model, head: keras.Model) -> keras.Model:
    """Return a model from images to logits that shares the layers of both."""
    x = extractor.outputs[0]
    for layer in head.layers[1:]:
        x = layer(x)
    return keras.Model(extractor.inputs[0], x)


def check_start(data: Data, hyperparameters: Hyperparameters) -> None:
    """Raise UsageError for frozen blocks without a network to start from."""
    if hyperparameters.frozen_blocks and not data.start:
        raise UsageError(
            f"frozen_blocks={hyperparameters.frozen_blocks}: the blocks of a model are kept; name it with start_from"
        )


def freeze_features(data: Data, hyperparameters: Hyperparameters) -> Data:
    """Return the data with features in place of images if all blocks are frozen, else as it is.

    The copies are changed as `hyperparameters` say, the same each time.
    """
    check_start(data, hyperparameters)
    if not data.start or hyperparameters.frozen_blocks < ALL_BLOCKS or isinstance(data.fitting, Features):
        return data
    extractor = make_extractor(load_network(data.start))
    return replace(data, fitting=compute_features(extractor, data.fitting, Augmentation.of(hyperparameters)))


def compute_features(extractor: keras.Model, images: Images, augmentation: Augmentation) -> Features:
    """Return the features of each image and of its changed copies."""
    everything = np.arange(len(images))
    batches = input_pipeline.validation_batches(images, CHUNK)
    if augmentation:
        copies = input_pipeline.validation_batches(images, CHUNK, augmentation, np.tile(everything, COPIES))
        batches = batches.concatenate(copies)
    x = np.concatenate([np.asarray(extractor(batch, training=False)) for batch, _ in batches])
    return Features(x.reshape(-1, len(images), x.shape[-1]).swapaxes(0, 1).copy(), images.y)


def _list_networks(network: keras.Model) -> list[keras.Model]:
    """Return the networks that `network` is made of, such as those of a mean, or itself."""
    parts = [layer for layer in network.layers if isinstance(layer, keras.Model)]
    return [each for part in parts for each in _list_networks(part)] or [network]


def _list_blocks(network: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers from the first convolution on whose outputs are images."""
    found = [layer for layer in network.layers if len(layer.output.shape) == 4]
    return found if any(isinstance(layer, layers.Conv2D) for layer in found) else []
