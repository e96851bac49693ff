"""What samplers of masked sequences know of a network, and wrappers that change its predictions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from genjax_lab.samplers.base import SamplerState
from genjax_lab.samplers.categorical import exact_categorical, logit_floor
from pallas_kernels.categorical import Draw


class TokenDenoiser(NamedTuple):
    """A network that predicts masked tokens.

    Attributes:
        predict: (tokens [batch, length], t [batch] or None, condition, rows [batch, k] or None for
            all) -> logits [batch, k, vocabulary] at these positions.
        vocab_size: the vocabulary, without the mask, whose id this is.
        evaluations: of the network for one prediction.
    """

    predict: Callable[..., Float[Array, "batch rows vocabulary"]]
    vocab_size: int
    evaluations: int = 1

    @property
    def mask_id(self) -> int:
        """The token that stands for "masked"."""
        return self.vocab_size


def token_denoiser(
    apply: Callable[..., Array], variables: Mapping[str, Any], vocab_size: int
) -> TokenDenoiser:
    """A network with its variables.

    Args:
        apply: called as `apply(variables, tokens, t, condition, rows=rows, train=False)`.
        variables: its variables.
        vocab_size: tokens that it predicts; the mask's id.

    Raises:
        ValueError: if `vocab_size` is not positive.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}; it must be positive")
    return TokenDenoiser(Partial(_predict, apply, variables), int(vocab_size))


def _predict(apply, variables, tokens, t, condition, rows):
    return apply(variables, tokens, t, condition, rows=rows, train=False)


def suppress_tokens(denoiser: TokenDenoiser, ids: Sequence[int]) -> TokenDenoiser:
    """Never draws these tokens: their logits are -inf before anything is drawn or ranked.

    Raises:
        ValueError: if an id is no token.
    """
    ids = np.asarray(ids)
    if ids.size and not (
        np.issubdtype(ids.dtype, np.integer) and ids.min() >= 0 and ids.max() < denoiser.vocab_size
    ):
        raise ValueError(f"ids must be integers in [0, {denoiser.vocab_size}), got {ids}")
    allowed = np.ones(denoiser.vocab_size, bool)
    allowed[ids.astype(int)] = False
    return denoiser._replace(predict=Partial(_suppressed, denoiser.predict, jnp.asarray(allowed)))


def _suppressed(predict, allowed, tokens, t, condition, rows):
    return jnp.where(allowed, predict(tokens, t, condition, rows), -jnp.inf)


def guide_tokens(
    denoiser: TokenDenoiser,
    guidance_scale: float | Float[Array, ""],
    *,
    null_condition: Any = None,
    prompt: Array | None = None,
) -> TokenDenoiser:
    """Classifier-free guidance: logits + guidance_scale (logits - logits without condition).

    Args:
        denoiser: of which two predictions are made for each.
        guidance_scale: 0 for the denoiser itself.
        null_condition: the condition that says nothing, without the batch axis.
        prompt: bool [length], tokens that are masked in the prediction without condition.

    Raises:
        ValueError: if neither a null condition nor a prompt is given.
    """
    if null_condition is None and prompt is None:
        raise ValueError("null_condition or prompt must say what is left out")
    predict = Partial(
        _guided, denoiser.predict, denoiser.mask_id, guidance_scale, null_condition, prompt
    )
    return denoiser._replace(predict=predict, evaluations=2 * denoiser.evaluations)


def _guided(predict, mask_id, scale, null_condition, prompt, tokens, t, condition, rows):
    logits = predict(tokens, t, condition, rows)
    hidden = tokens if prompt is None else jnp.where(prompt, mask_id, tokens)
    if null_condition is not None:
        condition = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (len(tokens), *jnp.shape(leaf))), null_condition
        )
    without = predict(hidden, t, condition, rows)
    guided = (1 + scale) * logits - scale * without
    return jnp.where(logits == -jnp.inf, -jnp.inf, guided)


class DrawOptions(NamedTuple):
    """How tokens are drawn from logits; see `exact_categorical` and `logit_floor`."""

    temperature: float | Float[Array, ""] = 1.0
    top_k: int = 0
    top_p: float | Float[Array, ""] = 1.0
    min_p: float | Float[Array, ""] = 0.0
    keep_crossing: bool = True

    def checked(self, vocab_size: int) -> "DrawOptions":
        """Itself; ValueError if a number is out of range."""
        if not isinstance(self.temperature, jax.core.Tracer) and not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0")
        jax.eval_shape(lambda: logit_floor(jnp.zeros((1, vocab_size)), **self.cuts))
        return self

    @property
    def cuts(self) -> dict[str, Any]:
        """Arguments of `logit_floor`."""
        return {name: value for name, value in self._asdict().items() if name != "temperature"}


def draw_rows(
    keys: Key[Array, "batch"],
    logits: Float[Array, "batch rows vocabulary"],
    positions: Int[Array, "batch rows"],
    options: DrawOptions,
) -> Draw:
    """Draws a token for each row, [batch, rows] each; noise depends on key and position alone."""
    batch, rows, vocabulary = logits.shape
    flat = logits.reshape(batch * rows, vocabulary)
    draw = exact_categorical(
        jnp.repeat(keys, rows),
        flat,
        counter=positions.reshape(-1),
        temperature=options.temperature,
        floor=logit_floor(flat, **options.cuts),
    )
    return Draw(*(field.reshape(batch, rows) for field in draw))


def split_keys(keys: Key[Array, "batch"]) -> tuple[Key[Array, "batch"], Key[Array, "batch"]]:
    """Two independent keys for each example."""
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def place(
    tokens: Int[Array, "batch length"],
    positions: Int[Array, "batch rows"],
    new: Int[Array, "batch rows"],
    where: Array,
) -> Int[Array, "batch length"]:
    """Writes tokens at positions where `where` [batch, rows] says so."""
    length = tokens.shape[1]
    target = jnp.where(where, positions, length)  # out of bounds is dropped
    return jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))(tokens, target, new)


def check_sequences(shape: tuple[int, ...], length: int | None = None) -> None:
    """Raises a ValueError unless `shape` is (batch, length)."""
    if len(shape) != 2 or shape[1] < 1 or (length is not None and shape[1] != length):
        wanted = "(batch, length)" if length is None else f"(batch, {length})"
        raise ValueError(f"shape is {tuple(shape)}; it must be {wanted}")


def masks_left(state: SamplerState, mask_id: int) -> Int[Array, "batch"]:
    """Tokens of each example that are masked."""
    return jnp.sum(state.sample == mask_id, axis=1, dtype=jnp.int32)
