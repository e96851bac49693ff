"""Windows of generalized neighborhood attention: definition, intervals and what falls out."""

import numpy as np
import pytest
from random_windows import random_spec

from genjax_lab.attention import (
    NeighborhoodSpec,
    adaptive_spec,
    neighborhood_mask,
    query_bounds,
    window_bounds,
)
from genjax_lab.attention.windows import AxisWindow, axis_mask, mean_keys


def every_window(longest=14):
    for length in range(1, longest + 1):
        for window in range(1, length + 1):
            for stride in range(1, window + 1):
                yield length, window, stride


def expected_keys(i, length, window, stride, causal):
    """Section 2.2 of the paper's definition, one query at a time."""
    base = i // stride * stride
    if causal:
        leader = min(base + stride - 1, length - 1)
        return range(max(leader - window + 1, 0), i + 1)
    leader = min(base + stride // 2, length - 1)
    start = min(max(leader - window // 2, 0), length - window)
    return range(start, start + window)


@pytest.mark.parametrize("causal", [False, True])
def test_bounds_and_mask_are_the_definition(causal):
    for length, window, stride in every_window():
        start, end = window_bounds(length, window, stride, causal)
        mask = axis_mask(AxisWindow(length, window, stride, 1, causal))
        for i in range(length):
            keys = expected_keys(i, length, window, stride, causal)
            assert (start[i], end[i]) == (keys.start, keys.stop)
            assert list(np.flatnonzero(mask[i])) == list(keys)


def test_windows_keep_their_promises():
    for length, window, stride in every_window():
        start, end = window_bounds(length, window, stride)
        i = np.arange(length)
        assert np.all(end - start == window)
        assert np.all((start <= i) & (i < end))
        assert np.all(np.diff(start) >= 0) and np.all(np.diff(end) >= 0)
        assert start[0] == 0 and end[-1] == length and np.all(start[1:] <= end[:-1])
    # Odd sliding windows are symmetric away from the ends; even ones reach one further to the left.
    mask = axis_mask(AxisWindow(20, 5))[4:-4, 4:-4]
    np.testing.assert_array_equal(mask, mask.T)
    assert list(np.flatnonzero(axis_mask(AxisWindow(20, 4))[10])) == [8, 9, 10, 11]
    # The leader of an even stride is the right one of the middle two.
    assert list(np.flatnonzero(axis_mask(AxisWindow(20, 5, 4))[8])) == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("border", ["shift", "mask"])
def test_inverse_bounds_are_those_of_the_transposed_mask(causal, border):
    for length, window, stride in every_window(12):
        first, last = query_bounds(length, window, stride, causal, border)
        mask = axis_mask(AxisWindow(length, window, stride, 1, causal, border))
        for key in range(length):
            assert list(np.flatnonzero(mask[:, key])) == list(range(first[key], last[key]))


def test_closed_form_of_the_inverse_holds():
    for length, window, stride in every_window():
        j, right = np.arange(length), window // 2 + window % 2 - 1
        o = stride - 1 - stride // 2
        first, last = query_bounds(length, window, stride)
        np.testing.assert_array_equal(
            first, np.where(j < window, 0, (j - right + o) // stride * stride)
        )
        after = (j + window // 2 + o + 1) // stride * stride
        np.testing.assert_array_equal(last, np.where(j >= length - window, length, after))


def test_borders_of_other_kinds():
    cut = axis_mask(AxisWindow(7, 3, border="mask"))
    assert [list(np.flatnonzero(row)) for row in cut[[0, 3, 6]]] == [[0, 1], [2, 3, 4], [5, 6]]
    start, end = window_bounds(7, 3, border="mask")
    assert list(end - start) == [2, 3, 3, 3, 3, 3, 2]
    around = axis_mask(AxisWindow(7, 3, border="wrap"))
    assert list(np.flatnonzero(around[0])) == [0, 1, 6]
    assert np.all(around == np.roll(around, (1, 1), (0, 1)))  # no place is special
    start, end = window_bounds(7, 3, border="wrap")
    for i in range(7):
        assert set(np.arange(start[i], end[i]) % 7) == set(np.flatnonzero(around[i]))


@pytest.mark.parametrize("border", ["shift", "mask", "wrap"])
def test_dilation_is_the_same_on_each_subgrid(border):
    for length, dilation in ((12, 3), (13, 3), (11, 2)):
        if border == "wrap" and length % dilation:
            continue
        mask = axis_mask(AxisWindow(length, 3, 2, dilation, False, border))
        for group in range(dilation):
            inner = mask[group::dilation, group::dilation]
            expected = axis_mask(AxisWindow(len(inner), 3, 2, 1, False, border))
            np.testing.assert_array_equal(inner, expected)
            mask[group::dilation, group::dilation] = False
        assert not mask.any()


def test_shorter_examples_have_the_windows_of_their_own_length():
    axis = AxisWindow(12, 3, 2, 2)
    together = axis_mask(axis, np.array([12, 9, 7]))
    for mask, length in zip(together, (12, 9, 7), strict=True):
        expected = axis_mask(axis._replace(length=length))
        np.testing.assert_array_equal(mask[:length, :length], expected)
        assert not mask[length:].any() and not mask[:, length:].any()
    assert axis_mask(AxisWindow(8, 5), 3)[:3, :3].all()


def test_masks_of_grids_are_products_and_permute_with_their_axes():
    spec = NeighborhoodSpec((2, 3, 4), (1, 3, 2), (1, 1, 2), (True, False, False))
    grid = (3, 4, 9)
    mask = neighborhood_mask(grid, spec).reshape(grid * 2)
    along = [axis_mask(axis) for axis in spec.axes(grid)]
    np.testing.assert_array_equal(mask, np.einsum("ad,be,cf->abcdef", *along))
    order = (2, 0, 1)
    turned = NeighborhoodSpec(*(tuple(f[a] for a in order) for f in list(vars(spec).values())[:4]))
    permuted = neighborhood_mask([grid[a] for a in order], turned)
    expected = mask.transpose(*order, *(3 + a for a in order)).reshape(permuted.shape)
    np.testing.assert_array_equal(permuted, expected)


def test_what_falls_out():
    blocked = neighborhood_mask((8, 6), NeighborhoodSpec((4, 3), (4, 3)))
    block = np.arange(8)[:, None] // 4 * 2 + np.arange(6) // 3
    np.testing.assert_array_equal(blocked, block.reshape(-1, 1) == block.reshape(1, -1))
    assert neighborhood_mask((4, 5), NeighborhoodSpec((4, 5), (2, 3))).all()
    causal = neighborhood_mask((6,), NeighborhoodSpec(6, is_causal=True))
    np.testing.assert_array_equal(causal, np.tril(np.ones((6, 6), bool)))


def test_mean_keys_counts_the_mask():
    rng = np.random.default_rng(0)
    for _ in range(60):
        grid = tuple(int(n) for n in rng.integers(3, 8, rng.integers(1, 4)))
        spec = random_spec(rng, grid)
        expected = neighborhood_mask(grid, spec).sum(1).mean()
        assert mean_keys(grid, spec) == pytest.approx(expected)


def test_adaptive_windows_follow_the_grid():
    spec = NeighborhoodSpec((-1, 12, 24), (1, 4, 8))
    assert adaptive_spec(spec, (24, 44, 80), (-1, 44, 80)) == NeighborhoodSpec(
        (24, 12, 24), (1, 4, 8), (1, 1, 1)
    )
    half = adaptive_spec(spec, (12, 22, 40), (-1, 44, 80))
    assert half == NeighborhoodSpec((12, 6, 12), (1, 2, 4), (1, 1, 1))
    dilated = NeighborhoodSpec((-1, 4, 16), 1, (1, 11, 5))
    assert adaptive_spec(dilated, (24, 44, 80), (-1, 44, 80)).dilation == (1, 11, 5)
    with pytest.raises(ValueError, match="as many axes"):
        adaptive_spec(spec, (24, 44, 80), (44, 80))


def test_specs_are_equal_and_hash_alike_whatever_their_sequences():
    a, b = NeighborhoodSpec([4, 4], np.array([2, 2])), NeighborhoodSpec((4, 4), (2, 2))
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1
    assert all(type(value) is int for value in a.stride)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window along axis 0"),
        ({"window": 9}, r"window \* dilation = 9 \* 1 along axis 0.*8"),
        ({"window": (4, 4), "dilation": (1, 3)}, r"4 \* 3 along axis 1.*8"),
        ({"window": 4, "stride": 5}, "stride=5 along axis 0.*window=4"),
        ({"window": 4.0}, "window along axis 0.*4.0"),
        ({"window": True}, "window along axis 0.*True"),
        ({"window": (4, 4, 4)}, "window.*2 axes"),
        ({"window": 4, "is_causal": 1}, "is_causal.*bool"),
        ({"window": 4, "border": "reflect"}, "reflect.*shift"),
        ({"window": 4, "border": "wrap", "is_causal": True}, "wrap.*is_causal"),
        ({"window": 2, "border": "wrap", "dilation": 3}, "wrap.*multiple"),
    ],
)
def test_impossible_windows_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodSpec(**fields).axes((8, 8))


def test_windows_that_go_round_have_no_inverse_intervals():
    with pytest.raises(ValueError, match="wrap"):
        query_bounds(8, 3, border="wrap")


def test_every_key_is_seen():
    for length, window, stride in every_window(10):
        assert axis_mask(AxisWindow(length, window, stride)).any(axis=0).all()
