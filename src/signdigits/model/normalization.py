"""Batch normalization by the kernel that TensorFlow has for it."""

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
