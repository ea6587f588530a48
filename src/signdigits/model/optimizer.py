"""Adam for a process with a single replica."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf


class SingleReplicaAdam(keras.optimizers.Adam):
    """Adam that leaves out the sum of the gradients over replicas, of which there is one: the same update, bit for bit.

    Keras makes that sum with a `tf.custom_gradient`, which TensorFlow registers and never releases: each network that is
    fitted keeps its graph, 11 MB, until the process ends. A search fits hundreds.
    """

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        def apply_to_all(strategy: tf.distribute.Strategy) -> None:
            super(SingleReplicaAdam, self).apply(grads, trainable_variables)

        replica = tf.distribute.get_replica_context()
        if replica is None:
            super().apply(grads, trainable_variables)
        else:
            replica.merge_call(apply_to_all)
