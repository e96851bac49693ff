"""Losses and a parameter update that direct discriminative optimisation is compared with.

They have the form of `ddo_loss`: log-ratios r(x) = log p_theta(x) - log p_ref(x) of data (or of
what is wanted) and of samples (or of what is not) go in, a mean loss and the same metrics come out;
but for the unlikelihood, which has no reference. Continued training by maximum likelihood is
`denoising`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from genjax_lab.objectives.discriminative import (
    LossAndMetrics,
    Scalar,
    check_alpha_and_beta,
    check_at_least_zero,
    check_positive,
    check_same_tree,
    ddo_loss,
    floats,
    is_concrete,
    log_ratios,
    monitors,
)


def spin_loss(
    delta_real: Float[Array, "batch"], delta_fake: Float[Array, "batch"], beta: Scalar
) -> LossAndMetrics:
    """Self-play fine-tuning: -mean log sigmoid(beta (r(real) - r(fake))) (arXiv 2401.01335, 4.7).

    Unlike DDO's, rows are pairs: the sample i answers the same prompt or class as the datum i.

    Args:
      delta_real: log p_theta - log p_ref of data.
      delta_fake: the same of the sample paired with each.
      beta: factor of the log-ratios, positive.

    Returns:
      The loss, log 2 at theta = ref, and the metrics of `ddo_loss`.

    Raises:
      ValueError: as `ddo_loss`.
    """
    delta_real, delta_fake = log_ratios(delta_real=delta_real, delta_fake=delta_fake)
    check_positive(beta=beta)
    loss = -jnp.mean(jax.nn.log_sigmoid(beta * (delta_real - delta_fake)))
    return loss, monitors(delta_real, delta_fake, beta)


def dpo_loss(
    delta_chosen: Float[Array, "batch"], delta_rejected: Float[Array, "batch"], beta: Scalar
) -> LossAndMetrics:
    """Direct preference optimisation (arXiv 2305.18290, Eq. 7): `spin_loss` of preference pairs.

    With the log-ratios of `diffusion_log_likelihood` it is Diffusion-DPO (arXiv 2311.12908).

    Args:
      delta_chosen: log p_theta - log p_ref of the preferred sample of each pair; in the metrics it
        is "real".
      delta_rejected: the same of the other; "fake".
      beta: factor of the log-ratios, positive.

    Raises:
      ValueError: as `ddo_loss`.
    """
    delta_chosen, delta_rejected = log_ratios(
        delta_chosen=delta_chosen, delta_rejected=delta_rejected
    )
    return spin_loss(delta_chosen, delta_rejected, beta)


def cca_loss(
    delta_matched: Float[Array, "batch"],
    delta_mismatched: Float[Array, "batch"],
    weight: Scalar,
    beta: Scalar,
) -> LossAndMetrics:
    """Condition contrastive alignment (arXiv 2410.09347): data against data of another condition.

    -mean log sigmoid(beta r(x, c)) - weight mean log sigmoid(-beta r(x, c')), that is `ddo_loss`
    with (x, c'), c' another row's condition, in the place of samples.

    Args:
      delta_matched: log p_theta - log p_ref of data under their conditions; "real" in the metrics.
      delta_mismatched: the same under shuffled conditions; "fake".
      weight: weight of the mismatched term (lambda in the paper), at least 0.
      beta: factor of the log-ratios, positive.

    Raises:
      ValueError: as `ddo_loss`.
    """
    delta_matched, delta_mismatched = log_ratios(
        delta_matched=delta_matched, delta_mismatched=delta_mismatched
    )
    check_at_least_zero(weight=weight)
    return ddo_loss(delta_matched, delta_mismatched, weight, beta)


def kto_loss(
    delta_real: Float[Array, "batch"],
    delta_fake: Float[Array, "batch"],
    alpha: Scalar,
    beta: Scalar,
    *,
    reference_point: Scalar | None = None,
) -> LossAndMetrics:
    """Kahneman-Tversky optimisation (arXiv 2402.01306, Eq. 8) with samples as undesirable.

    mean(1 - sigmoid(beta (r(real) - z_0))) + alpha mean(1 - sigmoid(beta (z_0 - r(fake)))).

    Args:
      delta_real: log p_theta - log p_ref of data.
      delta_fake: the same of samples of the reference.
      alpha: weight of the samples (lambda_U / lambda_D), at least 0.
      beta: factor of the log-ratios, positive.
      reference_point: z_0, the paper's estimate of KL(p_theta || p_ref); if None the mean of all
        log-ratios of the batch, at least 0, of which no gradient is taken.

    Returns:
      The loss, (1 + alpha) / 2 at theta = ref, and the metrics of `ddo_loss`.

    Raises:
      ValueError: as `ddo_loss`.
    """
    delta_real, delta_fake = log_ratios(delta_real=delta_real, delta_fake=delta_fake)
    check_alpha_and_beta(alpha, beta)
    if reference_point is None:
        mean = (jnp.mean(delta_real) + jnp.mean(delta_fake)) / 2
        reference_point = jax.lax.stop_gradient(jnp.maximum(mean, 0))
    # 1 - sigmoid(z) = sigmoid(-z)
    real = jnp.mean(jax.nn.sigmoid(-beta * (delta_real - reference_point)))
    fake = jnp.mean(jax.nn.sigmoid(beta * (delta_fake - reference_point)))
    return real + alpha * fake, monitors(delta_real, delta_fake, beta)


def unlikelihood_loss(
    log_likelihood_real: Float[Array, "batch *tokens"],
    log_likelihood_fake: Float[Array, "batch *tokens"],
    alpha: Scalar,
) -> LossAndMetrics:
    """-mean log p(real) - alpha mean log(1 - p(fake)) (arXiv 1908.04319, Eq. 3), no reference.

    Args:
      log_likelihood_real: log-probabilities of data, of tokens or of whole sequences.
      log_likelihood_fake: the same of samples, in the same shape. A sequence's probability is so
        small that 1 - p has no gradient: give tokens' (`token_log_probabilities`).
      alpha: weight of the samples, at least 0.

    Returns:
      The loss and the metrics "log_likelihood_real" and "log_likelihood_fake", means.

    Raises:
      ValueError: if the two are not float arrays of one shape, alpha is negative, or concrete
        log-likelihoods of samples are above 0, as those of densities can be.
    """
    real = floats("log_likelihood_real", log_likelihood_real)
    fake = floats("log_likelihood_fake", log_likelihood_fake)
    if real.shape != fake.shape or not real.size:
        raise ValueError(
            "log_likelihood_real and log_likelihood_fake must have one shape and not be empty, got "
            f"{list(real.shape)} and {list(fake.shape)}"
        )
    check_at_least_zero(alpha=alpha)
    if is_concrete(fake) and np.any(np.asarray(fake) > 0):
        raise ValueError(
            f"log_likelihood_fake must be at most 0, got {np.max(np.asarray(fake))}: unlikelihood "
            "is for probabilities, not for densities"
        )
    loss = -jnp.mean(real) - alpha * jnp.mean(_log_complement(fake))
    return loss, {"log_likelihood_real": jnp.mean(real), "log_likelihood_fake": jnp.mean(fake)}


def extrapolate(reference: PyTree, self_trained: PyTree, gain: Scalar) -> PyTree:
    """Negative extrapolation away from training on one's own samples.

    theta = reference + gain (reference - self_trained), in parameters as Neon (arXiv 2510.03597);
    SIMS (arXiv 2408.16333) extrapolates scores in the same way.

    Args:
      reference: parameters of the generator.
      self_trained: the same after a short training on samples of `reference`.
      gain: 0 returns `reference`; -1 returns `self_trained`.

    Raises:
      ValueError: if the two trees differ in structure or shapes.
    """
    check_same_tree("self_trained", self_trained, "reference", reference)
    return jax.tree.map(lambda ref, own: ref + gain * (ref - own), reference, self_trained)


def _log_complement(value: Array) -> Array:
    """log(1 - exp(value)) for value <= 0, by the branch that keeps digits; finite at 0."""
    value = jnp.minimum(value, -jnp.finfo(value.dtype).tiny)
    near_zero = value > -math.log(2)
    # Each branch sees only its own domain, so that neither spoils the gradient of the other.
    near = jnp.log(-jnp.expm1(jnp.where(near_zero, value, -1.0)))
    far = jnp.log1p(-jnp.exp(jnp.where(near_zero, -1.0, value)))
    return jnp.where(near_zero, near, far)
