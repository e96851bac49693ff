"""How tokens look at each other: functions `(query, key, value) -> out` over grids of any rank.

Arrays are `[batch, *grid, heads, head_dim]`; a sequence is a 1-D grid, an image a 2-D one. Networks
receive such a function as an attribute, so one attention is swapped for another without a new
network.
"""

from collections.abc import Callable

from jaxtyping import Array

from genjax_lab.attention.dense import dense_attention
from genjax_lab.attention.grid_boxes import box_tile
from genjax_lab.attention.merging import merge_attentions
from genjax_lab.attention.neighborhood import neighborhood_attention
from genjax_lab.attention.presets import NEIGHBORHOODS, NeighborhoodPreset
from genjax_lab.attention.sharded import (
    HaloReport,
    halo_report,
    neighborhood_attention_sharded,
)
from genjax_lab.attention.simulator import SimResult, roofline_seconds, simulate, suggest
from genjax_lab.attention.tiling import plan_tiles, token_permute, token_unpermute
from genjax_lab.attention.windows import (
    NeighborhoodSpec,
    adaptive_spec,
    neighborhood_mask,
    query_bounds,
    window_bounds,
)

__all__ = [
    "NEIGHBORHOODS",
    "AttentionFunction",
    "HaloReport",
    "NeighborhoodPreset",
    "NeighborhoodSpec",
    "SimResult",
    "adaptive_spec",
    "box_tile",
    "dense_attention",
    "halo_report",
    "merge_attentions",
    "neighborhood_attention",
    "neighborhood_attention_sharded",
    "neighborhood_mask",
    "plan_tiles",
    "query_bounds",
    "roofline_seconds",
    "simulate",
    "suggest",
    "token_permute",
    "token_unpermute",
    "window_bounds",
]

AttentionFunction = Callable[[Array, Array, Array], Array]
