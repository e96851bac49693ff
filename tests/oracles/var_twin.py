"""A PyTorch twin of VAR, its quantiser and its tokenizer, under the published parameter names.

Written from the equations of arXiv 2404.02905 in PyTorch's own layout and with PyTorch's own
interpolation, convolution and normalisation, so that it shares no code and no array order with the
networks under test.
"""

import math

import numpy as np
import torch
import torch.nn.functional as functional
from torch import nn


class Phi(nn.Conv2d):
    def __init__(self, channels: int, ratio: float):
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, h):
        return (1 - self.ratio) * h + self.ratio * super().forward(h)


class Phis(nn.Module):
    """Convolutions that the scales share by their position in [0, 1]."""

    def __init__(self, channels: int, ratio: float, count: int):
        super().__init__()
        self.qresi_ls = nn.ModuleList([Phi(channels, ratio) for _ in range(count)])

    def at(self, place: float) -> Phi:
        count = len(self.qresi_ls)
        border = 1 / 3 / 4 if count == 4 else 1 / (2 * count)
        ticks = np.linspace(border, 1 - border, count)
        return self.qresi_ls[int(np.abs(ticks - place).argmin())]


class Quantizer(nn.Module):
    def __init__(self, codes: int, channels: int, sides: tuple[int, ...], phis: int, ratio=0.5):
        super().__init__()
        self.sides = sides
        self.embedding = nn.Embedding(codes, channels)
        self.quant_resi = Phis(channels, ratio, phis)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(sides), codes))

    def upsample(self, tokens, scale):
        """Features of one scale's tokens, [batch, channels, side, side] at full size."""
        side, full = self.sides[scale], self.sides[-1]
        codes = self.embedding(tokens).permute(0, 2, 1).reshape(len(tokens), -1, side, side)
        if scale + 1 < len(self.sides):
            codes = functional.interpolate(codes, (full, full), mode="bicubic")
        return self.quant_resi.at(scale / (len(self.sides) - 1))(codes)

    def forward(self, features, beta=0.25):
        """Returns (straight-through sum, tokens of each scale, loss)."""
        target = features.detach()
        residual, total = target.clone(), torch.zeros_like(target)
        tokens, losses = [], []
        for scale, side in enumerate(self.sides):
            small = functional.interpolate(residual, (side, side), mode="area")
            rows = small.flatten(2).transpose(1, 2)
            codes = self.embedding.weight.detach()
            tokens.append(torch.cdist(rows, codes[None].expand(len(rows), -1, -1)).argmin(-1))
            h = self.upsample(tokens[-1], scale)
            total = total + h
            residual = residual - h.detach()
            losses.append(
                functional.mse_loss(total, target)
                + beta * functional.mse_loss(total.detach(), features)
            )
        quantized = features + (total.detach() - target)
        return quantized, tokens, sum(losses) / len(losses)

    def inputs(self, tokens):
        """What the transformer sees at every scale but the first."""
        full = self.sides[-1]
        total = torch.zeros(len(tokens[0]), self.embedding.embedding_dim, full, full)
        seen = []
        for scale, side in enumerate(self.sides[1:]):
            total = total + self.upsample(tokens[scale], scale)
            seen.append(functional.interpolate(total, (side, side), mode="area").flatten(2))
        return torch.cat(seen, dim=2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, normalize: bool):
        super().__init__()
        self.heads, self.normalize = heads, normalize
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        if normalize:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.proj = nn.Linear(width, width)

    def forward(self, x, bias):
        batch, tokens, width = x.shape
        offset = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = (self.mat_qkv(x) + offset).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        if self.normalize:
            factor = self.scale_mul_1H11.clamp(max=math.log(100)).exp()
            query = functional.normalize(query, dim=-1) * factor
            key = functional.normalize(key, dim=-1)
        else:
            query = query / (4 * math.sqrt(width // self.heads))
        weights = (query @ key.transpose(2, 3) + bias).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class Modulated(nn.Module):
    """Parameters of one block; `ada_lin` is a SiLU and a linear layer."""

    def __init__(self, width: int, heads: int, ratio: float, normalize: bool):
        super().__init__()
        self.attn = Attention(width, heads, normalize)
        self.ffn = FeedForward(width, round(width * ratio))
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition, bias):
        vectors = self.ada_lin(condition).view(len(x), 1, 6, -1)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (vectors[:, :, i] for i in range(6))
        x = x + gamma1 * self.attn(norm(x) * (1 + scale1) + shift1, bias)
        return x + gamma2 * self.ffn(norm(x) * (1 + scale2) + shift2)


class Head(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, condition):
        scale, shift = self.ada_lin(condition).unsqueeze(1).chunk(2, dim=-1)
        return norm(x) * (1 + scale) + shift


def norm(x):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class VARTwin(nn.Module):
    def __init__(
        self, *, classes, codes, channels, sides, width, depth, heads, ratio=4.0, normalize=True
    ):
        super().__init__()
        length = sum(side * side for side in sides)
        self.word_embed = nn.Linear(channels, width)
        self.class_emb = nn.Embedding(classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, sides[0] ** 2, width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, length, width))
        self.lvl_embed = nn.Embedding(len(sides), width)
        self.blocks = nn.ModuleList(
            [Modulated(width, heads, ratio, normalize) for _ in range(depth)]
        )
        self.head_nm = Head(width)
        self.head = nn.Linear(width, codes)
        levels = torch.cat([torch.full((side * side,), i) for i, side in enumerate(sides)])[None]
        self.register_buffer("lvl_1L", levels)
        bias = torch.zeros(1, 1, length, length)
        for i in range(length):
            for j in range(length):
                if levels[0, j] > levels[0, i]:
                    bias[0, 0, i, j] = -math.inf
        self.register_buffer("attn_bias_for_masking", bias)

    def forward(self, features, labels):
        condition = self.class_emb(labels)
        first = condition[:, None] + self.pos_start
        x = torch.cat([first, self.word_embed(features)], dim=1)
        x = x + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        for block in self.blocks:
            x = block(x, condition, self.attn_bias_for_masking)
        return self.head(self.head_nm(x, condition))


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = group_norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attend(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = group_norm(width)
        self.qkv, self.proj_out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        query, key, value = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = (query.transpose(1, 2) @ key / math.sqrt(x.shape[1])).softmax(dim=-1)
        return x + self.proj_out((value @ weights.transpose(1, 2)).view_as(x))


def group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


def level(widths, attends: bool, resample: str | None) -> nn.Module:
    """One resolution: residual blocks, each followed by attention at the coarsest one."""
    module = nn.Module()
    module.block = nn.ModuleList([ResBlock(a, b) for a, b in widths])
    module.attn = nn.ModuleList([Attend(b) for _, b in widths] if attends else [])
    if resample == "downsample":
        module.downsample = nn.Module()
        module.downsample.conv = nn.Conv2d(widths[-1][1], widths[-1][1], 3, stride=2)
    elif resample == "upsample":
        module.upsample = nn.Module()
        module.upsample.conv = nn.Conv2d(widths[-1][1], widths[-1][1], 3, padding=1)
    return module


def run_level(module, x):
    for i, block in enumerate(module.block):
        x = block(x)
        if len(module.attn):
            x = module.attn[i](x)
    return x


def middle(width: int) -> nn.Module:
    module = nn.Module()
    module.block_1, module.attn_1 = ResBlock(width, width), Attend(width)
    module.block_2 = ResBlock(width, width)
    return module


def run_middle(module, x):
    return module.block_2(module.attn_1(module.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, channels: int, width: int, mults: tuple[int, ...], blocks: int, out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        now, last = width, len(mults) - 1
        for i, mult in enumerate(mults):
            widths = [(now, width * mult)] + [(width * mult, width * mult)] * (blocks - 1)
            now = width * mult
            self.down.append(level(widths, i == last, None if i == last else "downsample"))
        self.mid = middle(now)
        self.norm_out, self.conv_out = group_norm(now), nn.Conv2d(now, out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for module in self.down:
            x = run_level(module, x)
            if hasattr(module, "downsample"):
                x = module.downsample.conv(functional.pad(x, (0, 1, 0, 1)))
        return self.conv_out(functional.silu(self.norm_out(run_middle(self.mid, x))))


class Decoder(nn.Module):
    def __init__(self, channels: int, width: int, mults: tuple[int, ...], blocks: int, inputs: int):
        super().__init__()
        now, last = width * mults[-1], len(mults) - 1
        self.conv_in = nn.Conv2d(inputs, now, 3, padding=1)
        self.mid = middle(now)
        levels = []
        for i in reversed(range(len(mults))):
            widths = [(now, width * mults[i])] + [(width * mults[i],) * 2] * blocks
            now = width * mults[i]
            levels.insert(0, level(widths, i == last, "upsample" if i else None))
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = group_norm(now), nn.Conv2d(now, channels, 3, padding=1)

    def forward(self, x):
        x = run_middle(self.mid, self.conv_in(x))
        for module in reversed(self.up):
            x = run_level(module, x)
            if hasattr(module, "upsample"):
                x = module.upsample.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv_out(functional.silu(self.norm_out(x)))


class VQVAETwin(nn.Module):
    def __init__(self, *, channels, width, mults, blocks, codes, features, sides, phis=4):
        super().__init__()
        self.encoder = Encoder(channels, width, mults, blocks, features)
        self.decoder = Decoder(channels, width, mults, blocks, features)
        self.quantize = Quantizer(codes, features, sides, phis)
        self.quant_conv = nn.Conv2d(features, features, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, images):
        features = self.quant_conv(self.encoder(images))
        quantized, tokens, loss = self.quantize(features)
        return self.decoder(self.post_quant_conv(quantized)), tokens, loss
