"""Exact draws from categorical distributions, at any vocabulary, in float32, on every device.

The largest of logits plus Gumbel noise is a draw from their softmax, if the noise is what it should
be. The usual float32 uniforms have 23 or 24 bits, so that the noise ends at 16 or 17, and tokens
much less probable than their rivals are drawn too rarely (arXiv 2409.02908);
`evaluation.truncated_categorical_probs` says how much. Here each token's noise comes from 64 bits,
which makes it right up to 45, without float64. The bits are a function of the row's key, its
counter and the token's place in the vocabulary, and the winner is found by comparisons only: so a
draw does not depend on batches, tiles, shards or devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pallas_kernels import categorical as kernels
from pallas_kernels.categorical import Draw

IMPLEMENTATIONS = ("xla", "pallas")


def exact_categorical(
    keys: Key[Array, "rows"],
    logits: Float[Array, "rows vocabulary"],
    *,
    counter: Int[Array, "rows"] | int = 0,
    temperature: float | Float[Array, ""] = 1.0,
    floor: Float[Array, "rows"] | None = None,
    implementation: str | None = None,
) -> Draw:
    """Draws a token for each row from softmax(logits / temperature).

    Args:
        keys: typed keys; rows of one key and counter have the same noise.
        logits: of any floating type; computed in float32. Tokens with -inf are never drawn.
        counter: tells rows with the same key apart, such as the positions of an example.
        temperature: at least 0; 0 takes the largest logit, the first of equals.
        floor: tokens with smaller logits are never drawn, see `logit_floor`.
        implementation: "xla", for any machine; "pallas", a kernel for GPUs and TPUs that reads the
            logits once; None chooses. All draw the same tokens.

    Returns:
        `Draw(token, log_probability, entropy, margin)`, [rows] each. The token is `vocabulary`
        where no logit is finite or one is NaN. Log-probability of the token, entropy and margin
        (probability of the most probable token less that of the next) are those of softmax(logits)
        over the tokens that may be drawn, at temperature 1 whatever the temperature.

    Raises:
        ValueError: if shapes do not fit, the temperature is negative, or the implementation is not
            for this machine.
    """
    keys, logits = jnp.asarray(keys), jnp.asarray(logits)
    if logits.ndim != 2 or not logits.size or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"logits must be floating point [rows, vocabulary], got {logits.dtype} {logits.shape}"
        )
    rows, vocabulary = logits.shape
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != (rows,):
        raise ValueError(
            f"keys must be typed keys of shape ({rows},), got {keys.dtype} {keys.shape}"
        )
    if not isinstance(temperature, jax.core.Tracer) and not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    platform = jax.default_backend()
    if implementation is None:
        implementation = "pallas" if platform in ("gpu", "tpu") else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}, not in {IMPLEMENTATIONS}")
    if implementation == "pallas" and platform not in ("gpu", "tpu"):
        raise ValueError(f"implementation='pallas' is for GPUs and TPUs, this is {platform!r}")
    words = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
    counter = jnp.broadcast_to(jnp.asarray(counter).astype(jnp.uint32), (rows,))
    if floor is None:
        floor = jnp.full((rows,), -jnp.inf, jnp.float32)
    race = {
        "xla": kernels.draw_in_jnp,
        "gpu": kernels.draw_on_gpu,
        "tpu": kernels.draw_on_tpu,
    }[platform if implementation == "pallas" else "xla"]
    temperature = jnp.asarray(temperature, jnp.float32)
    return kernels.finish(
        race(words, counter, logits, temperature, floor.astype(jnp.float32)), vocabulary
    )


def logit_floor(
    logits: Float[Array, "*batch vocabulary"],
    *,
    top_k: int = 0,
    top_p: float | Float[Array, ""] = 1.0,
    min_p: float | Float[Array, ""] = 0.0,
    keep_crossing: bool = True,
) -> Float[Array, "*batch"]:
    """The smallest logit that is kept by the usual cuts, taken one after the other.

    Args:
        logits: -inf for tokens that are out already.
        top_k: the k largest are kept, and those equal to the last; all if 0.
        top_p: then the largest, as many as are needed for a probability of at least top_p among
            those that were kept; equals of the last are kept, too.
        min_p: then those of at least this share of the largest probability (arXiv 2407.01082).
        keep_crossing: whether the token with which the probability passes top_p is kept, as usual;
            False leaves it out, as the code of BD3-LM and ReMDM does, but for the largest.

    Returns:
        A logit; tokens below it are out.

    Raises:
        ValueError: if a number is out of range.
    """
    vocabulary = logits.shape[-1]
    for name, value, low, high in (
        ("top_k", top_k, 0, vocabulary),
        ("top_p", top_p, 0, 1),
        ("min_p", min_p, 0, 1),
    ):
        if not isinstance(value, jax.core.Tracer) and not low <= value <= high:
            raise ValueError(f"{name} is {value}; it must be in [{low}, {high}]")
    logits = logits.astype(jnp.float32)
    floor = jnp.full(logits.shape[:-1], -jnp.inf, jnp.float32)
    if top_k:
        floor = jax.lax.top_k(logits, top_k)[0][..., -1]
    if isinstance(top_p, jax.core.Tracer | jax.Array) or top_p < 1:
        kept = jnp.where(logits >= floor[..., None], logits, -jnp.inf)
        floor = jnp.maximum(floor, _nucleus(kept, top_p, keep_crossing))
    if isinstance(min_p, jax.core.Tracer | jax.Array) or min_p > 0:
        floor = jnp.maximum(floor, jnp.max(logits, axis=-1) + jnp.log(min_p))
    return floor


def _nucleus(logits: Array, top_p: float | Array, keep_crossing: bool) -> Array:
    """A search for the threshold bit by bit, through the order of float32 as integers."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    largest = jnp.max(logits, axis=-1)
    keys = _ordered(logits)

    def mass(threshold):
        return jnp.sum(jnp.where(keys >= threshold[..., None], probabilities, 0), axis=-1)

    # The largest threshold that keeps top_p; or the largest that keeps more, which is one too low.
    def narrow(_, bounds):
        low, high = bounds  # low keeps enough, high does not
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = mass(middle) >= top_p if keep_crossing else mass(middle) > top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    full = lambda value: jnp.full(largest.shape, value, jnp.int32)  # noqa: E731
    low, high = jax.lax.fori_loop(0, 32, narrow, (full(-(2**31)), full(2**31 - 1)))
    return jnp.minimum(_float_of(low if keep_crossing else high), largest)


def _ordered(x: Array) -> Array:
    """float32 as int32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _float_of(ordered: Array) -> Array:
    """The inverse of `_ordered`, with -inf below all numbers."""
    bits = jnp.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    x = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(x), jnp.where(ordered < 0, -jnp.inf, jnp.inf), x)
