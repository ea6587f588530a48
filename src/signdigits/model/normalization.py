"""Batch normalization by the kernel that TensorFlow has for it."""


import keras
import tensorflow as tf


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization of convolutions, in training, with TensorFlow's fused kernel.

    Keras 3 builds the same function from a dozen operations, in float32, each of which reads the batch from memory. The
    kernel takes bfloat16 as well; mean, variance and weights are float32 in either case. As in Keras 2, the moving
    variance is that of a sample (n - 1).
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None) -> tf.Tensor:
        if not training:
            return super().call(inputs, training=training, mask=mask)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma, self.beta, epsilon=self.epsilon, is_training=True
        )
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + batch * (1 - self.momentum))
        return outputs
