"""An image as tokens: an encoder, the quantiser over scales and a decoder (arXiv 2404.02905).

`ImageTokenizer` joins any encoder and decoder with a `MultiScaleQuantizer`. Here is a small pair
for small images, good for 8 x 8 digits on a laptop; the convolutional pair of the published
tokenizer is in `genjax_lab.networks.vqvae`. The perceptual and the adversarial loss of the paper
are left out.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from genjax_lab.networks.convolution import conv_general_dilated
from genjax_lab.networks.multi_scale_quantizer import MultiScaleQuantizer


class TokenizerOutput(NamedTuple):
    """What a tokenizer returns in training.

    Attributes:
        reconstruction: the decoded image, not clipped; gradients pass the quantiser straight.
        tokens: int32 [batch, L].
        quantizer_loss: codebook and commitment loss, a scalar.
    """

    reconstruction: Float[Array, "batch height width channels"]
    tokens: Int[Array, "batch L"]
    quantizer_loss: Float[Array, ""]


class ImageTokenizer(nn.Module):
    """Encoder, quantiser and decoder.

    Attributes:
        encoder: images [batch, height, width, channels] -> features [batch, p_K, p_K, features].
        quantizer: the quantiser of these features.
        decoder: the quantised features -> images.
    """

    encoder: nn.Module
    quantizer: MultiScaleQuantizer
    decoder: nn.Module

    def __call__(self, images: Float[Array, "batch height width channels"]) -> TokenizerOutput:
        """Encode, quantise and decode images with values in [-1, 1].

        Raises:
            ValueError: if the images do not fit the encoder, or its features the quantiser.
        """
        quantized = self.quantizer(self._encode(images))
        return TokenizerOutput(self.decoder(quantized.quantized), quantized.tokens, quantized.loss)

    def images_to_tokens(
        self, images: Float[Array, "batch height width channels"]
    ) -> Int[Array, "batch L"]:
        """Encode images with values in [-1, 1] to int32 tokens in [0, vocab_size).

        Raises:
            ValueError: if the images do not fit the encoder, or its features the quantiser.
        """
        return self.quantizer.features_to_tokens(self._encode(images))

    def tokens_to_images(
        self, tokens: Int[Array, "batch L"]
    ) -> Float[Array, "batch height width channels"]:
        """Decode tokens to images clipped to [-1, 1].

        Raises:
            ValueError: if the tokens are not [batch, L] integers.
        """
        return jnp.clip(self.decoder(self.quantizer.tokens_to_features(tokens)), -1.0, 1.0)

    def tokens_to_inputs(
        self, tokens: Int[Array, "batch L"]
    ) -> Float[Array, "batch rest channels"]:
        """Inputs of the transformer: `MultiScaleQuantizer.tokens_to_inputs`."""
        return self.quantizer.tokens_to_inputs(tokens)

    def _encode(self, images: Array) -> Array:
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                "images must be [batch, height, width, channels] floats in [-1, 1], got "
                f"{images.dtype}{images.shape}."
            )
        return self.encoder(images)


def quantizer_of(
    tokenizer: ImageTokenizer, variables: Mapping[str, Any]
) -> tuple[MultiScaleQuantizer, dict[str, Any]]:
    """The quantiser of a tokenizer and its own variables, as `samplers.next_scale` wants them.

    Raises:
        ValueError: if the variables are not a tokenizer's.
    """
    if "quantizer" not in variables.get("params", {}):
        raise ValueError(
            "variables must have params of an ImageTokenizer with a 'quantizer', got "
            f"{sorted(variables.get('params', variables))}."
        )
    return tokenizer.quantizer, {"params": variables["params"]["quantizer"]}


class PatchEncoder(nn.Module):
    """Patches through a linear layer, residual 3 x 3 convolutions and a linear layer.

    Attributes:
        patch_size: side of a patch in pixels.
        width: features within.
        features: features of the output.
        num_blocks: number of residual blocks.
    """

    patch_size: int
    width: int
    features: int
    num_blocks: int = 1

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns features"]:
        """Encode; raises ValueError if the images' sides are not divisible by `patch_size`."""
        patch = self.patch_size
        if images.shape[1] % patch or images.shape[2] % patch:
            raise ValueError(f"images must have sides divisible by {patch}, got {images.shape}.")
        x = einops.rearrange(images, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)
        x = nn.Dense(self.width, name="patch_embedding")(x)
        x = _residual_blocks(x, self.num_blocks)
        return nn.Dense(self.features, name="out")(nn.silu(x))


class PatchDecoder(nn.Module):
    """The mirror of `PatchEncoder`.

    Attributes:
        patch_size: side of a patch in pixels.
        width: features within.
        channels: channels of the image.
        num_blocks: number of residual blocks.
    """

    patch_size: int
    width: int
    channels: int
    num_blocks: int = 1

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch rows columns features"]
    ) -> Float[Array, "batch height width channels"]:
        """Decode; the images are not clipped."""
        patch = self.patch_size
        x = _residual_blocks(nn.Dense(self.width, name="in")(features), self.num_blocks)
        x = nn.Dense(patch * patch * self.channels, name="patches")(nn.silu(x))
        return einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)


def _residual_blocks(x: Array, num_blocks: int) -> Array:
    for i in range(num_blocks):
        convolve = nn.Conv(
            x.shape[-1], (3, 3), conv_general_dilated=conv_general_dilated, name=f"conv_{i}"
        )
        hidden = convolve(nn.silu(x))
        x = x + nn.Dense(x.shape[-1], name=f"mix_{i}")(nn.silu(hidden))
    return x


def digits_tokenizer(**overrides: Any) -> ImageTokenizer:
    """Make a small tokenizer of 8 x 8 grey images: 21 tokens of 64 codes on scales 1, 2 and 4.

    Args:
        **overrides: attributes of `MultiScaleQuantizer` that replace those of the preset.
    """
    preset = {"vocab_size": 64, "channels": 8, "patch_nums": (1, 2, 4), "num_phi": 0}
    quantizer = MultiScaleQuantizer(**(preset | overrides))
    patch_size = 8 // quantizer.patch_nums[-1]
    return ImageTokenizer(
        encoder=PatchEncoder(patch_size=patch_size, width=64, features=quantizer.channels),
        quantizer=quantizer,
        decoder=PatchDecoder(patch_size=patch_size, width=64, channels=1),
    )
