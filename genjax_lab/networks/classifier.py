"""A small multi-layer perceptron that classifies images and whose last hidden layer are features.

It exists for metrics on data sets too small or too unlike photographs for Inception features: two
or three matrix products, trained in seconds on a CPU. Products run at the highest precision, so
that the features of one set of weights agree between accelerators to float32 rounding.
"""

from functools import partial

import flax.linen as nn
import jax
from jaxtyping import Array, Float


class Classifier(nn.Module):
    """Flattened pixels, hidden layers with SiLU, a last hidden layer of features, class logits.

    Attributes:
        num_classes: number of logits.
        hidden: widths of the hidden layers before the features.
        feature_dim: width of the last hidden layer.
    """

    num_classes: int
    hidden: tuple[int, ...] = (128,)
    feature_dim: int = 32

    def setup(self):
        """Create the layers `dense_0`, `dense_1`, ..., and `head`."""
        dense = partial(
            nn.Dense,
            kernel_init=nn.initializers.lecun_uniform(),
            precision=jax.lax.Precision.HIGHEST,
        )
        self.dense = [dense(width) for width in (*self.hidden, self.feature_dim)]
        self.head = dense(self.num_classes)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch num_classes"]:
        """Return the class logits of images in [-1, 1]."""
        return self.logits(self.features(images))

    def features(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch feature_dim"]:
        """Return the last hidden layer, after its SiLU."""
        x = images.reshape(len(images), -1)
        for layer in self.dense:
            x = nn.silu(layer(x))
        return x

    def logits(self, features: Float[Array, "batch feature_dim"]) -> Float[Array, "batch classes"]:
        """Return the class logits that belong to features."""
        return self.head(features)
