"""Denoising score matching for every Gaussian process and prediction kind (arXiv 2206.00364).

The squared error is taken in the network's own output space, where it is

    loss_weight(t) ||x_0_hat - x_0||^2 = loss_weight(t) c_out(t)^2 ||output - target||^2,

so that nothing is weighted where the network is scored in its own space, as in EDM (Eq. 8). Label
dropout and dropout are the network's; augmentation is `genjax_lab.objectives.augmented`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from genjax_lab.processes.gaussian import GaussianProcess, expand

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
      "augment_label": [batch, augment_dim], optional}, the last given to the network as
      `augment_labels`. Squared errors are means over dimensions. It has one metric where
      `log_variance` is given, the "unweighted_loss". It raises ValueError for a batch without
      "image", or whose images are not floats with a batch axis and others.
    """

    def objective(variables, batch, key):
        clean = images_of(batch)
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        t = process.sample_time(time_key, clean.shape[:1])
        noisy = process.diffuse(clean, t, jax.random.normal(noise_key, clean.shape, clean.dtype))
        scaled = noisy * expand(process.c_in(t), noisy)
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
            return jnp.mean(errors), {}
        uncertainty = log_variance(variables, process.c_noise(t))
        loss = jnp.mean(errors * jnp.exp(-uncertainty) + uncertainty)
        return loss, {"unweighted_loss": jnp.mean(errors)}

    return objective


def squared_error(
    process: GaussianProcess,
    output: Float[Array, "batch *dims"],
    clean: Float[Array, "batch *dims"],
    noisy: Float[Array, "batch *dims"],
    t: Float[Array, "batch"],
    *,
    reduce: str = "mean",
) -> Float[Array, "batch"]:
    """Each example's weighted squared error, in float32 or what is more precise.

    Args:
      process: schedule, prediction kind and weighting.
      output: the network's.
      clean: images.
      noisy: the same, diffused to the times `t`.
      t: times.
      reduce: "mean" or "sum" over an example's dimensions.

    Raises:
      ValueError: if the output has another shape than the images, or for another `reduce`.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce is {reduce!r}; it must be 'mean' or 'sum'")
    if output.shape != clean.shape:
        raise ValueError(
            f"the network's output has shape {list(output.shape)}, its images {list(clean.shape)}; "
            "it must predict as many channels as it sees"
        )
    output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
    residual = output - process.from_data(clean, noisy, t)
    over_dimensions = jnp.mean if reduce == "mean" else jnp.sum
    errors = over_dimensions(residual**2, axis=tuple(range(1, clean.ndim)))
    if process.weighting == process.prediction:
        return errors
    return errors * process.loss_weight(t) * process.coefficients(t)[1] ** 2


def images_of(batch: Mapping[str, Array], name: str = "image") -> Float[Array, "batch *dims"]:
    """The images of a batch; ValueError if it has none, or they are no float images."""
    if name not in batch:
        raise ValueError(f'batch must have the entry "{name}", got {sorted(batch)}')
    images = jnp.asarray(batch[name])
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"batch['{name}'] must be floating point with values in [-1, 1], got {images.dtype}"
        )
    if images.ndim < 2 or not images.size:
        raise ValueError(
            f"batch['{name}'] must be [batch, height, width, channels] (or [batch, ...] with "
            f"another number of axes) and not empty, got {list(images.shape)}"
        )
    return images
