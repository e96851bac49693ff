"""Boxes of keys: their plans against the mask, their attention against all pairs of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_windows import random_spec

from genjax_lab.attention import (
    NeighborhoodSpec,
    box_plan,
    box_tile,
    neighborhood_attention,
    token_permute,
    token_unpermute,
)
from genjax_lab.attention.box_plan import choose_tiles, plan_axis, tile_order
from genjax_lab.attention.windows import AxisWindow, axis_mask

Spec = NeighborhoodSpec
attend = jax.jit(
    neighborhood_attention,
    static_argnames=("spec", "return_lse", "layout", "grid", "q_tile", "implementation"),
)
CASES = {
    "line, moved tail": dict(grid=(23,), spec=Spec(9, 4), q_tile=6),
    "dilated line": dict(grid=(23,), spec=Spec(4, 2, 3), extra=3, kv_heads=1),
    "causal image": dict(grid=(7, 9), spec=Spec((5, 4), 2, 1, (True, False)), q_tile=(3, 4)),
    "cut off": dict(
        grid=(8, 7), spec=Spec((5, 3), (2, 1), (1, 2), border="mask"), bias=True, kv_heads=1
    ),
    "around": dict(grid=(6, 8), spec=Spec((3, 5), 1, (2, 1), border="wrap"), bias=True, extra=1),
    "video": dict(grid=(4, 6, 5), spec=Spec((3, 4, 3), (2, 4, 1)), kv_heads=1, large=True),
    "padded": dict(grid=(6, 7), spec=Spec((4, 3), 2, (1, 2)), extra=2, sizes=True, bias=True),
    "padded around": dict(grid=(9,), spec=Spec(4, 2, border="wrap"), sizes=True),
    "masked": dict(grid=(5, 6), spec=Spec((3, 4)), mask=True, q_tile=(2, 6)),
}


def problem(grid, spec, q_tile=None, kv_heads=2, extra=0, **kinds):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    heads = 2
    tensors = {
        # Large queries need the maxima of their logits, others do not.
        "query": normal(2, *grid, heads, 8) * (40 if kinds.get("large") else 1),
        "key": normal(2, *grid, kv_heads, 8),
        "value": normal(2, *grid, kv_heads, 4),
        "scale": np.float32(0.3),
    }
    if extra:
        tensors["additional_keys"] = normal(2, extra, kv_heads, 8)
        tensors["additional_values"] = normal(2, extra, kv_heads, 4)
    if kinds.get("bias"):
        windows = [2 * axis.window - 1 for axis in spec.axes(grid)]
        tensors["position_bias"] = normal(heads, *windows)
    options = {}
    if kinds.get("mask"):
        options["kv_mask"] = rng.random((2, *grid)) < 0.5
        tensors["key"][~options["kv_mask"]] = np.nan
    if kinds.get("sizes"):
        options["grid_sizes"] = np.array(
            [[length for length in grid], [length - 2 for length in grid]]
        )
    weights = normal(2, *grid, heads, 4), normal(2, *grid, heads)
    return tensors, options, weights


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_all_pairs(name):
    case = CASES[name]
    tensors, options, weights = problem(**case)

    def total(tensors, implementation, **more):
        out, lse = neighborhood_attention(
            **tensors,
            **options,
            **more,
            spec=case["spec"],
            return_lse=True,
            implementation=implementation,
        )
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(out * weights[0]) + jnp.sum(finite * weights[1]), (out, lse)

    run = jax.jit(jax.grad(total, has_aux=True), static_argnames=("implementation", "q_tile"))
    slopes, found = run(tensors, "xla", q_tile=case.get("q_tile"))
    expected_slopes, expected = run(tensors, "reference")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 if case.get("large") else 5e-6)
    for tensor, slope in slopes.items():
        expected = expected_slopes[tensor]
        np.testing.assert_allclose(
            slope, expected, rtol=1e-4, atol=1e-3 if case.get("large") else 1e-4, err_msg=tensor
        )


def box_mask(axis, edge, merged):
    """The mask that the plans of one axis compute, and how often a query is answered for."""
    bounds = [np.zeros(axis.length, int) for _ in range(2)]
    origin = 0
    for group, length in enumerate(axis.group_lengths()):
        for whole, part in zip(bounds, axis.bounds(group), strict=True):
            whole[origin : origin + length] = part + origin
        origin += length
    parts = plan_axis(
        [x[None] for x in bounds], axis.length, axis.group_lengths(), edge, merged=merged
    )
    mask, owned = np.zeros((axis.length, axis.length), bool), np.zeros(axis.length, int)
    for part in parts:
        for tile, first in enumerate(part.first):
            for query in range(part.skipped[tile], part.q_edge):
                box = np.zeros(part.kv_edge, bool)
                begin, end = (0, part.kv_edge)
                if part.seen is not None:
                    begin, end = part.seen[0, tile, query]
                box[begin:end] = True
                at = part.kv_first[0, tile]
                mask[first + query, at : at + part.kv_edge] |= box
                owned[first + query] += 1
    order = np.argsort(np.arange(axis.length) % axis.dilation, kind="stable")
    back = np.argsort(order)
    return mask[back][:, back], owned


def test_plans_are_the_mask():
    rng = np.random.default_rng(0)
    for _ in range(300):
        length = int(rng.integers(1, 30))
        axis = random_spec(rng, (length,)).axes((length,))[0]
        mask, owned = box_mask(axis, int(rng.integers(1, length + 1)), int(rng.integers(1, 4)))
        assert np.array_equal(mask, axis_mask(axis)), axis
        assert np.all(owned == 1), axis


def test_aligned_windows_and_ends_of_axes_need_no_mask():
    strided = AxisWindow(64, 32, 16)
    (plan,) = plan_axis([x[None] for x in strided.bounds()], 64, [64], 16)
    assert (plan.kv_edge, plan.seen) == (32, None)
    sliding, equal = plan_axis(
        [x[None] for x in AxisWindow(64, 32).bounds()], 64, [64], 8, merged=2
    )
    assert (sliding.kv_edge, sliding.seen.shape, len(sliding.first)) == (39, (1, 4, 8, 2), 4)
    assert (equal.q_edge, equal.kv_edge, equal.seen, len(equal.first)) == (16, 32, None, 2)


def test_tiles_fit_strides():
    assert box_tile((64, 64), Spec(32, 16), head_dim=64) == (16, 16)
    assert box_tile((15, 24, 40), Spec((9, 12, 12), (8, 4, 4)), head_dim=64) == (8, 4, 4)
    assert list(map(tuple, tile_order((1, 2)))) == [(0, 1), (0, 0)]
    bounds = [(np.zeros((1, 6), int), np.full((1, 6), 6))]
    (parts,) = choose_tiles(bounds, [6], [[6]], rows_per_query=1, width=8, tile=[1], q_tile=[4])
    assert [part.q_edge for part in parts] == [4]


@pytest.mark.parametrize("dilation", [1, 2])
def test_tokens_may_stay_in_tiles(dilation):
    grid, tile, spec = (7, 6), (2, 3), Spec((3, 2), (2, 1), (dilation, 1))
    tensors, _, _ = problem(grid, spec, extra=2)
    kv_mask = np.random.default_rng(1).random((2, *grid)) < 0.8
    sizes = np.array([[7, 6], [6, 4]])
    whole = attend(**tensors, spec=spec, kv_mask=kv_mask, grid_sizes=sizes, return_lse=True)
    permute = functools.partial(token_permute, tile=tile, dilation=(dilation, 1))
    stored = {
        name: permute(x) if name in ("query", "key", "value") else x for name, x in tensors.items()
    }
    options = {"layout": "tiled", "grid": grid, "q_tile": tile, "return_lse": True}
    tiled = attend(**stored, spec=spec, kv_mask=permute(kv_mask), grid_sizes=sizes, **options)
    for ours, theirs in zip(tiled, whole, strict=True):
        back = token_unpermute(ours, grid, tile, (dilation, 1))
        np.testing.assert_allclose(back, theirs, atol=2e-6)
    assert not np.any(np.isnan(tiled[0]))


def test_maxima_are_those_of_the_tile_that_answers():
    tensors = np.random.default_rng(0).normal(size=(3, 1, 23, 1, 8)).astype(np.float32)
    tensors[1] /= 100
    tensors[0, 0, 17], tensors[1, 0, 9] = 40, 40  # the query is in two tiles, its key in one box
    spec = Spec(9, is_causal=True)
    found, expected = (
        neighborhood_attention(*tensors, spec, q_tile=(6,), implementation=name)
        for name in ("xla", "reference")
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_memory_grows_with_the_tokens():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)

        def total(*arrays):
            return jnp.sum(neighborhood_attention(*arrays, Spec(256)) ** 2)

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(4096), temporaries(65536)
    assert large < 17 * small
    assert large < 65536 * 16 * 4 * 20  # twenty arrays of tokens; all pairs would be 17 GB


def test_equal_specs_are_one_program(monkeypatch):
    traced = []

    @functools.partial(jax.jit, static_argnames="spec")
    def run(x, spec):
        traced.append(spec)
        return neighborhood_attention(x, x, x, spec)

    x = jnp.ones((1, 6, 1, 4))
    run(x, Spec([3], stride=2))
    run(x, Spec((3,), 2))
    assert len(traced) == 1
    planned = []
    choose = box_plan.choose_tiles
    monkeypatch.setattr(
        box_plan, "choose_tiles", lambda *a, **k: planned.append(0) or choose(*a, **k)
    )
    for _ in range(2):  # nor is anything compiled again without jit
        neighborhood_attention(x, x, x, Spec(4, 3))
    assert len(planned) == 1


def test_works_under_vmap():
    tensors, _, _ = problem((6,), Spec(3))
    tensors = {name: x for name, x in tensors.items() if name != "scale"}
    more = {name: np.stack([x, 2 * x]) for name, x in tensors.items()}
    near = functools.partial(attend, spec=Spec(3))
    found = jax.jit(jax.vmap(lambda t: near(**t)))(more)
    for member in range(2):
        expected = near(**{name: x[member] for name, x in more.items()})
        np.testing.assert_allclose(found[member], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "rows"}, "layout is 'rows'"),
        ({"grid": (6,)}, "grid belongs to layout='tiled'"),
        ({"layout": "tiled", "grid": (6,)}, "q_tile"),
        ({"layout": "tiled", "grid": (8,), "q_tile": 4}, r"\[batch \* 1, 8,"),
        ({"q_tile": (2, 3)}, "q_tile must have a positive edge"),
        ({"q_tile": 0}, "q_tile must have a positive edge"),
        ({"kv_tile": 2}, "kv_tile is for"),
        ({"implementation": "pallas"}, "GPUs and TPUs"),
        ({"position_bias": np.zeros((2, 6), np.float32)}, r"position_bias must be \(2, 5\)"),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    tensors, _, _ = problem((6,), Spec(3))
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**tensors | changes, spec=Spec(3))
