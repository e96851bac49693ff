"""Neighborhood attention by the Pallas kernels: tokens go into tiles and back (arXiv 2504.16922).

This is the way from arrays of grids to `pallas_kernels`, which know tiles only.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from genjax_lab.attention.layouts import LAYOUTS, Problem
from genjax_lab.attention.tiling import plan_tiles, token_permute, token_unpermute
from genjax_lab.attention.windows import NeighborhoodSpec
from pallas_kernels.neighborhood_tpu import neighborhood_attention_tpu
from pallas_kernels.neighborhood_triton import neighborhood_attention_triton

PLATFORMS = {"gpu": neighborhood_attention_triton, "tpu": neighborhood_attention_tpu}
_LEAST_ON_GPU = 16  # tokens of a tile
DTYPES = {"gpu": ("float32", "bfloat16", "float16"), "tpu": ("float32", "bfloat16")}


def default_tiles(
    grid: Sequence[int], head_dim: int, platform: str = "gpu"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Edges of tiles of queries and of keys: boxes as near to cubes as powers of two allow.

    Args:
        grid: tokens along each axis, of one dilation group.
        head_dim: the larger width of keys and values.
        platform: "gpu", 128 queries by 64 keys, fewer where heads are wider than 128; or "tpu", 256
            by 256.

    Returns:
        (q_tile, kv_tile); no edge is larger than the next power of two of its axis, so that small
        grids have smaller tiles, but for GPUs of 16 tokens at least.

    Raises:
        ValueError: for an empty grid, or another platform.
    """
    _check_platform(platform)
    if not grid or min(grid) < 1:
        raise ValueError(f"grid must have positive lengths, got {tuple(grid)}")
    volumes = (256, 256) if platform == "tpu" else (128, 64) if head_dim <= 128 else (64, 32)
    least = 1 if platform == "tpu" else _LEAST_ON_GPU
    q_tile, kv_tile = (_box(grid, volume, least) for volume in volumes)
    return q_tile, kv_tile


def _box(grid: Sequence[int], volume: int, least: int) -> tuple[int, ...]:
    edges = [1] * len(grid)
    while math.prod(edges) < volume:
        short = [axis for axis, length in enumerate(grid) if edges[axis] < length]
        if not short:
            break
        axis = min(short, key=lambda axis: (edges[axis], -axis))
        edges[axis] *= 2
    while math.prod(edges) < least:
        edges[-1] *= 2
    return tuple(edges)


def obstacle(problem: Problem, dtype: DTypeLike, width: int, platform: str) -> str | None:
    """Why a kernel cannot solve a problem whose borders and options it knows; None if it can."""
    if str(dtype) not in DTYPES[platform]:
        return f"the type {dtype} is not in {DTYPES[platform]}"
    dilation = tuple(axis.dilation for axis in problem.axes)
    tiles = (problem.q_tile, problem.kv_tile)
    try:
        tiles = _tiles(problem.layout, problem.grid, dilation, width, platform, *tiles)
        counts = [
            [
                -(-axis.length // (edge * axis.dilation))
                for axis, edge in zip(problem.axes, tile, strict=True)
            ]
            for tile in tiles
        ]
        _check_tiles(platform, *zip(tiles, counts, strict=True), False)
    except ValueError as error:
        return str(error)
    return None


def kernel_attention(
    query: Float[Array, "batch *grid heads head_dim"],
    key: Float[Array, "batch *grid kv_heads head_dim"],
    value: Float[Array, "batch *grid kv_heads value_dim"],
    spec: NeighborhoodSpec,
    *,
    platform: str,
    scale: float | None = None,
    additional_keys: Float[Array, "batch extra kv_heads head_dim"] | None = None,
    additional_values: Float[Array, "batch extra kv_heads value_dim"] | None = None,
    kv_mask: Bool[Array, "batch *grid"] | None = None,
    grid_sizes: Array | None = None,
    q_tile: Sequence[int] | None = None,
    kv_tile: Sequence[int] | None = None,
    layout: str = "grid",
    grid: Sequence[int] | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """`neighborhood_attention` by a fused kernel; gradients of the first order, of `lse` too.

    Args:
        query: a grid of tokens; or, with layout="tiled", [batch * groups, tokens, heads, head_dim]
            as `token_permute` returns it.
        key: the same grid or tokens; `heads` is a multiple of `kv_heads`.
        value: the same grid or tokens.
        spec: the neighborhood; its borders are "shift" or "mask".
        platform: "gpu" (Triton) or "tpu" (Mosaic).
        scale: factor of the logits, a number, `1 / sqrt(head_dim)` by default.
        additional_keys: keys that every query of an example sees, with `additional_values`.
        additional_values: their values.
        kv_mask: False for keys that no query sees, of the shape of key without heads.
        grid_sizes: must be None.
        q_tile: edges of the tiles of queries, powers of two; `default_tiles` if None. With
            layout="tiled" those of the tokens, and to be given.
        kv_tile: edges of the tiles of keys; with layout="tiled" the same as `q_tile`.
        layout: "grid", or "tiled" for tokens that are in tiles already and stay so.
        grid: tokens along each axis, with layout="tiled" only.
        interpret: whether to run the kernel step by step on any machine, for tests.

    Returns:
        (out, lse): out in the layout and type of query, lse [..., heads] in float32 by the natural
        logarithm. Padding of tiled tokens, and queries without any key, have out 0 and lse -inf.

    Raises:
        ValueError: for what the kernels cannot do (border="wrap", grid_sizes, other types or
            tiles), and arguments that do not fit together.
    """
    _check_platform(platform)
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, not in {LAYOUTS}")
    if grid_sizes is not None:
        raise ValueError("grid_sizes is not for the kernels; use implementation='xla'")
    if (layout == "tiled") != (grid is not None):
        raise ValueError("grid must be given with layout='tiled', and only then")
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    grid = tuple(query.shape[1:-2]) if layout == "grid" else tuple(grid)
    dilation = tuple(axis.dilation for axis in spec.axes(grid))
    width = max(query.shape[-1], value.shape[-1])
    q_tile, kv_tile = _tiles(layout, grid, dilation, width, platform, q_tile, kv_tile)
    plan = plan_tiles(grid, spec, q_tile, kv_tile)
    sides = ((plan.q_tile, plan.q_grid), (plan.kv_tile, plan.kv_grid))
    _check_tiles(platform, *sides, interpret)
    arrays = {"query": query, "key": key, "value": value}
    if additional_keys is not None:
        arrays |= {"additional_keys": additional_keys, "additional_values": additional_values}
    dtype = jnp.result_type(*arrays.values())
    if str(dtype) not in DTYPES[platform] or not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(
            f"arrays must be of types in {DTYPES[platform]} on {platform!r}, got "
            f"{', '.join(str(array.dtype) for array in arrays.values())}; or use "
            "implementation='xla'"
        )
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    if layout == "grid":
        masks = {} if kv_mask is None else {"kv_mask": kv_mask.shape}
        shapes = {name: array.shape[:-2] for name, array in arrays.items() if "add" not in name}
        if len(set((shapes | masks).values())) > 1:
            raise ValueError(f"batch and grid must agree, got {shapes | masks}")
        for name, tile in (("query", q_tile), ("key", kv_tile), ("value", kv_tile)):
            arrays[name] = token_permute(arrays[name], tile, dilation)
        kv_mask = None if kv_mask is None else token_permute(kv_mask, kv_tile, dilation)
    _check_tokens(arrays, kv_mask, plan)
    out, lse = PLATFORMS[platform](
        *(arrays.pop(name) for name in ("query", "key", "value")),
        plan,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        kv_mask=kv_mask,
        interpret=interpret,
        **arrays,
    )
    if layout == "grid":
        out, lse = (token_unpermute(x, grid, q_tile, dilation) for x in (out, lse))
    return out.astype(query.dtype), lse


def _tiles(layout, grid, dilation, width, platform, q_tile, kv_tile):
    if layout == "tiled":
        if q_tile is None or (kv_tile is not None and tuple(kv_tile) != tuple(q_tile)):
            raise ValueError(
                "layout='tiled' needs the q_tile of its tokens, and a kv_tile that is None or the "
                f"same, got {q_tile} and {kv_tile}"
            )
        return tuple(q_tile), tuple(q_tile)
    lengths = [-(-length // step) for length, step in zip(grid, dilation, strict=True)]
    defaults = default_tiles(lengths, width, platform)
    chosen = ((q_tile, defaults[0]), (kv_tile, defaults[1]))
    return tuple(tuple(default if tile is None else tile) for tile, default in chosen)


def _check_platform(platform: str) -> None:
    if platform not in PLATFORMS:
        raise ValueError(f"platform is {platform!r}, not in {tuple(PLATFORMS)}")


def _check_tiles(platform, of_queries, of_keys, interpret) -> None:
    """Each side has the edges of its tiles, and how many there are along each axis."""
    for name, (tile, tiles) in (("q_tile", of_queries), ("kv_tile", of_keys)):
        volume = math.prod(tile)
        if any(edge & (edge - 1) for edge in tile):
            raise ValueError(f"edges of {name} must be powers of two, got {tile}")
        if platform == "gpu" and volume < _LEAST_ON_GPU and not interpret:
            raise ValueError(f"{name} must have at least {_LEAST_ON_GPU} tokens, got {tile}")
        if platform == "tpu" and volume % 128 and math.prod(tiles) > 1 and not interpret:
            raise ValueError(
                f"{name} must have a multiple of 128 tokens, or hold the whole grid, got {tile}"
            )


def _check_tokens(arrays, kv_mask, plan) -> None:
    """Raises a ValueError unless arrays are one attention problem in the plan's tiles."""
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    tokens = {
        "query": math.prod(plan.q_tile) * math.prod(plan.q_grid),
        "key": math.prod(plan.kv_tile) * math.prod(plan.kv_grid),
    }
    tokens["value"] = tokens["key"]
    groups = len(plan.query_start)
    for name, number in tokens.items():
        shape = arrays[name].shape
        if len(shape) != 4 or shape[:2] != (len(query), number) or len(query) % groups:
            raise ValueError(
                f"in tiles {name} must be [batch * {groups}, {number}, heads, width], all of one "
                f"batch, got {shape}"
            )
    kv_heads = key.shape[2]
    if value.shape[2] != kv_heads or query.shape[2] % kv_heads or query.shape[3] != key.shape[3]:
        raise ValueError(
            "key and value must have as many heads, query a multiple of them and the width of key, "
            f"got in tiles {query.shape}, {key.shape} and {value.shape}"
        )
    if "additional_keys" in arrays:
        number = arrays["additional_keys"].shape[1:2]
        for name, like in (("additional_keys", key), ("additional_values", value)):
            expected = (len(query) // groups, *number, *like.shape[2:])
            if arrays[name].shape != expected:
                raise ValueError(f"{name} must have shape {expected}, got {arrays[name].shape}")
    if kv_mask is not None and (kv_mask.shape != key.shape[:2] or kv_mask.dtype != jnp.bool_):
        raise ValueError(
            f"in tiles kv_mask must be bool {key.shape[:2]}, got {kv_mask.dtype} {kv_mask.shape}"
        )
