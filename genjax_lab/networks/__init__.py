"""Networks as flax linen modules: EDM U-Nets, EDM2, DiT; attention is injected as a function."""

from genjax_lab.networks.dhariwal_unet import DhariwalUNet, adm_imagenet64
from genjax_lab.networks.dit import DiT, dit_imagenet
from genjax_lab.networks.edm2_unet import EDM2UNet, edm2_imagenet
from genjax_lab.networks.magnitude_preserving import normalize_weights
from genjax_lab.networks.residual_mlp import ResidualMLP
from genjax_lab.networks.song_unet import SongUNet, ddpmpp_cifar10, ncsnpp_cifar10

__all__ = [
    "DhariwalUNet",
    "DiT",
    "EDM2UNet",
    "ResidualMLP",
    "SongUNet",
    "adm_imagenet64",
    "ddpmpp_cifar10",
    "dit_imagenet",
    "edm2_imagenet",
    "ncsnpp_cifar10",
    "normalize_weights",
]
