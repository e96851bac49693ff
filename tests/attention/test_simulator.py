"""Tiles of a neighborhood: the published table, and counting them one by one."""

import itertools
import math

import numpy as np
import pytest
from random_windows import random_spec

from genjax_lab.attention import NeighborhoodSpec, neighborhood_mask, simulate, suggest
from genjax_lab.attention.simulator import roofline_seconds

FLUX, HUNYUAN, COSMOS = (256, 256), (30, 48, 80), (24, 44, 80)
BIG = ((4, 8, 8), (2, 8, 8))
# grid, window, stride, dilation, tiles, pairs of tiles visited, bound, bound by keys
TABLE = [
    (FLUX, (80, 80), 1, 1, ((16, 16), (16, 8)), 18564, 7.061, 10.24),
    (FLUX, (80, 80), 4, 1, ((16, 16), (16, 8)), 18564, 7.061, 10.24),
    (FLUX, (80, 80), 8, 1, ((16, 16), (16, 8)), 18564, 7.061, 10.24),
    (FLUX, (80, 80), 16, 1, ((16, 16), (16, 8)), 12800, 10.24, 10.24),
    (FLUX, (80, 80), 1, 1, ((16, 8), (16, 8)), 34884, 7.515, 10.24),
    (FLUX, (80, 80), 1, 1, ((8, 8), (8, 8)), 116964, 8.965, 10.24),
    (FLUX, (80, 80), 16, 1, ((8, 32), (8, 16)), 14720, 8.904, 10.24),
    (HUNYUAN, (18, 24, 24), 1, 1, BIG, 82368, 4.917, 11.111),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), 1, BIG, 38880, 10.417, 11.111),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), 1, ((2, 8, 8), (2, 8, 8)), 72900, 11.111, 11.111),
    (HUNYUAN, (18, 24, 24), 1, 1, ((2, 8, 8), (2, 8, 8)), 148896, 5.440, 11.111),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), 1, ((8, 4, 8), (4, 4, 8)), 43200, 9.375, 11.111),
    ((32768,), 2048, 1, 1, ((256,), (128,)), 2288, 14.322, 16),
    ((32768,), 2048, 128, 1, ((256,), (128,)), 2288, 14.322, 16),
    ((32768,), 2048, 256, 1, ((256,), (128,)), 2048, 16, 16),
    ((32768,), 2048, 2048, 1, ((256,), (128,)), 2048, 16, 16),
    (COSMOS, (24, 12, 24), 1, 1, ((8, 4, 8), (4, 4, 8)), 38808, 5.612, 12.222),
    (COSMOS, (24, 12, 24), (1, 4, 8), 1, ((8, 4, 8), (4, 4, 8)), 17820, 12.222, 12.222),
    (COSMOS, (24, 28, 56), (1, 4, 8), 1, ((8, 4, 8), (4, 4, 8)), 97020, 2.245, 2.245),
    (COSMOS, (24, 4, 16), 1, (1, 11, 5), ((8, 4, 8), (4, 4, 8)), 3960, 55.0, 55.0),
]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_the_published_table(row):
    grid, window, stride, dilation, tiles, visited, bound, flop_bound = row
    result = simulate(grid, NeighborhoodSpec(window, stride, dilation), *tiles)
    assert result.visited == visited
    assert result.bound == pytest.approx(bound, abs=6e-4)
    assert result.flop_bound == pytest.approx(flop_bound, abs=6e-4)


@pytest.mark.parametrize("stride", [1, 16])
def test_flat_tiles_make_windows_of_images_pay_three_times(stride):
    spec = NeighborhoodSpec((80, 80), stride)
    result = simulate(FLUX, spec, (16, 16), (16, 8), tiling="flat")
    assert result.bound == pytest.approx(3.2, abs=0.01)


def random_case(rng):
    grid = tuple(int(n) for n in rng.integers(2, 9, rng.integers(1, 4)))
    tiles = [tuple(int(edge) for edge in rng.integers(1, 5, len(grid))) for _ in range(2)]
    return grid, random_spec(rng, grid), *tiles


def count_one_by_one(grid, spec, q_tile, kv_tile):
    """(visited, full) by looking at every pair of tiles of the mask, group by group."""
    axes = spec.axes(grid)
    mask = neighborhood_mask(grid, spec).reshape(grid * 2)
    visited = full = 0
    for groups in itertools.product(*(range(axis.dilation) for axis in axes)):
        own = tuple(slice(g, None, a.dilation) for g, a in zip(groups, axes, strict=True))
        part = mask[own + own]
        lengths = part.shape[: len(grid)]

        def boxes(tile, lengths=lengths):
            starts = (range(0, n, edge) for n, edge in zip(lengths, tile, strict=True))
            return [
                tuple(slice(s, s + edge) for s, edge in zip(corner, tile, strict=True))
                for corner in itertools.product(*starts)
            ]

        for q_box in boxes(q_tile):
            for kv_box in boxes(kv_tile):
                seen = part[q_box + kv_box]
                whole = math.prod(seen.shape[len(grid) :]) == math.prod(kv_tile)
                visited += bool(seen.any())
                full += bool(seen.all() and whole)
    return visited, full


def test_counts_are_those_of_looking_at_every_pair_of_tiles():
    rng = np.random.default_rng(0)
    for _ in range(200):
        case = random_case(rng)
        result = simulate(*case)
        assert (result.visited, result.full) == count_one_by_one(*case), case


def test_flat_counts_are_those_of_looking_at_every_pair_of_tiles():
    rng = np.random.default_rng(1)
    for _ in range(100):
        grid, spec, _, _ = random_case(rng)
        volumes = [int(v) for v in rng.integers(1, 12, 2)]
        tiles = [(volume, *(1,) * (len(grid) - 1)) for volume in volumes]
        axes = spec.axes(grid)
        mask = neighborhood_mask(grid, spec).reshape(grid * 2)
        expected = 0
        for groups in itertools.product(*(range(axis.dilation) for axis in axes)):
            own = tuple(slice(g, None, a.dilation) for g, a in zip(groups, axes, strict=True))
            part = mask[own + own]
            count = math.prod(part.shape[: len(grid)])
            flat = part.reshape(count, count)
            expected += sum(
                flat[q : q + volumes[0], k : k + volumes[1]].any()
                for q in range(0, count, volumes[0])
                for k in range(0, count, volumes[1])
            )
        assert simulate(grid, spec, *tiles, tiling="flat").visited == expected, (grid, spec)


def test_bounds_do_not_pass_the_number_of_keys_where_nothing_is_padded():
    rng = np.random.default_rng(2)
    for _ in range(100):
        tile = tuple(int(edge) for edge in rng.integers(1, 4, 2))
        grid = tuple(4 * edge for edge in tile)
        window = tuple(int(rng.integers(1, n + 1)) for n in grid)
        stride = tuple(int(rng.integers(1, w + 1)) for w in window)
        result = simulate(grid, NeighborhoodSpec(window, stride), tile, tile)
        assert result.bound <= result.flop_bound * (1 + 1e-9)
        finer = simulate(grid, NeighborhoodSpec(window, stride), tile, (1, 1))
        assert finer.visited / finer.dense <= result.visited / result.dense + 1e-9
        assert result.padding == 0


def test_additional_keys_are_seen_by_every_tile_of_queries():
    spec = NeighborhoodSpec((80, 80), 16)
    plain = simulate(FLUX, spec, (16, 16), (16, 8))
    more = simulate(FLUX, spec, (16, 16), (16, 8), num_additional=300)
    assert more.visited - plain.visited == more.dense - plain.dense == 256 * 3
    assert more.full - plain.full == 256 * 2
    assert more.flop_bound == pytest.approx((65536 + 300) / (6400 + 300))


def test_the_best_strides_are_the_smallest_that_reach_the_bound():
    """HunyuanVideo: as good as the published stride, with one 8 times less on the first axis."""
    tiles = [((2, 8, 8), (2, 8, 8)), ((4, 8, 8), (2, 8, 8))]
    first, second = suggest(HUNYUAN, (18, 24, 24), tiles)
    assert first.spec.stride == (2, 8, 8) and first.q_tile == (2, 8, 8)
    assert first.bound == pytest.approx(11.111, abs=6e-4) and first.bound > second.bound
    worse = simulate(HUNYUAN, NeighborhoodSpec((18, 24, 24), (8, 8, 8)), *tiles[0])
    assert worse.bound == pytest.approx(10.490, abs=6e-4)
    (line,) = suggest((32768,), 2048, [((256,), (128,))])
    assert line.spec.stride == (256,) and line.bound == 16
    assert simulate((32768,), NeighborhoodSpec(2048, 192), (256,), (128,)).bound < 14


def test_the_least_time_is_that_of_products_or_of_memory():
    result = simulate(FLUX, NeighborhoodSpec((80, 80), 16), (16, 16), (16, 8))
    machine = {"heads": 24, "head_dim": 128, "flops_per_second": 1e15}
    seconds = roofline_seconds(result, **machine, bytes_per_second=1e13)
    assert seconds == pytest.approx(4 * 65536 * 6400 * 128 * 24 / 1e15)
    slow = roofline_seconds(result, **machine, bytes_per_second=1e9)
    assert slow == pytest.approx(4 * 65536 * 24 * 128 * 2 / 1e9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_tile": (16,)}, "each axis"),
        ({"kv_tile": (0, 8)}, "positive edge"),
        ({"tiling": "round"}, "round"),
        ({"num_additional": -1}, "num_additional"),
        ({"spec": NeighborhoodSpec(300)}, "at most"),
        ({"spec": NeighborhoodSpec(80, border="wrap")}, "wrap"),
    ],
)
def test_refuses_what_is_no_tiling(changes, message):
    spec = NeighborhoodSpec(80)
    arguments = {"grid": FLUX, "spec": spec, "q_tile": (16, 16), "kv_tile": (16, 8)} | changes
    with pytest.raises(ValueError, match=message):
        simulate(**arguments)
