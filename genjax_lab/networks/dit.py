"""The diffusion transformer with adaLN-zero conditioning (arXiv 2212.09748).

Patches of the image become tokens on a 2-D grid, to which fixed sine-cosine positions are added.
Noise level and class make one vector, from which every block regresses shifts, scales and gates;
gates and the last layer start at zero, so that a fresh network returns zero. Attention is a
function on the grid that the network receives. The variance head of the original is just more
output channels (`out_channels`); what they mean is for a process to say.
"""

from typing import Any

import einops
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from genjax_lab.attention import AttentionFunction, dense_attention
from genjax_lab.networks.embeddings import positional_embedding
from genjax_lab.networks.labels import class_vectors, drop_labels

# Width, depth and number of heads of arXiv 2212.09748, Table 1.
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
_PATCH_SIZES = (2, 4, 8)

# Sinusoids of the noise level, as in the original.
_NOISE_FEATURES = 256

_XAVIER = nn.initializers.xavier_uniform()
_ZEROS = nn.initializers.zeros
_SMALL = nn.initializers.normal(0.02)


def sine_cosine_positions(height: int, width: int, features: int) -> Float[np.ndarray, "h w c"]:
    """Fixed positions of a grid: half of the features tell the column, half the row.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        features: number of features, divisible by 4.

    Returns:
        `[sin, cos]` of the column times `10000 ** (-4 i / features)`, then of the row; float32
        [height, width, features].

    Raises:
        ValueError: if `features` is not divisible by 4.
    """
    if features % 4:
        raise ValueError(f"the width of the positions must be divisible by 4, got {features}.")
    frequencies = 10000.0 ** (-np.arange(features // 4) / (features / 4))

    def waves(count: int) -> np.ndarray:
        angles = np.outer(np.arange(count), frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    shape = (height, width, features // 2)
    columns = np.broadcast_to(waves(width)[None, :], shape)
    rows = np.broadcast_to(waves(height)[:, None], shape)
    return np.concatenate([columns, rows], axis=-1).astype(np.float32)


class DiTBlock(nn.Module):
    """Transformer block whose norms and residual branches are conditioned (adaLN-zero, Fig. 3).

    Attributes:
        num_heads: number of attention heads, a divisor of the width.
        mlp_ratio: width of the hidden layer in units of the tokens' width.
        dropout: probability of dropping an activation at the end of a branch.
        attention: function of query, key, value `[batch, height, width, heads, head_dim]`.
        dtype: dtype of the computation.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    attention: AttentionFunction = dense_attention
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width features"],
        condition: Float[Array, "batch features"],
        train: bool = False,
    ) -> Float[Array, "batch height width features"]:
        """Apply the block; `train` turns dropout on."""
        batch, height, width, features = x.shape
        drop = nn.Dropout(self.dropout, deterministic=not train)
        modulation = _dense(6 * features, self.dtype, "adaln", _ZEROS)(nn.silu(condition))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(
            modulation[:, None, None, :], 6, axis=-1
        )

        y = _layer_norm(self.dtype, "norm1")(x) * (1 + scale_a) + shift_a
        qkv = _dense(3 * features, self.dtype, "qkv")(y)
        qkv = qkv.reshape(batch, height, width, 3, self.num_heads, features // self.num_heads)
        y = self.attention(*jnp.moveaxis(qkv, 3, 0)).reshape(x.shape)
        x = x + gate_a * drop(_dense(features, self.dtype, "proj")(y))

        y = _layer_norm(self.dtype, "norm2")(x) * (1 + scale_m) + shift_m
        y = nn.gelu(_dense(int(self.mlp_ratio * features), self.dtype, "mlp_in")(y))
        return x + gate_m * drop(_dense(features, self.dtype, "mlp_out")(y))


class DiT(nn.Module):
    """Diffusion transformer for images or latents of any size divisible by the patch.

    Attributes:
        num_classes: number of classes; 0 for an unconditional network. The table of classes has
            one row more, for no class; a vector of labels mixes the rows and gives the rest of
            its sum to that last one.
        out_channels: channels of the output; None for those of the input.
        patch_size: side of a patch in pixels.
        width: features of a token, divisible by 4 and by `num_heads`.
        depth: number of blocks.
        num_heads: number of attention heads.
        mlp_ratio: width of the blocks' hidden layer in units of `width`.
        dropout: probability of dropping an activation at the end of a branch.
        label_dropout: probability of dropping an example's class in training, for guidance.
        noise_scale: factor of `c_noise` before its sinusoids, whose angular frequencies run from
            1 down to 1e-4: 1 suits the timesteps 0 to 1000 of the original, and a `c_noise` that
            varies by about one unit, as EDM's `ln(sigma) / 4`, wants some hundreds.
        attention: function of query, key, value `[batch, height, width, heads, head_dim]`.
        scan: hold the blocks in one `lax.scan`, which compiles one block instead of `depth`; the
            parameters of all blocks are then stacked in "blocks" instead of "block_0" and so on.
        remat: recompute the blocks' activations in the backward pass instead of storing them.
        dtype: dtype of the computation; parameters, embeddings and output are float32.
    """

    num_classes: int = 0
    out_channels: int | None = None
    patch_size: int = 2
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    label_dropout: float = 0.0
    noise_scale: float = 1.0
    attention: AttentionFunction = dense_attention
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        c_noise: Float[Array, " batch"],
        labels: Int[Array, " batch"] | Float[Array, "batch num_classes"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch height width out_channels"]:
        """Evaluate the network.

        Args:
            x: scaled noisy images, NHWC.
            c_noise: noise level or timestep, [batch].
            labels: integers (`num_classes` for no class), label vectors, or None for no class.
            train: whether dropout of activations and labels is on (rng "dropout").

        Returns:
            The raw output, float32.

        Raises:
            ValueError: when shapes or attributes do not fit together.
        """
        self._check(x, c_noise)
        patch = self.patch_size
        vectors = class_vectors(labels, num_classes=self.num_classes, batch=x.shape[0])
        if train and vectors is not None and self.label_dropout:
            vectors = drop_labels(self.make_rng("dropout"), vectors, self.label_dropout)
        condition = self._embed(c_noise, vectors)

        patches = einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)
        tokens = _dense(self.width, self.dtype, "patch_embedding")(patches)
        tokens += sine_cosine_positions(*tokens.shape[1:]).astype(tokens.dtype)
        tokens = self._blocks(tokens, condition, train)

        modulation = _dense(2 * self.width, self.dtype, "final_adaln", _ZEROS)(nn.silu(condition))
        shift, scale = jnp.split(modulation[:, None, None, :], 2, axis=-1)
        tokens = _layer_norm(self.dtype, "final_norm")(tokens) * (1 + scale) + shift
        features = patch * patch * (self.out_channels or x.shape[-1])
        out = _dense(features, self.dtype, "final_proj", _ZEROS)(tokens)
        out = einops.rearrange(out, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)
        return out.astype(jnp.float32)

    def _embed(self, c_noise: Array, vectors: Array | None) -> Array:
        """Embed noise level and class, in float32."""
        waves = positional_embedding(self.noise_scale * c_noise, _NOISE_FEATURES)
        hidden = nn.silu(_dense(self.width, jnp.float32, "noise_in", _SMALL)(waves))
        condition = _dense(self.width, jnp.float32, "noise_out", _SMALL)(hidden)
        if vectors is None:
            return condition
        rest = 1 - vectors.sum(axis=-1, keepdims=True)
        table = self.param("class_embedding", _SMALL, (self.num_classes + 1, self.width))
        return condition + jnp.concatenate([vectors, rest], axis=-1) @ table

    def _blocks(self, tokens: Array, condition: Array, train: bool) -> Array:
        """Apply all blocks, one after the other or scanned."""
        block = nn.remat(DiTBlock, static_argnums=(3,)) if self.remat else DiTBlock
        attributes = {
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "dropout": self.dropout,
            "attention": self.attention,
            "dtype": self.dtype,
        }
        if not self.scan:
            for i in range(self.depth):
                tokens = block(**attributes, name=f"block_{i}")(tokens, condition, train)
            return tokens
        scanned = nn.scan(
            lambda module, carry: (module(carry, condition, train), None),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
        )
        return scanned(block(**attributes, name="blocks"), tokens)[0]

    def _check(self, x: Array, c_noise: Array) -> None:
        """Raise a ValueError unless inputs and attributes fit together."""
        if x.ndim != 4 or x.shape[1] % self.patch_size or x.shape[2] % self.patch_size:
            raise ValueError(
                "x must be [batch, height, width, channels] with height and width divisible by "
                f"patch_size={self.patch_size}, got shape {x.shape}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be floating point, got {x.dtype}.")
        if c_noise.shape != x.shape[:1]:
            raise ValueError(f"c_noise must have shape {x.shape[:1]}, got {c_noise.shape}.")
        if self.width % 4 or self.width % self.num_heads:
            raise ValueError(
                f"width must be divisible by 4 and by num_heads={self.num_heads}, got {self.width}."
            )


def _dense(
    features: int,
    dtype: DTypeLike,
    name: str,
    kernel_init: nn.initializers.Initializer = _XAVIER,
) -> nn.Dense:
    """Make a dense layer with the initialisation of the original."""
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


def _layer_norm(dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """Make a layer norm without parameters, since the conditioning supplies them."""
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype, name=name)


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
