"""Neighborhood attention split over eight devices against the same on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from genjax_lab.attention import NeighborhoodSpec, neighborhood_attention
from genjax_lab.attention.sharded import halo_report, neighborhood_attention_sharded

attend = jax.jit(
    neighborhood_attention, static_argnames=("spec", "scale", "return_lse", "implementation")
)


@functools.cache
def mesh_of(*sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(
        sizes, ("data", "model", "space"), axis_types=(AxisType.Auto,) * 3, devices=devices
    )


# Devices along the grid, grid, neighborhood.
HALOS = {
    "line": (8, (32,), NeighborhoodSpec(5)),
    "strided line": (8, (40,), NeighborhoodSpec(8, 3)),  # the stride does not divide the slabs
    "causal line": (8, (24,), NeighborhoodSpec(7, 3, 1, True)),
    "halo beyond the neighbour": (8, (16,), NeighborhoodSpec(9, 2)),
    "whole line": (8, (16,), NeighborhoodSpec(16)),
    "dilated line": (4, (24,), NeighborhoodSpec(4, 2, 3)),
    "cut windows": (4, (12,), NeighborhoodSpec(7, 2, border="mask")),
    "around, dilated": (4, (16,), NeighborhoodSpec(4, 1, 2, border="wrap")),
    "one device": (1, (8,), NeighborhoodSpec(3, border="wrap")),
    "image": (4, (8, 7), NeighborhoodSpec((5, 4), (2, 3))),
    "dilated image": (2, (8, 7), NeighborhoodSpec(3, 2, 2)),
    "cylinder": (4, (8, 6), NeighborhoodSpec(3, (1, 2), (1, 2), border=("mask", "wrap"))),
    "video": (4, (8, 3, 5), NeighborhoodSpec((4, 3, 3), (2, 1, 2), 1, (True, False, False))),
}


def arrays(grid, heads=4, kv_heads=2, extra=0, batch=2, spec=None):
    """Inputs; with a bias of relative positions for a neighborhood."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    made = {
        "query": normal(batch, *grid, heads, 8),
        "key": normal(batch, *grid, kv_heads, 8),
        "value": normal(batch, *grid, kv_heads, 3),
    }
    if extra:
        made["additional_keys"] = normal(batch, extra, kv_heads, 8)
        made["additional_values"] = normal(batch, extra, kv_heads, 3)
    if spec:
        made["position_bias"] = normal(heads, *(2 * axis.window - 1 for axis in spec.axes(grid)))
    return made


@pytest.mark.parametrize("name", HALOS)
def test_split_grids_give_what_whole_ones_give(name):
    slabs, grid, spec = HALOS[name]
    made = arrays(grid, extra=3, spec=spec)
    kv_mask = np.random.default_rng(1).random((2, *grid)) < 0.8
    options = {"spec": spec, "kv_mask": kv_mask, "return_lse": True}
    mesh = mesh_of(1, 1, slabs)
    found = neighborhood_attention_sharded(**made, **options, mesh=mesh, grid_axis="space")
    layout = NamedSharding(mesh, PartitionSpec(None, "space"))
    expected = attend(**made, **options, implementation="reference")
    for ours, whole in zip(found, expected, strict=True):
        assert ours.sharding.is_equivalent_to(layout, ours.ndim)
        np.testing.assert_allclose(ours, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads"),
    [
        ((8, 1, 1), 2, 1),
        ((1, 2, 1), 4, 2),
        ((1, 8, 1), 8, 2),  # every key-value head is read by four devices
        ((2, 4, 1), 12, 6),  # devices read two heads of six, one of them in part
    ],
)
def test_splitting_examples_and_heads_changes_no_bit(sizes, heads, kv_heads):
    grid, spec = (4, 5), NeighborhoodSpec(3, (2, 1), 1, (True, False))
    made = arrays(grid, heads, kv_heads, extra=2, batch=8)
    kv_mask = np.random.default_rng(1).random((8, *grid)) < 0.8
    options = {"spec": spec, "kv_mask": kv_mask, "return_lse": True, "scale": 0.5}
    found = neighborhood_attention_sharded(
        **made, **options, mesh=mesh_of(*sizes), batch_axis="data", head_axis="model"
    )
    layout = NamedSharding(mesh_of(*sizes), PartitionSpec("data", None, None, "model"))
    assert found[0].sharding.is_equivalent_to(layout, found[0].ndim)
    for ours, whole in zip(found, attend(**made, **options), strict=True):
        np.testing.assert_array_equal(ours, whole)


@pytest.mark.parametrize(
    ("kv_heads", "axes"),
    [
        (1, {"batch_axis": "data", "head_axis": "model", "grid_axis": "space"}),
        (2, {"head_axis": "model", "grid_axis": "space"}),
    ],
)
def test_gradients_are_those_of_the_whole(kv_heads, axes):
    grid, spec = (8, 5), NeighborhoodSpec((5, 3), (2, 1), 1, (False, True))
    made = arrays(grid, kv_heads=kv_heads, extra=3, spec=spec)
    split = functools.partial(neighborhood_attention_sharded, mesh=mesh_of(2, 2, 2), **axes)
    directions = np.random.default_rng(1).normal(size=(2, 8, 5, 4, 4)).astype(np.float32)

    def slopes(function):
        def total(made):
            out, lse = function(**made, spec=spec, return_lse=True)
            return jnp.sum(jnp.concatenate([out, lse[..., None]], -1) * directions)

        return jax.jit(jax.grad(total))(made)

    whole = functools.partial(neighborhood_attention, implementation="reference")
    found, expected = slopes(split), slopes(whole)
    assert found.keys() == made.keys()
    for name in made:
        np.testing.assert_allclose(found[name], expected[name], atol=5e-6, err_msg=name)


def test_only_halos_are_communicated():
    grid, spec = (32, 4), NeighborhoodSpec((5, 3))
    mesh = mesh_of(1, 1, 8)
    arguments = [
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "space")))
        for x in arrays(grid).values()
    ]

    def total(*arguments):
        return jnp.sum(
            neighborhood_attention_sharded(*arguments, spec=spec, mesh=mesh, grid_axis="space")
        )

    slopes = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    program = slopes.lower(*arguments).compile().as_text()
    assert "collective-permute" in program
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all"))


def test_splitting_examples_and_heads_communicates_nothing():
    mesh = mesh_of(2, 2, 1)
    place = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    arguments = [jax.device_put(x, place) for x in arrays((6,)).values()]
    run = functools.partial(
        neighborhood_attention_sharded,
        spec=NeighborhoodSpec(3),
        mesh=mesh,
        batch_axis="data",
        head_axis="model",
    )
    program = jax.jit(run).lower(*arguments).compile().as_text()
    assert not any(name in program for name in ("collective", "all-gather", "all-reduce"))


def test_axes_of_the_mesh_may_be_taken_together_or_left():
    grid, spec = (8,), NeighborhoodSpec(5, 2)
    made = arrays(grid)
    whole = attend(**made, spec=spec, implementation="reference")
    mesh = mesh_of(2, 2, 2)
    for names in (
        {"grid_axis": ("model", "space")},
        {"head_axis": ("data", "space"), "grid_axis": "model"},
        {},
    ):
        out = neighborhood_attention_sharded(**made, spec=spec, mesh=mesh, **names)
        np.testing.assert_allclose(out, whole, atol=1e-6)


def test_reports_count_the_rows_that_are_passed_on():
    # Slabs of 4 rows: 2 rows from each side, and none from beyond the ends.
    report = halo_report((32, 3), NeighborhoodSpec((5, 3)), 8, kv_heads=2, head_dim=8, itemsize=4)
    assert report.rows == (2, 4, 4, 4, 4, 4, 4, 2)
    row = 3 * 2 * (8 + 8) * 4
    assert (report.halo_bytes, report.all_gather_bytes) == (4 * row, 28 * row)
    assert report.ratio == 4 / 28
    # The first of slabs of one row sees the window - 1 rows after it.
    rows = halo_report((8,), NeighborhoodSpec(5), 8, 1, 1, 1).rows
    assert rows[0] == rows[7] == 4
    # Three groups, in each one row before and none after; the last two of 8 rows are of no window.
    assert halo_report((24,), NeighborhoodSpec(2, 1, 3), 4, 1, 1, 1).rows == (0, 3, 3, 3)
    assert halo_report((16,), NeighborhoodSpec(4, 4), 4, 1, 1, 1, value_dim=3).rows == (0,) * 4
    assert halo_report((16,), NeighborhoodSpec(16), 4, 1, 1, 1).ratio == 1
    assert halo_report((8,), NeighborhoodSpec(3, border="wrap"), 1, 1, 1, 1).ratio == 0


def test_reports_count_the_bytes_of_the_program():
    slabs, grid, spec = HALOS["image"]
    made = arrays(grid, batch=1)
    run = functools.partial(
        neighborhood_attention_sharded, spec=spec, mesh=mesh_of(1, 1, slabs), grid_axis="space"
    )
    received = np.zeros(slabs, int)
    for equation in permutations(jax.make_jaxpr(run)(*made.values()).jaxpr):
        for _, target in equation.params["perm"]:
            received[target] += equation.outvars[0].aval.size * 4
    report = halo_report(grid, spec, slabs, 2, 8, 4, value_dim=3)
    row = report.all_gather_bytes / 6
    np.testing.assert_array_equal(received, np.array(report.rows) * row)
    assert received.max() == report.halo_bytes


def permutations(jaxpr):
    """All exchanges of a program, those of programs within it too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from permutations(inner)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_axis": "rows"}, r"grid_axis is 'rows'.*'data', 'model', 'space'"),
        ({"batch_axis": "space"}, "'space', which is used more than once"),
        ({"batch_axis": ("data", "data")}, "'data', which is used more than once"),
        ({"batch_axis": "data"}, "batch_axis has 4 devices.*the batch, 2"),
        ({"head_axis": "data", "query": np.zeros((2, 12, 2, 8), np.float32)}, "heads of query, 2"),
        ({"spec": NeighborhoodSpec(3, 1, 4)}, "slabs of 6 rows.*dilation 4"),
        ({"implementation": "reference"}, "'reference' computes whole grids"),
        ({"query": np.zeros((2, 12, 3, 8), np.float32)}, "multiple"),
        ({"spec": NeighborhoodSpec(13)}, "window"),
        (
            {"query": np.zeros((2, 13, 2, 8), np.float32)}
            | {name: np.zeros((2, 13, 2, 8), np.float32) for name in ("key", "value")},
            "13 long, does not divide into 2 slabs",
        ),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    arguments = arrays((12,), heads=2) | {"spec": NeighborhoodSpec(3), "grid_axis": "space"}
    with pytest.raises(ValueError, match=message):
        neighborhood_attention_sharded(**arguments | changes, mesh=mesh_of(4, 1, 2))


def test_reports_refuse_what_cannot_be_split():
    with pytest.raises(ValueError, match="does not divide into 3 slabs"):
        halo_report((8,), NeighborhoodSpec(3), 3, 1, 8, 4)
    with pytest.raises(ValueError, match="num_slabs must be at least 1, got 0"):
        halo_report((8,), NeighborhoodSpec(3), 0, 1, 8, 4)


def test_meshes_of_every_kind_of_axis_will_do():
    made, spec = arrays((16,), heads=2), NeighborhoodSpec(5)
    expected = attend(**made, spec=spec, scale=0.3)
    mesh = jax.make_mesh((8,), ("space",))  # whose axes are explicit
    scale = jnp.float32(0.3)
    split = functools.partial(
        neighborhood_attention_sharded, spec=spec, mesh=mesh, grid_axis="space", scale=scale
    )
    placed = jax.device_put(made, NamedSharding(mesh, PartitionSpec(None, "space")))
    for out in (split(**made), split(**placed), jax.jit(lambda made: split(**made))(made)):
        np.testing.assert_allclose(out, expected, atol=1e-6)


def test_no_mesh_is_named():
    made = arrays((16,))
    with pytest.raises(ValueError, match="mesh"):
        neighborhood_attention_sharded(**made, spec=NeighborhoodSpec(5), mesh=None)
