"""Device meshes, and where parameters and batches live on them.

One mesh with three axes serves every method: `data` splits the batch, `fsdp` splits the batch and
the parameters (fully sharded data parallelism, as ZeRO-3, arXiv 1910.02054), `tensor` splits the
output features of the kernels. The rules look at shapes alone, so that a parameter, its optimiser
moments and its averages are always laid out alike; XLA inserts the communication. A rule changes
where numbers are computed and never, beyond floating-point rounding, which numbers.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped

AXES = ("data", "fsdp", "tensor")
_BATCH_AXES = ("data", "fsdp")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Arranges devices into a mesh with the axes `data`, `fsdp` and `tensor`.

    Args:
        data: number of ways in which the batch alone is split.
        fsdp: number of ways in which both the batch and the parameters are split.
        tensor: number of ways in which output features are split.
        devices: the devices to use; all devices of all processes by default, or, where one
            process asks for fewer, the first of them.

    At most one size may be -1: it then takes the devices that the other two leave.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(
            f"mesh sizes must be positive, and at most one of them -1 (the rest); got {asked}"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices is None:
        devices = jax.devices()
        if not free and jax.process_count() == 1 and fixed < len(devices):
            devices = devices[:fixed]
    devices = list(devices)
    if free:
        sizes[free[0]] = len(devices) // fixed
    if not devices or math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh sizes {asked} do not multiply to the number of devices, {len(devices)}; "
            "change them, set one to -1 (the rest), or pass the devices to use"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def parameter_shardings(
    abstract_params: PyTree, mesh: Mesh, *, min_size: int = 2**14
) -> PyTree[NamedSharding]:
    """Chooses the sharding of every leaf of a tree of parameters by its shape.

    `tensor` splits the last axis (the output features) of leaves with two or more axes; `fsdp`
    splits the largest axis that is left. An axis is split only if its length is divisible. Leaves
    of fewer than `min_size` elements stay whole on every device: gathering them costs more time
    than splitting them saves memory.

    Args:
        abstract_params: a tree of anything with a `shape`: arrays, tracers, `ShapeDtypeStruct`s.
            Optimiser states and averages of the parameters follow the same rule.
        mesh: a mesh of `make_mesh`.
        min_size: the smallest number of elements that is split.

    Returns:
        A tree of `NamedSharding` of the same structure.
    """

    def sharding(leaf: Any) -> NamedSharding:
        shape = leaf.shape
        split: list[str | None] = [None] * len(shape)
        if math.prod(shape) >= min_size:
            tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
            if tensor > 1 and len(shape) >= 2 and shape[-1] % tensor == 0:
                split[-1] = "tensor"
            axes = [
                axis
                for axis, size in enumerate(shape)
                if fsdp > 1 and split[axis] is None and size % fsdp == 0
            ]
            if axes:
                split[max(axes, key=lambda axis: shape[axis])] = "fsdp"
        while split and split[-1] is None:
            split.pop()
        return NamedSharding(mesh, PartitionSpec(*split))

    return jax.tree.map(sharding, abstract_params)


def batch_sharding(mesh: Mesh, *, batch_axis: int = 0) -> NamedSharding:
    """The sharding of batches: `batch_axis` is split over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * batch_axis, _BATCH_AXES))


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Says which part of every global batch this process must load.

    Returns:
        `(index, count)`: the global batch is cut into `count` equal parts in order, and this
        process loads part `index`. Processes that hold the same rows (because `tensor` spans
        them) have the same index.

    Raises:
        ValueError: the mesh overlaps the processes' rows so that no such cut exists.
    """
    num_slots = mesh.shape["data"] * mesh.shape["fsdp"]
    slots: dict[int, set[int]] = {}
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((num_slots,)).items():
        slots.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({frozenset(part) for part in slots.values()}, key=min)
    sizes = {len(part) for part in parts}
    if len(sizes) != 1 or sum(len(part) for part in parts) != num_slots:
        raise ValueError(
            "mesh splits the batch so that processes hold overlapping or unequal rows, got "
            f"{dict(mesh.shape)} over {len(slots)} processes; make data * fsdp a multiple of the "
            "number of processes, or a divisor of it"
        )
    if jax.process_index() not in slots:
        raise ValueError(
            f"mesh has no device of process {jax.process_index()}; every process must take part"
        )
    return parts.index(frozenset(slots[jax.process_index()])), len(parts)


def global_batch(
    local_batch: PyTree[Shaped[np.ndarray, "..."]], mesh: Mesh, *, batch_axis: int = 0
) -> PyTree[Shaped[jax.Array, "..."]]:
    """Places the rows that this process has loaded into one array over all devices.

    Args:
        local_batch: a tree of numpy arrays holding this process's part of the batch
            (`process_share`) along `batch_axis`; with one process, the whole batch.
        mesh: a mesh of `make_mesh`.
        batch_axis: the axis that counts examples.

    Returns:
        The tree of global arrays, sharded as `batch_sharding` says.

    Raises:
        ValueError: the batch does not divide among the devices.
    """
    _, count = process_share(mesh)
    slots = mesh.shape["data"] * mesh.shape["fsdp"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(local_batch):
        if leaf.ndim <= batch_axis or (leaf.shape[batch_axis] * count) % slots:
            raise ValueError(
                f"local_batch{jax.tree_util.keystr(path)} has shape {leaf.shape}: axis "
                f"{batch_axis} of the batch of all {count} processes must be a multiple of "
                f"data * fsdp = {slots}"
            )
    sharding = batch_sharding(mesh, batch_axis=batch_axis)
    return jax.make_array_from_process_local_data(sharding, local_batch)
