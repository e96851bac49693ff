"""Images and videos as tokens: patches, fixed positions, and the order that blocks see them in.

Blocks of a transformer are token-wise but for their attention, so a network may put its tokens in
tiles once, before its first block, and back once, after its last: `TokenLayout` says how they are
stored in between, and makes attention functions that know it (arXiv 2504.16922, section 4).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import einops
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from genjax_lab.attention import (
    AttentionFunction,
    NeighborhoodSpec,
    dense_attention,
    neighborhood_attention,
    token_permute,
    token_unpermute,
)

Neighborhoods = NeighborhoodSpec | tuple[NeighborhoodSpec | None, ...] | None


def patch_edges(patch_size: int | Sequence[int], x: Array) -> tuple[int, ...]:
    """The edges of a patch, one for each axis of images or videos.

    Args:
        patch_size: an edge for all axes, or one for each.
        x: `[batch, height, width, channels]`, or `[batch, frames, height, width, channels]`.

    Raises:
        ValueError: if x is neither, not floating point, or not divisible into patches.
    """
    edges = (patch_size,) * (x.ndim - 2) if isinstance(patch_size, int) else tuple(patch_size)
    if (
        x.ndim not in (4, 5)
        or len(edges) != x.ndim - 2
        or min(edges) < 1
        or any(length % edge for length, edge in zip(x.shape[1:], edges, strict=False))
    ):
        raise ValueError(
            "x must be [batch, height, width, channels] or [batch, frames, height, width, "
            f"channels] with axes divisible by patch_size={patch_size}, got shape {x.shape}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating point, got {x.dtype}.")
    return edges


def patchify(
    x: Float[Array, "batch *size channels"], edges: Sequence[int]
) -> Float[Array, "batch *grid features"]:
    """Cuts x into patches, each the features of one token: in row-major order, channels fastest."""
    whole, tokens, sizes = _pattern(edges)
    return einops.rearrange(x, f"{whole} -> {tokens}", **sizes)


def unpatchify(
    tokens: Float[Array, "batch *grid features"], edges: Sequence[int]
) -> Float[Array, "batch *size channels"]:
    """Undoes `patchify`."""
    whole, patches, sizes = _pattern(edges)
    return einops.rearrange(tokens, f"{patches} -> {whole}", **sizes)


def _pattern(edges: Sequence[int]) -> tuple[str, str, dict[str, int]]:
    axes = range(len(edges))
    whole = " ".join(f"(g{axis} p{axis})" for axis in axes)
    grid, patch = (" ".join(f"{letter}{axis}" for axis in axes) for letter in "gp")
    sizes = {f"p{axis}": edge for axis, edge in enumerate(edges)}
    return f"b {whole} c", f"b {grid} ({patch} c)", sizes


def sine_cosine_positions(grid: Sequence[int], features: int) -> Float[Array, "*grid features"]:
    """Fixed positions of a grid: each axis has its own part of the features.

    Args:
        grid: tokens along each axis.
        features: number of features, even, and at least two for each axis; of a grid of two axes
            (arXiv 2212.09748) divisible by 4, so that their parts are equal. With three axes the
            last have a pair more where the pairs do not divide.

    Returns:
        For the last axis (columns), then for those before it (rows, frames): `[sin, cos]` of the
        coordinate times `10000 ** (-i / pairs)`, i from 0 to the axis's pairs; float32.

    Raises:
        ValueError: if there are no such features.
    """
    divisor = 4 if len(grid) == 2 else 2
    if features % divisor or features < 2 * len(grid):
        raise ValueError(
            f"the width of the positions must be divisible by {divisor} and at least "
            f"{2 * len(grid)}, got {features}."
        )
    share, more = divmod(features // 2, len(grid))
    parts = []
    for number, axis in enumerate(reversed(range(len(grid)))):
        pairs = share + (number < more)
        frequencies = 10000.0 ** (-np.arange(pairs) / pairs)
        angles = np.outer(np.arange(grid[axis]), frequencies)
        waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
        shape = [grid[axis] if other == axis else 1 for other in range(len(grid))]
        # Broadcast by the program: large grids would make a large constant.
        parts.append(jnp.broadcast_to(waves.reshape(*shape, -1), (*grid, 2 * pairs)))
    return jnp.concatenate(parts, axis=-1)


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """How the tokens of a grid are stored between both ends of a network.

    Attributes:
        grid: tokens along each axis.
        tile: edges of the tiles that `token_permute` puts tokens in; None for tokens as they are.
        dilation: of each axis, with a tile: all attention's.
    """

    grid: tuple[int, ...]
    tile: tuple[int, ...] | None = None
    dilation: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        grid: Sequence[int],
        neighborhoods: Sequence[NeighborhoodSpec | None],
        tile: Sequence[int] | None,
    ) -> "TokenLayout":
        """The layout that serves all blocks, which have these neighborhoods (None: dense).

        Raises:
            ValueError: for windows that do not fit the grid, and tiles of blocks whose dilations
                differ, or of another number of axes.
        """
        grid, dilations = tuple(grid), set()
        for spec in set(neighborhoods):
            try:
                axes = (spec or NeighborhoodSpec(grid)).axes(grid)
            except ValueError as error:
                raise ValueError(f"neighborhood does not fit the grid {grid}: {error}") from error
            dilations.add(tuple(axis.dilation for axis in axes))
        if tile is None:
            return cls(grid)
        edges = tuple(tile) if np.ndim(tile) == 1 else ()
        if len(edges) != len(grid) or not all(
            isinstance(edge, int | np.integer) and edge > 0 for edge in edges
        ):
            raise ValueError(
                f"token_tile must have a positive edge for each axis of {grid}, got {tile!r}"
            )
        if len(dilations) > 1:
            raise ValueError(
                f"token_tile={edges} needs neighborhood to have one dilation in all blocks, "
                f"which is 1 in those without, got {sorted(dilations)}"
            )
        return cls(grid, edges, dilations.pop())

    @property
    def num_groups(self) -> int:
        """Dilation groups, each of which is a row of the stored batch."""
        return math.prod(self.dilation)

    def store(self, tokens: Float[Array, "batch *grid_and_features"]) -> Array:
        """Puts tokens in order: `[batch, *grid, ...]`, or `[batch * groups, tokens, ...]`."""
        if self.tile is None:
            return tokens
        return token_permute(tokens, self.tile, self.dilation)

    def restore(self, tokens: Array) -> Float[Array, "batch *grid_and_features"]:
        """Undoes `store`."""
        if self.tile is None:
            return tokens
        return token_unpermute(tokens, self.grid, self.tile, self.dilation)

    def per_group(self, x: Float[Array, "batch ..."]) -> Array:
        """What belongs to examples, for each row of stored tokens."""
        return x if self.num_groups == 1 else jnp.repeat(x, self.num_groups, axis=0)

    def real_tokens(self) -> Bool[Array, " stored"] | None:
        """Which stored tokens of an example, one group after the other, are of the grid.

        Returns:
            bool [groups * tokens], or None if all are.
        """
        if self.tile is None or not any(
            length % (edge * step)
            for length, edge, step in zip(self.grid, self.tile, self.dilation, strict=True)
        ):
            return None
        return self.store(jnp.ones((1, *self.grid), bool)).reshape(-1)

    def attention(
        self, spec: NeighborhoodSpec | None, dense: AttentionFunction = dense_attention
    ) -> AttentionFunction:
        """Neighborhood attention to stored tokens; without a neighborhood `dense`, or its like."""
        if spec is None and self.tile is None:
            return dense
        options = {} if self.tile is None else {"grid": self.grid, "q_tile": self.tile}
        return functools.partial(
            neighborhood_attention,
            spec=spec or NeighborhoodSpec(self.grid),
            layout="grid" if self.tile is None else "tiled",
            **options,
        )


def neighborhoods_of_blocks(
    neighborhood: Neighborhoods, depth: int
) -> tuple[NeighborhoodSpec | None, ...]:
    """The neighborhood of each of `depth` blocks.

    Raises:
        ValueError: unless it is one for all or one for each.
    """
    if neighborhood is None or isinstance(neighborhood, NeighborhoodSpec):
        return (neighborhood,) * depth
    if (
        not isinstance(neighborhood, Sequence)
        or len(neighborhood) != depth
        or not all(spec is None or isinstance(spec, NeighborhoodSpec) for spec in neighborhood)
    ):
        raise ValueError(
            f"neighborhood must be a NeighborhoodSpec, or one or None for each of the {depth} "
            f"blocks, got {neighborhood!r}"
        )
    return tuple(neighborhood)
