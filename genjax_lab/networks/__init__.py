"""Networks as flax linen modules: EDM U-Nets, EDM2, DiT; attention is injected as a function."""

from genjax_lab.networks.dhariwal_unet import DhariwalUNet, adm_imagenet64
from genjax_lab.networks.residual_mlp import ResidualMLP
from genjax_lab.networks.song_unet import SongUNet, ddpmpp_cifar10, ncsnpp_cifar10

__all__ = [
    "DhariwalUNet",
    "ResidualMLP",
    "SongUNet",
    "adm_imagenet64",
    "ddpmpp_cifar10",
    "ncsnpp_cifar10",
]
