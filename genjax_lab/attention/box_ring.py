"""Boxes that share their keys with the tile before.

From one tile to the next along the last axis most of a box stays, so only the keys that are new are
copied, into the places of those that are no longer in it: along this axis the box is a ring. The
order of its keys does not matter to attention, only to what is masked.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax_lab.attention.box_step import Box, BoxPlan, line_width

_NAMES = ("key", "value")


class RingBox(Box):
    """A step whose keys and values lie in rings, [units but of the last axis, slots * unit].

    The unit c of the last axis is in the slot c - last modulo the number of slots, where `last` is
    the first unit of the box of the row's last tile, which comes first.
    """

    def __init__(
        self, plan: BoxPlan, loop: int, tensors: dict, tables: dict, step: Array, rings: dict
    ):
        super().__init__(plan, loop, tensors, tables, step)
        self._ring = self.axes[-1].ring
        # The slot of the first unit of this box is -turn, modulo the number of slots.
        last = self._set(self.arrays[-1]["kv_first"])[-1]
        self._turn = (last - self.kv_first[-1]) % self._ring.slots
        self.kv_edges = (*self.kv_edges[:-1], self._ring.slots)
        self.rings = {name: self._renewed(name, rings[name]) for name in _NAMES}

    def _renewed(self, name: str, ring: Array) -> Array:
        """The ring with the units that are new in this box."""
        lines, piece, slots = self.tensors[name], self._ring.piece, self._ring.slots
        unit = lines.shape[-1] // self.plan.kv_lengths[-1]
        for offset in range(0, self._ring.advance, piece):
            new = _units(self, lines, offset, piece)
            slot = (offset - self._turn) % slots
            origin = (*(jnp.int32(0),) * (ring.ndim - 1), slot * unit)
            ring = jax.lax.dynamic_update_slice(ring, new, origin)
        return ring

    def _in_box(self, name: str) -> Array:
        return self.rings[name].reshape(-1, line_width(self.plan, self.tensors[name]))

    def _places(self, number: int, dtype: jnp.dtype) -> Array:
        places = super()._places(number, dtype)
        if number < self.plan.rank - 1:
            return places
        tokens = self.plan.tile[-1]
        turned = places + (self._turn * tokens).astype(dtype)
        size = self._ring.slots * tokens
        return jnp.where(turned >= size, turned - jnp.asarray(size, dtype), turned)


def empty_rings(plan: BoxPlan, loop: int, tensors: dict) -> dict[str, Array]:
    """Rings that hold nothing yet."""
    axes = plan.loops[loop]
    others = [axis.kv_edge for axis in axes[:-1]]
    slots = {
        name: tensors[name].shape[-1] // plan.kv_lengths[-1] * axes[-1].ring.slots
        for name in _NAMES
    }
    return {name: jnp.zeros((*others, slots[name]), plan.exact) for name in _NAMES}


def filled_rings(box: Box, rings: dict[str, Array]) -> dict[str, Array]:
    """The rings of the tile that comes first: its box, and in further slots some of it again.

    They are written into the rings of the row before, so that nothing else is.
    """
    kv_edge, filled = box.kv_edges[-1], {}
    for name, ring in rings.items():
        lines = box.tensors[name]
        unit = lines.shape[-1] // box.plan.kv_lengths[-1]
        for slot in range(0, box.axes[-1].ring.slots, kv_edge):
            count = min(kv_edge, box.axes[-1].ring.slots - slot)
            origin = (*(0,) * (ring.ndim - 1), slot * unit)
            ring = jax.lax.dynamic_update_slice(ring, _units(box, lines, 0, count), origin)
        filled[name] = ring
    return filled


def _units(box: Box, lines: Array, offset: int, count: int) -> Array:
    """Some units of the last axis of the box's part of `lines`."""
    (*origin, first), (*size, last) = box.where_keys(lines)
    unit = last // box.kv_edges[-1]
    origin, size = (*origin, first + offset * unit), (*size, count * unit)
    return jax.lax.dynamic_slice(lines, origin, size)[0, 0].astype(box.plan.exact)
