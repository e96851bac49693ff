"""Losses of log-ratios: a likelihood-trained generator as its own discriminator (arXiv 2503.01103).

With r(x) = log p_theta(x) - log p_ref(x) for a frozen reference, sigmoid(r) discriminates data from
samples of the reference, and the best discriminator has p_theta = p_data (Theorem 3.1). Direct
discriminative optimisation (DDO) minimises

    L(theta) = -E_data[log sigmoid(beta r)] - alpha E_ref[log sigmoid(-beta r)]          (Eq. 13).

Beside it stand the same objective for other f-divergences and what is known of its optimum. The
losses it is compared with are in `contrastive.py`; how log-ratios are computed, in `log_ratio.py`;
how a network gives likelihoods, in `likelihood.py`. Rounds and samples of the reference are not the
concern of this file.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

Scalar = float | Float[Array, ""]
LossAndMetrics = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]

SATURATED = 3.0  # |beta r| beyond which a row's gradient is within 5 % of all or nothing


def ddo_loss(
    delta_real: Float[Array, "batch"],
    delta_fake: Float[Array, "batch"],
    alpha: Scalar,
    beta: Scalar,
    *,
    real_weight: Float[Array, "batch"] | None = None,
    fake_weight: Float[Array, "batch"] | None = None,
    normalize_by_alpha: bool = False,
) -> LossAndMetrics:
    """The DDO loss (arXiv 2503.01103, Eq. 13), a mean over the batch.

    Args:
      delta_real: log p_theta - log p_ref of data.
      delta_fake: the same of samples of the reference, as many.
      alpha: weight of the samples, at least 0; [0.5, 50] in the paper.
      beta: factor of the log-ratios, positive; [0.01, 0.1] in the paper, for sums over some
        thousand dimensions. See `calibrate_beta`.
      real_weight: factor of each row's data term; 1 if None.
      fake_weight: factor of each row's sample term; 1 if None. Zero where a label was dropped for
        classifier-free guidance: the unconditional network is a negative signal itself.
      normalize_by_alpha: divides the loss by max(alpha, 1), so that a search over alpha does not
        also change the size of the gradient.

    Returns:
      The loss, (1 + alpha) log 2 at theta = ref, and metrics: mean and standard deviation of both
      log-ratios "delta_{real,fake}_{mean,std}"; their difference "margin"; "accuracy" of the sign
      of r as a classifier, ties being half right; "saturation", the share of rows with
      |beta r| > 3; "js_estimate" = (2 log 2 - L) / 2 with L the loss at alpha = 1, which for any
      beta is in expectation a lower bound of JS(p_data || p_ref), reached at p_theta = p_data for
      beta = 1.

    Raises:
      ValueError: if the log-ratios or weights are not float vectors of one length, or a concrete
        alpha is negative or beta not positive.
    """
    delta_real, delta_fake = log_ratios(delta_real=delta_real, delta_fake=delta_fake)
    check_alpha_and_beta(alpha, beta)
    # log(1 - sigmoid(z)) = log_sigmoid(-z), finite for every z.
    real = _weighted_mean(-jax.nn.log_sigmoid(beta * delta_real), real_weight, "real_weight")
    fake = _weighted_mean(-jax.nn.log_sigmoid(-beta * delta_fake), fake_weight, "fake_weight")
    loss = real + alpha * fake
    if normalize_by_alpha:
        loss = loss / jnp.maximum(alpha, 1)
    return loss, monitors(delta_real, delta_fake, beta)


class _FDivergence(NamedTuple):
    """The two terms of the variational form in z = log u, with u = (p_theta / p_ref)^beta.

    Attributes:
      real: z -> -f'(u).
      fake: z -> u f'(u) - f(u).
      power: the largest |k| of the powers u^k that occur.
    """

    real: Callable[[Array], Array]
    fake: Callable[[Array], Array]
    power: float


_F_DIVERGENCES = {
    # f = u log u
    "kl": _FDivergence(lambda z: -z - 1, jnp.exp, 1.0),
    # f = -log u
    "reverse_kl": _FDivergence(lambda z: jnp.exp(-z), lambda z: z - 1, 1.0),
    # f = u log u - (u + 1) log(u + 1)
    "gan": _FDivergence(lambda z: -jax.nn.log_sigmoid(z), lambda z: -jax.nn.log_sigmoid(-z), 0.0),
    # f = (u - 1)^2
    "chi2": _FDivergence(lambda z: -2 * jnp.expm1(z), lambda z: jnp.expm1(2 * z), 2.0),
    # f = (sqrt(u) - 1)^2
    "squared_hellinger": _FDivergence(lambda z: jnp.expm1(-z / 2), lambda z: jnp.expm1(z / 2), 0.5),
}
F_DIVERGENCES = tuple(_F_DIVERGENCES)


def f_divergence_loss(
    name: str,
    delta_real: Float[Array, "batch"],
    delta_fake: Float[Array, "batch"],
    alpha: Scalar,
    beta: Scalar,
    *,
    max_exponent: float = 20.0,
) -> LossAndMetrics:
    """DDO for another divergence, in the variational form of f-GAN (arXiv 1606.00709, Eq. 4).

    With u = (p_theta / p_ref)^beta the loss is -E_data[f'(u)] + alpha E_ref[u f'(u) - f(u)]. At
    alpha = beta = 1 its minimum over all densities is at p_theta = p_data and has the value
    -D_f(p_data || p_ref) with D_f = E_ref[f(p_data / p_ref)].

    Args:
      name: one of "kl" (whose gradient is that of maximum likelihood at alpha = beta = 1),
        "reverse_kl", "gan" (equal to `ddo_loss`), "chi2", "squared_hellinger".
      delta_real: log p_theta - log p_ref of data.
      delta_fake: the same of samples of the reference.
      alpha: weight of the samples, at least 0.
      beta: factor of the log-ratios, positive.
      max_exponent: where a loss has powers u^k, k beta r is kept within +-max_exponent, beyond
        which a row has no gradient.

    Returns:
      The loss, and the metrics of `ddo_loss` with "clipped", the share of rows beyond it.

    Raises:
      ValueError: for an unknown name, `max_exponent` not in (0, 80], and as `ddo_loss`.
    """
    if name not in _F_DIVERGENCES:
        raise ValueError(f"name is {name!r}; it must be one of {F_DIVERGENCES}")
    if not 0 < max_exponent <= 80:
        raise ValueError(f"max_exponent must be in (0, 80], where exp is finite: {max_exponent}")
    delta_real, delta_fake = log_ratios(delta_real=delta_real, delta_fake=delta_fake)
    check_alpha_and_beta(alpha, beta)
    divergence = _F_DIVERGENCES[name]
    limit = max_exponent / divergence.power if divergence.power else jnp.inf
    real, fake = beta * delta_real, beta * delta_fake
    loss = jnp.mean(divergence.real(jnp.clip(real, -limit, limit))) + alpha * jnp.mean(
        divergence.fake(jnp.clip(fake, -limit, limit))
    )
    clipped = jnp.mean(jnp.abs(jnp.concatenate([real, fake])) > limit)
    return loss, monitors(delta_real, delta_fake, beta) | {"clipped": clipped}


def tilted_optimum(
    p_data: Float[Array, "states"], p_ref: Float[Array, "states"], beta: Scalar
) -> tuple[Float[Array, "states"], Float[Array, ""]]:
    """The density that DDO aims at for beta other than 1 (arXiv 2503.01103, Theorem 3.3).

    p = p_ref^(1 - 1/beta) p_data^(1/beta) / Z minimises the loss over all densities at
    alpha = alpha_star = Z^beta: the pointwise optimum exp(beta r) = p_data / (alpha p_ref) is then
    normalised. 1/beta acts like a guidance weight.

    Args:
      p_data: probabilities of the data, summing to 1.
      p_ref: those of the reference, positive.
      beta: positive.

    Returns:
      (p, alpha_star).

    Raises:
      ValueError: if the two are not float vectors of one length, or beta is not positive.
    """
    p_data, p_ref = log_ratios(p_data=p_data, p_ref=p_ref)
    check_positive(beta=beta)
    logits = (1 - 1 / beta) * jnp.log(p_ref) + jnp.log(p_data) / beta
    return jax.nn.softmax(logits), jnp.exp(beta * jax.nn.logsumexp(logits))


def jsd_from_loss(loss: Scalar) -> Float[Array, ""]:
    """JS(p_data || p_ref) = (2 log 2 - L) / 2 from the minimum L of the loss at alpha = beta = 1.

    Any larger loss gives a lower bound, in nats (arXiv 2503.01103, below Theorem 3.1).
    """
    return (2 * math.log(2) - jnp.asarray(loss)) / 2


def calibrate_beta(probe_deltas: Float[Array, "..."], target: float = 1.0) -> Float[Array, ""]:
    """beta = target / std(r), so that beta r has the standard deviation `target`.

    The paper's grid suits its sums over thousands of dimensions; the size of r depends on the
    number of dimensions, the weighting and the length of a round.

    Args:
      probe_deltas: log-ratios of data and samples after a short probing run; at theta = ref they
        are all 0.
      target: wanted standard deviation; beyond about 3 the sigmoid saturates.

    Raises:
      ValueError: if concrete log-ratios are constant or not finite, or `target` is not positive.
    """
    probe_deltas = floats("probe_deltas", probe_deltas)
    check_positive(target=target)
    deviation = jnp.std(probe_deltas)
    if is_concrete(deviation) and not (deviation > 0 and jnp.isfinite(deviation)):
        raise ValueError(
            f"probe_deltas must be finite and differ, got standard deviation {deviation}; measure "
            "them after some steps of training"
        )
    return target / deviation


def adaptive_beta(
    beta: Scalar,
    deltas: Float[Array, "..."],
    *,
    max_share: float = 0.05,
    threshold: float = SATURATED,
) -> Float[Array, ""]:
    """The largest value up to `beta` with which few rows are saturated.

    A row with |beta r| > 3 has all or nothing of a gradient, and log-ratios grow in the course of a
    round. Given the same `beta` every time, the result rises again when they shrink.

    Args:
      beta: the wanted factor of the log-ratios, positive.
      deltas: log-ratios r, of data and samples together.
      max_share: the largest share of rows with |beta r| > threshold, in [0, 1).
      threshold: where a row counts as saturated, positive.

    Returns:
      beta, or where more than `max_share` of the rows would be saturated the largest value with
      which they are not: threshold / q, q being the (1 - max_share) quantile of |r|.

    Raises:
      ValueError: if the log-ratios are no floats, none, or, being concrete, not finite; if a number
        is out of its range.
    """
    deltas = floats("deltas", deltas)
    check_positive(beta=beta)
    check_positive(threshold=threshold)
    if not 0 <= max_share < 1:
        raise ValueError(f"max_share must be in [0, 1), got {max_share}")
    if not deltas.size or (is_concrete(deltas) and not np.all(np.isfinite(deltas))):
        raise ValueError(f"deltas must be finite log-ratios, at least one, got {deltas}")
    sizes = jnp.sort(jnp.abs(deltas).ravel())
    saturated = math.floor(max_share * sizes.size)  # so many may be
    largest = sizes[sizes.size - 1 - saturated]
    # A little less than the quotient, which may be rounded up.
    bound = threshold * (1 - 4 * jnp.finfo(sizes.dtype).eps) / largest
    return jnp.minimum(beta, bound)


def start_of_round_ratio(fake_gradient: PyTree, data_gradient: PyTree) -> Float[Array, ""]:
    """||E_fake[s]|| / ||E_data[s]|| with s = grad log p_theta at theta = ref.

    A round starts with the gradient (beta/2) (alpha E_fake[s] - E_data[s]). For an exact likelihood
    and exact samples of it E_fake[s] = 0, and alpha has no influence on the direction; a ratio well
    above the one of sampling noise says that alpha can matter.

    Args:
      fake_gradient: gradient of the mean log-likelihood of samples of the reference.
      data_gradient: the same of data.

    Raises:
      ValueError: if the trees differ in structure or shapes.
    """
    check_same_tree("fake_gradient", fake_gradient, "data_gradient", data_gradient)
    return optax.tree.norm(fake_gradient) / optax.tree.norm(data_gradient)


def check_alpha_and_beta(alpha: Scalar, beta: Scalar) -> None:
    """Raises ValueError for a concrete alpha below 0 or beta that is not above."""
    check_at_least_zero(alpha=alpha)
    check_positive(beta=beta)


def check_same_tree(name: str, tree: PyTree, expected_name: str, expected: PyTree) -> None:
    """Raises ValueError unless the trees have equal structure and shapes."""
    structures = jax.tree.structure(tree), jax.tree.structure(expected)
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name} must have the structure of {expected_name}, {structures[1]}, got "
            f"{structures[0]}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), other in zip(leaves, jax.tree.leaves(expected), strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must have the shape {list(jnp.shape(other))} "
                f"of {expected_name}, got {list(jnp.shape(leaf))}"
            )


def monitors(delta_real: Array, delta_fake: Array, beta: Scalar) -> dict[str, Array]:
    """The metrics of log-ratios that `ddo_loss` describes."""
    both = jnp.concatenate([delta_real, -delta_fake])
    bound = jnp.mean(-jax.nn.log_sigmoid(beta * delta_real)) + jnp.mean(
        -jax.nn.log_sigmoid(-beta * delta_fake)
    )
    return {
        "delta_real_mean": jnp.mean(delta_real),
        "delta_real_std": jnp.std(delta_real),
        "delta_fake_mean": jnp.mean(delta_fake),
        "delta_fake_std": jnp.std(delta_fake),
        "margin": jnp.mean(delta_real) - jnp.mean(delta_fake),
        "accuracy": jnp.mean((jnp.sign(both) + 1) / 2),
        "saturation": jnp.mean(jnp.abs(beta * both) > SATURATED, dtype=both.dtype),
        "js_estimate": jsd_from_loss(bound),
    }


def _weighted_mean(values: Array, weight: Array | None, name: str) -> Array:
    if weight is None:
        return jnp.mean(values)
    weight = floats(name, weight)
    if weight.shape != values.shape:
        raise ValueError(
            f"{name} must have one entry for each of the {len(values)} rows, got shape "
            f"{list(weight.shape)}"
        )
    return jnp.mean(weight * values)


def log_ratios(**arrays: Array) -> list[Array]:
    """The two named arrays; ValueError unless they are float vectors of one length."""
    values = [floats(name, array) for name, array in arrays.items()]
    shapes = [list(value.shape) for value in values]
    if values[0].ndim != 1 or shapes[0] != shapes[1] or not values[0].size:
        raise ValueError(
            f"{' and '.join(arrays)} must be vectors of one length, got shapes {shapes[0]} and "
            f"{shapes[1]}"
        )
    return values


def floats(name: str, array: Array) -> Array:
    """`array` in float32 or what is more precise; ValueError if it is not floating point."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {array.dtype}")
    # In a half precision the small difference of two large sums would already be lost.
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def is_concrete(value: Scalar) -> bool:
    """Whether a value is known while the program is traced."""
    return not isinstance(value, jax.core.Tracer)


def check_at_least_zero(**value: Scalar) -> None:
    """Raises ValueError if the one named value is concrete and below 0."""
    ((name, number),) = value.items()
    if is_concrete(number) and not np.all(np.asarray(number) >= 0):
        raise ValueError(f"{name} must be at least 0, got {number}")


def check_positive(**value: Scalar) -> None:
    """Raises ValueError if the one named value is concrete and not above 0."""
    ((name, number),) = value.items()
    if is_concrete(number) and not np.all(np.asarray(number) > 0):
        raise ValueError(f"{name} must be positive, got {number}")
