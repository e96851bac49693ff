"""One step of attention in boxes: a tile of queries, its box of keys, and where both are stored."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from genjax_lab.attention import box_plan

# The logit of what a query does not see.
HIDDEN = -1e37


@dataclasses.dataclass(frozen=True, eq=False)
class BoxPlan:
    """What is fixed when the program is traced.

    Attributes:
        loops: the plans of all axes, for each loop over tiles of one shape.
        tile: tokens along each axis that are stored together.
        kv_lengths: units of `tile` along each axis of the keys.
        kv_heads: heads of keys and values.
        longest: at most so many keys are in a window, along each axis.
        precision: of the matrix products.
        exact: the type that is computed in.
    """

    loops: tuple[tuple[box_plan.AxisPlan, ...], ...]
    tile: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    kv_heads: int
    longest: tuple[int, ...]
    precision: Any
    exact: Any

    @property
    def rank(self) -> int:
        """Axes of the grid."""
        return len(self.tile)

    def tiles(self, axes: Sequence[box_plan.AxisPlan]) -> np.ndarray:
        """Indices [tiles, axes] of the tiles of a loop, in its order."""
        return box_plan.tile_order(tuple(len(axis.first) for axis in axes))


class Box:
    """One step of the loop: a tile of queries [rows, width] and its box of keys [keys, width].

    Rows are the tile's queries, row-major, with the heads that share keys innermost.
    """

    def __init__(self, plan: BoxPlan, loop: int, tensors: dict, tables: dict, step: Array):
        self.plan, self.tensors, self.tables = plan, tensors, tables
        self.axes, self.arrays = plan.loops[loop], tables["loops"][loop]
        tiles = plan.tiles(self.axes)
        outer, tile = step // len(tiles), step % len(tiles)
        self.example, self.head = outer // plan.kv_heads, outer % plan.kv_heads
        self.group = tensors["query"].shape[-2] // plan.kv_heads
        self.at = list(jnp.asarray(tiles)[tile])
        self.row = tables["rows"][self.example]
        self.q_first = [
            jnp.asarray(axis.first, jnp.int32)[i]
            for axis, i in zip(self.axes, self.at, strict=True)
        ]
        self.kv_first = [
            self._set(table["kv_first"])[i] for table, i in zip(self.arrays, self.at, strict=True)
        ]
        self.q_edges = tuple(axis.q_edge for axis in self.axes)
        self.kv_edges = tuple(axis.kv_edge for axis in self.axes)

    def _set(self, table: Array) -> Array:
        """The example's set of bounds."""
        return table[0] if len(table) == 1 else table[self.row]

    def dot(self, a: Array, b: Array) -> Array:
        """A matrix product in the type that is computed in."""
        return jnp.dot(a, b, precision=self.plan.precision, preferred_element_type=self.plan.exact)

    def _where_queries(self) -> tuple:
        zeros = (jnp.int32(0),) * (self.plan.rank + 1)
        head = self.head * self.group
        origin = (self.example, *self.q_first, *zeros[1:], head, zeros[0])
        return origin, (1, *self.q_edges, *self.plan.tile, self.group)

    def where_keys(self, lines: Array) -> tuple:
        """(origin, size) of the box in keys or values `in_lines`."""
        unit = lines.shape[-1] // self.plan.kv_lengths[-1]
        origin = (self.example, self.head, *self.kv_first[:-1], self.kv_first[-1] * unit)
        return origin, (1, 1, *self.kv_edges[:-1], self.kv_edges[-1] * unit)

    def take_queries(self, array: Array) -> Array:
        """The tile's part of an array [batch, *units, *tile, heads, width], as rows."""
        origin, size = self._where_queries()
        part = jax.lax.dynamic_slice(array, origin, (*size, array.shape[-1]))
        return part.reshape(-1, array.shape[-1]).astype(self.plan.exact)

    def put_queries(self, array: Array, rows: Array) -> Array:
        """The array with rows in the tile's place."""
        origin, size = self._where_queries()
        return jax.lax.dynamic_update_slice(array, rows.reshape(*size, -1), origin)

    def _in_box(self, name: str) -> Array:
        lines = self.tensors[name]
        part = jax.lax.dynamic_slice(lines, *self.where_keys(lines))
        return part.reshape(-1, line_width(self.plan, lines)).astype(self.plan.exact)

    def _take_keys(self, name: str, extra: str) -> Array:
        part = self._in_box(name)
        if extra not in self.tensors:
            return part
        more = self.tensors[extra][self.example, :, self.head].astype(self.plan.exact)
        return jnp.concatenate([part, more])

    def add_keys(self, bars: dict, name: str, extra: str, rows: Array) -> dict:
        """Gradients with those of the box's keys, and of additional ones, added."""
        bars = dict(bars)
        origin, size = self.where_keys(bars[name])
        count = math.prod(size) // rows.shape[1]
        new = jax.lax.dynamic_slice(bars[name], origin, size) + rows[:count].reshape(size)
        bars[name] = jax.lax.dynamic_update_slice(bars[name], new, origin)
        if extra in bars:
            bars[extra] = bars[extra].at[self.example, :, self.head].add(rows[count:])
        return bars

    def queries(self) -> Array:
        """Scaled by `scale`."""
        return self.take_queries(self.tensors["query"]) * self.tensors["scale"]

    def keys(self) -> Array:
        """[keys, width], additional ones last."""
        return self._take_keys("key", "extra_key")

    def values(self) -> Array:
        """[keys, width of values], additional ones last."""
        return self._take_keys("value", "extra_value")

    def logits(self, keys_first: bool = False) -> Array:
        """[rows, keys], or the other way round."""

        def product(of_rows, of_keys):
            return self.dot(of_keys, of_rows.T) if keys_first else self.dot(of_rows, of_keys.T)

        logits = product(self.queries(), self.keys())
        if "bias" in self.tensors:
            bias = self._with_extra(self._bias(self.tensors["bias"]))
            logits += bias if keys_first else bias.T
        visible = self._visible(keys_first)
        return logits if visible is None else jnp.where(visible, logits, HIDDEN)

    @property
    def _num_extra(self) -> int:
        return self.tensors["extra_key"].shape[1] if "extra_key" in self.tensors else 0

    def _with_extra(self, keys: Array) -> Array:
        """Additional keys have no bias."""
        return jnp.pad(keys, ((0, self._num_extra), (0, 0)))

    def _visible(self, keys_first: bool) -> Array | None:
        """What rows see of the box, as logits are; None if that is all of it."""
        of_rows, of_keys = (lambda x: x[None], lambda x: x[:, None])[:: 1 if keys_first else -1]
        visible = None
        for number, axis in enumerate(self.axes):
            if axis.seen is None:
                continue
            first, length = (
                self._set(self.arrays[number][name])[self.at[number]]
                for name in ("first", "length")
            )
            places = self._places(number, first.dtype)
            # Unsigned numbers go round, so that one comparison is enough; the narrower, the faster.
            inside = of_keys(places) - of_rows(first) < of_rows(length)
            visible = inside if visible is None else visible & inside
        if visible is not None and self._num_extra:
            visible |= of_keys(np.arange(len(places)) >= len(places) - self._num_extra)
        if self.tables["key_mask"] is not None:
            origin = (self.example, *self.kv_first, *(jnp.int32(0),) * self.plan.rank)
            mask = jax.lax.dynamic_slice(self.tables["key_mask"], origin, (1, *self._key_shape()))
            mask = of_keys(jnp.pad(mask.reshape(-1), (0, self._num_extra), constant_values=True))
            visible = mask if visible is None else visible & mask
        return visible

    def _key_shape(self) -> tuple[int, ...]:
        return (*self.kv_edges, *self.plan.tile)

    def _places(self, number: int, dtype: Any) -> np.ndarray:
        """Where the keys of the box are along an axis, a constant; 0 for additional keys."""
        unit, inside = (np.indices(self._key_shape())[n] for n in (number, self.plan.rank + number))
        places = unit * self.plan.tile[number] + inside
        return np.pad(places.ravel(), (0, self._num_extra)).astype(dtype)

    def _spread(self, rows: Array, number: int, edges: Sequence[int], times: int = 1) -> Array:
        """Rows of one axis [tokens of it, width] to all tokens [tokens * times, width]."""
        rank, width = self.plan.rank, rows.shape[-1]
        shape = [1] * (2 * rank + 1)
        tile = self.plan.tile
        shape[number], shape[rank + number] = edges[number], tile[number]
        rows = rows.reshape(*shape, width)
        return jnp.broadcast_to(rows, (*edges, *tile, times, width)).reshape(-1, width)

    def has_overlaps(self) -> bool:
        """Whether some tile has rows that it does not answer for."""
        return any(axis.skipped.any() for axis in self.axes)

    def is_own(self) -> Array:
        """Which rows this tile answers for."""
        own = jnp.ones((1, 1), bool)
        for number, (axis, at) in enumerate(zip(self.axes, self.at, strict=True)):
            tile = self.plan.tile[number]
            skipped = jnp.asarray(axis.skipped)[at] * tile
            inside = (jnp.arange(axis.q_edge * tile) >= skipped)[:, None]
            own &= self._spread(inside, number, self.q_edges, self.group)
        return own[:, 0]

    def _bias(self, bias: Array) -> Array:
        """[keys in the box, rows]."""
        index = 0
        for number, (size, places) in enumerate(
            zip(bias.shape[1:], self.tables["places"], strict=True)
        ):
            tile = self.plan.tile[number]
            query, key = (
                first[number] * tile + jnp.arange(edges[number] * tile)
                for first, edges in ((self.q_first, self.q_edges), (self.kv_first, self.kv_edges))
            )
            along = jnp.clip(key[:, None] - places[query], 0, size - 1)
            along = self._spread(along, number, self.kv_edges)  # [keys, queries of the axis]
            index = index * size + self._spread(along.T, number, self.q_edges).T
        heads = jax.lax.dynamic_slice_in_dim(bias, self.head * self.group, self.group)
        values = heads.reshape(self.group, -1).astype(self.plan.exact)[:, index]
        return jnp.moveaxis(values, 0, -1).reshape(len(index), -1)

    def bias_gradient(self, logits_bar: Array) -> Array:
        """From the gradient of the logits, [keys, rows]."""
        bias = self.tensors["bias"]
        _, transpose = jax.vjp(lambda b: self._with_extra(self._bias(b)), bias)
        return transpose(logits_bar)[0].astype(self.plan.exact)


def in_lines(x: Array, rank: int) -> Array:
    """[batch, *units, *tile, heads, width] -> [batch, heads, *units but the last, line].

    A box is then made of long pieces of memory, which are copied faster.
    """
    x = jnp.moveaxis(x, -2, 1)
    return x.reshape(*x.shape[: rank + 1], -1)


def line_width(plan: BoxPlan, lines: Array) -> int:
    """The last axis before `in_lines`."""
    return lines.shape[-1] // (plan.kv_lengths[-1] * math.prod(plan.tile))
