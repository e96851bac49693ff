"""Rings of keys: the slots of units, and attention with rings against all pairs of tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.attention import (
    NeighborhoodSpec,
    boxes,
    neighborhood_attention,
    token_permute,
    token_unpermute,
)
from genjax_lab.attention.box_plan import Ring, plan_axis
from genjax_lab.attention.windows import AxisWindow

Spec = NeighborhoodSpec
CASES = {  # grid, neighborhood, tile of queries, stored tile, ring of the loop that has one
    "as many slots as keys": ((40,), Spec(12), (2,), None, Ring(13, 2, 1)),
    "more slots than keys": ((36,), Spec(12), (6,), None, Ring(18, 6, 6)),
    "boxes that stay": ((3, 40), Spec((2, 12), (1, 4)), (3, 4), None, Ring(12, 4, 4)),
    "uneven": ((64,), Spec(32, 16), (16,), None, Ring(32, 16, 8)),
    "stored tiles": ((2, 160), Spec((2, 40)), (2, 4), (2, 4), Ring(20, 10, 5)),
}


@pytest.fixture
def rings(monkeypatch):
    """The rings that are used."""
    used, empty = [], boxes.empty_rings

    def spy(plan, loop, tensors):
        used.append(plan.loops[loop][-1].ring)
        return empty(plan, loop, tensors)

    monkeypatch.setattr(boxes, "empty_rings", spy)
    return used


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("name", CASES)
def test_rings_are_boxes(name, extra, rings):
    grid, spec, q_tile, stored, ring = CASES[name]
    rng = np.random.default_rng(extra)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    query, key, value = normal(2, *grid, 2, 8), normal(2, *grid, 1, 8), normal(2, *grid, 1, 4)
    options = {"return_lse": True}
    if extra:
        options["additional_keys"] = normal(2, extra, 1, 8)
        options["additional_values"] = normal(2, extra, 1, 4)
    expected = neighborhood_attention(
        query, key, value, spec, implementation="reference", **options
    )
    options |= {"implementation": "xla", "q_tile": q_tile}
    if stored is None:
        found = neighborhood_attention(query, key, value, spec, **options)
    else:
        tensors = [token_permute(x, stored) for x in (query, key, value)]
        found = neighborhood_attention(*tensors, spec, **options, layout="tiled", grid=grid)
        found = [token_unpermute(x, grid, stored) for x in found]
    assert rings == [ring]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_nothing_stays_in_a_ring_from_another_example(rings):
    tensors = np.random.default_rng(0).normal(size=(3, 2, 36, 1, 8)).astype(np.float32)
    spec, options = Spec(12), {"implementation": "xla", "q_tile": (6,)}
    expected = neighborhood_attention(*tensors, spec, **options)
    tensors[:, 0] = np.nan
    found = neighborhood_attention(*(jnp.asarray(x) for x in tensors), spec, **options)
    assert rings == [Ring(18, 6, 6)]  # slots that the first box does not need
    assert np.array_equal(found[1], expected[1])


def test_slots_of_all_kinds_of_axes():
    """Every unit of every box is in its slot, if each tile renews what its ring says."""
    rng, kinds = np.random.default_rng(0), set()
    for _ in range(300):
        length = int(rng.integers(2, 60))
        window = int(rng.integers(1, length + 1))
        axis = AxisWindow(length, window, int(rng.integers(1, window + 1)))
        bounds = [x[None] for x in axis.bounds()]
        for part in plan_axis(bounds, length, [length], int(rng.integers(1, length + 1))):
            if (ring := part.ring) is None:
                continue
            kinds.add((ring.slots > part.kv_edge, ring.advance > ring.piece))
            last = part.kv_first[0, -1]
            slots = np.full(ring.slots, -1)
            slots[: part.kv_edge] = last + np.arange(part.kv_edge)
            for first in part.kv_first[0, ::-1]:
                for offset in range(0, ring.advance, ring.piece):
                    slot = (first + offset - last) % ring.slots
                    assert slot + ring.piece <= ring.slots
                    slots[slot : slot + ring.piece] = first + offset + np.arange(ring.piece)
                units = first + np.arange(part.kv_edge)
                assert np.array_equal(slots[(units - last) % ring.slots], units)
    assert kinds >= {(False, False), (False, True), (True, False)}


def test_places_may_need_more_bits(rings, monkeypatch):
    monkeypatch.setattr(boxes, "_NARROW", 0)  # as for boxes of more than 16384 tokens
    tensors = np.random.default_rng(0).normal(size=(3, 1, 36, 1, 8)).astype(np.float32)
    expected, found = (
        neighborhood_attention(*tensors, Spec(12), q_tile=(6,), implementation=name)
        for name in ("reference", "xla")
    )
    assert rings == [Ring(18, 6, 6)]
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_rings_have_no_further_slots_where_nothing_is_masked(rings):
    tensors = np.random.default_rng(0).normal(size=(3, 1, 49, 1, 8)).astype(np.float32)
    spec = Spec(13, 6)  # in 13 slots what is new would be six pieces; 15 are more than is seen
    expected, found = (
        neighborhood_attention(*tensors, spec, q_tile=(6,), implementation=name)
        for name in ("reference", "xla")
    )
    assert not rings
    np.testing.assert_allclose(found, expected, atol=5e-6)
