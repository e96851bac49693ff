"""What the Gumbel-max trick draws from when its uniforms are not fine enough (arXiv 2409.02908).

A uniform of b bits is at most 1 - 2^-b, so its Gumbel noise ends at M = -log(-log(1 - 2^-b)), about
b log 2, and a token that is less probable than a rival by more than exp(-M) never wins. With `e` =
exp(-M), the race is one of exponential variables that all start at e. Two laws follow, for
continuous uniforms that end there, and for real ones, which are multiples of 2^-b.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

_MODES = ("low", "high", "highest")


def gumbel_cap(
    dtype: DTypeLike = jnp.float32, mode: str = "low", *, bits: int | None = None
) -> float:
    """Where Gumbel noise ends.

    Args:
        dtype: of the noise of `jax.random.gumbel`, which is that of the logits in
            `jax.random.categorical`.
        mode: its mode; "low" is the default there.
        bits: of the uniforms of another generator, in place of both: 24 for `torch.rand` in
            float32, 53 for NumPy's and PyTorch's float64, 64 for `samplers.exact_categorical`.

    Returns:
        -log(-log(1 - 2^-bits)).

    Raises:
        ValueError: if `bits` is not positive, or type or mode are unknown.
    """
    if bits is None:
        dtype = jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating) or mode not in _MODES:
            raise ValueError(
                f"dtype must be floating and mode in {_MODES}, got {dtype} and {mode!r}"
            )
        mantissa = jnp.finfo(dtype).nmant
        bits = mantissa if mode == "low" else 2 * mantissa
        if mode == "highest" and dtype == jnp.float32:
            bits = 64
    if bits < 1:
        raise ValueError(f"bits is {bits}; it must be positive")
    return -math.log(-math.log1p(-(2.0**-bits)))


def truncated_categorical_probs(
    log_probs: Float[np.ndarray, "*batch vocabulary"], cap: float
) -> Float[np.ndarray, "*batch vocabulary"]:
    """The law of Gumbel-max draws whose noise is continuous and ends at `cap`.

    With p_1 <= ... <= p_N, S_i = p_i + ... + p_N, e = exp(-cap):

        p'_n = p_n sum_{i <= n} exp((N - i + 1) e) [exp(-S_i e / p_i) - exp(-S_i e / p_{i-1})] / S_i

    p' / p never decreases with p: a cap lowers the temperature. Real generators draw multiples of
    2^-b, for which this overstates the fault: see `lattice_categorical_probs`.

    Args:
        log_probs: log-probabilities, up to a constant; -inf for what cannot be drawn.
        cap: as `gumbel_cap` returns it; `math.inf` gives the probabilities themselves.

    Returns:
        Probabilities in float64, whose sum is 1.

    Raises:
        ValueError: if no log-probability of a row is finite, one is NaN or +inf, or `cap` is NaN.
    """
    probs = _probabilities(log_probs)
    if math.isnan(cap):
        raise ValueError("cap is NaN")
    return np.apply_along_axis(_truncated, -1, probs, math.exp(-cap))


def _truncated(probs: Any, e: float) -> Any:
    if e == 0:
        return probs
    drawn = probs > 0
    order = np.argsort(probs[drawn], kind="stable")
    p = probs[drawn][order]
    after = np.cumsum(p[::-1])[::-1]  # S_i
    number = np.arange(len(p), 0, -1)  # N - i + 1
    last = number * e - after * e / p
    with np.errstate(divide="ignore"):
        first = number * e - after * e / np.concatenate([[0.0], p[:-1]])
    # exp(last) - exp(first), which are nearly equal where neighbours are
    beta = np.exp(last) * -np.expm1(np.where(first == last, 0, first - last)) / after
    result = np.zeros_like(probs)
    places = np.flatnonzero(drawn)[order]
    result[places] = p * np.cumsum(beta)
    return result


def lattice_categorical_probs(
    log_probs: Float[np.ndarray, "*batch vocabulary"], bits: int
) -> Float[np.ndarray, "*batch vocabulary"]:
    """About the law of Gumbel-max draws whose uniforms are multiples of 2^-bits.

    Against one dominant token the others, of weight w, win with probability w x / (e^x - 1), where
    x = 2^-bits / w; the dominant one has the rest. This is meant for rows such as those of
    ancestral masked diffusion, whose mask keeps nearly all probability: where all others together
    have more than about 0.02, or uniforms have less than about 14 bits, simulate instead.

    Args:
        log_probs: log-probabilities, up to a constant; -inf for what cannot be drawn.
        bits: of the uniforms: 23 for `jax.random.categorical`, 24 for `torch.rand` in float32.

    Returns:
        Probabilities in float64, whose sum is 1.

    Raises:
        ValueError: if no log-probability of a row is finite, one is NaN or +inf, or `bits` is not
            positive.
    """
    probs = _probabilities(log_probs)
    if bits < 1:
        raise ValueError(f"bits is {bits}; it must be positive")
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        x = 2.0**-bits / probs
        result = np.where(probs > 0, probs * np.where(x > 700, 0, x / np.expm1(x)), 0)
    top = np.argmax(probs, axis=-1, keepdims=True)
    np.put_along_axis(result, top, 0.0, axis=-1)
    np.put_along_axis(result, top, 1 - np.sum(result, axis=-1, keepdims=True), axis=-1)
    return result


def _probabilities(log_probs: Any) -> Any:
    log_probs = np.asarray(log_probs, np.float64)
    if log_probs.ndim < 1 or not log_probs.size:
        raise ValueError(f"log_probs must be [..., vocabulary], got shape {log_probs.shape}")
    top = np.max(log_probs, axis=-1, keepdims=True)
    if not np.all(np.isfinite(top)):
        raise ValueError("log_probs must have a finite number in each row, and no NaN or +inf")
    weights = np.exp(log_probs - top)
    return weights / np.sum(weights, axis=-1, keepdims=True)
