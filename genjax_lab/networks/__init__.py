"""Networks as flax linen modules: U-Nets, transformers, tokenizers; attention is a function."""

from genjax_lab.networks.decoder import Decoder, chunked_attention, stacked, unstacked
from genjax_lab.networks.dhariwal_unet import DhariwalUNet, adm_imagenet64
from genjax_lab.networks.discriminator import Discriminator
from genjax_lab.networks.dit import DiT, dit_imagenet
from genjax_lab.networks.edm2_unet import EDM2UNet, edm2_imagenet
from genjax_lab.networks.image_tokenizer import ImageTokenizer, digits_tokenizer, quantizer_of
from genjax_lab.networks.magnitude_preserving import normalize_weights
from genjax_lab.networks.masked_transformer import MaskedTransformer
from genjax_lab.networks.mmdit import MMDiT, TextCondition, mmdit_flux
from genjax_lab.networks.multi_scale_quantizer import (
    MultiScaleQuantizer,
    token_counts,
    update_usage,
    used_fraction,
)
from genjax_lab.networks.neighborhood import NeighborhoodAttention
from genjax_lab.networks.residual_mlp import ResidualMLP
from genjax_lab.networks.song_unet import SongUNet, ddpmpp_cifar10, ncsnpp_cifar10
from genjax_lab.networks.var import VAR, block_causal_mask, drop_class, teacher_forced, var_imagenet
from genjax_lab.networks.vqvae import var_tokenizer

__all__ = [
    "VAR",
    "Decoder",
    "DhariwalUNet",
    "DiT",
    "Discriminator",
    "EDM2UNet",
    "ImageTokenizer",
    "MMDiT",
    "MaskedTransformer",
    "MultiScaleQuantizer",
    "NeighborhoodAttention",
    "ResidualMLP",
    "SongUNet",
    "TextCondition",
    "adm_imagenet64",
    "block_causal_mask",
    "chunked_attention",
    "ddpmpp_cifar10",
    "digits_tokenizer",
    "dit_imagenet",
    "drop_class",
    "edm2_imagenet",
    "mmdit_flux",
    "ncsnpp_cifar10",
    "normalize_weights",
    "quantizer_of",
    "stacked",
    "teacher_forced",
    "token_counts",
    "unstacked",
    "update_usage",
    "used_fraction",
    "var_imagenet",
    "var_tokenizer",
]
