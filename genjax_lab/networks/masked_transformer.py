"""The bidirectional transformer of masked diffusion language models (MDLM, arXiv 2406.07524).

Tokens, V of them and the mask, are embedded; blocks of rotary attention and an MLP are modulated by
the noise level, as in DiT; the last layer gives logits of the V tokens. Weights have the published
model's names and meanings, see `pretrained.mdlm`. Not told the time, the network is told sigma = 0,
as the published time-free models are.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from genjax_lab.attention import AttentionFunction, dense_attention
from genjax_lab.networks.embeddings import positional_embedding
from genjax_lab.networks.rotary import rotary_angles, rotate

Cache = tuple[Float[Array, "depth batch past heads head_dim"], ...]
_FREQUENCIES = 256


class MaskedTransformer(nn.Module):
    """The network.

    Attributes:
        vocab_size: V, tokens that are predicted; the mask is token V.
        width, depth, num_heads: of the transformer; heads divide the width into even numbers.
        condition_width: features of the noise level's embedding; 0 for a network without one, whose
            blocks are not modulated.
        dropout: share of features that blocks drop in training.
        tied: whether the last layer is the embedding, for small models.
        eps: sigma(t) = -log(1 - (1 - eps) t) is what a network that is told the time is told.
        remat: whether blocks are computed again for gradients, to save memory.
        attention: how tokens look at each other, where nothing else is asked of it.
        dtype: of the computation.
    """

    vocab_size: int
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    condition_width: int = 128
    dropout: float = 0.0
    tied: bool = False
    eps: float = 1e-3
    remat: bool = False
    attention: AttentionFunction = dense_attention
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        t: Float[Array, "batch"] | None = None,
        condition: Any = None,
        *,
        rows: Int[Array, "batch rows"] | None = None,
        positions: Int[Array, "length"] | None = None,
        mask: Bool[Array, "length past_and_length"] | None = None,
        past: Cache | None = None,
        with_cache: bool = False,
        train: bool = False,
    ) -> Any:
        """Predicts tokens.

        Args:
            tokens: int32 in [0, V]; V is the mask.
            t: times in [0, 1]; None tells the network sigma = 0.
            condition: must be None.
            rows: positions whose logits are wanted; all if None.
            positions: of the tokens, for the rotation of queries and keys; 0 .. length - 1, or what
                follows `past`, if None.
            mask: which token (row) sees which (column), those of `past` first; all see all if None.
            past: keys and values of earlier tokens, as a call with `with_cache` returned them.
            with_cache: whether to return this call's keys and values, too.
            train: whether to drop features, which needs the random stream "dropout".

        Returns:
            Logits float32 [batch, rows, V]; or (logits, (keys, values)), both [depth, batch,
            length, heads, head_dim].

        Raises:
            ValueError: for tokens that are no integers [batch, length], a condition, or a width
                that the heads do not divide.
        """
        self._check(tokens, condition)
        embedding = self.param(
            "embedding",
            nn.initializers.normal(0.02 if self.tied else 1.0 / self.width**0.5),
            (self.vocab_size + 1, self.width),
        )
        x = embedding[tokens].astype(self.dtype)
        modulation = self._noise_level(t, len(tokens))
        if positions is None:
            start = 0 if past is None else past[0].shape[2]
            positions = start + jnp.arange(tokens.shape[1])
        angles = rotary_angles(positions, self.width // self.num_heads)
        block = nn.remat(MaskedBlock, static_argnums=(6,)) if self.remat else MaskedBlock
        cache = []
        for number in range(self.depth):
            earlier = None if past is None else (past[0][number], past[1][number])
            x, own = block(
                self.num_heads, self.dropout, self.attention, self.dtype, name=f"block_{number}"
            )(x, modulation, angles, mask, earlier, train)
            cache.append(own)
        if rows is not None:
            x = jnp.take_along_axis(x, rows[..., None], axis=1)
        x = _norm(self.dtype, "norm")(x)
        if modulation is not None:
            shift, scale = _modulation(modulation, 2, self.width, self.dtype, "adaln")
            x = x * (1 + scale) + shift
        if self.tied:
            logits = jnp.einsum("brd,vd->brv", x, embedding[:-1].astype(self.dtype))
            logits += self.param("bias", nn.initializers.zeros, (self.vocab_size,)).astype(x.dtype)
        else:
            zeros = nn.initializers.zeros
            logits = nn.Dense(self.vocab_size, dtype=self.dtype, kernel_init=zeros, name="head")(x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if not with_cache:
            return logits
        return logits, tuple(jnp.stack(part) for part in zip(*cache, strict=True))

    def _check(self, tokens, condition) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be integers [batch, length], got {tokens.dtype} {tokens.shape}"
            )
        if condition is not None:
            raise ValueError("this network has no condition, got one")
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"width={self.width} must be num_heads={self.num_heads} times an even number"
            )

    def _noise_level(self, t, batch) -> Float[Array, "batch features"] | None:
        if not self.condition_width:
            if t is not None:
                raise ValueError("a network with condition_width=0 cannot be told the time t")
            return None
        sigma = jnp.zeros((batch,)) if t is None else -jnp.log1p(-(1 - self.eps) * t)
        x = positional_embedding(sigma, _FREQUENCIES).astype(self.dtype)
        for number in range(2):
            name = f"noise_{number}"
            x = nn.silu(nn.Dense(self.condition_width, dtype=self.dtype, name=name)(x))
        return x


class MaskedBlock(nn.Module):
    """Rotary attention and an MLP, both modulated by the noise level where there is one.

    Attributes:
        num_heads: heads.
        dropout: share of the branches' features that is dropped in training.
        attention: used where there is neither mask nor past.
        dtype: of the computation.
    """

    num_heads: int
    dropout: float
    attention: AttentionFunction
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        modulation: Float[Array, "batch features"] | None,
        angles: Float[Array, "length half"],
        mask: Bool[Array, "length keys"] | None,
        past: tuple[Array, Array] | None,
        train: bool,
    ) -> tuple[Array, tuple[Array, Array]]:
        """The tokens, and their own keys and values."""
        width = x.shape[-1]
        drop: Callable = nn.Dropout(self.dropout, deterministic=not train)
        shifts = scales = (0.0, 0.0)
        gates = (1.0, 1.0)
        if modulation is not None:
            parts = _modulation(modulation, 6, width, self.dtype, "adaln")
            shifts, scales, gates = (parts[i::3] for i in range(3))
        dense = lambda size, name, bias: nn.Dense(  # noqa: E731
            size, dtype=self.dtype, use_bias=bias, name=name
        )
        y = _norm(self.dtype, "norm_attention")(x) * (1 + scales[0]) + shifts[0]
        qkv = dense(3 * width, "qkv", False)(y)
        qkv = qkv.reshape(*x.shape[:2], 3, self.num_heads, -1)
        query, key = (rotate(qkv[:, :, part], angles) for part in range(2))
        own = (key, qkv[:, :, 2])
        y = self._attend(query, own, mask, past).reshape(x.shape)
        x = x + gates[0] * drop(dense(width, "out", False)(y))
        y = _norm(self.dtype, "norm_mlp")(x) * (1 + scales[1]) + shifts[1]
        y = nn.gelu(dense(4 * width, "mlp_in", True)(y), approximate=True)
        return x + gates[1] * drop(dense(width, "mlp_out", True)(y)), own

    def _attend(self, query, own, mask, past):
        key, value = own
        if past is not None:
            key, value = (jnp.concatenate(pair, axis=1) for pair in zip(past, own, strict=True))
        if mask is None and past is None:
            return self.attention(query, key, value)
        return jax.nn.dot_product_attention(query, key, value, mask=mask)


def _norm(dtype: DTypeLike, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, use_bias=False, dtype=dtype, name=name)


def _modulation(x, parts: int, width: int, dtype: DTypeLike, name: str) -> list[Array]:
    zeros = nn.initializers.zeros
    out = nn.Dense(parts * width, dtype=dtype, kernel_init=zeros, name=name)(x)
    return jnp.split(out[:, None], parts, axis=-1)
