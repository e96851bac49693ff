"""Attention problems of published models, for the tests and benchmarks of the kernels.

Windows and strides are those that arXiv 2504.16922 and NATTEN give for FLUX.1, HunyuanVideo and
Cosmos-Predict2, and those of the vision models' own papers; tiles are what the GPU kernels take.
"""

from typing import NamedTuple

from genjax_lab.attention.windows import NeighborhoodSpec


class AttentionShape(NamedTuple):
    """One attention layer.

    Attributes:
        name: of the model, and what tells it from its other layers.
        batch: examples.
        grid: tokens along each axis.
        heads, kv_heads: of queries, and of keys and values.
        head_dim: width of a head.
        spec: the neighborhood.
        q_tile, kv_tile: edges of the tiles for GPUs.
        num_additional: text tokens that every query sees.
        dtype: of the arrays.
    """

    name: str
    batch: int
    grid: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    spec: NeighborhoodSpec
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    num_additional: int = 0
    dtype: str = "bfloat16"


def _flux(name: str, stride: int) -> AttentionShape:
    spec = NeighborhoodSpec((80, 80), stride)
    return AttentionShape(name, 1, (256, 256), 24, 24, 128, spec, (16, 8), (8, 8), 512)


def _hunyuan(name: str, stride: int | tuple[int, ...]) -> AttentionShape:
    spec = NeighborhoodSpec((18, 24, 24), stride)
    return AttentionShape(name, 1, (30, 48, 80), 24, 24, 128, spec, (2, 8, 8), (2, 4, 8), 256)


def _cosmos(name: str, window: tuple[int, ...]) -> AttentionShape:
    spec = NeighborhoodSpec(window, (1, 4, 8))
    return AttentionShape(name, 1, (24, 44, 80), 16, 16, 128, spec, (4, 4, 8), (2, 4, 8))


def _vision(name: str, heads: int, spec: NeighborhoodSpec) -> AttentionShape:
    tile = (8, 8)
    return AttentionShape(name, 8, (56, 56), heads, heads, 32, spec, tile, tile, 0, "float16")


def _line(name: str, stride: int) -> AttentionShape:
    spec = NeighborhoodSpec(2048, stride)
    return AttentionShape(name, 1, (32768,), 1, 1, 128, spec, (128,), (64,))


SHAPES = (
    _flux("flux-4k sliding", 1),
    _flux("flux-4k", 16),
    _hunyuan("hunyuan-video sliding", 1),
    _hunyuan("hunyuan-video", (16, 8, 8)),
    _cosmos("cosmos-predict2", (24, 12, 24)),
    _cosmos("cosmos-predict2 wide", (24, 28, 56)),
    _vision("swin-t blocks", 3, NeighborhoodSpec(7, 7)),
    _vision("nat-t", 2, NeighborhoodSpec(7)),
    _vision("dinat-t dilated", 2, NeighborhoodSpec(7, dilation=8)),
    _line("32k tokens sliding", 1),
    _line("32k tokens", 256),
    _line("32k tokens blocked", 2048),
    AttentionShape(
        *("mistral-7b", 1, (8192,), 32, 8, 128),
        *(NeighborhoodSpec(4096, is_causal=True), (128,), (64,)),
    ),
)

# The same windows on grids that a CPU computes in moments.
SMALL_SHAPES = (
    AttentionShape(
        *("flux-4k / 4", 1, (64, 64), 2, 2, 64, NeighborhoodSpec(32, 16)),
        *((16, 8), (8, 8), 0, "float32"),
    ),
    AttentionShape(
        *("hunyuan-video / 2", 1, (15, 24, 40), 2, 2, 64),
        *(NeighborhoodSpec((9, 12, 12), (8, 4, 4)), (2, 8, 8), (2, 4, 8), 0, "float32"),
    ),
)
