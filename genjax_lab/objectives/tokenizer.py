"""Training of an image tokenizer: reconstruction and the quantiser's losses (arXiv 1711.00937).

    loss = ||decoder(f_hat) - image||^2 + quantizer_weight (codebook loss + beta commitment loss),

beta being the quantiser's. The perceptual and adversarial terms with which VAR's tokenizer was
trained (arXiv 2404.02905, Eq. 5) need networks of their own and are left out.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from genjax_lab.objectives.denoising import Objective


def tokenizer_reconstruction(
    apply: Callable[..., Array], *, quantizer_weight: float = 1.0
) -> Objective:
    """The objective of a tokenizer.

    Args:
      apply: a linen `Module.apply`, called as `apply(variables, images)`, that returns
        `reconstruction`, `tokens` and `quantizer_loss` as `networks.ImageTokenizer` does.
      quantizer_weight: factor of the quantiser's losses, not negative.

    Returns:
      An objective of batches {"image": [batch, height, width, channels] float32 in [-1, 1]}.
      Errors are means over batch and dimensions. Its metrics are the "reconstruction_loss", the
      "quantizer_loss" and "distinct_tokens", the number of different codes in the batch. It raises
      ValueError for a batch without "image", or whose images are not of this form.

    Raises:
      ValueError: if `quantizer_weight` is negative.
    """
    if quantizer_weight < 0:
        raise ValueError(f"quantizer_weight is {quantizer_weight}; it must not be negative")

    def objective(variables, batch, key):
        del key
        if "image" not in batch:
            raise ValueError(f'batch must have the entry "image", got {sorted(batch)}')
        images = jnp.asarray(batch["image"])
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                "batch['image'] must be [batch, height, width, channels] floats in [-1, 1], got "
                f"{images.dtype}{list(images.shape)}"
            )
        output = apply(variables, images)
        error = jnp.mean((output.reconstruction - images) ** 2)
        ordered = jnp.sort(output.tokens.reshape(-1))
        metrics = {
            "reconstruction_loss": error,
            "quantizer_loss": output.quantizer_loss,
            "distinct_tokens": 1 + jnp.sum(ordered[1:] != ordered[:-1]),
        }
        return error + quantizer_weight * output.quantizer_loss, metrics

    return objective
