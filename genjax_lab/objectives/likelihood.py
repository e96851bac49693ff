"""Log-likelihoods per example, or what stands for them, of diffusion and token networks.

Each constructor takes a network's apply function and returns a pure function
(variables, x, condition, *draws) -> [batch] whose randomness is given, because a log-ratio
(arXiv 2503.01103) needs the same draws for both of its networks. They are sums over dimensions, as
log-likelihoods are, in float32 whatever the network computes in, and evaluate it without dropout.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from genjax_lab.objectives.denoising import squared_error
from genjax_lab.processes.gaussian import GaussianProcess, expand


def diffusion_log_likelihood(
    apply: Callable[..., Array], process: GaussianProcess, *, reduce: str = "sum"
) -> Callable[..., Float[Array, "batch"]]:
    """-w(t) ||x_0_hat - x_0||^2, whose differences stand for log-ratios (arXiv 2503.01103).

    For EDM it is -||F - F_hat||^2, the plain loss of the network, since w = 1 / c_out^2. A constant
    in the weighting is absorbed by beta.

    Args:
      apply: called as `apply(variables, c_in x_t, c_noise, label, train=False)`.
      process: schedule, prediction kind and weighting.
      reduce: "sum" over dimensions, or "mean", with which beta is larger by their number.

    Returns:
      (variables, clean [batch, ...], label [batch] or None, t [batch], noise [batch, ...]) ->
      [batch]. It raises ValueError where noise or output do not have the shape of `clean`.

    Raises:
      ValueError: for another `reduce`.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce is {reduce!r}; it must be 'sum' or 'mean'")

    def log_likelihood(
        variables: PyTree,
        clean: Float[Array, "batch *dims"],
        label: Shaped[Array, "batch ..."] | None,
        t: Float[Array, "batch"],
        noise: Float[Array, "batch *dims"],
    ) -> Float[Array, "batch"]:
        if noise.shape != clean.shape or t.shape != clean.shape[:1]:
            raise ValueError(
                f"noise and t must have the shapes {list(clean.shape)} and "
                f"{list(clean.shape[:1])} of the images and their batch, got {list(noise.shape)} "
                f"and {list(t.shape)}"
            )
        noisy = process.diffuse(clean, t, noise)
        scaled = noisy * expand(process.c_in(t), noisy)
        output = apply(variables, scaled, process.c_noise(t), label, train=False)
        return -squared_error(process, output, clean, noisy, t, reduce=reduce)

    return log_likelihood


def autoregressive_log_likelihood(
    apply: Callable[..., Array],
) -> Callable[..., Float[Array, "batch"]]:
    """Exact log p(x | c) = sum_i log softmax(logits_i)[x_i] of a token network.

    Args:
      apply: called as `apply(variables, tokens, condition, train=False)`; returns
        [batch, length, vocab], the logits of position i given the condition and the tokens before
        i (of earlier scales, for a next-scale network).

    Returns:
      (variables, tokens [batch, length] int, condition, mask=None) -> [batch]. `mask` [batch,
      length] multiplies each position's term: 0 for a prompt or padding.
    """

    def log_likelihood(
        variables: PyTree,
        tokens: Int[Array, "batch length"],
        condition: Shaped[Array, "batch ..."] | None = None,
        mask: Shaped[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch"]:
        logits = apply(variables, tokens, condition, train=False)
        terms = token_log_probabilities(logits, tokens)
        if mask is not None:
            _check_mask(mask, tokens)
            terms = terms * mask
        return jnp.sum(terms, axis=1)

    return log_likelihood


def masked_log_likelihood(
    apply: Callable[..., Array],
    mask_id: int,
    *,
    weight: Callable[[Float[Array, "batch"]], Float[Array, "batch"]] = lambda t: 1 / t,
) -> Callable[..., Float[Array, "batch"]]:
    """The integrand of the masked diffusion ELBO (arXiv 2406.07524, 2406.04329).

    w(t) sum over masked positions of log p(x_i | x_unmasked), whose mean over t and masks is at
    most log p(x | c).

    Args:
      apply: called as `apply(variables, tokens, t, condition, train=False)` with tokens of which
        some are `mask_id`; returns logits [batch, length, vocab].
      mask_id: the token that stands for "masked".
      weight: w(t) = -alpha'(t) / (1 - alpha(t)), with alpha(t) the share of tokens that stay: 1/t
        for alpha = 1 - t.

    Returns:
      (variables, tokens [batch, length] int, condition, t [batch], mask [batch, length] bool) ->
      [batch], `mask` being True where a token is hidden.
    """

    def log_likelihood(
        variables: PyTree,
        tokens: Int[Array, "batch length"],
        condition: Shaped[Array, "batch ..."] | None,
        t: Float[Array, "batch"],
        mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch"]:
        _check_mask(mask, tokens)
        hidden = jnp.where(mask, mask_id, tokens)
        logits = apply(variables, hidden, t, condition, train=False)
        terms = jnp.where(mask, token_log_probabilities(logits, tokens), 0)
        return weight(t) * jnp.sum(terms, axis=1)

    return log_likelihood


def token_log_probabilities(
    logits: Float[Array, "batch length vocab"], tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length"]:
    """log softmax(logits)[token] of every position, in float32 or what is more precise.

    Raises:
      ValueError: if the shapes do not match or tokens are not integers.
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"logits must be [batch, length, vocab] for tokens {list(tokens.shape)}, got "
            f"{list(logits.shape)}"
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    taken = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return taken - jax.nn.logsumexp(logits, axis=-1)


def draw_times_and_noise(
    process: GaussianProcess, key: PRNGKeyArray, shape: Sequence[int]
) -> tuple[Float[Array, "batch"], Float[Array, "batch *dims"]]:
    """Training times and normal noise for a batch of `shape`: (t [batch], noise [batch, ...])."""
    time_key, noise_key = jax.random.split(key)
    return process.sample_time(time_key, (shape[0],)), jax.random.normal(noise_key, tuple(shape))


def seeded_times_and_noise(
    process: GaussianProcess, seeds: Int[Array, "batch"], shape: Sequence[int], *, draw: int = 0
) -> tuple[Float[Array, "batch"], Float[Array, "batch *dims"]]:
    """The same with draws that depend on each row's own seed alone.

    What a reference makes of a row can then be computed once and kept beside it.

    Args:
      process: the process whose training times are drawn.
      seeds: integers; equal seeds give equal times and noise.
      shape: [batch, ...].
      draw: which of the independent draws of a seed.

    Raises:
      ValueError: unless seeds are [batch] integers.
    """
    if seeds.shape != (shape[0],) or not jnp.issubdtype(seeds.dtype, jnp.integer):
        raise ValueError(
            f"seeds must be integers of shape [{shape[0]}], got {seeds.dtype} {list(seeds.shape)}"
        )

    def of_row(seed):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), draw)
        t, noise = draw_times_and_noise(process, key, (1, *shape[1:]))
        return t[0], noise[0]

    return jax.vmap(of_row)(seeds)


def draw_times_and_masks(
    key: PRNGKeyArray, shape: Sequence[int], *, t_min: float = 1e-3
) -> tuple[Float[Array, "batch"], Bool[Array, "batch length"]]:
    """Times in [t_min, 1] and masks, a position being hidden with probability t.

    The times of a batch are evenly spaced behind one random offset (arXiv 2107.00630, Appendix
    I.1), which lowers the variance of their mean; each time alone is uniform.
    """
    time_key, mask_key = jax.random.split(key)
    batch = shape[0]
    even = (jax.random.uniform(time_key) + jnp.arange(batch) / batch) % 1
    t = t_min + (1 - t_min) * even
    return t, jax.random.uniform(mask_key, tuple(shape)) < t[:, None]


def _check_mask(mask: Array, tokens: Array) -> None:
    if mask.shape != tokens.shape:
        raise ValueError(
            f"mask must have the shape {list(tokens.shape)} of tokens, got {list(mask.shape)}"
        )
