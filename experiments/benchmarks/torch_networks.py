"""The benchmarked networks in PyTorch, written as a PyTorch user would.

They have the same layers and sizes as ours; their weights are not shared, since only time is
compared.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class ResidualMLP(nn.Module):
    """Twin of `genjax_lab.networks.ResidualMLP`."""

    def __init__(self, size: int, *, num_classes: int, width: int, num_blocks: int):
        super().__init__()
        self.register_buffer("freqs", torch.randn(16))
        self.noise, self.label = nn.Linear(32, width), nn.Linear(num_classes, width, bias=False)
        self.embed, self.first = nn.Linear(width, width), nn.Linear(size, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "modulation": nn.Linear(width, 3 * width),
                    "norm": nn.LayerNorm(width, elementwise_affine=False),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width),
                }
            )
            for _ in range(num_blocks)
        )
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, size)

    def forward(self, x, c_noise, label):
        """[batch, channels, height, width] in and out."""
        angles = 2 * math.pi * c_noise[:, None] * self.freqs
        condition = self.noise(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label)
        condition = F.silu(self.embed(F.silu(condition)))
        h = self.first(x.flatten(1))
        for block in self.blocks:
            shift, scale, gate = block["modulation"](condition).chunk(3, 1)
            hidden = block["up"](block["norm"](h) * (1 + scale) + shift)
            h = h + gate * block["down"](F.silu(hidden))
        return self.last(self.norm(h)).reshape(x.shape)


class DiT(nn.Module):
    """Twin of `genjax_lab.networks.DiT`."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        num_classes: int,
        width: int,
        num_blocks: int,
        num_heads: int,
        patch_size: int,
    ):
        super().__init__()
        height, _, channels = image_shape
        self.num_heads, self.patch_size, self.grid = num_heads, patch_size, height // patch_size
        self.patch = nn.Conv2d(channels, width, patch_size, patch_size)
        self.register_buffer("position", torch.randn(1, self.grid**2, width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Linear(num_classes, width, bias=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "modulation": nn.Linear(width, 6 * width),
                    "norm1": nn.LayerNorm(width, elementwise_affine=False),
                    "qkv": nn.Linear(width, 3 * width),
                    "proj": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width, elementwise_affine=False),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, patch_size**2 * channels)

    def forward(self, x, c_noise, label):
        """[batch, channels, height, width] in and out."""
        batch, channels = x.shape[:2]
        freqs = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = c_noise[:, None] * freqs
        condition = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label)
        condition = F.silu(condition)[:, None]
        h = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block["modulation"](condition).chunk(
                6, 2
            )
            qkv = block["qkv"](block["norm1"](h) * (1 + scale1) + shift1)
            query, key, value = (
                part.reshape(batch, -1, self.num_heads, h.shape[-1] // self.num_heads).transpose(
                    1, 2
                )
                for part in qkv.chunk(3, 2)
            )
            seen = F.scaled_dot_product_attention(query, key, value)
            h = h + gate1 * block["proj"](seen.transpose(1, 2).reshape(h.shape))
            hidden = block["up"](block["norm2"](h) * (1 + scale2) + shift2)
            h = h + gate2 * block["down"](F.gelu(hidden, approximate="tanh"))
        shift, scale = self.modulation(condition).chunk(2, 2)
        patches = self.last(self.norm(h) * (1 + scale) + shift)
        patches = patches.reshape(batch, self.grid, self.grid, channels, *2 * (self.patch_size,))
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
