"""Keras' batch normalization and Adam, each with one step replaced by a faster one."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization of convolutions with TensorFlow's fused kernel.

    Keras 3 builds the same function from a dozen operations, in float32, each of which reads the batch from memory. The
    kernel takes bfloat16 as well; mean, variance and weights are float32 in either case. As in Keras 2, the moving
    variance is that of a sample (n - 1).
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None) -> tf.Tensor:
        moving = {} if training else {"mean": self.moving_mean.value, "variance": self.moving_variance.value}
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma.value, self.beta.value, epsilon=self.epsilon, is_training=bool(training), **moving
        )
        if training:
            for average, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
                average.assign(average * self.momentum + batch * (1 - self.momentum))
        return outputs


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
