"""Denoising score matching for every Gaussian process and prediction kind (arXiv 2206.00364).

The squared error is taken in the network's own output space, where it is

    loss_weight(t) ||x_0_hat - x_0||^2 = loss_weight(t) c_out(t)^2 ||output - target||^2,

which avoids the cancellation of c_skip x against x_0; for EDM the factor is exactly 1 (Eq. 8 there).
Label dropout and dropout are the network's; augmentation belongs to the data.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from genjax_lab.processes.gaussian import GaussianProcess

Objective = Callable[
    [PyTree, Mapping[str, Array], PRNGKeyArray], tuple[Float[Array, ""], dict[str, Array]]
]


def denoising(
    apply: Callable[..., Array],
    process: GaussianProcess,
    *,
    log_variance: Callable[[PyTree, Float[Array, "batch"]], Float[Array, "batch"]] | None = None,
) -> Objective:
    """The denoising objective of a network under a Gaussian process.

    Args:
      apply: a linen `Module.apply` called as `apply(variables, c_in x, c_noise, labels, train=True,
        rngs={"dropout": key})`, where labels is None for batches without "label".
      process: schedule, prediction kind and weighting.
      log_variance: (variables, c_noise) -> u; the loss becomes loss / exp(u) + u, which balances
        noise levels by their learned uncertainty (arXiv 2312.02696, Eq. 15).

    Returns:
      An objective of batches {"image": [batch, ...] float32, "label": [batch] int32, optional,
      "augment_label": [batch, augment_dim], optional}; its metrics are "loss" and, where
      `log_variance` is given, "unweighted_loss". Squared errors are means over dimensions.
    """

    def objective(variables, batch, key):
        clean = batch["image"]
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        t = process.sample_time(time_key, clean.shape[:1])
        noisy = process.diffuse(clean, t, jax.random.normal(noise_key, clean.shape, clean.dtype))
        scaled = noisy * process.c_in(t).reshape((-1,) + (1,) * (clean.ndim - 1))
        augmented = {}
        if "augment_label" in batch:
            augmented["augment_labels"] = batch["augment_label"]
        output = apply(
            variables,
            scaled,
            process.c_noise(t),
            batch.get("label"),
            train=True,
            rngs={"dropout": dropout_key},
            **augmented,
        )
        errors = squared_error(process, output, clean, noisy, t)
        if log_variance is None:
            loss = jnp.mean(errors)
            return loss, {"loss": loss}
        uncertainty = log_variance(variables, process.c_noise(t))
        loss = jnp.mean(errors * jnp.exp(-uncertainty) + uncertainty)
        return loss, {"loss": loss, "unweighted_loss": jnp.mean(errors)}

    return objective


def squared_error(
    process: GaussianProcess,
    output: Float[Array, "batch *dims"],
    clean: Float[Array, "batch *dims"],
    noisy: Float[Array, "batch *dims"],
    t: Float[Array, "batch"],
) -> Float[Array, "batch"]:
    """Each example's weighted squared error, averaged over its dimensions, in float32."""
    residual = output.astype(jnp.float32) - process.from_data(clean, noisy, t)
    errors = jnp.mean(residual**2, axis=tuple(range(1, clean.ndim)))
    if process.weighting == process.prediction:
        return errors
    return errors * process.loss_weight(t) * process.coefficients(t)[1] ** 2
