"""The diffusion transformer with adaLN-zero conditioning (arXiv 2212.09748).

Patches of the image or video become tokens on a grid, to which fixed sine-cosine positions are
added. Noise level and class make one vector, from which every block regresses shifts, scales and
gates; gates and the last layer start at zero, so that a fresh network returns zero. Attention is a
function on the grid that the network receives, or to a neighborhood (arXiv 2504.16922). The
variance head of the original is just more output channels (`out_channels`); what they mean is for a
process to say.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from genjax_lab.attention import AttentionFunction, dense_attention
from genjax_lab.networks.dit_block import SMALL, DiTBlock, dense, final_layer, noise_vector
from genjax_lab.networks.labels import class_vectors, drop_labels
from genjax_lab.networks.token_grid import (
    Neighborhoods,
    TokenLayout,
    neighborhoods_of_blocks,
    patch_edges,
    patchify,
    sine_cosine_positions,
    unpatchify,
)

# Width, depth and number of heads of arXiv 2212.09748, Table 1.
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
_PATCH_SIZES = (2, 4, 8)


class DiT(nn.Module):
    """Diffusion transformer for images, videos or latents of any size divisible by the patch.

    Attributes:
        num_classes: number of classes; 0 for an unconditional network. The table of classes has
            one row more, for no class; a vector of labels mixes the rows and gives the rest of
            its sum to that last one.
        out_channels: channels of the output; None for those of the input.
        patch_size: side of a patch in pixels, one for all axes or one for each.
        width: features of a token, divisible by 4 and by `num_heads`.
        depth: number of blocks.
        num_heads: number of attention heads.
        mlp_ratio: width of the blocks' hidden layer in units of `width`.
        dropout: probability of dropping an activation at the end of a branch.
        label_dropout: probability of dropping an example's class in training, for guidance.
        noise_scale: factor of `c_noise` before its sinusoids, whose angular frequencies run from
            1 down to 1e-4: 1 suits the timesteps 0 to 1000 of the original, and a `c_noise` that
            varies by about one unit, as EDM's `ln(sigma) / 4`, wants some hundreds.
        attention: function of query, key, value `[batch, *grid, heads, head_dim]`, in blocks
            without a neighborhood.
        neighborhood: what tokens attend to, on the grid of patches: one for all blocks, or one or
            None for each; None for `attention`.
        token_tile: edges of tiles that tokens are put in before the first block and taken out of
            after the last, so that neighborhood attention need not. The blocks' dilations must then
            be equal, and those without a neighborhood attend to the whole grid. For speed alone.
        scan: hold the blocks in one `lax.scan`, which compiles one block instead of `depth`; the
            parameters of all blocks are then stacked in "blocks" instead of "block_0" and so on.
            Needs the same neighborhood in all of them.
        remat: recompute the blocks' activations in the backward pass instead of storing them.
        dtype: dtype of the computation; parameters, embeddings and output are float32.
    """

    num_classes: int = 0
    out_channels: int | None = None
    patch_size: int | tuple[int, ...] = 2
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    label_dropout: float = 0.0
    noise_scale: float = 1.0
    attention: AttentionFunction = dense_attention
    neighborhood: Neighborhoods = None
    token_tile: tuple[int, ...] | None = None
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *size channels"],
        c_noise: Float[Array, " batch"],
        labels: Int[Array, " batch"] | Float[Array, "batch num_classes"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch *size out_channels"]:
        """Evaluate the network.

        Args:
            x: scaled noisy images [batch, height, width, channels], or videos [batch, frames,
                height, width, channels].
            c_noise: noise level or timestep, [batch].
            labels: integers (`num_classes` for no class), label vectors, or None for no class.
            train: whether dropout of activations and labels is on (rng "dropout").

        Returns:
            The raw output, float32.

        Raises:
            ValueError: when shapes or attributes do not fit together.
        """
        self._check(x, c_noise)
        patch = patch_edges(self.patch_size, x)
        vectors = class_vectors(labels, num_classes=self.num_classes, batch=x.shape[0])
        if train and vectors is not None and self.label_dropout:
            vectors = drop_labels(self.make_rng("dropout"), vectors, self.label_dropout)
        condition = self._embed(c_noise, vectors)

        tokens = dense(self.width, self.dtype, "patch_embedding")(patchify(x, patch))
        positions = sine_cosine_positions(tokens.shape[1:-1], self.width)
        tokens = self._blocks(tokens + positions.astype(tokens.dtype), condition, train)
        features = math.prod(patch) * (self.out_channels or x.shape[-1])
        out = final_layer(tokens, condition, features, self.dtype)
        return unpatchify(out, patch).astype(jnp.float32)

    def _embed(self, c_noise: Array, vectors: Array | None) -> Array:
        """Embed noise level and class, in float32."""
        condition = noise_vector(c_noise, self.width, self.noise_scale)
        if vectors is None:
            return condition
        rest = 1 - vectors.sum(axis=-1, keepdims=True)
        table = self.param("class_embedding", SMALL, (self.num_classes + 1, self.width))
        return condition + jnp.concatenate([vectors, rest], axis=-1) @ table

    def _blocks(self, tokens: Array, condition: Array, train: bool) -> Array:
        """Apply all blocks, one after the other or scanned, to tokens in the order of the tiles."""
        neighborhoods = neighborhoods_of_blocks(self.neighborhood, self.depth)
        layout = TokenLayout.of(tokens.shape[1:-1], neighborhoods, self.token_tile)
        block = nn.remat(DiTBlock, static_argnums=(3,)) if self.remat else DiTBlock
        attributes = {
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }
        attentions = [layout.attention(spec, self.attention) for spec in neighborhoods]
        tokens, condition = layout.store(tokens), layout.per_group(condition)
        if not self.scan:
            for i, attention in enumerate(attentions):
                made = block(**attributes, attention=attention, name=f"block_{i}")
                tokens = made(tokens, condition, train)
            return layout.restore(tokens)
        scanned = nn.scan(
            lambda module, carry: (module(carry, condition, train), None),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
        )
        made = block(**attributes, attention=attentions[0], name="blocks")
        return layout.restore(scanned(made, tokens)[0])

    def _check(self, x: Array, c_noise: Array) -> None:
        """Raise a ValueError unless inputs and attributes fit together."""
        if c_noise.shape != x.shape[:1]:
            raise ValueError(f"c_noise must have shape {x.shape[:1]}, got {c_noise.shape}.")
        if self.width % 4 or self.width % self.num_heads:
            raise ValueError(
                f"width must be divisible by 4 and by num_heads={self.num_heads}, got {self.width}."
            )
        neighborhoods = neighborhoods_of_blocks(self.neighborhood, self.depth)
        if self.scan and len(set(neighborhoods)) > 1:
            raise ValueError(
                "scan=True needs the same neighborhood in all blocks, got "
                f"neighborhood={self.neighborhood}"
            )
        if self.token_tile and None in neighborhoods and self.attention is not dense_attention:
            raise ValueError(
                f"attention cannot be another with token_tile={self.token_tile}, where it would "
                "see tiles; give each block a neighborhood"
            )


def dit_imagenet(size: str, **overrides: Any) -> DiT:
    """Make a network of the paper, for latents of ImageNet with 4 channels.

    Args:
        size: "S/2" to "XL/8": S, B, L or XL (33M, 130M, 458M, 675M parameters with patches of 2),
            and the side of a patch, 2, 4 or 8 (arXiv 2212.09748, Tables 1 and 4).
        **overrides: attributes of `DiT` that replace those of the preset.

    Raises:
        ValueError: for an unknown size.
    """
    sizes = {f"{name}/{patch}": (name, patch) for name in _SIZES for patch in _PATCH_SIZES}
    if size not in sizes:
        raise ValueError(f"size must be one of {list(sizes)}, got {size!r}.")
    name, patch = sizes[size]
    width, depth, num_heads = _SIZES[name]
    preset = {
        "num_classes": 1000,
        "out_channels": 8,  # the paper's networks also predict a variance for each channel
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "label_dropout": 0.1,
    }
    return DiT(**(preset | overrides))
