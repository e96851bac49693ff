"""A neighborhood of a grid, and how the tokens of the grid are stored in arrays."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array

from genjax_lab.attention.windows import AxisWindow, NeighborhoodSpec

LAYOUTS = ("grid", "tiled")


class Problem(NamedTuple):
    """A neighborhood of a grid, and how its tokens are stored.

    Attributes:
        spec: the neighborhood.
        axes: the same along each axis of the grid.
        grid: tokens along each axis.
        layout: "grid" or "tiled".
        q_tile, kv_tile: edges of tiles; with layout="tiled" those that tokens are stored in.
    """

    spec: NeighborhoodSpec
    axes: tuple[AxisWindow, ...]
    grid: tuple[int, ...]
    layout: str
    q_tile: tuple[int, ...] | None
    kv_tile: tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        query: Array,
        spec: NeighborhoodSpec,
        layout: str,
        grid: Sequence[int] | None,
        q_tile: int | Sequence[int] | None,
        kv_tile: int | Sequence[int] | None,
    ) -> "Problem":
        """Of the arguments of `neighborhood_attention`; ValueError if they do not fit together."""
        if not isinstance(spec, NeighborhoodSpec):
            raise ValueError(
                f"spec must be a NeighborhoodSpec, such as NeighborhoodSpec(7), got {spec!r}"
            )
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}, not in {LAYOUTS}")
        if (layout == "tiled") != (grid is not None):
            raise ValueError(f"grid belongs to layout='tiled', got {grid=} with {layout=}")
        ranks = (4,) if layout == "tiled" else (4, 5, 6)
        if query.ndim not in ranks or query.size == 0:
            raise ValueError(
                "query must be [batch, *grid, heads, head_dim] with a grid of one to three axes, "
                "none of them empty, or one axis of tokens in layout='tiled', got shape "
                f"{query.shape}"
            )
        if grid is not None and not isinstance(grid, Sequence):
            raise ValueError(f"grid must have a length for each axis, got {grid!r}")
        grid = query.shape[1:-2] if grid is None else tuple(int(length) for length in grid)
        tiles = [_edges(name, t, grid) for name, t in (("q_tile", q_tile), ("kv_tile", kv_tile))]
        if layout == "tiled":
            if tiles[0] is None or tiles[1] not in (None, tiles[0]):
                raise ValueError(
                    "layout='tiled' needs the q_tile that tokens are in, and no other kv_tile, got "
                    f"{q_tile=} and {kv_tile=}"
                )
            tiles[1] = tiles[0]
        return cls(spec, spec.axes(grid), grid, layout, *tiles)

    @property
    def num_groups(self) -> int:
        """Dilation groups of all axes."""
        return math.prod(axis.dilation for axis in self.axes)

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the tokens of one element of the arrays' batch."""
        if self.layout == "grid":
            return self.grid
        return (math.prod(self.tiles_along()) * math.prod(self.q_tile),)

    def tiles_along(self) -> tuple[int, ...]:
        """Tiles of each axis of a dilation group, in layout="tiled"."""
        return tuple(
            -(-axis.length // (edge * axis.dilation))
            for axis, edge in zip(self.axes, self.q_tile, strict=True)
        )


def _edges(name: str, tile: int | Sequence[int] | None, grid: Sequence[int]):
    if tile is None:
        return None
    edges = (tile,) * len(grid) if np.ndim(tile) == 0 else tuple(tile)
    if len(edges) != len(grid) or not all(
        isinstance(edge, int | np.integer) and edge > 0 for edge in edges
    ):
        raise ValueError(f"{name} must have a positive edge for each axis of {grid}, got {tile!r}")
    return tuple(int(edge) for edge in edges)
