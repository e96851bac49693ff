"""A PyTorch twin of EDM2's network, under the parameter names of the published checkpoints.

Written from the equations of arXiv 2312.02696 in PyTorch's own layout (NCHW, OIHW, transposed
convolutions), so that it shares no code and no array order with the network under test.
"""

import math

import torch
import torch.nn.functional as functional
from torch import nn


def to_unit_magnitude(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    size = math.prod(x.shape[d] for d in dims)
    length = x.square().sum(dims, keepdim=True).sqrt()
    return x / (1e-4 + length / math.sqrt(size))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x) / 0.596


def mix(main: torch.Tensor, branch: torch.Tensor, share: float) -> torch.Tensor:
    return ((1 - share) * main + share * branch) / math.hypot(1 - share, share)


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int | None = None):
        super().__init__()
        grid = () if kernel is None else (kernel, kernel)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *grid))

    def forward(self, x, gain=1.0):
        rows = self.weight.flatten(1)
        rows = gain * to_unit_magnitude(rows, (1,)) / math.sqrt(rows.shape[1])
        weight = rows.view_as(self.weight)
        if weight.dim() == 2:
            return functional.linear(x, weight)
        return functional.conv2d(x, weight, padding="same")


class Fourier(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))

    def forward(self, t):
        return math.sqrt(2) * torch.cos(torch.outer(t, self.freqs) + self.phases)


class Block(nn.Module):
    def __init__(self, inputs, outputs, embedding, *, encoder, resample=None, heads=0):
        super().__init__()
        self.encoder, self.resample, self.heads = encoder, resample, heads
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res0 = Layer(outputs if encoder else inputs, outputs, 3)
        self.emb_linear = Layer(embedding, outputs)
        self.conv_res1 = Layer(outputs, outputs, 3)
        self.conv_skip = Layer(inputs, outputs, 1) if inputs != outputs else None
        if heads:
            self.attn_qkv = Layer(outputs, 3 * outputs, 1)
            self.attn_proj = Layer(outputs, outputs, 1)

    def forward(self, x, emb):
        channels = x.shape[1]
        if self.resample == "down":
            box = x.new_full((channels, 1, 2, 2), 0.25)
            x = functional.conv2d(x, box, stride=2, groups=channels)
        elif self.resample == "up":
            box = x.new_ones((channels, 1, 2, 2))
            x = functional.conv_transpose2d(x, box, stride=2, groups=channels)
        if self.encoder:
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = to_unit_magnitude(x, (1,))
        branch = self.conv_res0(silu(x))
        branch = silu(branch * (1 + self.emb_linear(emb, self.emb_gain))[:, :, None, None])
        branch = self.conv_res1(branch)
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mix(x, branch, 0.3)
        if self.heads:
            x = mix(x, self.attend(x), 0.3)
        return x.clamp(-256, 256)

    def attend(self, x):
        batch, channels, height, width = x.shape
        head_dim = channels // self.heads
        qkv = self.attn_qkv(x).view(batch, self.heads, head_dim, 3, height * width)
        query, key, value = (
            to_unit_magnitude(part, (2,)).transpose(2, 3) for part in qkv.unbind(3)
        )
        weights = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(head_dim), dim=-1)
        out = (weights @ value).transpose(2, 3).reshape(batch, channels, height, width)
        return self.attn_proj(out)


class UNet(nn.Module):
    def __init__(self, *, size, channels, classes, width, mults, blocks, attends, head_dim):
        super().__init__()
        self.classes = classes
        emb = width * max(mults)
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.emb_fourier = Fourier(width * mults[0])
        self.emb_noise = Layer(width * mults[0], emb)
        if classes:
            self.emb_label = Layer(classes, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()

        def heads(level, features):
            return features // head_dim if size >> level in attends else 0

        widths = []
        now = width * mults[0]
        for level, mult in enumerate(mults):
            at = f"{size >> level}x{size >> level}"
            if level:
                self.enc[f"{at}_down"] = Block(now, now, emb, encoder=True, resample="down")
            else:
                self.enc[f"{at}_conv"] = Layer(channels + 1, now, 3)
            widths.append(now)
            for i in range(blocks):
                block = Block(
                    now, width * mult, emb, encoder=True, heads=heads(level, width * mult)
                )
                self.enc[f"{at}_block{i}"] = block
                now = width * mult
                widths.append(now)
        for level in range(len(mults) - 1, -1, -1):
            at = f"{size >> level}x{size >> level}"
            if level == len(mults) - 1:
                self.dec[f"{at}_in0"] = Block(now, now, emb, encoder=False, heads=now // head_dim)
                self.dec[f"{at}_in1"] = Block(now, now, emb, encoder=False)
            else:
                self.dec[f"{at}_up"] = Block(now, now, emb, encoder=False, resample="up")
            out = width * mults[level]
            for i in range(blocks + 1):
                block = Block(now + widths.pop(), out, emb, encoder=False, heads=heads(level, out))
                self.dec[f"{at}_block{i}"] = block
                now = out
        self.out_conv = Layer(now, channels, 3)

    def forward(self, x, c_noise, one_hot=None):
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.classes:
            emb = mix(emb, self.emb_label(one_hot * math.sqrt(self.classes)), 0.5)
        emb = silu(emb)
        x = functional.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)
        saved = []
        for name, block in self.enc.items():
            x = block(x) if name.endswith("_conv") else block(x, emb)
            saved.append(x)
        for name, block in self.dec.items():
            if "_block" in name:
                skip = saved.pop()
                # Either half carries half of the squared magnitude of the whole.
                half = (x.shape[1] + skip.shape[1]) / 2
                scales = (math.sqrt(half / x.shape[1]), math.sqrt(half / skip.shape[1]))
                x = torch.cat([scales[0] * x, scales[1] * skip], dim=1)
            x = block(x, emb)
        return self.out_conv(x, self.out_gain)


class EDM2Twin(nn.Module):
    """The network with its uncertainty head; `forward` returns `(F, logvar)`."""

    def __init__(self, **architecture):
        super().__init__()
        self.unet = UNet(**architecture)
        self.logvar_fourier = Fourier(128)
        self.logvar_linear = Layer(128, 1)

    def forward(self, x, c_noise, one_hot=None):
        logvar = self.logvar_linear(self.logvar_fourier(c_noise))[:, 0]
        return self.unet(x, c_noise, one_hot), logvar
