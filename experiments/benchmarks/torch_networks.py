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


class _UNetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, embedding, *, attends=False, sampling=None):
        super().__init__()
        self.sampling, self.attends = sampling, attends
        self.norm0, self.norm1 = _group_norm(in_channels), _group_norm(out_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(embedding, out_channels)
        same = in_channels == out_channels and sampling is None
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        if attends:
            self.norm2 = _group_norm(out_channels)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x, embedding):
        h = F.silu(self.norm0(x))
        if self.sampling == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.sampling == "up":
            x, h = (F.interpolate(part, scale_factor=2.0) for part in (x, h))
        h = self.conv0(h) + self.affine(embedding)[:, :, None, None]
        h = (self.conv1(F.silu(self.norm1(h))) + self.skip(x)) * 0.5**0.5
        if self.attends:
            query, key, value = self.qkv(self.norm2(h)).flatten(2).transpose(1, 2).chunk(3, 2)
            seen = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])
            h = (self.proj(seen[:, 0].transpose(1, 2).reshape(h.shape)) + h) * 0.5**0.5
        return h


class SongUNet(nn.Module):
    """Twin of `genjax_lab.networks.SongUNet` in its DDPM++ form, with two-tap resampling."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        num_classes: int,
        model_channels: int,
        channel_mult: tuple[int, ...],
        num_blocks: int,
        attn_levels: tuple[int, ...],
    ):
        super().__init__()
        channels, embedding = image_shape[-1], 4 * model_channels
        self.model_channels = model_channels
        self.label = nn.Linear(num_classes, model_channels)
        self.map0, self.map1 = nn.Linear(model_channels, embedding), nn.Linear(embedding, embedding)
        self.first = nn.Conv2d(channels, model_channels, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        width, skips = model_channels, [model_channels]
        for level, factor in enumerate(channel_mult):
            if level:
                self.encoder.append(_UNetBlock(width, width, embedding, sampling="down"))
                skips.append(width)
            for _ in range(num_blocks):
                attends = level in attn_levels
                out = model_channels * factor
                self.encoder.append(_UNetBlock(width, out, embedding, attends=attends))
                skips.append(width := out)
        self.decoder.append(_UNetBlock(width, width, embedding, attends=True))
        self.decoder.append(_UNetBlock(width, width, embedding))
        self.takes_skip = [False, False]
        for level in reversed(range(len(channel_mult))):
            if level < len(channel_mult) - 1:
                self.decoder.append(_UNetBlock(width, width, embedding, sampling="up"))
                self.takes_skip.append(False)
            for i in range(num_blocks + 1):
                attends = level in attn_levels and i == num_blocks
                out = model_channels * channel_mult[level]
                self.decoder.append(
                    _UNetBlock(width + skips.pop(), out, embedding, attends=attends)
                )
                self.takes_skip.append(True)
                width = out
        self.last_norm = _group_norm(width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x, c_noise, label):
        """[batch, channels, height, width] in and out."""
        half = self.model_channels // 2
        freqs = 10000.0 ** (-torch.arange(half) / (half - 1))
        angles = c_noise[:, None] * freqs
        embedding = torch.cat([angles.sin(), angles.cos()], 1)
        embedding = embedding + self.label(label * label.shape[1] ** 0.5)
        embedding = F.silu(self.map1(F.silu(self.map0(embedding))))
        skips = [h := self.first(x)]
        for block in self.encoder:
            skips.append(h := block(h, embedding))
        for block, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            h = block(torch.cat([h, skips.pop()], 1) if takes_skip else h, embedding)
        return self.last(F.silu(self.last_norm(h)))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)
