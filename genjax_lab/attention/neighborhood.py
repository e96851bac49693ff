"""Generalized neighborhood attention over 1-D, 2-D and 3-D grids (arXiv 2504.16922).

Each query sees a box of keys around it, as `windows` says, and any additional keys, in one softmax:

    out_i = sum_j p_ij v_j,  p_ij = exp(scale <q_i, k_j> - lse_i),  lse_i = log sum_j exp(...)

over the keys j that query i sees. `functools.partial(neighborhood_attention, spec=spec)` is an
attention function that networks take.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from genjax_lab.attention import box_plan, kernels
from genjax_lab.attention.boxes import box_attention
from genjax_lab.attention.masked import masked_attention, real_tokens
from genjax_lab.attention.windows import AxisWindow, NeighborhoodSpec, bounds_of

IMPLEMENTATIONS = ("reference", "xla", "pallas")
LAYOUTS = ("grid", "tiled")


def neighborhood_attention(
    query: Float[Array, "batch *grid heads head_dim"],
    key: Float[Array, "batch *grid kv_heads head_dim"],
    value: Float[Array, "batch *grid kv_heads value_dim"],
    spec: NeighborhoodSpec,
    *,
    scale: float | Float[Array, ""] | None = None,
    additional_keys: Float[Array, "batch extra kv_heads head_dim"] | None = None,
    additional_values: Float[Array, "batch extra kv_heads value_dim"] | None = None,
    kv_mask: Bool[Array, "batch *grid"] | None = None,
    grid_sizes: Int[Array, "batch axes"] | None = None,
    position_bias: Float[Array, "heads *displacements"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    q_tile: int | Sequence[int] | None = None,
    kv_tile: int | Sequence[int] | None = None,
    layout: str = "grid",
    grid: Sequence[int] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array | tuple[Array, Array]:
    """Lets every query attend to the keys of its neighborhood.

    Differentiable in all floating arguments, through `lse` too; "reference" and "xla" any number of
    times in reverse.

    Args:
        query: a grid of one, two or three axes.
        key: the same grid; `heads` is a multiple of `kv_heads`: query head `h` reads key-value head
            `h // (heads / kv_heads)`.
        value: the same grid.
        spec: the neighborhood.
        scale: factor of the logits, `1 / sqrt(head_dim)` by default.
        additional_keys: keys that every query sees, such as those of a text; with
            `additional_values`.
        additional_values: their values.
        kv_mask: False for keys that no query sees, whatever they hold.
        grid_sizes: tokens that there really are along each axis of each example, at least 1; what
            lies beyond is padding, and windows are shifted inward from the real ends. Of an axis
            that is shorter than the window all is seen. None: the whole grid.
        position_bias: `[heads, 2 window - 1, ...]`, added to the logits: the key that lies d tokens
            (of its dilation group) after the query along an axis has the index
            `d + window - 1` there.
        return_lse: whether to return `lse` too.
        implementation: "reference" computes all pairs of tokens; "xla" tiles of queries with boxes
            of keys, on any machine; "pallas" is a kernel for GPUs and TPUs. None chooses the kernel
            on machines and for arguments that it is made for, and "xla" otherwise.
        q_tile: edges of the tiles of queries; None chooses.
        kv_tile: edges of the tiles of keys, for the kernel; "xla" takes boxes of any size.
        layout: "grid", or "tiled" for tokens that `token_permute` has put in order by tiles of
            `q_tile`: all arrays over the grid are then `[batch * dilation groups, tokens, ...]`, as
            is the output, and `kv_tile` is `q_tile`. Networks permute once, at both their ends.
        grid: tokens along each axis, for layout="tiled".
        precision: of the matrix products, but for the kernel, whose products are exact.

    Returns:
        `out` [batch, *grid, heads, value_dim] in the query's type, or (out, lse). `lse`, [batch,
        *grid, heads], is in float32 (float64 where the inputs are), by the natural logarithm. A
        query without any key, and padding, have out 0 and lse -inf.

    Raises:
        ValueError: shapes or types that do not fit together, windows that do not fit the grid, an
            unknown implementation, or one that cannot do what is asked.
    """
    query, key, value, additional_keys, additional_values, kv_mask, grid_sizes, position_bias = (
        None if x is None else jnp.asarray(x)
        for x in (
            *(query, key, value, additional_keys, additional_values),
            *(kv_mask, grid_sizes, position_bias),
        )
    )
    problem = _Problem.of(query, spec, layout, grid, q_tile, kv_tile)
    _check(
        *(problem, query, key, value, additional_keys, additional_values),
        *(kv_mask, grid_sizes, position_bias),
    )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    options = {"grid_sizes": grid_sizes, "position_bias": position_bias}
    implementation = _choose(implementation, problem, options, kv_tile)
    arguments = {
        "scale": scale,
        "additional_keys": additional_keys,
        "additional_values": additional_values,
        "kv_mask": kv_mask,
    }
    options["precision"] = precision
    if implementation == "reference":
        out, lse = masked_attention(query, key, value, spec, **arguments, **options)
    elif implementation == "xla":
        out, lse = _in_boxes(problem, query, key, value, **arguments, **options)
    else:
        out, lse = kernels.kernel_attention(
            query,
            key,
            value,
            spec,
            **arguments,
            q_tile=problem.q_tile,
            kv_tile=problem.kv_tile,
            layout=layout,
            grid=grid,
            platform=jax.default_backend(),
        )
    return (out, lse) if return_lse else out


class _Problem(NamedTuple):
    """A neighborhood of a grid, and how its tokens are stored."""

    spec: NeighborhoodSpec
    axes: tuple[AxisWindow, ...]
    grid: tuple[int, ...]
    layout: str
    q_tile: tuple[int, ...] | None
    kv_tile: tuple[int, ...] | None

    @classmethod
    def of(cls, query, spec, layout, grid, q_tile, kv_tile) -> "_Problem":
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
    edges = (tile,) * len(grid) if isinstance(tile, int) else tuple(tile)
    if len(edges) != len(grid) or not all(
        isinstance(edge, int | np.integer) and edge > 0 for edge in edges
    ):
        raise ValueError(f"{name} must have a positive edge for each axis of {grid}, got {tile!r}")
    return tuple(int(edge) for edge in edges)


def _choose(
    implementation: str | None, problem: _Problem, options: dict[str, Any], kv_tile: Any
) -> str:
    """The implementation that runs; ValueError if it cannot."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation is {implementation!r}, not in {IMPLEMENTATIONS}")
    unsupported = [name for name, value in options.items() if value is not None]
    if any(axis.border == "wrap" for axis in problem.axes):
        unsupported.append("border='wrap'")
    has_kernel = jax.default_backend() in ("gpu", "tpu")
    if implementation is None:
        implementation = "pallas" if has_kernel and not unsupported else "xla"
    if implementation == "pallas" and (unsupported or not has_kernel):
        raise ValueError(
            "implementation='pallas' is for GPUs and TPUs and does not do grid_sizes, position_bias"
            f" or border='wrap', got {', '.join(unsupported) or jax.default_backend()!r}; "
            "implementation='xla' does"
        )
    if problem.layout == "tiled" and implementation == "reference":
        raise ValueError("layout='tiled' needs implementation 'xla', 'pallas' or None")
    if problem.layout == "tiled" and "border='wrap'" in unsupported:
        raise ValueError("border='wrap' needs layout='grid'")
    if kv_tile is not None and implementation != "pallas" and problem.layout == "grid":
        raise ValueError(f"kv_tile is for implementation='pallas', got {implementation!r}")
    return implementation


class _AxisOrder(NamedTuple):
    """One axis put in order by dilation groups, so that windows are intervals.

    Attributes:
        queries: [length] tokens in that order.
        keys: [n, keys] the same for keys, some of them repeated where windows go round.
        bounds: (start, end), each [n, length], in that order.
        segments: lengths of the groups.
        places: [length] where the key of each query's own token is among the keys.
    """

    queries: np.ndarray
    keys: Any
    bounds: tuple[Any, Any]
    segments: tuple[int, ...]
    places: np.ndarray


def _ordered(axis: AxisWindow, sizes: Int[Array, " batch"] | None) -> _AxisOrder:
    """The order of an axis; `sizes` are tokens that there are in each example."""
    xp = np if sizes is None else jnp
    lengths = axis.group_lengths()
    group = np.repeat(np.arange(axis.dilation), lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    total = np.asarray([[axis.length]]) if sizes is None else sizes[:, None]
    count = (total - group + axis.dilation - 1) // axis.dilation
    start, end = bounds_of(place, count, axis, xp)
    start, end = (xp.broadcast_to(x, (len(total), axis.length)) for x in (start, end))
    queries = place * axis.dilation + group
    if axis.border != "wrap":
        first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
        return _AxisOrder(
            queries, queries[None], (start + first, end + first), lengths, place + first
        )
    # Keys are repeated at both ends of a group, as far as windows reach.
    margin, reach = axis.window // 2, axis.window
    width = margin + lengths[0] + reach
    origin = group * width + margin
    places = origin + place
    group, place = np.divmod(np.arange(axis.dilation * width), width)
    count = xp.maximum((total - group + axis.dilation - 1) // axis.dilation, 1)
    keys = (place - margin) % count * axis.dilation + group
    return _AxisOrder(queries, keys, (start + origin, end + origin), lengths, places)


def _in_boxes(
    problem: _Problem,
    query: Array,
    key: Array,
    value: Array,
    *,
    additional_keys: Array | None,
    additional_values: Array | None,
    kv_mask: Array | None,
    grid_sizes: Array | None,
    position_bias: Array | None,
    **options: Any,
) -> tuple[Array, Array]:
    """(out, lse) by `box_attention`."""
    axes = problem.axes
    options["bias"] = position_bias
    if grid_sizes is not None:
        options["spans"] = [axis.window + axis.stride - 1 for axis in axes]
    if problem.layout == "tiled":
        return _in_stored_tiles(
            *(problem, query, key, value, additional_keys, additional_values),
            *(kv_mask, grid_sizes, options),
        )
    mask, real = kv_mask, None
    if grid_sizes is not None:
        real = real_tokens(problem.grid, grid_sizes)
        mask = real if mask is None else mask & real
    orders = [
        _ordered(axis, None if grid_sizes is None else grid_sizes[:, number])
        for number, axis in enumerate(axes)
    ]
    for number, order in enumerate(orders):
        query = _reordered(query, order.queries[None], number + 1)
        key, value = (_reordered(x, order.keys, number + 1) for x in (key, value))
        mask = None if mask is None else _reordered(mask, order.keys, number + 1)
    out, lse = box_attention(
        query,
        key,
        value,
        [order.bounds for order in orders],
        additional_keys=additional_keys,
        additional_values=additional_values,
        key_mask=mask,
        bias_places=[
            order.places - axis.window + 1 for axis, order in zip(axes, orders, strict=True)
        ],
        segments=[order.segments for order in orders],
        q_tile=problem.q_tile,
        **options,
    )
    for number, order in enumerate(orders):
        back = np.argsort(order.queries)[None]
        out, lse = (_reordered(x, back, number + 1) for x in (out, lse))
    if real is not None and additional_keys is not None:
        out = jnp.where(real[..., None, None], out, 0)
        lse = jnp.where(real[..., None], lse, -jnp.inf)
    return out, lse


def box_tile(
    grid: Sequence[int],
    spec: NeighborhoodSpec,
    *,
    head_dim: int,
    value_dim: int | None = None,
    heads_per_kv_head: int = 1,
) -> tuple[int, ...]:
    """The tile of queries that implementation="xla" chooses.

    Where queries at the ends of an axis have the same window, several tiles may be one there.

    Args:
        grid: tokens along each axis.
        spec: the neighborhood.
        head_dim: width of queries and keys.
        value_dim: width of values, that of keys by default.
        heads_per_kv_head: heads of queries that share their keys.

    Raises:
        ValueError: for windows that do not fit the grid.
    """
    orders = [_ordered(axis, None) for axis in spec.axes(grid)]
    plans = box_plan.choose_tiles(
        [order.bounds for order in orders],
        [order.keys.shape[1] for order in orders],
        [order.segments for order in orders],
        rows_per_query=heads_per_kv_head,
        width=head_dim + (head_dim if value_dim is None else value_dim),
        tile=(1,) * len(orders),
    )
    return tuple(parts[0].q_edge for parts in plans)


def _reordered(x: Array, index: Any, axis: int) -> Array:
    """Elements of an axis in the order `index`, [1 or batch, elements]."""
    if isinstance(index, np.ndarray) and np.array_equal(index[0], np.arange(x.shape[axis])):
        return x
    if len(index) == 1:
        return jnp.take(x, index[0], axis=axis)
    return jax.vmap(lambda row, order: jnp.take(row, order, axis=axis - 1))(x, index)


def _in_stored_tiles(
    problem: _Problem,
    query: Array,
    key: Array,
    value: Array,
    additional_keys: Array | None,
    additional_values: Array | None,
    kv_mask: Array | None,
    grid_sizes: Array | None,
    options: dict[str, Any],
) -> tuple[Array, Array]:
    """(out, lse) of tokens that are stored tile by tile."""
    axes, tile, counts = problem.axes, problem.q_tile, problem.tiles_along()
    groups = np.array(list(np.ndindex(*(axis.dilation for axis in axes))))
    stored = lambda x: x.reshape(len(x), *counts, *tile, *x.shape[2:])  # noqa: E731
    bounds = []
    real = jnp.ones((len(query), *counts, *tile), bool)
    for number, (axis, edge, tiles) in enumerate(zip(axes, tile, counts, strict=True)):
        xp, total = np, np.asarray([axis.length])
        if grid_sizes is not None:
            xp, total = jnp, grid_sizes[:, number]
        count = (total[:, None] - groups[:, number] + axis.dilation - 1) // axis.dilation
        count = count.reshape(-1, 1)  # [groups, or batch * groups; 1]
        place = np.arange(tiles * edge)
        bounds.append(bounds_of(place, count, axis, xp))
        inside = jnp.tile(place < count, (len(query) // len(count), 1))
        shape = [1] * real.ndim
        shape[0], shape[1 + number], shape[1 + len(axes) + number] = len(query), tiles, edge
        real &= inside.reshape(shape)
    has_padding = grid_sizes is not None or math.prod(problem.grid) < len(groups) * math.prod(
        problem.stored
    )
    if additional_keys is not None:
        additional_keys, additional_values = (
            jnp.repeat(x, len(groups), axis=0) for x in (additional_keys, additional_values)
        )
    key_mask = None if kv_mask is None else stored(kv_mask)
    if has_padding:
        key_mask = real if key_mask is None else key_mask & real
    out, lse = box_attention(
        *(stored(x) for x in (query, key, value)),
        bounds,
        additional_keys=additional_keys,
        additional_values=additional_values,
        key_mask=key_mask,
        bias_places=[
            np.arange(tiles * edge) - axis.window + 1
            for axis, edge, tiles in zip(axes, tile, counts, strict=True)
        ],
        stored_tile=tile,
        **options,
    )
    if has_padding and additional_keys is not None:
        out = jnp.where(real[..., None, None], out, 0)
        lse = jnp.where(real[..., None], lse, -jnp.inf)
    return out.reshape(*query.shape[:-1], -1), lse.reshape(query.shape[:-1])


def _check(
    problem: _Problem,
    query: Array,
    key: Array,
    value: Array,
    additional_keys: Array | None,
    additional_values: Array | None,
    kv_mask: Array | None,
    grid_sizes: Array | None,
    position_bias: Array | None,
) -> None:
    """Raises a ValueError unless the arrays form one attention problem."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != query.ndim or array.size == 0:
            raise ValueError(
                f"{name} must be [batch, *grid, heads, head_dim] with the grid of query, none of "
                f"them empty, got shape {array.shape}"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {array.dtype}")
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        raise ValueError(
            "query, key and value must agree in batch and grid, got shapes "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    groups = problem.num_groups if problem.layout == "tiled" else 1
    if query.shape[1:-2] != problem.stored or query.shape[0] % groups:
        raise ValueError(
            f"with layout='tiled' and grid={problem.grid} query must be [batch * {groups}, "
            f"{problem.stored[0]}, heads, head_dim], got shape {query.shape}"
        )
    batch = query.shape[0] // groups
    if key.shape[-2] != value.shape[-2] or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            "key and value must have as many heads, and query a multiple of them, got shapes "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must agree in head_dim, got shapes {query.shape} and {key.shape}"
        )
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    if additional_keys is not None:
        extra = additional_keys.shape[1] if additional_keys.ndim == 4 else "extra"
        for name, array, like in (
            ("additional_keys", additional_keys, key),
            ("additional_values", additional_values, value),
        ):
            expected = (batch, extra, *like.shape[-2:])
            if array.shape != expected:
                raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
    if kv_mask is not None and (kv_mask.shape != key.shape[:-2] or kv_mask.dtype != jnp.bool_):
        raise ValueError(
            f"kv_mask must be bool {key.shape[:-2]}, got {kv_mask.dtype} {kv_mask.shape}"
        )
    if grid_sizes is not None:
        expected = (batch, len(problem.grid))
        if grid_sizes.shape != expected or not jnp.issubdtype(grid_sizes.dtype, jnp.integer):
            raise ValueError(
                f"grid_sizes must be integers {expected}, got {grid_sizes.dtype} {grid_sizes.shape}"
            )
    if position_bias is not None:
        expected = (query.shape[-2], *(2 * axis.window - 1 for axis in problem.axes))
        if position_bias.shape != expected:
            raise ValueError(f"position_bias must be {expected}, got shape {position_bias.shape}")
        if grid_sizes is not None and any(axis.border == "wrap" for axis in problem.axes):
            raise ValueError("position_bias with border='wrap' needs grid_sizes=None")
