"""The next-scale autoregressive transformer VAR (arXiv 2404.02905).

An image is K token maps of growing size, and a whole map is predicted from those before:

    p(tokens | class) = prod_k prod_i p(token_{k,i} | tokens_1, ..., tokens_{k-1}, class),

so that attention is causal over blocks, everything within a scale being visible. Its inputs are not
embeddings of tokens but features of the coarser scales, resized to the scale that is predicted
(`MultiScaleQuantizer.tokens_to_inputs`); the first scale sees the class alone. The class also
scales, shifts and gates every block. Attention is not injected as elsewhere in this package, since
its mask and its cache belong to the model. Left out: stochastic depth, and the adaLN layer that
the 512 x 512 model shares among its blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from genjax_lab.networks.multi_scale_quantizer import (
    VAR_PATCH_NUMS,
    MultiScaleQuantizer,
    scale_bounds,
)
from genjax_lab.networks.var_block import VARBlock, dense, initial_std, layer_norm

# Depths of arXiv 2404.02905; the width is 64 depth, in heads of 64.
_DEPTHS = {"d16": 16, "d20": 20, "d24": 24, "d30": 30}


def block_causal_mask(patch_nums: Sequence[int]) -> Bool[np.ndarray, "L L"]:
    """Who sees whom: entry (i, j) is true if the scale of token j is not finer than that of i.

    Raises:
        ValueError: unless `patch_nums` are positive and increase.
    """
    levels = _levels(patch_nums)
    return levels[:, None] >= levels[None, :]


def drop_class(
    key: PRNGKeyArray, labels: Int[Array, " batch"], *, num_classes: int, rate: float = 0.1
) -> Int[Array, " batch"]:
    """Replace each label by `num_classes`, no class, with probability `rate`.

    A caller that compares two networks draws the labels once and gives both the same; the rows
    without class are those where the result is `num_classes`.

    Raises:
        ValueError: if `labels` is not a vector of integers or `rate` is not in [0, 1].
    """
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers [batch], got {labels.dtype}{labels.shape}.")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}.")
    dropped = jax.random.bernoulli(key, rate, labels.shape)
    return jnp.where(dropped, jnp.asarray(num_classes, labels.dtype), labels)


class ScaleCache(NamedTuple):
    """Keys and values of the scales predicted so far, but the last scale's, which nobody reads.

    Attributes:
        keys: [batch, depth, L - p_K^2, heads, head_dim], normalised where queries are.
        values: likewise.
    """

    keys: Float[Array, "batch depth past heads head_dim"]
    values: Float[Array, "batch depth past heads head_dim"]


class VAR(nn.Module):
    """Next-scale transformer over the tokens of a `MultiScaleQuantizer`.

    Attributes:
        num_classes: number of classes; 0 for an unconditional network. The table of classes has
            one row more, for no class.
        vocab_size: number of codes V.
        codebook_channels: features of a code.
        patch_nums: sides of the token maps, increasing.
        width: features of a token, divisible by `num_heads`.
        depth: number of blocks.
        num_heads: number of attention heads.
        mlp_ratio: width of the blocks' hidden layer in units of `width`.
        normalize: normalise queries and keys, and scale the former per head by a learned factor;
            otherwise attention logits are multiplied by 0.25 / sqrt(head_dim).
        label_dropout: probability of dropping an example's class in training, for guidance.
        scan: hold the blocks in one `lax.scan`, which compiles one block instead of `depth`; the
            parameters of all blocks are then stacked in "blocks" instead of "block_0" and so on.
        remat: recompute the blocks' activations in the backward pass instead of storing them.
        dtype: dtype of the blocks; parameters, embeddings, head and output are float32.
    """

    num_classes: int = 1000
    vocab_size: int = 4096
    codebook_channels: int = 32
    patch_nums: tuple[int, ...] = VAR_PATCH_NUMS
    width: int = 1024
    depth: int = 16
    num_heads: int = 16
    mlp_ratio: float = 4.0
    normalize: bool = True
    label_dropout: float = 0.1
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, L."""
        return scale_bounds(self.patch_nums)[-1][1]

    def __call__(
        self,
        inputs: Float[Array, "batch rest codebook_channels"],
        labels: Int[Array, " batch"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch L vocab_size"]:
        """Evaluate all scales at once, teacher-forced.

        Args:
            inputs: features of the coarser scales for every scale but the first, which
                `MultiScaleQuantizer.tokens_to_inputs(tokens)` returns.
            labels: integers in [0, num_classes], `num_classes` for no class; None for nobody.
            train: whether labels are dropped (rng "dropout"); two networks called with the same
                rng drop the same ones.

        Returns:
            Logits of all tokens, float32.

        Raises:
            ValueError: when shapes, labels or attributes do not fit together.
        """
        first = scale_bounds(self.patch_nums)[0][1]
        expected = (self.num_tokens - first, self.codebook_channels)
        if inputs.ndim != 3 or inputs.shape[1:] != expected:
            raise ValueError(
                f"inputs must be [batch, {expected[0]}, {expected[1]}] for patch_nums="
                f"{self.patch_nums}, got {inputs.shape}; see MultiScaleQuantizer.tokens_to_inputs."
            )
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            raise ValueError(f"inputs must be floating point, got {inputs.dtype}.")
        labels = self._check_labels(labels, inputs.shape[0])
        if train and self.label_dropout:
            labels = drop_class(
                self.make_rng("dropout"),
                labels,
                num_classes=self.num_classes,
                rate=self.label_dropout,
            )
        mask = block_causal_mask(self.patch_nums)
        return self._evaluate(inputs, labels, (0, self.num_tokens), mask, None)[0]

    def init_cache(self, batch: int) -> ScaleCache:
        """The empty cache of `predict_scale`; needs no variables."""
        past = scale_bounds(self.patch_nums)[-1][0]
        shape = (batch, self.depth, past, self.num_heads, self.width // self.num_heads)
        return ScaleCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def predict_scale(
        self,
        inputs: Float[Array, "batch tokens_of_scale codebook_channels"] | None,
        labels: Int[Array, " batch"] | None,
        cache: ScaleCache,
        scale: int,
    ) -> tuple[Float[Array, "batch tokens_of_scale vocab_size"], ScaleCache]:
        """Evaluate one scale, given the keys and values of those before.

        Args:
            inputs: `MultiScaleQuantizer.scale_inputs` of this scale; None at scale 0.
            labels: as in `__call__`.
            cache: what the scales before left, `init_cache` at scale 0.
            scale: which scale, counted from 0; static.

        Returns:
            Logits of the scale's tokens, float32, and the cache for the next scale.

        Raises:
            ValueError: when shapes, labels or attributes do not fit together.
        """
        if not 0 <= scale < len(self.patch_nums):
            raise ValueError(f"scale must be in [0, {len(self.patch_nums)}), got {scale}.")
        start, end = scale_bounds(self.patch_nums)[scale]
        batch = cache.keys.shape[0]
        expected = None if scale == 0 else (batch, end - start, self.codebook_channels)
        found = None if inputs is None else inputs.shape
        if found != expected:
            raise ValueError(f"inputs of scale {scale} must be {expected}, got {found}.")
        if inputs is None:
            inputs = jnp.zeros((batch, 0, self.codebook_channels), jnp.float32)
        labels = self._check_labels(labels, batch)
        past = (cache.keys[:, :, :start], cache.values[:, :, :start])
        logits, own = self._evaluate(inputs, labels, (start, end), None, past)
        if scale < len(self.patch_nums) - 1:
            cache = ScaleCache(
                *(old.at[:, :, start:end].set(new) for old, new in zip(cache, own, strict=True))
            )
        return logits, cache

    @nn.compact
    def _evaluate(
        self,
        inputs: Array,
        labels: Array,
        bounds: tuple[int, int],
        mask: np.ndarray | None,
        past: tuple[Array, Array] | None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Logits of the tokens within bounds and, where a past is given, their keys and values."""
        self._check_attributes()
        width, std = self.width, initial_std(self.width)
        first, (start, end) = self.patch_nums[0] ** 2, bounds
        normal = nn.initializers.normal(std)
        classes = self.param("class_embedding", normal, (self.num_classes + 1, width))
        start_positions = self.param("start_positions", normal, (first, width))
        positions = self.param("positions", normal, (self.num_tokens, width))
        levels = self.param("level_embedding", normal, (len(self.patch_nums), width))

        # A label that is foreign to the table becomes NaN rather than another class.
        lookup = {"mode": "fill", "fill_value": jnp.nan, "wrap_negative_indices": False}
        condition = jnp.asarray(classes).at[labels].get(**lookup)
        tokens = dense(width, jnp.float32, "word_embedding", normal)(inputs)
        if start == 0:
            tokens = jnp.concatenate([condition[:, None] + start_positions, tokens], axis=1)
        tokens += (levels[_levels(self.patch_nums)] + positions)[start:end]

        tokens, own = self._blocks(tokens.astype(self.dtype), condition, mask, past)

        tokens = tokens.astype(jnp.float32)
        modulation = dense(
            2 * width, jnp.float32, "final_adaln", nn.initializers.normal(0.5 * std)
        )(nn.silu(condition))
        scale, shift = jnp.split(modulation[:, None, :], 2, axis=-1)
        tokens = layer_norm(jnp.float32, "final_norm")(tokens) * (1 + scale) + shift
        head_init = nn.initializers.normal(0.02 * std)
        return dense(self.vocab_size, jnp.float32, "head", head_init)(tokens), own

    def _blocks(self, tokens, condition, mask, past):
        """Apply all blocks, one after the other or scanned."""
        block = nn.remat(VARBlock) if self.remat else VARBlock
        attributes = {
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "normalize": self.normalize,
            "depth": self.depth,
            "dtype": self.dtype,
        }
        if not self.scan:
            made = []
            for i in range(self.depth):
                before = None if past is None else jax.tree.map(lambda p, i=i: p[:, i], past)
                tokens, own = block(**attributes, name=f"block_{i}")(
                    tokens, condition, mask, before
                )
                made.append(own)
            if past is None:
                return tokens, None
            return tokens, jax.tree.map(lambda *parts: jnp.stack(parts, axis=1), *made)

        def body(module, carry, before):
            carry, own = module(carry, condition, mask, before)
            return carry, (None if before is None else own)

        scanned = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast if past is None else 1,
            out_axes=1,
            length=self.depth,
        )
        return scanned(block(**attributes, name="blocks"), tokens, past)

    def _check_labels(self, labels: Array | None, batch: int) -> Array:
        """Return integer labels of the whole batch, or raise a ValueError."""
        if labels is None:
            return jnp.full(batch, self.num_classes, jnp.int32)
        if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"labels must be integers of shape ({batch},), got {labels.dtype}{labels.shape}."
            )
        if not isinstance(labels, jax.core.Tracer):
            values = np.asarray(labels)
            if values.size and not 0 <= values.min() <= values.max() <= self.num_classes:
                raise ValueError(
                    f"labels must be in [0, {self.num_classes}], the last for no class; got "
                    f"{values.min()} to {values.max()}."
                )
        return jnp.asarray(labels)

    def _check_attributes(self) -> None:
        scale_bounds(self.patch_nums)
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be divisible by num_heads={self.num_heads}, got {self.width}."
            )
        if min(self.depth, self.vocab_size, self.codebook_channels) < 1 or self.num_classes < 0:
            raise ValueError(
                "depth, vocab_size and codebook_channels must be positive and num_classes not "
                f"negative, got {self.depth}, {self.vocab_size}, {self.codebook_channels} and "
                f"{self.num_classes}."
            )


def teacher_forced(
    network: VAR, quantizer: MultiScaleQuantizer, quantizer_variables: Mapping[str, Any]
) -> Partial:
    """The network as a function of tokens, the form that objectives of token models take.

    Args:
        network: the transformer.
        quantizer: what its tokens come from, with its frozen variables.
        quantizer_variables: those variables.

    Returns:
        `apply(variables, tokens [batch, L], labels=None, *, train=False, rngs=None)` -> logits
        [batch, L, vocab_size], those of a token being a function of coarser scales' tokens alone.

    Raises:
        ValueError: if network and quantiser differ in scales, codes or features.
    """
    ours = (tuple(network.patch_nums), network.vocab_size, network.codebook_channels)
    others = (tuple(quantizer.patch_nums), quantizer.vocab_size, quantizer.channels)
    if ours != others:
        raise ValueError(
            f"patch_nums, vocab_size and channels of the network are {ours}, but {others} of the "
            "quantizer."
        )
    return Partial(_apply_to_tokens, network, quantizer, quantizer_variables)


def _apply_to_tokens(
    network, quantizer, quantizer_variables, variables, tokens, labels=None, **options
):
    inputs = quantizer.apply(quantizer_variables, tokens, method="tokens_to_inputs")
    return network.apply(variables, inputs, labels, **options)


def _levels(patch_nums: Sequence[int]) -> np.ndarray:
    """Scale of every token."""
    counts = [end - start for start, end in scale_bounds(patch_nums)]
    return np.repeat(np.arange(len(counts)), counts)


def var_imagenet(size: str, **overrides: Any) -> VAR:
    """Make a network of the paper for ImageNet at 256 x 256.

    Args:
        size: "d16", "d20", "d24" or "d30" (310M, 600M, 1.0B, 2.0B parameters).
        **overrides: attributes of `VAR` that replace those of the preset.

    Raises:
        ValueError: for an unknown size.
    """
    if size not in _DEPTHS:
        raise ValueError(f"size must be one of {list(_DEPTHS)}, got {size!r}.")
    depth = _DEPTHS[size]
    return VAR(**({"width": 64 * depth, "depth": depth, "num_heads": depth} | overrides))
