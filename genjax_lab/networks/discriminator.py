"""A discriminator of noisy images: any network of this library, with a linear head.

It tells noised data from noised samples of a model at every noise level, and its gradient corrects
the model's score (discriminator guidance, arXiv 2211.17091). The paper's is half a U-Net on the
features of a pretrained classifier; here it is as large as the network that it is given.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Discriminator(nn.Module):
    """The logit that an image is data: a linear function of the output of an image network.

    Networks of this library begin with output 0, so it begins with logit 0.

    Attributes:
        network: a module `(x, c_noise, labels, *, train) -> [batch, height, width, channels]`.
    """

    network: nn.Module

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        c_noise: Float[Array, " batch"],
        labels: Int[Array, " batch"] | Float[Array, "batch num_classes"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, " batch"]:
        """Map scaled noisy images to the logit log(d / (1 - d)) of being data.

        Args:
            x: images, already scaled by c_in.
            c_noise: noise level of each image.
            labels: classes, as `network` takes them.
            train: whether dropout acts; it needs the rng "dropout".
        """
        features = self.network(x, c_noise, labels, train=train)
        head = nn.Dense(1, name="head")
        return head(features.reshape(len(x), -1).astype(jnp.float32))[:, 0]
