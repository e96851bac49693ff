"""Running one computation on many devices: meshes and sharding rules."""

from genjax_lab.parallel.mesh import (
    AXES,
    batch_sharding,
    global_batch,
    make_mesh,
    parameter_shardings,
    process_share,
)

__all__ = [
    "AXES",
    "batch_sharding",
    "global_batch",
    "make_mesh",
    "parameter_shardings",
    "process_share",
]
