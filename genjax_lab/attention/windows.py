"""Which keys a query sees in generalized neighborhood attention (arXiv 2504.16922), axis by axis.

Every axis of a grid has a window, a stride, a dilation and may be causal. Dilation d cuts an axis
into d interleaved groups; the rest happens within a group, on positions i = 0 .. L - 1. Queries are
cut into groups of `stride`, which share the window of their leader: the middle query of the group,
or its last where the axis is causal. A window of a query in n dimensions is the box of those of its
coordinates.

    border "shift"  windows are moved inward at the ends, so that every query sees `window` keys
    border "mask"   windows are cut off at the ends
    border "wrap"   windows go round

Window = stride is blocked attention (Swin), stride 1 sliding windows, a window of the whole axis
dense attention.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

BORDERS = ("shift", "mask", "wrap")


@dataclasses.dataclass(frozen=True)
class NeighborhoodSpec:
    """The windows of an attention over a grid; each field one value for all axes, or one for each.

    Attributes:
        window: keys that a query sees along an axis, at least 1.
        stride: queries that share one window, at least 1 and at most `window`.
        dilation: distance of neighbouring keys of a window, at least 1.
        is_causal: whether queries see no later keys along an axis.
        border: what happens at the ends of an axis: one of `BORDERS`.
    """

    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    border: str | tuple[str, ...] = "shift"

    def __post_init__(self):
        """Makes lists tuples, so that specs can be hashed."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and isinstance(value, Sequence | np.ndarray):
                value = tuple(v.item() if isinstance(v, np.generic) else v for v in value)
            object.__setattr__(self, field.name, value)

    def axes(self, grid: Sequence[int]) -> tuple["AxisWindow", ...]:
        """The windows along each axis of a grid.

        Raises:
            ValueError: for a number of axes other than the fields', or values out of range.
        """
        fields = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            fields[field.name] = value if isinstance(value, tuple) else (value,) * len(grid)
            if len(fields[field.name]) != len(grid):
                raise ValueError(
                    f"spec.{field.name}={value} must have one value for each of the "
                    f"{len(grid)} axes of the grid {tuple(grid)}"
                )
        return tuple(
            AxisWindow(int(length), *(fields[name][axis] for name in fields)).checked(axis)
            for axis, length in enumerate(grid)
        )


class AxisWindow(NamedTuple):
    """A `NeighborhoodSpec` along one axis of `length` tokens."""

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    border: str = "shift"

    def checked(self, axis: int = 0) -> "AxisWindow":
        """Itself; ValueError, naming the axis, if there is no such window."""
        for name in ("length", "window", "stride", "dilation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} along axis {axis} must be a positive int, got {value!r}")
        if not isinstance(self.is_causal, bool | np.bool_):
            raise ValueError(f"is_causal along axis {axis} must be a bool, got {self.is_causal!r}")
        if self.stride > self.window:
            raise ValueError(
                f"stride={self.stride} along axis {axis} must be at most window={self.window}, or "
                "some keys would be seen by no query"
            )
        if self.window * self.dilation > self.length:
            raise ValueError(
                f"window * dilation = {self.window} * {self.dilation} along axis {axis} must be at "
                f"most the grid's length {self.length}"
            )
        if self.border not in BORDERS:
            raise ValueError(f"border along axis {axis} is {self.border!r}, not in {BORDERS}")
        if self.border == "wrap" and (self.is_causal or self.length % self.dilation):
            raise ValueError(
                f"border='wrap' along axis {axis} needs is_causal=False and a length that is a "
                f"multiple of the dilation, got {self}"
            )
        return self

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key."""
        whole = self.window == self.length and self.dilation == 1
        return whole and not self.is_causal and self.border != "mask"

    def group_lengths(self) -> list[int]:
        """Length of each of the `dilation` groups; the first are longest."""
        return [-(-(self.length - group) // self.dilation) for group in range(self.dilation)]

    def bounds(self, group: int = 0) -> tuple[Int32[np.ndarray, "L"], Int32[np.ndarray, "L"]]:
        """`window_bounds` within one of the dilation groups."""
        length = self.group_lengths()[group]
        return window_bounds(length, self.window, self.stride, self.is_causal, self.border)


def window_bounds(
    length: int, window: int, stride: int = 1, is_causal: bool = False, border: str = "shift"
) -> tuple[Int32[np.ndarray, "length"], Int32[np.ndarray, "length"]]:
    """Where the window of each query of one axis begins and ends, without dilation.

    Returns:
        (start, end): query i sees the keys j with start[i] <= j < end[i]; with border="wrap" j is
        modulo `length`, and start may be negative and end beyond it. Both never decrease.

    Raises:
        ValueError: see `NeighborhoodSpec`.
    """
    axis = AxisWindow(length, window, stride, 1, is_causal, border).checked()
    start, end = bounds_of(np.arange(length), length, axis, np)
    return start.astype(np.int32), end.astype(np.int32)


def bounds_of(query: Any, count: Any, axis: AxisWindow, xp: Any) -> tuple[Any, Any]:
    """`window_bounds` of positions within a dilation group of `count` tokens, which may be traced.

    A window that is larger than the group is all of it. Positions beyond the group see nothing.
    """
    window, stride = axis.window, axis.stride
    first = query // stride * stride
    if axis.is_causal:
        leader = xp.minimum(first + stride - 1, count - 1)
        start, end = xp.maximum(leader - window + 1, 0), query + 1
    else:
        leader = xp.minimum(first + stride // 2, count - 1)
        start = leader - window // 2
        if axis.border == "shift":
            start = xp.maximum(xp.minimum(start, count - window), 0)
        end = start + xp.minimum(window, count)
        if axis.border == "mask":
            start, end = xp.maximum(start, 0), xp.minimum(start + window, count)
    inside = query < count
    return xp.where(inside, start, 0), xp.where(inside, end, 0)


def query_bounds(
    length: int, window: int, stride: int = 1, is_causal: bool = False, border: str = "shift"
) -> tuple[Int32[np.ndarray, "length"], Int32[np.ndarray, "length"]]:
    """The inverse: which queries see each key of one axis; borders "shift" and "mask" only.

    Returns:
        (first, last): key j is seen by the queries i with first[j] <= i < last[j].

    Raises:
        ValueError: see `NeighborhoodSpec`; and for border="wrap".
    """
    if border == "wrap":
        raise ValueError("border='wrap' has windows that are no intervals, so no query_bounds")
    start, end = window_bounds(length, window, stride, is_causal, border)
    key = np.arange(length)
    first = np.searchsorted(end, key, side="right")
    last = np.searchsorted(start, key, side="right")
    return first.astype(np.int32), last.astype(np.int32)


def axis_mask(axis: AxisWindow, length: Any = None, xp: Any = np) -> Any:
    """Which keys each query of one axis sees, element by element: the definition itself.

    Args:
        axis: the windows.
        length: tokens that there really are, of `axis.length`, an integer array [...] or None for
            all; windows larger than what there is see all of it.
        xp: numpy or jax.numpy.

    Returns:
        bool [..., axis.length, axis.length], queries by keys.
    """
    length = xp.asarray(axis.length if length is None else length)[..., None, None]
    query = xp.arange(axis.length)[:, None]
    key = xp.arange(axis.length)[None, :]
    window, stride, dilation = axis.window, axis.stride, axis.dilation
    group = query % dilation
    count = (length - group + dilation - 1) // dilation  # of the group's tokens
    i, j = query // dilation, key // dilation
    first = i // stride * stride
    if axis.is_causal:
        leader = xp.minimum(first + stride - 1, count - 1)
        seen = (j > leader - window) & (j <= i)
    else:
        leader = xp.minimum(first + stride // 2, count - 1)
        start = leader - window // 2
        if axis.border == "shift":
            start = xp.maximum(xp.minimum(start, count - window), 0)
        if axis.border == "wrap":
            j = start + (j - start) % xp.maximum(count, 1)
        seen = (j >= start) & (j < start + window)
    return seen & (key % dilation == group) & (query < length) & (key < length)


def neighborhood_mask(grid: Sequence[int], spec: NeighborhoodSpec) -> Bool[np.ndarray, "N N"]:
    """Which keys each query of a grid sees, tokens in row-major order: for small grids, to compare.

    Raises:
        ValueError: see `NeighborhoodSpec.axes`.
    """
    mask = np.ones((1, 1), bool)
    for axis in spec.axes(grid):
        mask = np.kron(mask, axis_mask(axis))
    return mask


def adaptive_spec(
    spec: NeighborhoodSpec, grid: Sequence[int], base_grid: Sequence[int]
) -> NeighborhoodSpec:
    """Windows in proportion to a grid, as those of Cosmos-Predict2 are.

    Args:
        spec: windows for `base_grid`; a window of 1 or less is the whole axis.
        grid: the grid to make windows for.
        base_grid: the grid that `spec` is meant for; 1 or less is the axis as it is.

    Raises:
        ValueError: if the numbers of axes differ.
    """
    if len(base_grid) != len(grid):
        raise ValueError(f"base_grid={tuple(base_grid)} must have as many axes as {tuple(grid)}")

    def for_each(value):
        values = value if isinstance(value, tuple) else (value,) * len(grid)
        if len(values) != len(grid):
            raise ValueError(
                f"spec must have one value for each axis of {tuple(grid)}, got {value}"
            )
        return values

    windows, strides, dilations = [], [], []
    for length, base, window, stride, dilation in zip(
        *(grid, base_grid, for_each(spec.window), for_each(spec.stride), for_each(spec.dilation)),
        strict=True,
    ):
        ratio = 1.0 if base <= 1 else length / base
        whole = length if window <= 1 else round(window * ratio)
        windows.append(min(max(2, whole), length))
        strides.append(min(max(1, round(stride * ratio)), windows[-1]))
        dilations.append(min(max(1, round(dilation * ratio)), length // windows[-1]))
    return dataclasses.replace(
        spec, window=tuple(windows), stride=tuple(strides), dilation=tuple(dilations)
    )


def mean_keys(grid: Sequence[int], spec: NeighborhoodSpec) -> float:
    """Keys that a query sees, on average over the grid's queries."""
    means = []
    for axis in spec.axes(grid):
        seen = 0
        for group in range(axis.dilation):
            start, end = axis.bounds(group)
            seen += int(np.sum(end - start))
        means.append(seen / axis.length)
    return math.prod(means)
