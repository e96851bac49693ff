"""Tokens in tiles, and the lists of the tiles that a neighborhood visits."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_windows import random_spec

from genjax_lab.attention import NeighborhoodSpec, neighborhood_mask, simulate
from genjax_lab.attention.kernels import default_tiles, kernel_attention
from genjax_lab.attention.shapes import SHAPES, SMALL_SHAPES
from genjax_lab.attention.tiling import plan_tiles, token_permute, token_unpermute


def problems(count, seed=0):
    rng = np.random.default_rng(seed)
    for number in range(count):
        grid = tuple(rng.integers(1, 14 if number % 3 == 0 else 7, size=number % 3 + 1).tolist())
        tiles = 2 ** rng.integers(0, 4, size=(2, len(grid)))
        yield grid, random_spec(rng, grid), *(tuple(tile.tolist()) for tile in tiles)


def test_tokens_are_ordered_by_group_tile_and_place():
    grid, tile, dilation = (7, 5), (2, 4), (3, 1)
    x = np.arange(1, 36).reshape(1, 7, 5, 1) * np.ones((2, 1, 1, 3), int)
    tiled = np.asarray(token_permute(x, tile, dilation))
    assert tiled.shape == (2 * 3, 2 * 2 * 8, 3)
    expected = np.zeros((3, 32), int)
    for group in range(3):
        places = itertools.product(range(2), range(2), range(2), range(4))
        for token, (row, column, down, right) in enumerate(places):
            first, second = (row * 2 + down) * 3 + group, column * 4 + right
            if first < 7 and second < 5:
                expected[group, token] = first * 5 + second + 1
    np.testing.assert_array_equal(tiled[..., 0], np.tile(expected, (2, 1)))
    np.testing.assert_array_equal(token_unpermute(tiled, grid, tile, dilation), x)


def test_permuting_and_back_is_the_identity():
    rng = np.random.default_rng(1)
    for grid, spec, tile, _ in problems(6):
        dilation = tuple(axis.dilation for axis in spec.axes(grid))
        rest = ((), (3,), (2, 3))[len(grid) - 1]
        x = rng.normal(size=(2, *grid, *rest)).astype(np.float32)
        tiled = np.asarray(token_permute(x, tile, dilation))
        assert tiled.shape[0] == 2 * math.prod(dilation) and tiled.shape[2:] == rest
        np.testing.assert_array_equal(token_unpermute(tiled, grid, tile, dilation), x)
        assert np.count_nonzero(tiled) == x.size


def test_permuting_works_inside_jit_and_has_a_gradient():
    x = np.random.default_rng(2).normal(size=(1, 5, 7, 2)).astype(np.float32)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(token_permute(x, (4, 2), (2, 1)) ** 2)))(x)
    np.testing.assert_allclose(slope, 2 * x)


@pytest.fixture(scope="module")
def masks():
    """Of random problems: (plan, which queries see which keys by the definition, real queries).

    In tiles: [G, tiles of queries, tiles of keys, queries, keys]; [G, tiles of queries, queries].
    """
    found = []
    for grid, spec, q_tile, kv_tile in problems(18):
        plan = plan_tiles(grid, spec, q_tile, kv_tile)
        dilation = tuple(axis.dilation for axis in spec.axes(grid))
        tokens = np.arange(1, math.prod(grid) + 1, dtype=np.int32).reshape(1, *grid)
        q, kv = (np.asarray(token_permute(tokens, tile, dilation)) for tile in (q_tile, kv_tile))
        mask = np.pad(neighborhood_mask(grid, spec), ((1, 0), (1, 0)))
        seen = mask[q[:, :, None], kv[:, None, :]]
        q_volume, kv_volume = math.prod(q_tile), math.prod(kv_tile)
        seen = seen.reshape(len(q), -1, q_volume, kv.shape[1] // kv_volume, kv_volume)
        found.append((plan, seen.swapaxes(2, 3), (q > 0).reshape(len(q), -1, q_volume)))
    return found


def test_plans_list_the_pairs_of_tiles_with_a_visible_key(masks):
    for plan, seen, is_real in masks:
        visited = seen.any((-2, -1))
        full = visited & (seen | ~is_real[:, :, None, :, None]).all((-2, -1))
        for group, row in itertools.product(*map(range, visited.shape[:2])):
            whole, count = plan.kv_full[group, row], plan.kv_visited[group, row]
            listed = plan.kv_tiles[group, row]
            np.testing.assert_array_equal(listed[:whole], np.flatnonzero(full[group, row]))
            rest = visited[group, row] & ~full[group, row]
            np.testing.assert_array_equal(listed[whole:count], np.flatnonzero(rest))
        for group, row in itertools.product(range(len(visited)), range(visited.shape[2])):
            whole, count = plan.q_full[group, row], plan.q_visited[group, row]
            listed = plan.q_tiles[group, row]
            np.testing.assert_array_equal(listed[:whole], np.flatnonzero(full[group, :, row]))
            rest = visited[group, :, row] & ~full[group, :, row]
            np.testing.assert_array_equal(listed[whole:count], np.flatnonzero(rest))


def test_plans_visit_as_many_tiles_as_the_simulator_counts():
    named = [(s.grid, s.spec, s.q_tile, s.kv_tile) for s in SHAPES + SMALL_SHAPES]
    for grid, spec, q_tile, kv_tile in [*problems(60, seed=3), *named]:
        plan = plan_tiles(grid, spec, q_tile, kv_tile)
        counted = simulate(grid, spec, q_tile, kv_tile)
        assert (plan.num_visited, plan.num_full) == (counted.visited, counted.full)
        assert plan.num_visited == plan.q_visited.sum() and plan.num_full == plan.q_full.sum()


def test_bounds_are_the_windows_of_each_query(masks):
    for plan, seen, is_real in masks:
        keys = np.prod(plan.query_end - plan.query_start, axis=1)
        np.testing.assert_array_equal(keys, seen.sum((2, 4)).reshape(keys.shape))
        assert not np.any(plan.query_end.swapaxes(1, 2)[~is_real.reshape(keys.shape)])
        assert plan.query_start.dtype == plan.kv_tiles.dtype == np.int32


def test_plans_are_kept():
    spec = NeighborhoodSpec(3)
    assert plan_tiles([5, 6], spec, [2, 2], (4, 2)) is plan_tiles((5, 6), spec, (2, 2), [4, 2])


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_default_tiles_are_powers_of_two_no_larger_than_they_need_be(platform):
    for grid in [(1,), (7, 7), (5, 300), (30, 48, 80), (2, 3, 1000), (32768,)]:
        for tile in default_tiles(grid, 128, platform):
            assert all(edge & (edge - 1) == 0 for edge in tile)
            # The kernel of GPUs takes 16 tokens at least.
            is_least = platform == "gpu" and math.prod(tile) == 16
            fits = all(edge < 2 * length for edge, length in zip(tile, grid, strict=True))
            assert fits or is_least
    sizes = {math.prod(tile) for tile in default_tiles((30, 48, 80), 64, platform)}
    assert sizes == ({128, 64} if platform == "gpu" else {256})


def attend(lengths=(6,), heads=2, **changes):
    query, key = (np.zeros((1, *lengths, number, 8), np.float32) for number in (heads, 2))
    arguments = {"query": query, "key": key, "value": key, "spec": NeighborhoodSpec(3)}
    return kernel_attention(**arguments | {"platform": "gpu", "interpret": True} | changes)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda: token_permute(np.zeros((1, 4)), (2, 2)), "2 grid axes"),
        (lambda: token_permute(np.zeros((1, 4)), (0,)), "positive"),
        (lambda: token_permute(np.zeros((1, 4)), (2,), (1, 1)), "for each axis"),
        (lambda: token_unpermute(np.zeros((1, 5)), (4,), (2,)), r"\[batch \* 1, 4"),
        (lambda: token_unpermute(np.zeros((3, 4)), (4,), (2,), 2), r"\[batch \* 2"),
        (lambda: token_unpermute(np.zeros((1, 4)), (4, 4), (2,)), "edge for each axis"),
        (lambda: plan_tiles((4, 4), NeighborhoodSpec(3), (2,), (2, 2)), "edge for each axis"),
        (lambda: plan_tiles((4,), NeighborhoodSpec(5), (2,), (2,)), "window"),
        (lambda: plan_tiles((4,), NeighborhoodSpec(3, border="wrap"), (2,), (2,)), "wrap.*'xla'"),
        (lambda: default_tiles((0,), 64), "positive lengths"),
        (lambda: default_tiles((8,), 64, "cpu"), "platform is 'cpu'"),
        (lambda: attend(spec=NeighborhoodSpec(3, border="wrap")), "wrap.*'xla'"),
        (lambda: attend(grid_sizes=np.ones((1, 1), int)), "grid_sizes.*'xla'"),
        (lambda: attend(platform="cpu"), "platform is 'cpu'"),
        (lambda: attend(layout="boxes"), "layout is 'boxes'"),
        (lambda: attend(layout="tiled"), "grid must be given"),
        (lambda: attend(layout="tiled", grid=(6,)), "q_tile of its tokens"),
        (lambda: attend(layout="tiled", grid=(6,), q_tile=(2,), kv_tile=(4,)), "the same"),
        (lambda: attend(layout="tiled", grid=(9,), q_tile=(2,)), "in tiles query"),
        (lambda: attend(q_tile=(3,)), "powers of two"),
        (lambda: attend(q_tile=(8,), interpret=False), "at least 16 tokens"),
        (lambda: attend((200,), kv_tile=(64,), platform="tpu", interpret=False), "multiple of 128"),
        (lambda: attend(heads=3), "a multiple of them"),
        (lambda: attend(key=np.zeros((1, 7, 2, 8), np.float32)), "batch and grid"),
        (lambda: attend(additional_keys=np.zeros((1, 2, 2, 8), np.float32)), "together"),
        (
            lambda: attend(
                **{
                    f"additional_{x}": np.zeros((2, 2, 2, 8), np.float32)
                    for x in ("keys", "values")
                }
            ),
            r"additional_keys must have shape \(1, 2, 2, 8\)",
        ),
        (lambda: attend(kv_mask=np.ones((1, 6))), "kv_mask must be bool"),
        (lambda: attend(query=np.zeros((1, 6, 2, 8), np.int32)), "int32.*'xla'"),
        (
            lambda: attend(
                platform="tpu",
                **dict.fromkeys(["query", "key", "value"], np.zeros((1, 6, 2, 8), "f2")),
            ),
            "float16.*'xla'",
        ),
    ],
)
def test_refuses_what_does_not_fit(program, message):
    with pytest.raises(ValueError, match=message):
        program()
