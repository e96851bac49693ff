"""The networks that are timed, ours and PyTorch's, at the sizes that small studies run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from experiments.benchmarks import torch_networks
from genjax_lab import networks


class Case(NamedTuple):
    """A network on both sides, and how it is run.

    Attributes:
      network: ours.
      twin: makes PyTorch's.
      image_shape: [height, width, channels].
      batch_size: images in a step.
      steps: optimiser steps in one timed call.
    """

    network: Any
    twin: Callable[[], torch.nn.Module]
    image_shape: tuple[int, int, int]
    batch_size: int
    steps: int


CASES = {
    "mlp": Case(
        networks.ResidualMLP(num_classes=10, width=256, num_blocks=4),
        lambda: torch_networks.ResidualMLP(64, num_classes=10, width=256, num_blocks=4),
        (8, 8, 1),
        256,
        50,
    ),
    "dit": Case(
        networks.DiT(num_classes=10, width=128, depth=4, num_heads=4, patch_size=4),
        lambda: torch_networks.DiT(
            (28, 28, 1), num_classes=10, width=128, num_blocks=4, num_heads=4, patch_size=4
        ),
        (28, 28, 1),
        64,
        5,
    ),
    "unet": Case(
        networks.SongUNet(
            resolution=28,
            num_classes=10,
            model_channels=32,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(14,),
            dropout=0.0,
        ),
        lambda: torch_networks.SongUNet(
            (28, 28, 1),
            num_classes=10,
            model_channels=32,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_levels=(1,),
        ),
        (28, 28, 1),
        32,
        4,
    ),
}
