"""Neighborhood attention over the devices of a mesh (arXiv 2504.16922; parallelism is ours).

Examples and heads do not see each other, so splitting them needs no communication. Where the first
axis of the grid is split, a device holds a slab of rows, and its queries see keys beyond its ends.
Which rows those are is known beforehand from `window_bounds`: neighbours pass them on, one message
for each distance, and nobody gathers the whole grid. Windows are shifted inward at the ends of the
grid, so the first and last slab may need up to window - 1 rows from one side, and a halo that is
larger than a slab comes from several neighbours. Dilated rows are cut into their interleaved groups
first, which are grids of their own.

Gradients follow by transposing the messages. Grids of different sizes in one batch are left out.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from genjax_lab.attention.boxes import box_attention
from genjax_lab.attention.neighborhood import neighborhood_attention
from genjax_lab.attention.windows import AxisWindow, NeighborhoodSpec, window_bounds

MeshAxis = str | tuple[str, ...]


def neighborhood_attention_sharded(
    query: Float[Array, "batch *grid heads head_dim"],
    key: Float[Array, "batch *grid kv_heads head_dim"],
    value: Float[Array, "batch *grid kv_heads value_dim"],
    spec: NeighborhoodSpec,
    mesh: Mesh,
    *,
    batch_axis: MeshAxis | None = None,
    head_axis: MeshAxis | None = None,
    grid_axis: MeshAxis | None = None,
    scale: float | None = None,
    additional_keys: Float[Array, "batch extra kv_heads head_dim"] | None = None,
    additional_values: Float[Array, "batch extra kv_heads value_dim"] | None = None,
    kv_mask: Bool[Array, "batch *grid"] | None = None,
    position_bias: Float[Array, "heads *displacements"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array | tuple[Array, Array]:
    """`neighborhood_attention`, of which every device computes a part.

    The arrays are global; inside of `jax.jit` they need no particular sharding, but only one like
    that of the result saves moving them. Axes of the mesh that are not named are left to XLA.

    Args:
        query: a grid of one, two or three axes.
        key: the same grid. Where the size of `head_axis` does not divide `kv_heads`, all devices
            hold all of them, and each reads those of its query heads.
        value: the same grid.
        spec: the neighborhood.
        mesh: the devices.
        batch_axis: axis of the mesh over which examples are split, or a tuple of axes.
        head_axis: axis over which query heads are split, and key-value heads where they can be.
        grid_axis: axis over which the first axis of the grid is split; None: computed by
            `neighborhood_attention` on every device.
        scale: factor of the logits, `1 / sqrt(head_dim)` by default.
        additional_keys: keys that every query sees; every device of `grid_axis` holds all.
        additional_values: their values.
        kv_mask: False for keys that no query sees.
        position_bias: `[heads, 2 window - 1, ...]`, added to the logits.
        return_lse: whether to return the logarithms of the sums of exponentials too.
        implementation: as for `neighborhood_attention`; with `grid_axis` None or "xla".
        precision: of the matrix products.

    Returns:
        `out` [batch, *grid, heads, value_dim] or (out, lse), split as the arguments say.

    Raises:
        ValueError: for what `neighborhood_attention` refuses; an axis that the mesh has not, or
            named twice; a batch, number of query heads or first grid axis that does not divide
            among its devices; slabs that are no multiple of the first axis' dilation; an
            implementation that knows no slabs.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}")
    mesh, is_explicit = _automatic(mesh)
    more = {
        "scale": scale,
        "additional_keys": additional_keys,
        "additional_values": additional_values,
        "kv_mask": kv_mask,
        "position_bias": position_bias,
    }
    more = {name: jnp.asarray(x) for name, x in more.items() if x is not None}
    names = tuple(map(_as_tuple, (batch_axis, head_axis, grid_axis)))
    arrays = (query, key, value, more)
    if is_explicit:
        arrays = jax.tree.map(lambda x: _placed_anew(x, mesh), arrays)
    out, lse = _sharded(
        *arrays,
        spec=spec,
        mesh=mesh,
        names=names,
        options=(("implementation", implementation), ("precision", precision)),
    )
    return (out, lse) if return_lse else out


def _automatic(mesh: Mesh) -> tuple[Mesh, bool]:
    """The mesh with axes that XLA may split, and whether it had others (as `jax.make_mesh` has)."""
    automatic = Mesh(mesh.devices, mesh.axis_names)
    return automatic, automatic != mesh


def _placed_anew(x: Array, mesh: Mesh) -> Array:
    """An array whose type names an explicit mesh, as one of the automatic mesh."""
    sharding = getattr(x, "sharding", None)
    if isinstance(x, jax.core.Tracer) or not isinstance(sharding, NamedSharding):
        return x
    return jax.device_put(x, NamedSharding(mesh, sharding.spec))


class HaloReport(NamedTuple):
    """Keys and values that devices receive when the first axis of a grid is split.

    Attributes:
        rows: rows of the grid that each device receives, in order of the slabs.
        halo_bytes: keys and values, in bytes, that the busiest device receives for each example.
        all_gather_bytes: what every device would receive to hold all rows.
    """

    rows: tuple[int, ...]
    halo_bytes: int
    all_gather_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes received, in units of those of an all-gather; 0 where there is one device."""
        return self.halo_bytes / max(self.all_gather_bytes, 1)


def halo_report(
    grid: Sequence[int],
    spec: NeighborhoodSpec,
    num_slabs: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    value_dim: int | None = None,
) -> HaloReport:
    """How much `neighborhood_attention_sharded` communicates for each example of a batch.

    Args:
        grid: lengths of the grid's axes.
        spec: the neighborhood.
        num_slabs: devices among which the first axis is split, a divisor of its length.
        kv_heads: key-value heads on a device.
        head_dim: features of a key.
        itemsize: bytes of a number: 2 for bfloat16, 4 for float32.
        value_dim: features of a value, `head_dim` by default.

    Raises:
        ValueError: windows that do not fit the grid, slabs that cannot be made.
    """
    for name, count in (("num_slabs", num_slabs), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    axis = spec.axes(grid)[0]
    halo = _slab_halo(axis, num_slabs)
    rows = np.zeros(num_slabs, int)
    for message in (*halo.before, *halo.after):
        for source, target in message.pairs:
            rows[target] += message.rows * axis.dilation * (source != target)
    row_bytes = math.prod(grid[1:]) * kv_heads * (head_dim + (value_dim or head_dim)) * itemsize
    others = axis.length - axis.length // num_slabs
    return HaloReport(tuple(rows.tolist()), int(rows.max()) * row_bytes, others * row_bytes)


class _Message(NamedTuple):
    """Rows that devices pass on to those at one distance: `pairs` of (source, target)."""

    rows: int
    pairs: tuple[tuple[int, int], ...]


class _Halo(NamedTuple):
    """What the slabs of an axis receive, and what their queries then see.

    Rows are those of one dilation group.

    Attributes:
        before: messages from the side of the first row, the nearest neighbour's first.
        after: those from the other side.
        kind: [slabs] inner slabs are mostly of one kind, 0; others are for themselves.
        start: [kinds, rows] first key of each query, in a slab with its halo, rows before it first.
        end: [kinds, rows] the key after the last.
    """

    before: tuple[_Message, ...]
    after: tuple[_Message, ...]
    kind: np.ndarray
    start: np.ndarray
    end: np.ndarray


@functools.lru_cache(maxsize=256)
def _slab_halo(axis: AxisWindow, num_slabs: int) -> _Halo:
    """Plans the exchange; ValueError if there are no such slabs."""
    if axis.length % num_slabs:
        raise ValueError(
            f"the first axis of the grid, {axis.length} long, does not divide into {num_slabs} "
            "slabs, one for each device of grid_axis; use another mesh"
        )
    if axis.length // num_slabs % axis.dilation:
        raise ValueError(
            f"slabs of {axis.length // num_slabs} rows are no multiple of the first axis' dilation "
            f"{axis.dilation}, so that its groups would begin elsewhere in every slab; use fewer "
            "devices along grid_axis"
        )
    length = axis.length // axis.dilation
    slab = length // num_slabs
    bounds = window_bounds(length, axis.window, axis.stride, axis.is_causal, axis.border)
    start, end = (bound.reshape(num_slabs, slab) for bound in bounds)
    first = np.arange(num_slabs)[:, None] * slab
    missing_before = np.maximum(first[:, 0] - start.min(axis=1), 0)
    missing_after = np.maximum(end.max(axis=1) - first[:, 0] - slab, 0)
    local = np.stack([start, end]) + missing_before.max() - first
    kinds, kind, counts = np.unique(local, axis=1, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return _Halo(
        _messages(missing_before, slab, -1),
        _messages(missing_after, slab, 1),
        np.argsort(order)[kind.ravel()],
        *kinds[:, order],
    )


def _messages(missing: np.ndarray, slab: int, side: int) -> tuple[_Message, ...]:
    """What each device must get of the devices on one side, nearest first."""
    messages = []
    for distance in range(1, -(-int(missing.max()) // slab) + 1):
        rows = np.clip(missing - (distance - 1) * slab, 0, slab)
        pairs = [
            ((to + side * distance) % len(missing), to) for to in np.flatnonzero(rows).tolist()
        ]
        messages.append(_Message(int(rows.max()), tuple(pairs)))
    return tuple(messages)


def _as_tuple(axis: MeshAxis | None) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


@functools.partial(jax.jit, static_argnames=("spec", "mesh", "names", "options"))
def _sharded(query, key, value, more, *, spec, mesh, names, options):
    """(out, lse); compiled, since only so may a `shard_map` leave axes of the mesh alone."""
    options = dict(options)
    _check(query, key, value, more, spec, mesh, names, options["implementation"])
    batch, heads, grid = (axis or None for axis in names)
    num_heads, num_slabs = (_size(mesh, axis) for axis in names[1:])
    local_heads = query.shape[-2] // num_heads
    share = query.shape[-2] // key.shape[-2]
    splits_kv = key.shape[-2] % num_heads == 0

    def body(query, key, value, more):
        if not splits_kv:
            first = jax.lax.axis_index(heads) * local_heads
            of_device = lambda x: _heads_of(x, first, local_heads, share)  # noqa: E731
            key, value = of_device(key), of_device(value)
            more = {n: of_device(x) if n.startswith("additional") else x for n, x in more.items()}
        if grid is None:
            return neighborhood_attention(
                *(query, key, value, spec), **more, return_lse=True, **options
            )
        axes = spec.axes((query.shape[1] * num_slabs, *query.shape[2:-2]))
        return _slab_attention(*(query, key, value, axes, num_slabs, grid), **more, **options)

    def layout(heads, ends):
        return PartitionSpec(batch, grid, *(None,) * (query.ndim - 4), heads, *ends)

    kv_heads = heads if splits_kv else None
    keys = layout(kv_heads, (None,))
    extra = PartitionSpec(batch, None, kv_heads)
    of_more = {
        "additional_keys": extra,
        "additional_values": extra,
        "kv_mask": PartitionSpec(batch, grid),
        "position_bias": PartitionSpec(heads),
        "scale": PartitionSpec(),
    }
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(layout(heads, (None,)), keys, keys, {name: of_more[name] for name in more}),
        out_specs=(layout(heads, (None,)), layout(heads, ())),
        axis_names=set().union(*names),
        check_vma=False,
    )(query, key, value, more)


def _check(query, key, value, more, spec, mesh, names, implementation) -> None:
    """Raises a ValueError unless the problem is one, and can be split."""
    whole = functools.partial(neighborhood_attention, spec=spec, implementation="reference")
    jax.eval_shape(whole, query, key, value, **more)
    arguments = dict(zip(("batch_axis", "head_axis", "grid_axis"), names, strict=True))
    used = [name for axis in names for name in axis]
    for argument, axis in arguments.items():
        for name in axis:
            if name not in mesh.shape:
                raise ValueError(f"{argument} is {name!r}, not in the mesh's {mesh.axis_names}")
            if used.count(name) > 1:
                raise ValueError(f"{argument} is {name!r}, which is used more than once")
    for argument, what, length in (
        ("batch_axis", "the batch", query.shape[0]),
        ("head_axis", "the heads of query", query.shape[-2]),
    ):
        size = _size(mesh, arguments[argument])
        if length % size:
            raise ValueError(f"{argument} has {size} devices, which do not divide {what}, {length}")
    if arguments["grid_axis"]:
        _slab_halo(spec.axes(query.shape[1:-2])[0], _size(mesh, arguments["grid_axis"]))
        if implementation not in (None, "xla"):
            raise ValueError(
                f"implementation={implementation!r} computes whole grids; with grid_axis only "
                "'xla' or None can be used"
            )


def _size(mesh: Mesh, axis: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in axis)


def _heads_of(x: Array, first: Array, local_heads: int, share: int) -> Array:
    """Key-value heads of the query heads `first` to `first + local_heads`, as few as possible.

    Query head h reads head h // share; so do all of any `together` that begin at a multiple of it.
    """
    together = math.gcd(local_heads, share)
    index = (first + jnp.arange(0, local_heads, together)) // share
    return jnp.take(x, index, axis=-2)


def _slab_attention(
    query: Array,
    key: Array,
    value: Array,
    axes: Sequence[AxisWindow],
    num_slabs: int,
    name: MeshAxis,
    *,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    kv_mask: Array | None = None,
    position_bias: Array | None = None,
    scale: float | Array | None = None,
    implementation: str | None,
    precision: jax.lax.PrecisionLike,
) -> tuple[Array, Array]:
    """(out, lse) of the queries of this device's slab, in a `shard_map` over `name`."""
    del implementation  # this is "xla"
    dilation = tuple(axis.dilation for axis in axes)
    groups = math.prod(dilation)
    halo = _slab_halo(axes[0], num_slabs)
    seen = [_split_groups(x, dilation) for x in (key, value)]
    seen += [] if kv_mask is None else [_split_groups(kv_mask, dilation)]
    seen = [_with_halo(x, halo, name) for x in seen]
    bounds = [tuple(np.repeat(bound, groups, axis=0) for bound in (halo.start, halo.end))]
    margins = [sum(message.rows for message in halo.before)]  # keys before the first query
    for number, axis in enumerate(axes[1:], start=1):
        start, end = _group_bounds(axis)
        margin = max(-int(start.min()), 0)
        if axis.border == "wrap":
            reach = max(int(end.max()) - start.shape[1], 0)
            seen = [_wrapped(x, number + 1, (margin, reach)) for x in seen]
        # Groups are numbered row-major over the axes, and are the same in all slabs.
        group = np.arange(groups) // math.prod(dilation[number + 1 :]) % axis.dilation
        repeated = (len(halo.start), 1)
        bounds.append(tuple(np.tile(bound[group] + margin, repeated) for bound in (start, end)))
        margins.append(margin)
    queries = _split_groups(query, dilation)
    kind = jnp.asarray(halo.kind)[jax.lax.axis_index(name)]
    if additional_keys is not None:
        additional_keys, additional_values = (
            jnp.repeat(x, groups, axis=0) for x in (additional_keys, additional_values)
        )
    out, lse = box_attention(
        *(queries, *seen[:2], bounds),
        rows=kind * groups + jnp.arange(len(queries)) % groups,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        key_mask=None if kv_mask is None else seen[2],
        bias=position_bias,
        bias_places=[
            np.arange(length) + m - axis.window + 1
            for axis, m, length in zip(axes, margins, queries.shape[1:], strict=False)
        ],
        precision=precision,
    )
    grid = query.shape[1:-2]
    return _join_groups(out, grid, dilation), _join_groups(lse, grid, dilation)


def _with_halo(x: Array, halo: _Halo, name: MeshAxis) -> Array:
    """A slab between the rows before and after it that its queries see.

    Rows that a device does not need, such as those beyond the ends of the grid, are zero.
    """
    pass_on = functools.partial(jax.lax.ppermute, axis_name=name)
    before = [pass_on(x[:, -message.rows :], perm=message.pairs) for message in halo.before]
    after = [pass_on(x[:, : message.rows], perm=message.pairs) for message in halo.after]
    return jnp.concatenate([*before[::-1], x, *after], axis=1)


def _group_bounds(axis: AxisWindow) -> tuple[np.ndarray, np.ndarray]:
    """Bounds [dilation, rows] of all groups; shorter ones repeat their last."""
    rows = -(-axis.length // axis.dilation)
    bounds = [axis.bounds(group) for group in range(axis.dilation)]
    return tuple(
        np.stack([np.pad(pair[side], (0, rows - len(pair[side])), "edge") for pair in bounds])
        for side in (0, 1)
    )


def _split_groups(x: Array, dilation: Sequence[int]) -> Array:
    """Makes examples of the interleaved groups: [batch * groups, *rows, ...], groups innermost."""
    if set(dilation) == {1}:
        return x
    count = len(dilation)
    batch, *rest = x.shape
    padding = [(0, -length % d) for length, d in zip(rest, dilation, strict=False)]
    x = jnp.pad(x, [(0, 0), *padding, *[(0, 0)] * (len(rest) - count)])
    rows = [length // d for length, d in zip(x.shape[1:], dilation, strict=False)]
    cut = [length for pair in zip(rows, dilation, strict=True) for length in pair]
    x = x.reshape(batch, *cut, *rest[count:])
    order = [0, *range(2, 2 * count + 1, 2), *range(1, 2 * count, 2)]
    x = x.transpose(*order, *range(2 * count + 1, x.ndim))
    return x.reshape(batch * math.prod(dilation), *rows, *rest[count:])


def _join_groups(x: Array, grid: Sequence[int], dilation: Sequence[int]) -> Array:
    """The inverse of `_split_groups`."""
    if set(dilation) == {1}:
        return x
    count = len(dilation)
    rows, rest = x.shape[1 : count + 1], x.shape[count + 1 :]
    x = x.reshape(-1, *dilation, *rows, *rest)
    order = [axis for number in range(1, count + 1) for axis in (number + count, number)]
    x = x.transpose(0, *order, *range(2 * count + 1, x.ndim))
    whole = [length * d for length, d in zip(rows, dilation, strict=True)]
    x = x.reshape(x.shape[0], *whole, *rest)
    return x[:, *(slice(length) for length in grid)]


def _wrapped(x: Array, axis: int, widths: tuple[int, int]) -> Array:
    """Continues an axis at both ends by its other end."""
    return jnp.pad(x, [widths if a == axis else (0, 0) for a in range(x.ndim)], mode="wrap")
