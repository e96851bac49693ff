"""Blocks of the joint text-image transformer (arXiv 2403.03206, Fig. 2; FLUX.1's parallel blocks).

Text and image tokens are two streams. Each makes its own queries, keys and values, and attention
joins them: text sees all of the text and the image, image tokens see all of the text and, of the
image, a neighborhood or everything (arXiv 2504.16922). In tiles (`TokenLayout`) an image stream is
`[batch * groups, tokens, ...]`.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from genjax_lab.attention import NeighborhoodSpec, dense_attention
from genjax_lab.networks.dit_block import ZEROS, dense, layer_norm, split_modulation
from genjax_lab.networks.token_grid import TokenLayout


class QueriesKeysValues(NamedTuple):
    """What tokens bring to an attention, each `[batch, *tokens, heads, head_dim]`.

    Attributes:
        query: None for tokens that are only seen.
        key: of as many tokens as value.
        value: of as many tokens as key.
    """

    query: Array | None
    key: Array
    value: Array


def joint_attention(
    image: QueriesKeysValues,
    text: QueriesKeysValues,
    *,
    neighborhood: NeighborhoodSpec | None = None,
    layout: TokenLayout | None = None,
    text_mask: Bool[Array, "batch text"] | None = None,
) -> tuple[Array, Array | None]:
    """One attention over text and image tokens, in which image tokens may see a neighborhood.

    Args:
        image: of the image's tokens, in the order of `layout`.
        text: `[batch, text, heads, head_dim]` each.
        neighborhood: of the image, that each of its tokens sees beside the text; None: all of it.
        layout: how image tokens are stored; None for a grid as it is.
        text_mask: False for text tokens that nobody sees; their values must be finite. It costs
            one more feature of queries and keys, which GPUs pad to the next power of two.

    Returns:
        (image, text): the outputs, the second None if text has no queries.
    """
    layout = layout or TokenLayout(image.key.shape[1:-2])
    scale = 1 / math.sqrt(image.key.shape[-1])
    batch = len(text.key)
    flat = [x.reshape(batch, -1, *x.shape[-2:]) for x in (image.key, image.value)]
    everything = [
        jnp.concatenate(pair, axis=1) for pair in zip((text.key, text.value), flat, strict=True)
    ]
    real = layout.real_tokens()
    seen = None
    if real is not None or text_mask is not None:
        there = jnp.ones((batch, text.key.shape[1]), bool) if text_mask is None else text_mask
        real = jnp.ones(flat[0].shape[1], bool) if real is None else real
        seen = jnp.concatenate([there, jnp.broadcast_to(real, (batch, len(real)))], axis=1)

    def to_everything(query: Array) -> Array:
        key, value = everything
        return dense_attention(_asking(query, seen), _hidden(key, seen), value, scale=scale)

    text_out = None if text.query is None else to_everything(text.query)
    if neighborhood is None and layout.tile is None:
        return to_everything(image.query), text_out
    image_out = layout.attention(neighborhood)(
        _asking(image.query, text_mask),
        image.key if text_mask is None else _hidden(image.key, jnp.ones((1, 1), bool)),
        image.value,
        scale=scale,
        additional_keys=_hidden(text.key, text_mask),
        additional_values=text.value,
    )
    return image_out, text_out


def _asking(query: Array, mask: Array | None) -> Array:
    """Queries with the feature that tells hidden keys, if there are any."""
    if mask is None:
        return query
    return jnp.concatenate([query, jnp.ones_like(query[..., :1])], axis=-1)


def _hidden(key: Array, mask: Array | None) -> Array:
    """Keys with a feature that is very negative where the mask, [batch, tokens], is False."""
    if mask is None:
        return key
    far = max(-1e9, float(jnp.finfo(key.dtype).min) / 2)
    feature = jnp.where(mask, 0, far)[..., None, None].astype(key.dtype)
    return jnp.concatenate([key, jnp.broadcast_to(feature, (*key.shape[:-1], 1))], axis=-1)


class _Stream(nn.Module):
    """What a block does to one kind of tokens, before attention and after it."""

    width: int
    num_heads: int
    mlp_ratio: float
    updates: bool
    dtype: DTypeLike

    def setup(self):
        parts = 6 if self.updates else 2
        self.adaln = dense(parts * self.width, self.dtype, kernel_init=ZEROS)
        self.norm1 = layer_norm(self.dtype)
        self.qkv = dense((3 if self.updates else 2) * self.width, self.dtype)
        self.key_norm = _rms_norm(self.dtype)
        if self.updates:
            self.query_norm = _rms_norm(self.dtype)
            self.proj = dense(self.width, self.dtype)
            self.norm2 = layer_norm(self.dtype)
            self.mlp_in = dense(int(self.mlp_ratio * self.width), self.dtype)
            self.mlp_out = dense(self.width, self.dtype)

    def before(self, x: Array, condition: Array) -> tuple[QueriesKeysValues, list[Array]]:
        values = self.adaln(nn.silu(condition))
        shift, scale, *rest = split_modulation(values, 6 if self.updates else 2, like=x)
        qkv = self.qkv(self.norm1(x) * (1 + scale) + shift)
        *query, key, value = _heads(qkv, 3 if self.updates else 2, self.num_heads)
        query = self.query_norm(query[0]) if query else None
        return QueriesKeysValues(query, self.key_norm(key), value), rest

    def after(self, x: Array, attended: Array, rest: list[Array]) -> Array:
        gate_a, shift, scale, gate_m = rest
        x = x + gate_a * self.proj(attended.reshape(x.shape))
        y = self.norm2(x) * (1 + scale) + shift
        return x + gate_m * self.mlp_out(nn.gelu(self.mlp_in(y)))


class MMDiTBlock(nn.Module):
    """Block of two streams (arXiv 2403.03206), each with its own weights, joined by attention.

    Queries and keys are normalised by their root mean square, times learned scales. Gates start at
    zero, so that a fresh block is the identity.

    Attributes:
        num_heads: number of attention heads, a divisor of the width.
        mlp_ratio: width of the hidden layers in units of the tokens' width.
        neighborhood: of the image, that its tokens see beside the text; None: all of it.
        layout: how image tokens are stored; None for a grid as it is.
        updates_text: whether the text stream goes on; if not, it is only seen, and has no weights
            beyond that.
        dtype: dtype of the computation.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    neighborhood: NeighborhoodSpec | None = None
    layout: TokenLayout | None = None
    updates_text: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "image_batch *tokens features"],
        text: Float[Array, "batch text features"],
        condition: Float[Array, "batch features"],
        text_mask: Bool[Array, "batch text"] | None = None,
    ) -> tuple[Float[Array, "image_batch *tokens features"], Float[Array, "batch text features"]]:
        """Apply the block.

        Args:
            x: tokens of the image, in the order of `layout`.
            text: tokens of the text, of the same width.
            condition: vector of each example, of the same width.
            text_mask: False for text tokens that nobody sees.

        Returns:
            The tokens of both; the text as it was if `updates_text` is False.
        """
        attributes = (x.shape[-1], self.num_heads, self.mlp_ratio)
        image_stream = _Stream(*attributes, True, self.dtype, name="image")
        text_stream = _Stream(*attributes, self.updates_text, self.dtype, name="text")
        groups = len(x) // len(text)
        image, image_rest = image_stream.before(x, jnp.repeat(condition, groups, axis=0))
        words, text_rest = text_stream.before(text, condition)
        image_out, text_out = joint_attention(
            image, words, neighborhood=self.neighborhood, layout=self.layout, text_mask=text_mask
        )
        x = image_stream.after(x, image_out, image_rest)
        return x, text_stream.after(text, text_out, text_rest) if self.updates_text else text


class ParallelBlock(nn.Module):
    """Block of FLUX.1 whose attention and MLP run side by side, with the same weights for both.

    Text and image tokens differ only in what they see, which is as in `MMDiTBlock`.

    Attributes:
        num_heads: number of attention heads, a divisor of the width.
        mlp_ratio: width of the hidden layer in units of the tokens' width.
        neighborhood: of the image, that its tokens see beside the text; None: all of it.
        layout: how image tokens are stored; None for a grid as it is.
        dtype: dtype of the computation.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    neighborhood: NeighborhoodSpec | None = None
    layout: TokenLayout | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "image_batch *tokens features"],
        text: Float[Array, "batch text features"],
        condition: Float[Array, "batch features"],
        text_mask: Bool[Array, "batch text"] | None = None,
    ) -> tuple[Float[Array, "image_batch *tokens features"], Float[Array, "batch text features"]]:
        """Apply the block, as `MMDiTBlock` does."""
        width = x.shape[-1]
        adaln = dense(3 * width, self.dtype, "adaln", ZEROS)
        norm = layer_norm(self.dtype, "norm")
        layer_in = dense(3 * width + int(self.mlp_ratio * width), self.dtype, "in")
        query_norm, key_norm = (_rms_norm(self.dtype, f"{name}_norm") for name in ("query", "key"))
        layer_out = dense(width, self.dtype, "out")

        def before(tokens, condition):
            shift, scale, gate = split_modulation(adaln(nn.silu(condition)), 3, like=tokens)
            both = layer_in(norm(tokens) * (1 + scale) + shift)
            qkv, hidden = jnp.split(both, [3 * width], axis=-1)
            query, key, value = _heads(qkv, 3, self.num_heads)
            return QueriesKeysValues(query_norm(query), key_norm(key), value), hidden, gate

        def after(tokens, out, hidden, gate):
            joined = jnp.concatenate([out.reshape(tokens.shape), nn.gelu(hidden)], axis=-1)
            return tokens + gate * layer_out(joined)

        image, *image_rest = before(x, jnp.repeat(condition, len(x) // len(text), axis=0))
        words, *text_rest = before(text, condition)
        image_out, text_out = joint_attention(
            image, words, neighborhood=self.neighborhood, layout=self.layout, text_mask=text_mask
        )
        return after(x, image_out, *image_rest), after(text, text_out, *text_rest)


def _heads(x: Array, count: int, num_heads: int) -> Array:
    """[count, ..., heads, head_dim] of `count` vectors side by side."""
    x = x.reshape(*x.shape[:-1], count, num_heads, -1)
    return jnp.moveaxis(x, -3, 0)


def _rms_norm(dtype: DTypeLike, name: str | None = None) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=1e-6, dtype=dtype, name=name)
