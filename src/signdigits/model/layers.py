"""Batch normalization and Adam of Keras, each with a faster step; the memory of Adam's moving average grows with the steps."""

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

    The moving average of the weights (`use_ema`) begins with a short memory, as TensorFlow's own does (`num_updates` of
    tf.train.ExponentialMovingAverage): with 0.99 from the start, a training of 40 steps would end near where it began.
    """

    @property
    def ema_momentum(self) -> Any:
        """The momentum of the present step: at most what was given, which is reached after some hundred steps."""
        steps = keras.ops.cast(self.iterations, "float32")
        return keras.ops.minimum(self._largest_momentum, (1 + steps) / (10 + steps))

    @ema_momentum.setter
    def ema_momentum(self, momentum: float) -> None:
        self._largest_momentum = momentum

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        return config | {"ema_momentum": self._largest_momentum}

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        def apply_to_all(strategy: tf.distribute.Strategy) -> None:
            super(SingleReplicaAdam, self).apply(grads, trainable_variables)

        replica = tf.distribute.get_replica_context()
        if replica is None:
            super().apply(grads, trainable_variables)
        else:
            replica.merge_call(apply_to_all)
