"""The residual quantiser over scales of VAR (arXiv 2404.02905, Algorithms 1 and 2).

A feature map f [height, width, channels] becomes K token maps of growing size p_k x p_k, all from
one codebook: with the residual r = f and the sum f_hat = 0,

    tokens_k = nearest codes of area(r, p_k),   h_k = phi_k(bicubic(codes(tokens_k), p_K)),
    r <- r - h_k,   f_hat <- f_hat + h_k,       phi(h) = (1 - ratio) h + ratio conv3x3(h).

A transformer that predicts tokens_{k+1} sees area(f_hat, p_{k+1}) of the scales before. Token maps
are concatenated, coarse to fine and row by row, into L = sum_k p_k^2 tokens.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from genjax_lab.networks.convolution import conv2d
from genjax_lab.networks.interpolation import resize_area, resize_bicubic

# Scales of 256 x 256 images, whose features are 16 x 16.
VAR_PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def scale_bounds(patch_nums: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """First token of every scale and the one after its last; the last bound is L.

    Raises:
        ValueError: unless `patch_nums` are positive and increase.
    """
    sizes = tuple(patch_nums)
    if not sizes or sizes[0] < 1 or any(a >= b for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"patch_nums must be positive and increase, got {sizes}.")
    ends = tuple(itertools.accumulate(size**2 for size in sizes))
    return tuple(zip((0, *ends[:-1]), ends, strict=True))


def phi_of_scale(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """Which of `num_phi` residual convolutions each scale uses: the nearest on [0, 1].

    Scale k lies at k / (K - 1), the only one of K = 1 at 1. Convolution i of n lies at evenly
    spaced points from 1/(2n) to 1 - 1/(2n); for n = 4, from 1/12 to 11/12. Where two are equally
    near, float64's rounding decides, in the original's order of operations.
    """
    border = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(border, 1 - border, num_phi)
    places = [k / (num_scales - 1) if num_scales > 1 else 1.0 for k in range(num_scales)]
    return tuple(int(np.argmin(np.abs(ticks - place))) for place in places)


class QuantizerOutput(NamedTuple):
    """What quantisation returns in training.

    Attributes:
        quantized: the sum over scales, [batch, height, width, channels]; its gradient goes to the
            features as if nothing had been quantised.
        tokens: int32 [batch, L].
        loss: codebook loss + beta times commitment loss, a scalar.
    """

    quantized: Float[Array, "batch height width channels"]
    tokens: Int[Array, "batch L"]
    loss: Float[Array, ""]


class MultiScaleQuantizer(nn.Module):
    """Residual vector quantiser of square feature maps over scales, with one codebook.

    Attributes:
        vocab_size: number of codes V.
        channels: features of a code.
        patch_nums: sides of the token maps, increasing; the last is that of the features.
        residual_ratio: share of the convolution in phi; at 0 there is none.
        num_phi: number of convolutions that the scales share; 0 for one of each scale.
        beta: weight of the commitment loss.
        cosine: choose codes by cosine similarity instead of distance.
    """

    vocab_size: int = 4096
    channels: int = 32
    patch_nums: tuple[int, ...] = VAR_PATCH_NUMS
    residual_ratio: float = 0.5
    num_phi: int = 4
    beta: float = 0.25
    cosine: bool = False

    def setup(self):
        """Declare the codebook and the convolutions."""
        scale_bounds(self.patch_nums)
        if self.vocab_size < 1 or self.channels < 1 or self.num_phi < 0:
            raise ValueError(
                "vocab_size and channels must be positive and num_phi not negative, got "
                f"{self.vocab_size}, {self.channels} and {self.num_phi}."
            )
        shape = (self.vocab_size, self.channels)
        self.codebook = self.param("codebook", nn.initializers.normal(0.1), shape)

        def init_phi(key):
            kernel = nn.initializers.lecun_normal()(key, (3, 3, self.channels, self.channels))
            return {"kernel": kernel, "bias": jnp.zeros(self.channels)}

        # Declared here, since with few scales some are the nearest of none and never used.
        count = (self.num_phi or len(self.patch_nums)) if self.residual_ratio else 0
        self.phi = [self.param(f"phi_{i}", init_phi) for i in range(count)]

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, L."""
        return scale_bounds(self.patch_nums)[-1][1]

    def __call__(self, features: Float[Array, "batch height width channels"]) -> QuantizerOutput:
        """Quantise features, with a gradient and the losses of training.

        The loss is the mean over scales of ||f_hat_k - sg(f)||^2 + beta ||sg(f_hat_k) - f||^2,
        squared errors being means over all elements.

        Raises:
            ValueError: if the features are not [batch, p_K, p_K, channels] floats.
        """
        stop = jax.lax.stop_gradient
        features = self._check_features(features)
        tokens, sums = self._quantize(stop(features))
        losses = [
            jnp.mean((f_hat - stop(features)) ** 2)
            + self.beta * jnp.mean((stop(f_hat) - features) ** 2)
            for f_hat in sums
        ]
        quantized = features + stop(sums[-1] - features)
        return QuantizerOutput(quantized, tokens, jnp.mean(jnp.stack(losses)))

    def features_to_tokens(
        self, features: Float[Array, "batch height width channels"]
    ) -> Int[Array, "batch L"]:
        """Quantise features; int32 tokens in [0, vocab_size).

        Raises:
            ValueError: if the features are not [batch, p_K, p_K, channels] floats.
        """
        return self._quantize(self._check_features(features))[0]

    def tokens_to_features(
        self, tokens: Int[Array, "batch L"]
    ) -> Float[Array, "batch height width channels"]:
        """Sum the features of all scales, f_hat.

        Raises:
            ValueError: if the tokens are not [batch, L] integers.
        """
        return self._partial_sums(tokens)[-1]

    def tokens_to_inputs(
        self, tokens: Int[Array, "batch L"]
    ) -> Float[Array, "batch rest channels"]:
        """Make the inputs of a teacher-forced transformer: area(f_hat of scales < k, p_k), k >= 1.

        Returns:
            [batch, L - p_0^2, channels], all scales but the first.

        Raises:
            ValueError: if the tokens are not [batch, L] integers.
        """
        sums = self._partial_sums(tokens, last=False)
        inputs = [self.scale_inputs(f_hat, k + 1) for k, f_hat in enumerate(sums)]
        empty = jnp.zeros((tokens.shape[0], 0, self.channels), self.codebook.dtype)
        return jnp.concatenate([empty, *inputs], axis=1)

    def add_scale(
        self,
        f_hat: Float[Array, "batch height width channels"],
        tokens: Int[Array, "batch tokens_of_scale"],
        scale: int,
    ) -> Float[Array, "batch height width channels"]:
        """Add the features h_k of one scale's tokens to the sum of the scales before.

        Args:
            f_hat: sum of the scales before, zeros before the first.
            tokens: tokens of this scale, p_k^2 of them, in [0, vocab_size).
            scale: k, static.
        """
        side, size = self.patch_nums[scale], self.patch_nums[-1]
        # A foreign token becomes NaN rather than another code.
        lookup = {"mode": "fill", "fill_value": jnp.nan, "wrap_negative_indices": False}
        codes = jnp.asarray(self.codebook).at[tokens].get(**lookup)
        h = einops.rearrange(codes, "b (h w) c -> b h w c", h=side)
        if scale < len(self.patch_nums) - 1:
            h = resize_bicubic(h, (size, size))
        if self.phi:
            ratio, highest = self.residual_ratio, jax.lax.Precision.HIGHEST
            phi = self.phi[self._phi_of_scale(scale)]
            convolved = conv2d(h, phi["kernel"], precision=highest) + phi["bias"]
            h = h * (1 - ratio) + convolved * ratio
        return f_hat + h

    def scale_inputs(
        self, f_hat: Float[Array, "batch height width channels"], scale: int
    ) -> Float[Array, "batch tokens_of_scale channels"]:
        """Features that the transformer sees when it predicts scale k >= 1 (static)."""
        side = self.patch_nums[scale]
        return einops.rearrange(resize_area(f_hat, (side, side)), "b h w c -> b (h w) c")

    def _quantize(self, features: Array) -> tuple[Array, list[Array]]:
        """Tokens, and the partial sums f_hat after each scale."""
        f_hat, tokens, sums = jnp.zeros_like(features), [], []
        for scale in range(len(self.patch_nums)):
            targets = self.scale_inputs(features - jax.lax.stop_gradient(f_hat), scale)
            tokens.append(self._nearest_codes(targets))
            f_hat = self.add_scale(f_hat, tokens[-1], scale)
            sums.append(f_hat)
        return jnp.concatenate(tokens, axis=1), sums

    def _nearest_codes(self, targets: Array) -> Array:
        codes = jax.lax.stop_gradient(self.codebook)
        highest = jax.lax.Precision.HIGHEST  # bfloat16 products would choose other codes
        if self.cosine:
            unit = codes / jnp.maximum(jnp.linalg.norm(codes, axis=-1, keepdims=True), 1e-12)
            similarity = jnp.einsum("blc,vc->blv", targets, unit, precision=highest)
            return jnp.argmax(similarity, axis=-1).astype(jnp.int32)
        # ||z - e||^2 = ||z||^2 - 2 <z, e> + ||e||^2, whose first term is that of every code.
        products = jnp.einsum("blc,vc->blv", targets, codes, precision=highest)
        distances = jnp.sum(codes**2, axis=-1) - 2 * products
        return jnp.argmin(distances, axis=-1).astype(jnp.int32)

    def _partial_sums(self, tokens: Array, last: bool = True) -> list[Array]:
        if tokens.ndim != 2 or tokens.shape[1] != self.num_tokens:
            raise ValueError(f"tokens must be [batch, {self.num_tokens}], got {tokens.shape}.")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers, got {tokens.dtype}.")
        size = self.patch_nums[-1]
        f_hat = jnp.zeros((tokens.shape[0], size, size, self.channels), self.codebook.dtype)
        sums = []
        bounds = scale_bounds(self.patch_nums)
        for scale, (start, end) in enumerate(bounds if last else bounds[:-1]):
            f_hat = self.add_scale(f_hat, tokens[:, start:end], scale)
            sums.append(f_hat)
        return sums

    def _phi_of_scale(self, scale: int) -> int:
        count = len(self.patch_nums)
        return phi_of_scale(count, self.num_phi or count)[scale]

    def _check_features(self, features: Array) -> Array:
        size = self.patch_nums[-1]
        if features.ndim != 4 or features.shape[1:] != (size, size, self.channels):
            raise ValueError(
                f"features must be [batch, {size}, {size}, {self.channels}], the last of "
                f"patch_nums={self.patch_nums} and channels; got {features.shape}."
            )
        if not jnp.issubdtype(features.dtype, jnp.floating):
            raise ValueError(f"features must be floating point, got {features.dtype}.")
        return features.astype(jnp.float32)


def token_counts(
    tokens: Int[Array, "batch L"], patch_nums: Sequence[int], vocab_size: int
) -> Int[Array, "K V"]:
    """How often each scale of a batch uses each code.

    Raises:
        ValueError: if the tokens are not [batch, L] for these scales.
    """
    bounds = scale_bounds(patch_nums)
    if tokens.ndim != 2 or tokens.shape[1] != bounds[-1][1]:
        raise ValueError(f"tokens must be [batch, {bounds[-1][1]}], got {tokens.shape}.")
    counts = [jnp.bincount(tokens[:, a:b].reshape(-1), length=vocab_size) for a, b in bounds]
    return jnp.stack(counts)


def update_usage(
    usage: Float[Array, "K V"], counts: Int[Array, "K V"], step: int | Int[Array, ""]
) -> Float[Array, "K V"]:
    """Moving average of `token_counts` over batches.

    Args:
        usage: the average so far; whatever it is, step 0 replaces it.
        counts: counts of this batch.
        step: batches seen before. The decay is 0.9 for the first hundred and 0.99 from then on.
    """
    decay = jnp.where(step == 0, 0.0, jnp.where(step < 100, 0.9, 0.99))
    return decay * usage + (1 - decay) * counts


def used_fraction(
    usage: Float[Array, "K V"], *, batch: int, patch_nums: Sequence[int]
) -> Float[Array, " K"]:
    """Fraction of codes in use at each scale.

    A code is in use if its average count is at least 8 % of what every code would have if the
    tokens of the last scale were spread evenly, batch p_K^2 / V.
    """
    margin = 0.08 * batch * math.prod((patch_nums[-1],) * 2) / usage.shape[1]
    return jnp.mean(usage >= margin, axis=1)
