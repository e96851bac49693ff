import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from genjax_lab.parallel import (
    batch_sharding,
    global_batch,
    make_mesh,
    parameter_shardings,
    process_share,
)


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 4, 2), (1, 4, 2)),
        ((-1, 8, 1), (1, 8, 1)),
    ],
)
def test_mesh_has_the_asked_sizes_and_minus_one_takes_the_rest(sizes, expected):
    mesh = make_mesh(*sizes)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), expected, strict=True))
    assert mesh.size == 8


def test_mesh_takes_exactly_the_given_devices():
    devices = jax.devices()[2:4]
    assert set(make_mesh(devices=devices).devices.flat) == set(devices)


def test_smaller_mesh_takes_the_first_devices():
    assert list(make_mesh(2, 2).devices.flat) == jax.devices()[:4]


@pytest.mark.parametrize("sizes", [(9, 1, 1), (4, 4, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1)])
def test_mesh_sizes_that_do_not_fit_are_named_with_the_number_of_devices(sizes):
    with pytest.raises(ValueError, match=rf"data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}"):
        make_mesh(*sizes)
    if 0 not in sizes and sizes.count(-1) < 2:
        with pytest.raises(ValueError, match="number of devices, 8"):
            make_mesh(*sizes)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((128, 256), P("fsdp", "tensor")),
        ((256, 128), P("fsdp", "tensor")),
        ((3, 3, 64, 128), P(None, None, "fsdp", "tensor")),
        # The output axis does not divide, so fsdp takes it or another, whichever is largest.
        ((128, 257), P("fsdp")),
        ((2**14,), P("fsdp")),
        ((2**14 + 1,), P()),
        ((127, 127), P()),
        ((8, 8), P()),
        ((), P()),
    ],
)
def test_parameters_are_split_by_their_shapes(shape, expected):
    mesh = make_mesh(2, 2, 2)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert parameter_shardings({"w": leaf}, mesh)["w"].spec == expected


def test_parameters_stay_whole_where_the_mesh_only_splits_data():
    leaf = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    assert parameter_shardings(leaf, make_mesh(8)).spec == P()


def test_min_size_decides_what_is_small():
    leaf = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert parameter_shardings(leaf, make_mesh(1, 8), min_size=64).spec != P()


@pytest.mark.parametrize("batch_axis", [0, 1])
def test_batches_are_split_over_data_and_fsdp_and_keep_their_rows(batch_axis):
    mesh = make_mesh(2, 2, 2)
    rows = np.moveaxis(np.arange(8 * 3).reshape(8, 3), 0, batch_axis)
    placed = global_batch({"x": rows}, mesh, batch_axis=batch_axis)["x"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding == batch_sharding(mesh, batch_axis=batch_axis)
    assert {shard.data.shape[batch_axis] for shard in placed.addressable_shards} == {2}


def test_batch_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"\['x'\] has shape \(6, 3\).*data \* fsdp = 8"):
        global_batch({"x": np.zeros((6, 3))}, make_mesh(4, 2))


def test_one_process_loads_the_whole_batch():
    assert process_share(make_mesh(2, 2, 2)) == (0, 1)


class _Device:
    """Stands for a device of another process, which one process cannot have."""

    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    "owners, expected",
    [
        ((0, 0, 1, 1), (0, 2)),  # each process has its own rows
        ((1, 1, 0, 0), (1, 2)),  # and their order is that of the rows, not of the processes
        ((0, 1, 0, 1), ValueError),  # tensor=2 within a pair, but the pairs interleave: see below
    ],
)
def test_process_share_follows_who_holds_which_rows(monkeypatch, owners, expected):
    # Four slots of rows; what each device holds is what the sharding would say.
    mesh = make_mesh(4, 1, 2)
    slots = {_Device(owner): (slice(row, row + 1),) for row, owner in enumerate(owners)}
    if expected is ValueError:
        # Process 0 also holds row 1: the parts overlap and no cut exists.
        slots[_Device(0)] = (slice(1, 2),)

    class Sharding:
        def devices_indices_map(self, shape):
            assert shape == (4,)
            return slots

    monkeypatch.setattr("genjax_lab.parallel.mesh.batch_sharding", lambda mesh: Sharding())
    if expected is ValueError:
        with pytest.raises(ValueError, match="overlapping or unequal"):
            process_share(mesh)
    else:
        assert process_share(mesh) == expected
