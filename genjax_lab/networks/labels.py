"""Class labels as vectors, in the one form that all image networks read.

Networks accept integers (a data set's labels) and vectors (mixtures of classes, or a guidance that
differentiates through the label). Both become `[batch, num_classes]` vectors whose zero vector
means "no class", the convention of EDM (arXiv 2206.00364).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def class_vectors(
    labels: Int[Array, " batch"] | Float[Array, "batch num_classes"] | None,
    *,
    num_classes: int,
    batch: int,
) -> Float[Array, "batch num_classes"] | None:
    """Turn labels into one vector per example.

    Args:
        labels: integers `[batch]` in `[0, num_classes]`, where `num_classes` means no class; or
            vectors `[batch, num_classes]`, returned as they are; or None, no class for anybody.
        num_classes: number of classes; 0 for an unconditional network.
        batch: number of examples.

    Returns:
        `[batch, num_classes]` in float32, or None for an unconditional network.

    Raises:
        ValueError: when `labels` has the wrong shape, or is given to an unconditional network.
    """
    if num_classes < 0:
        raise ValueError(f"num_classes must be at least 0, got {num_classes}.")
    if num_classes == 0:
        if labels is not None:
            raise ValueError(
                "labels were given to an unconditional network (num_classes=0); pass labels=None."
            )
        return None
    if labels is None:
        return jnp.zeros((batch, num_classes), jnp.float32)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if labels.shape != (batch,):
            raise ValueError(f"integer labels must have shape ({batch},), got {labels.shape}.")
        return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        raise ValueError(f"labels must be integers or floats, got {labels.dtype}.")
    if labels.shape != (batch, num_classes):
        raise ValueError(
            f"label vectors must have shape ({batch}, {num_classes}), got {labels.shape}."
        )
    return labels.astype(jnp.float32)


def drop_labels(
    key: PRNGKeyArray, vectors: Float[Array, "batch num_classes"], rate: float
) -> Float[Array, "batch num_classes"]:
    """Replace the label of each example by zeros (no class) with probability `rate`."""
    keep = jax.random.bernoulli(key, 1 - rate, (vectors.shape[0], 1))
    return vectors * keep
