"""What the TPU kernels of neighborhood attention share: prefetched lists, blocks, masked logits.

The last axis of a kernel's grid goes through the tiles that a tile visits, the full ones first; its
index maps read the next tile from prefetched scalars. Steps beyond the last tile repeat it, so that
they fetch nothing, and compute nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tiles import Bounds, Operands, Problem, Visits, in_window


class Lists(NamedTuple):
    """Visited tiles as one-dimensional lists, which are dense in scalar memory, and their sizes."""

    visits: Visits
    groups: int
    most: int

    @classmethod
    def of(cls, visits: Visits) -> "Lists":
        """Flattens `visits`."""
        groups, _, most = visits.tiles.shape
        return cls(Visits(*(jnp.ravel(array) for array in visits)), groups, most)


def dot(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product in float32, exact for float32."""
    return lax.dot_general(
        left,
        right,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def masked_logits(
    problem: Problem, query: Any, key: Any, tile: Any, bounds: Bounds | None, mask_ref: Any
) -> jax.Array:
    """[keys, queries], -inf where hidden; bounds are refs [axes, queries], None for no mask."""
    logits = dot(key, query, (1, 1)) * problem.scale
    seen = None
    if bounds is not None:
        axes = range(len(problem.kv_tile))
        rows = [(bounds.start[a : a + 1, :], bounds.end[a : a + 1, :]) for a in axes]
        seen = in_window(problem, tile, _key_numbers(problem.kv_block), rows)
    if mask_ref is not None:
        allowed = mask_ref[...] != 0
        seen = allowed if seen is None else seen & allowed
    return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def additional_logits(problem: Problem, query: Any, key: Any, number: Any) -> jax.Array:
    """[additional keys, queries] of a block, -inf for its padding."""
    logits = dot(key, query, (1, 1)) * problem.scale
    size = problem.additional_block
    if problem.num_additional % size == 0:
        return logits
    return jnp.where(number * size + _key_numbers(size) < problem.num_additional, logits, -jnp.inf)


def _key_numbers(size: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, (size, 1), 0)


def visit(lists: Lists, number: Any, step: Callable[..., None], bounds: Bounds | None) -> None:
    """Runs `step(tile, bounds, or None for a full tile)` if there is a tile of this number."""
    visits, groups, most = lists
    row = lax.rem(pl.program_id(0), groups) * pl.num_programs(2) + pl.program_id(2)
    tile = visits.tiles[row * most + jnp.minimum(number, most - 1)]
    full, visited = visits.full[row], visits.visited[row]
    pl.when(number < full)(lambda: step(tile, None))
    pl.when((number >= full) & (number < visited))(lambda: step(tile, bounds))


def call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    lists: Lists,
    inputs: list[tuple[Any, Any]],
    outputs: list[tuple[Any, jax.ShapeDtypeStruct]],
    scratch: list[tuple[int, int]],
    interpret: bool,
) -> tuple:
    """`kernel(lists, *inputs, *outputs, *scratch)`; inputs and outputs come with their specs."""
    in_specs, operands = zip(*inputs, strict=True)
    out_specs, out_shape = zip(*outputs, strict=True)

    def with_lists(visits, *refs):
        kernel(lists._replace(visits=visits), *refs)

    return pl.pallas_call(
        with_lists,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name=name,
    )(lists.visits, *operands)


class QuerySide:
    """Grid and blocks of the programs that take a tile of queries; arrays are heads first."""

    def __init__(self, problem: Problem, visits: Visits, operands: Operands):
        self.problem, self.lists = problem, Lists.of(visits)
        batch, heads, queries, _ = operands.query.shape
        self.repeats = heads // operands.key.shape[1]
        self.num_q = queries // problem.q_block
        extra = -(-problem.num_additional // problem.additional_block)
        self.grid = (batch, heads, self.num_q, self.lists.most + extra)

    def of_query(self, width: int) -> pl.BlockSpec:
        """Blocks of [batch, heads, queries, width]."""
        shape = (None, None, self.problem.q_block, width)
        return pl.BlockSpec(shape, lambda b, h, i, j, _: (b, h, i, 0))

    def by_lane(self, width: int) -> pl.BlockSpec:
        """Blocks of [batch, heads, width, queries]."""
        shape = (None, None, width, self.problem.q_block)
        return pl.BlockSpec(shape, lambda b, h, i, j, _: (b, h, 0, i))

    def of_keys(self, width: int, by_lane: bool = False) -> pl.BlockSpec:
        """Blocks of [batch, kv_heads, keys, width], or of the two last exchanged."""

        def index(b, h, i, j, visits):
            tile = self._tile(b, i, j, visits)
            return (b, lax.div(h, self.repeats), *((0, tile) if by_lane else (tile, 0)))

        return self._oriented(self.problem.kv_block, width, by_lane, index)

    def of_additional(self, array: Any, by_lane: bool = False) -> pl.BlockSpec | None:
        """Blocks of additional [batch, kv_heads, extra, width], or of the two last exchanged."""
        if array is None:
            return None

        def index(b, h, i, j, _):
            block = jnp.maximum(j - self.lists.most, 0)
            row = (lax.div(b, self.lists.groups), lax.div(h, self.repeats))
            return (*row, *((0, block) if by_lane else (block, 0)))

        width = array.shape[2 if by_lane else 3]
        return self._oriented(self.problem.additional_block, width, by_lane, index)

    def of_bounds(self) -> Bounds:
        """Blocks of both bounds."""
        window = pl.BlockSpec(
            (None, len(self.problem.q_tile), self.problem.q_block),
            lambda b, h, i, j, _: (lax.rem(b, self.lists.groups), 0, i),
        )
        return Bounds(window, window)

    def of_mask(self, mask: Any) -> pl.BlockSpec | None:
        """Blocks of [batch, keys, 1]."""
        if mask is None:
            return None
        return pl.BlockSpec(
            (None, self.problem.kv_block, 1),
            lambda b, h, i, j, visits: (b, self._tile(b, i, j, visits), 0),
        )

    def of_operands(self, operands: Operands, values_by_lane: bool = False) -> Operands:
        """Blocks of all operands."""
        width = operands.value.shape[2 if values_by_lane else 3]
        return Operands(
            self.of_query(operands.query.shape[3]),
            self.of_keys(operands.key.shape[3]),
            self.of_keys(width, values_by_lane),
            self.of_additional(operands.additional_keys),
            self.of_additional(operands.additional_values, values_by_lane),
            self.of_mask(operands.kv_mask),
        )

    def _tile(self, b, i, j, visits):
        row = lax.rem(b, self.lists.groups) * self.num_q + i
        return visits.tiles[row * self.lists.most + jnp.minimum(j, self.lists.most - 1)]

    @staticmethod
    def _oriented(size, width, by_lane, index) -> pl.BlockSpec:
        shape = (width, size) if by_lane else (size, width)
        return pl.BlockSpec((None, None, *shape), index)
