"""Attention of tiles of queries to boxes of keys, in plain XLA: no array has queries by all keys.

One loop runs over examples, heads and tiles. A tile takes its box out of the keys and values, and
two matrix products of the tile's size do the rest; memory grows with the number of tokens, time
with the keys that are seen. What a query does not see of its tile's box is masked by adding, to the
logits, the product of two thin matrices: the class of a query along an axis (one-hot), and a
penalty of each class for each key. That costs less than looking at every logit.

A softmax needs a number to subtract from each query's logits, usually their maximum, which reads
all of them once more. The product of the query's norm and of the largest norm of the keys that it
sees is as good as long as it is small, and cheaper; where it is not, the maximum is taken.

The backward pass recomputes each tile (arXiv 2205.14135, Algorithm 4):

    dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q,
    delta = rowsum(dO * O) - dLSE

and adds what it finds for keys and values to their places.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from genjax_lab.attention import box_plan

# A penalty that no logit makes good for, and that can be added four times in float32.
_HIDDEN = -1e37
# Largest bound of the logits that is subtracted instead of their maximum: exp(-2 * 30) is far from
# what float32 cannot hold.
_LARGEST_SHIFT = 30.0
_TRACED_TILE = 256  # queries of a tile where windows are not known beforehand


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What is fixed when the program is traced."""

    loops: tuple[tuple[box_plan.AxisPlan, ...], ...]
    tile: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    kv_heads: int
    longest: tuple[int, ...]  # windows
    precision: Any
    exact: Any

    @property
    def rank(self) -> int:
        return len(self.tile)

    def visits(self, axes: Sequence[box_plan.AxisPlan], batch: int) -> np.ndarray:
        """Rows (example, head of keys, tile along each axis), in the order of a loop."""
        tiles = box_plan.tile_order(tuple(len(axis.first) for axis in axes))
        outer = np.array(list(np.ndindex(batch, self.kv_heads)), np.int32)
        return np.concatenate(
            [np.repeat(outer, len(tiles), 0), np.tile(tiles, (len(outer), 1))], axis=1
        )


def box_attention(
    query: Float[Array, "batch *q_grid heads head_dim"],
    key: Float[Array, "batch *kv_grid kv_heads head_dim"],
    value: Float[Array, "batch *kv_grid kv_heads value_dim"],
    bounds: Sequence[tuple[Int[Array, "n length"], Int[Array, "n length"]]],
    *,
    scale: float,
    additional_keys: Float[Array, "batch extra kv_heads head_dim"] | None = None,
    additional_values: Float[Array, "batch extra kv_heads value_dim"] | None = None,
    key_mask: Bool[Array, "batch *kv_grid"] | None = None,
    bias: Float[Array, "heads ..."] | None = None,
    bias_places: Sequence[Int[np.ndarray, " length"]] | None = None,
    rows: Int[Array, " batch"] | None = None,
    segments: Sequence[Sequence[int]] | None = None,
    spans: Sequence[int] | None = None,
    q_tile: Sequence[int] | None = None,
    stored_tile: Sequence[int] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Array, Array]:
    """Lets each query attend to a box of keys.

    Args:
        query: a grid of one to three axes; tokens that are stored tile by tile are
            `[batch, *(tiles along each axis), *stored_tile, heads, head_dim]`.
        key: a grid of as many axes, stored in the same way.
        value: the keys' grid.
        bounds: (start, end) for each axis: query i of the axis sees its keys start <= j < end. n
            sets of bounds, of which `rows` says which an example takes.
        scale: factor of the logits, a number or a scalar array.
        additional_keys: keys that every query sees.
        additional_values: their values.
        key_mask: False for keys that no query sees; they may hold anything finite or not.
        bias: added to the logits by relative position: `bias[head, j - bias_places[i], ...]`, an
            index for each axis, for the key j of the query i; clipped to what there is.
        bias_places: for each axis and query, the key that has the index 0; may be negative.
        rows: set of bounds of each example; by default example b has set b modulo n.
        segments: lengths of the runs of each axis along which bounds never decrease, in units of
            `stored_tile`.
        spans: see `box_plan.plan_axis`; needed where bounds are traced.
        q_tile: edges of the tiles of queries, in units of `stored_tile`.
        stored_tile: edges of the tiles in which tokens are stored; None for a plain grid.
        precision: of the matrix products.

    Returns:
        (out, lse): the first in the query's type and the place of its tokens, the second in
        float32, or float64 where the inputs are.
    """
    rank = len(bounds)
    tile = (1,) * rank if stored_tile is None else tuple(stored_tile)
    if stored_tile is None:
        query, key, value = (
            x.reshape(*x.shape[: rank + 1], *tile, *x.shape[-2:]) for x in (query, key, value)
        )
        key_mask = None if key_mask is None else key_mask.reshape(key.shape[:-2])
    exact = jnp.promote_types(query.dtype, jnp.float32)
    heads, kv_heads = query.shape[-2], key.shape[-2]
    q_lengths, kv_lengths = query.shape[1 : rank + 1], key.shape[1 : rank + 1]
    segments = [(length,) for length in q_lengths] if segments is None else segments
    if spans is None:
        parts = box_plan.choose_tiles(
            bounds,
            kv_lengths,
            segments,
            rows_per_query=heads // kv_heads,
            width=key.shape[-1] + value.shape[-1],
            tile=tile,
            q_tile=q_tile,
        )
    else:  # windows are not known yet: tiles as wide as high
        edge = round(_TRACED_TILE ** (1 / rank))
        q_tile = [max(1, edge // step) for step in tile] if q_tile is None else q_tile
        parts = [
            box_plan.plan_axis(*arguments)
            for arguments in zip(bounds, kv_lengths, segments, q_tile, tile, spans, strict=True)
        ]
    loops = tuple(itertools.product(*parts))
    longest = spans
    if spans is None:
        longest = [max(1, int(np.max(end - start))) for start, end in bounds]
    plan = _Plan(loops, tile, kv_lengths, kv_heads, tuple(longest), precision, exact)
    count = max(len(start) for start, _ in bounds)
    rows = jnp.arange(len(query)) % count if rows is None else rows
    tables = {
        "bounds": tuple((jnp.asarray(start), jnp.asarray(end)) for start, end in bounds),
        "rows": rows,
        "key_mask": key_mask,
        "places": () if bias is None else tuple(jnp.asarray(places) for places in bias_places),
        "loops": tuple(tuple(_arrays(part) for part in axes) for axes in loops),
    }
    if key_mask is not None:  # whatever hidden tokens hold
        key, value = (jnp.where(key_mask[..., None, None], x, 0) for x in (key, value))
    tensors = {
        "query": query,
        "key": _in_lines(key, rank),
        "value": _in_lines(value, rank),
        "scale": jnp.asarray(scale, exact),
    }
    if additional_keys is not None and additional_keys.shape[1]:
        tensors |= {"extra_key": additional_keys, "extra_value": additional_values}
    if bias is not None:
        tensors["bias"] = bias
    out, lse = _attend(plan, tensors, tables)
    if stored_tile is None:
        out = out.reshape(out.shape[0], *q_lengths, *out.shape[-2:])
        lse = lse.reshape(lse.shape[0], *q_lengths, lse.shape[-1])
    return out, lse


def _arrays(part: box_plan.AxisPlan) -> dict[str, Array]:
    """What a loop looks up, and what may be traced."""
    arrays = {"kv_first": jnp.asarray(part.kv_first, jnp.int32)}
    if part.num_classes:
        arrays |= {"group": jnp.asarray(part.group), "seen": jnp.asarray(part.seen)}
    return arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, tensors: dict, tables: dict) -> tuple[Array, Array]:
    query, value = tensors["query"], tensors["value"]
    shifts = _shifts(plan, tensors, tables)

    def visit(number, carry, place):
        out, lse = carry
        box = _Box(plan, number, tensors, tables, place)
        logits = box.logits()
        shift = box.take_queries(shifts[..., None])[:, 0]
        # Only rows whose bound is too large take their maximum, so that no row's result depends on
        # what others see.
        too_large = shift > _LARGEST_SHIFT

        def with_maximum():
            top = jnp.max(logits, axis=1)
            return jnp.where(too_large, jnp.where(top > _HIDDEN / 2, top, 0), shift)

        shift = jax.lax.cond(jnp.any(too_large), with_maximum, lambda: shift)
        weights = jnp.exp(logits - shift[:, None])
        total = jnp.sum(weights, axis=1)
        seen = total > 0
        safe = jnp.where(seen, total, 1)
        tile_out = box.dot(weights, box.values()) / safe[:, None]
        tile_lse = jnp.where(seen, shift + jnp.log(safe), -jnp.inf)
        out = box.put_queries(out, tile_out.astype(out.dtype))
        return (out, box.put_queries(lse, tile_lse[:, None])), None

    empty = (
        jnp.zeros((*query.shape[:-1], _width(plan, value)), query.dtype),
        jnp.zeros((*query.shape[:-1], 1), plan.exact),
    )
    out, lse = _run_loops(plan, visit, empty, len(query))
    return out, lse[..., 0]


def _forward(plan, tensors, tables):
    out, lse = _attend(plan, tensors, tables)
    return (out, lse), (tensors, tables, out, lse)


def _backward(plan, residuals, cotangents):
    tensors, tables, out, lse = residuals
    out_bar, lse_bar = (x.astype(plan.exact) for x in cotangents)
    delta = jnp.sum(out_bar * out.astype(plan.exact), axis=-1) - lse_bar
    seen = lse > -jnp.inf
    # Queries that see nothing have no gradient: exp(logits - inf) is zero.
    lse = jnp.where(seen, lse, jnp.inf)
    per_row = jnp.stack([jnp.where(seen, delta, 0), lse], axis=-1)

    def visit(number, bars, place):
        box = _Box(plan, number, tensors, tables, place)
        out_bar_tile = box.take_queries(out_bar)
        delta_tile, lse_tile = jnp.moveaxis(box.take_queries(per_row), -1, 0)
        if box.has_overlaps():
            own = box.is_own()
            out_bar_tile = jnp.where(own[:, None], out_bar_tile, 0)
            delta_tile = jnp.where(own, delta_tile, 0)
            lse_tile = jnp.where(own, lse_tile, jnp.inf)
        queries, keys, values = box.queries(), box.keys(), box.values()
        # By keys and rows, the order that these products are fastest in.
        weights = jnp.exp(box.logits(keys_first=True) - lse_tile)
        logits_bar = weights * (box.dot(values, out_bar_tile.T) - delta_tile)
        # Queries are scaled already.
        bars = box.add_keys(bars, "key", "extra_key", box.dot(logits_bar, queries))
        bars = box.add_keys(bars, "value", "extra_value", box.dot(weights, out_bar_tile))
        query_bar = box.dot(logits_bar.T, keys)
        bars["query"] = box.put_queries(bars["query"], query_bar * tensors["scale"])
        bars["scale"] += jnp.sum(query_bar * box.take_queries(tensors["query"]))
        if "bias" in bars:
            bars["bias"] = bars["bias"] + box.bias_gradient(logits_bar)
        return bars, None

    bars = {name: jnp.zeros(x.shape, plan.exact) for name, x in tensors.items()}
    bars = _run_loops(plan, visit, bars, len(tensors["query"]))
    return {name: bars[name].astype(x.dtype) for name, x in tensors.items()}, None


_attend.defvjp(_forward, _backward)


def _run_loops(plan: _Plan, visit: Callable, carry: Any, batch: int) -> Any:
    """One loop after the other, over tiles of one shape each."""
    for number, axes in enumerate(plan.loops):
        step = jax.checkpoint(functools.partial(visit, number))
        carry, _ = jax.lax.scan(step, carry, plan.visits(axes, batch))
    return carry


class _Box:
    """One step of the loop: a tile of queries [rows, width] and its box of keys [keys, width].

    Rows are the tile's queries, row-major, with the heads that share keys innermost.
    """

    def __init__(self, plan: _Plan, loop: int, tensors: dict, tables: dict, place: Array):
        self.plan, self.tensors, self.tables = plan, tensors, tables
        self.axes, self.arrays = plan.loops[loop], tables["loops"][loop]
        self.example, self.head = place[0], place[1]
        self.group = tensors["query"].shape[-2] // plan.kv_heads
        self.at = [place[2 + axis] for axis in range(plan.rank)]
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
        return jnp.dot(a, b, precision=self.plan.precision, preferred_element_type=self.plan.exact)

    def _where_queries(self) -> tuple:
        zeros = (jnp.int32(0),) * (self.plan.rank + 1)
        head = self.head * self.group
        origin = (self.example, *self.q_first, *zeros[1:], head, zeros[0])
        return origin, (1, *self.q_edges, *self.plan.tile, self.group)

    def _where_keys(self, lines: Array) -> tuple:
        """Of keys or values `_in_lines`."""
        unit = lines.shape[-1] // self.plan.kv_lengths[-1]
        origin = (self.example, self.head, *self.kv_first[:-1], self.kv_first[-1] * unit)
        return origin, (1, 1, *self.kv_edges[:-1], self.kv_edges[-1] * unit)

    def take_queries(self, array: Array) -> Array:
        origin, size = self._where_queries()
        part = jax.lax.dynamic_slice(array, origin, (*size, array.shape[-1]))
        return part.reshape(-1, array.shape[-1]).astype(self.plan.exact)

    def put_queries(self, array: Array, rows: Array) -> Array:
        origin, size = self._where_queries()
        return jax.lax.dynamic_update_slice(array, rows.reshape(*size, -1), origin)

    def _take_keys(self, name: str, extra: str) -> Array:
        lines = self.tensors[name]
        part = jax.lax.dynamic_slice(lines, *self._where_keys(lines))
        part = part.reshape(-1, _width(self.plan, lines)).astype(self.plan.exact)
        if extra not in self.tensors:
            return part
        more = self.tensors[extra][self.example, :, self.head].astype(self.plan.exact)
        return jnp.concatenate([part, more])

    def add_keys(self, bars: dict, name: str, extra: str, rows: Array) -> dict:
        bars = dict(bars)
        origin, size = self._where_keys(bars[name])
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
        return self._take_keys("key", "extra_key")

    def values(self) -> Array:
        return self._take_keys("value", "extra_value")

    def logits(self, keys_first: bool = False) -> Array:
        """[rows, keys], or the other way round."""

        def product(of_rows, of_keys):
            return self.dot(of_keys, of_rows.T) if keys_first else self.dot(of_rows, of_keys.T)

        logits = product(self.queries(), self.keys())
        classes, penalties = self._classes()
        if classes:
            classes = jnp.concatenate(classes, axis=1)
            penalties = jnp.concatenate(penalties, axis=1)
            logits += product(classes, self._with_extra(penalties))
        if "bias" in self.tensors:
            bias = self._with_extra(self._bias(self.tensors["bias"]))
            logits += bias if keys_first else bias.T
        return logits

    def _with_extra(self, keys: Array) -> Array:
        """Additional keys have neither penalty nor bias."""
        if "extra_key" not in self.tensors:
            return keys
        return jnp.pad(keys, ((0, self.tensors["extra_key"].shape[1]), (0, 0)))

    def _classes(self) -> tuple[list[Array], list[Array]]:
        """One-hot classes [rows, classes], and penalties [keys, classes], of all that is masked."""
        classes, penalties = [], []
        for number, (axis, table) in enumerate(zip(self.axes, self.arrays, strict=True)):
            if not axis.num_classes:
                continue
            at = self.at[number]
            one_hot = self._set(table["group"])[at][:, None] == jnp.arange(axis.num_classes)
            one_hot = one_hot.astype(self.plan.exact)
            classes.append(self._spread(one_hot, number, self.q_edges, self.group))
            start, end = jnp.moveaxis(self._set(table["seen"])[at], -1, 0)
            key = jnp.arange(axis.kv_edge * self.plan.tile[number])[:, None]
            penalty = jnp.where((start <= key) & (key < end), 0, _HIDDEN).astype(self.plan.exact)
            penalties.append(self._spread(penalty, number, self.kv_edges))
        if self.tables["key_mask"] is not None:
            mask = self.tables["key_mask"]
            origin = (self.example, *self.kv_first, *(jnp.int32(0),) * self.plan.rank)
            mask = jax.lax.dynamic_slice(mask, origin, (1, *self.kv_edges, *self.plan.tile))
            penalties.append(jnp.where(mask.reshape(-1, 1), 0, _HIDDEN).astype(self.plan.exact))
            classes.append(jnp.ones((self.group * self._num_queries(), 1), self.plan.exact))
        return classes, penalties

    def _num_queries(self) -> int:
        return math.prod(self.q_edges) * math.prod(self.plan.tile)

    def _spread(self, rows: Array, number: int, edges: Sequence[int], times: int = 1) -> Array:
        """Rows of one axis [tokens of it, width] to all tokens [tokens * times, width]."""
        rank, width = self.plan.rank, rows.shape[-1]
        shape = [1] * (2 * rank + 1)
        tile = self.plan.tile
        shape[number], shape[rank + number] = edges[number], tile[number]
        rows = rows.reshape(*shape, width)
        return jnp.broadcast_to(rows, (*edges, *tile, times, width)).reshape(-1, width)

    def has_overlaps(self) -> bool:
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
        bias = self.tensors["bias"]
        _, transpose = jax.vjp(lambda b: self._with_extra(self._bias(b)), bias)
        return transpose(logits_bar)[0].astype(self.plan.exact)


def _in_lines(x: Array, rank: int) -> Array:
    """[batch, *units, *tile, heads, width] -> [batch, heads, *units but the last, line].

    A box is then made of long pieces of memory, which are copied faster.
    """
    x = jnp.moveaxis(x, -2, 1)
    return x.reshape(*x.shape[: rank + 1], -1)


def _width(plan: _Plan, lines: Array) -> int:
    """The last axis before `_in_lines`."""
    return lines.shape[-1] // (plan.kv_lengths[-1] * math.prod(plan.tile))


def _shifts(plan: _Plan, tensors: dict, tables: dict) -> Array:
    """Bounds of each query's logits by norms, [batch, *units, *tile, heads].

    The largest norm is that among the keys that the query sees, not of others.
    """
    norm = lambda x: jnp.linalg.norm(x.astype(plan.exact), axis=-1)  # noqa: E731
    query, key = tensors["query"], tensors["key"]
    stored = (len(key), plan.kv_heads, *plan.kv_lengths, *plan.tile, _width(plan, key))
    largest = _positions(jnp.moveaxis(norm(key.reshape(stored)), 1, -1), plan.rank)
    for number, (start, end) in enumerate(tables["bounds"]):
        largest = _largest_between(
            largest, number + 1, start, end, tables["rows"], plan.longest[number]
        )
    largest = _in_tiles(largest, query.shape, plan.rank)
    if "extra_key" in tensors:
        extra = jnp.max(norm(tensors["extra_key"]), axis=1)
        extra = extra.reshape(len(query), *(1,) * (2 * plan.rank), -1)
        largest = jnp.maximum(largest, extra)
    heads = query.shape[-2]
    largest = jnp.repeat(largest, heads // plan.kv_heads, axis=-1)
    shift = jnp.abs(tensors["scale"]) * norm(query) * largest
    if "bias" in tensors:
        bias = tensors["bias"].astype(plan.exact)
        shift += jnp.max(jnp.abs(bias).reshape(heads, -1), axis=-1)
    # Whole numbers, so that the last bits of norms decide nothing.
    return jnp.ceil(shift)


def _positions(x: Array, rank: int) -> Array:
    """[batch, *units, *tile, heads] -> [batch, *tokens, heads]."""
    order = [axis for number in range(rank) for axis in (1 + number, 1 + rank + number)]
    shape = [x.shape[1 + number] * x.shape[1 + rank + number] for number in range(rank)]
    return x.transpose(0, *order, 2 * rank + 1).reshape(len(x), *shape, x.shape[-1])


def _in_tiles(x: Array, shape: Sequence[int], rank: int) -> Array:
    """The inverse of `_positions`, for a grid stored as an array of `shape` is."""
    pairs = [n for number in range(rank) for n in (shape[1 + number], shape[1 + rank + number])]
    x = x.reshape(len(x), *pairs, x.shape[-1])
    units = range(1, 2 * rank + 1, 2)
    return x.transpose(0, *units, *(axis + 1 for axis in units), 2 * rank + 1)


def _largest_between(
    x: Array, axis: int, start: Array, end: Array, rows: Array, longest: int
) -> Array:
    """Largest of start <= j < end along an axis; 0 of none. By runs of 1, 2, 4, ... elements."""
    runs = [x]
    while 2 ** len(runs) <= min(longest, x.shape[axis]):
        last, reach = runs[-1], 2 ** (len(runs) - 1)
        later = jax.lax.slice_in_dim(last, reach, None, axis=axis)
        fill = [(0, reach) if number == axis else (0, 0) for number in range(x.ndim)]
        runs.append(jnp.maximum(last, jnp.pad(later, fill)))
    length = jnp.maximum(end - start, 1)
    level = jnp.asarray(np.log2(np.arange(1, x.shape[axis] + 1)).astype(np.int32))[length - 1]
    stacked = jnp.stack(runs, axis=axis)
    flat = stacked.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def take(index: Array) -> Array:
        index = index + level * x.shape[axis]
        if len(index) == 1:
            return jnp.take(flat, index[0], axis=axis)
        return jax.vmap(lambda f, i: jnp.take(f, i, axis=axis - 1))(flat, index[rows])

    largest = jnp.maximum(take(start), take(end - 2**level))
    visible = (end > start) if len(end) == 1 else (end > start)[rows]
    shape = [1] * x.ndim
    shape[0], shape[axis] = visible.shape
    return jnp.where(visible.reshape(shape), largest, 0)
