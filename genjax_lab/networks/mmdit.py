"""The joint text-image transformer of SD3 and FLUX.1 (arXiv 2403.03206), for images and videos.

Text and patches are two streams of tokens, joined by attention in blocks of two streams and then,
as FLUX.1 has them, of one; noise level and a vector of the whole text condition all of them. Image
tokens may see a neighborhood of the image beside the text (arXiv 2504.16922).

Positions of patches are SD3's sine-cosine features; the rotary positions of FLUX.1 and
HunyuanVideo, FLUX.1's embedding of a guidance scale, and text encoders are left out.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from genjax_lab.attention.presets import NEIGHBORHOODS
from genjax_lab.networks.dit_block import SMALL, dense, final_layer, noise_vector
from genjax_lab.networks.mmdit_block import MMDiTBlock, ParallelBlock
from genjax_lab.networks.token_grid import (
    Neighborhoods,
    TokenLayout,
    neighborhoods_of_blocks,
    patch_edges,
    patchify,
    sine_cosine_positions,
    unpatchify,
)


class TextCondition(NamedTuple):
    """An encoded text of each example.

    Attributes:
        tokens: `[batch, text, features]`.
        mask: False for tokens that are padding, bool `[batch, text]`; None if none are.
        pooled: one vector of the whole text, `[batch, pooled_features]`, or None.
    """

    tokens: Float[Array, "batch text features"]
    mask: Bool[Array, "batch text"] | None = None
    pooled: Float[Array, "batch pooled_features"] | None = None


class MMDiT(nn.Module):
    """Joint transformer of text and image tokens, or of text and video.

    Attributes:
        out_channels: channels of the output; None for those of the input.
        patch_size: side of a patch in pixels, one for all axes or one for each.
        width: features of a token, divisible by 4 and by `num_heads`.
        depth: number of blocks of two streams. Where no others follow, the last leaves the text.
        parallel_depth: number of blocks of one stream, attention beside MLP, after them.
        num_heads: number of attention heads.
        mlp_ratio: width of the blocks' hidden layers in units of `width`.
        uses_pooled: whether the network is conditioned on `TextCondition.pooled`.
        noise_scale: factor of `c_noise` before its sinusoids, as in `DiT`.
        neighborhood: of the image, on the grid of patches, that its tokens see beside the text: one
            for all blocks, or one or None for each of the `depth + parallel_depth`; None for all.
        token_tile: edges of tiles that image tokens are put in before the first block and taken out
            of after the last, as in `DiT`. For speed alone.
        remat: recompute the blocks' activations in the backward pass instead of storing them.
        dtype: dtype of the computation; parameters, embeddings and output are float32.
    """

    out_channels: int | None = None
    patch_size: int | tuple[int, ...] = 2
    width: int = 384
    depth: int = 6
    parallel_depth: int = 0
    num_heads: int = 6
    mlp_ratio: float = 4.0
    uses_pooled: bool = False
    noise_scale: float = 1.0
    neighborhood: Neighborhoods = None
    token_tile: tuple[int, ...] | None = None
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *size channels"],
        c_noise: Float[Array, " batch"],
        text: TextCondition | Float[Array, "batch text features"],
        *,
        train: bool = False,
    ) -> Float[Array, "batch *size out_channels"]:
        """Evaluate the network.

        Args:
            x: scaled noisy images [batch, height, width, channels], or videos [batch, frames,
                height, width, channels].
            c_noise: noise level or timestep, [batch].
            text: the encoded text, or its tokens alone.
            train: without effect: no part of the network is random.

        Returns:
            The raw output, float32.

        Raises:
            ValueError: when shapes or attributes do not fit together.
        """
        text = text if isinstance(text, TextCondition) else TextCondition(text)
        self._check(x, c_noise, text)
        patch = patch_edges(self.patch_size, x)
        condition = noise_vector(c_noise, self.width, self.noise_scale)
        if self.uses_pooled:
            hidden = nn.silu(dense(self.width, jnp.float32, "pooled_in", SMALL)(text.pooled))
            condition += dense(self.width, jnp.float32, "pooled_out", SMALL)(hidden)
        words = dense(self.width, self.dtype, "text_embedding")(text.tokens)
        tokens = dense(self.width, self.dtype, "patch_embedding")(patchify(x, patch))
        positions = sine_cosine_positions(tokens.shape[1:-1], self.width)
        tokens = self._blocks(tokens + positions.astype(tokens.dtype), words, condition, text.mask)
        features = math.prod(patch) * (self.out_channels or x.shape[-1])
        out = final_layer(tokens, condition, features, self.dtype)
        return unpatchify(out, patch).astype(jnp.float32)

    def _blocks(self, tokens: Array, words: Array, condition: Array, mask: Array | None) -> Array:
        """Apply all blocks to image tokens in the order of the tiles."""
        neighborhoods = neighborhoods_of_blocks(self.neighborhood, self.depth + self.parallel_depth)
        layout = TokenLayout.of(tokens.shape[1:-1], neighborhoods, self.token_tile)
        attributes = {
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "layout": layout,
            "dtype": self.dtype,
        }
        tokens = layout.store(tokens)
        for i, neighborhood in enumerate(neighborhoods):
            options = attributes | {"neighborhood": neighborhood, "name": f"block_{i}"}
            block = MMDiTBlock if i < self.depth else ParallelBlock
            if block is MMDiTBlock:
                options["updates_text"] = i + 1 < len(neighborhoods)
            block = nn.remat(block) if self.remat else block
            tokens, words = block(**options)(tokens, words, condition, mask)
        return layout.restore(tokens)

    def _check(self, x: Array, c_noise: Array, text: TextCondition) -> None:
        """Raise a ValueError unless inputs and attributes fit together."""
        if c_noise.shape != x.shape[:1]:
            raise ValueError(f"c_noise must have shape {x.shape[:1]}, got {c_noise.shape}.")
        if self.width % 4 or self.width % self.num_heads:
            raise ValueError(
                f"width must be divisible by 4 and by num_heads={self.num_heads}, got {self.width}."
            )
        shape = jnp.shape(text.tokens)
        if len(shape) != 3 or shape[0] != len(x) or 0 in shape:
            raise ValueError(
                f"text must have tokens [{len(x)}, text, features], none of them empty, got shape "
                f"{shape}."
            )
        if text.mask is not None and (
            text.mask.shape != shape[:2] or not jnp.issubdtype(text.mask.dtype, jnp.bool_)
        ):
            raise ValueError(
                f"text.mask must be bool {shape[:2]}, got {text.mask.dtype} {text.mask.shape}."
            )
        if (text.pooled is not None) != self.uses_pooled:
            raise ValueError(
                f"text.pooled is {'missing' if text.pooled is None else 'given'}, but uses_pooled="
                f"{self.uses_pooled}."
            )
        if self.uses_pooled and (text.pooled.ndim != 2 or len(text.pooled) != len(x)):
            raise ValueError(f"text.pooled must be [{len(x)}, features], got {text.pooled.shape}.")


def mmdit_flux(**overrides: Any) -> MMDiT:
    """A network of the size and the blocks of FLUX.1, for latents of 16 channels.

    19 blocks of two streams and 38 of one, width 3072, 24 heads of 128: 11.9 billion parameters. On
    512x512 latents (4K images), hence 256x256 tokens, image tokens see windows of 80x80 with stride
    16x16 (arXiv 2504.16922), in tiles of 16x8. FLUX.1's own weights do not fit, for what the module
    says is left out.

    Args:
        **overrides: attributes of `MMDiT` that replace those of the preset; neighborhood=None and
            token_tile=None for other sizes.
    """
    preset = {
        "width": 3072,
        "depth": 19,
        "parallel_depth": 38,
        "num_heads": 24,
        "uses_pooled": True,
        "neighborhood": NEIGHBORHOODS["flux-4k"].specs[0],
        "token_tile": NEIGHBORHOODS["flux-4k"].tile,
    }
    return MMDiT(**(preset | overrides))
