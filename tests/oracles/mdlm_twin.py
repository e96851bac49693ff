"""MDLM's network (arXiv 2406.07524) in PyTorch, from its equations, under its published names."""

import math

import torch
from torch import nn
from torch.nn import functional


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return functional.layer_norm(x, x.shape[-1:]) * self.weight


def rotated(x):
    """[batch, length, heads, features]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1)


class Block(nn.Module):
    def __init__(self, width, heads, condition):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.adaLN_modulation = nn.Linear(condition, 6 * width)

    def forward(self, x, c):
        parts = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        qkv = self.attn_qkv(self.norm1(x) * (1 + scale) + shift)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key, value = (y.transpose(1, 2) for y in (rotated(query), rotated(key), value))
        y = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + gate * self.attn_out(y)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class Embedding(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(rows, width))


class NoiseLevel(nn.Module):
    def __init__(self, condition):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, condition), nn.SiLU(), nn.Linear(condition, condition)
        )

    def forward(self, sigma):
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        angles = sigma[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Output(nn.Module):
    def __init__(self, width, rows, condition):
        super().__init__()
        self.norm_final = Norm(width)
        self.linear = nn.Linear(width, rows)
        self.adaLN_modulation = nn.Linear(condition, 2 * width)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Network(nn.Module):
    def __init__(self, rows, width=32, depth=2, heads=4, condition=16):
        super().__init__()
        self.vocab_embed = Embedding(rows, width)
        self.sigma_map = NoiseLevel(condition)
        self.blocks = nn.ModuleList([Block(width, heads, condition) for _ in range(depth)])
        self.output_layer = Output(width, rows, condition)

    def forward(self, tokens, sigma):
        x = self.vocab_embed.embedding[tokens]
        c = functional.silu(self.sigma_map(sigma))
        for block in self.blocks:
            x = block(x, c)
        return self.output_layer(x, c)
