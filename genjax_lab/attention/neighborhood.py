"""Generalized neighborhood attention over 1-D, 2-D and 3-D grids (arXiv 2504.16922).

Each query sees a box of keys around it, as `windows` says, and any additional keys, in one softmax:

    out_i = sum_j p_ij v_j,  p_ij = exp(scale <q_i, k_j> - lse_i),  lse_i = log sum_j exp(...)

over the keys j that query i sees. `functools.partial(neighborhood_attention, spec=spec)` is an
attention function that networks take.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from genjax_lab.attention import kernels
from genjax_lab.attention.grid_boxes import attend_in_boxes
from genjax_lab.attention.layouts import Problem
from genjax_lab.attention.masked import masked_attention, real_tokens
from genjax_lab.attention.windows import NeighborhoodSpec

IMPLEMENTATIONS = ("reference", "xla", "pallas")


def neighborhood_attention(
    query: Float[Array, "batch *grid heads head_dim"],
    key: Float[Array, "batch *grid kv_heads head_dim"],
    value: Float[Array, "batch *grid kv_heads value_dim"],
    spec: NeighborhoodSpec,
    *,
    scale: float | Float[Array, ""] | None = None,
    additional_keys: Float[Array, "batch extra kv_heads head_dim"] | None = None,
    additional_values: Float[Array, "batch extra kv_heads value_dim"] | None = None,
    kv_mask: Bool[Array, "batch *grid"] | None = None,
    grid_sizes: Int[Array, "batch axes"] | None = None,
    position_bias: Float[Array, "heads *displacements"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    q_tile: int | Sequence[int] | None = None,
    kv_tile: int | Sequence[int] | None = None,
    layout: str = "grid",
    grid: Sequence[int] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array | tuple[Array, Array]:
    """Lets every query attend to the keys of its neighborhood.

    Differentiable in all floating arguments, through `lse` too; "reference" and "xla" any number of
    times in reverse.

    Args:
        query: a grid of one, two or three axes.
        key: the same grid; `heads` is a multiple of `kv_heads`: query head `h` reads key-value head
            `h // (heads / kv_heads)`.
        value: the same grid.
        spec: the neighborhood.
        scale: factor of the logits, `1 / sqrt(head_dim)` by default. One that is traced multiplies
            the queries of a kernel, in their type.
        additional_keys: keys that every query sees, such as those of a text; with
            `additional_values`.
        additional_values: their values.
        kv_mask: False for keys that no query sees, whatever they hold.
        grid_sizes: tokens that there really are along each axis of each example, at least 1; what
            lies beyond is padding, and windows are shifted inward from the real ends. Of an axis
            that is shorter than the window all is seen. None: the whole grid.
        position_bias: `[heads, 2 window - 1, ...]`, added to the logits: the key that lies d tokens
            (of its dilation group) after the query along an axis has the index
            `d + window - 1` there.
        return_lse: whether to return `lse` too.
        implementation: "reference" computes all pairs of tokens; "xla" tiles of queries with boxes
            of keys, on any machine; "pallas" is a kernel for GPUs and TPUs. None chooses the kernel
            on machines and for arguments that it is made for, and "xla" otherwise, which is made
            for CPUs and slow on GPUs: with `grid_sizes`, `position_bias`, border="wrap", types or
            tiles that the kernel does not take.
        q_tile: edges of the tiles of queries; None chooses.
        kv_tile: edges of the tiles of keys, for the kernel; "xla" takes boxes of any size.
        layout: "grid", or "tiled" for tokens that `token_permute` has put in order by tiles of
            `q_tile`: all arrays over the grid are then `[batch * dilation groups, tokens, ...]`, as
            is the output, and `kv_tile` is `q_tile`. Networks permute once, at both their ends.
        grid: tokens along each axis, for layout="tiled".
        precision: of the matrix products, but for the kernels: those for GPUs round float32 to the
            10 bits of mantissa of TF32, those for TPUs are exact.

    Returns:
        `out` [batch, *grid, heads, value_dim] in the query's type, or (out, lse). `lse`, [batch,
        *grid, heads], is in float32 (float64 where the inputs are), by the natural logarithm. A
        query without any key, and padding, have out 0 and lse -inf.

    Raises:
        ValueError: shapes or types that do not fit together, windows that do not fit the grid, an
            unknown implementation, or one that cannot do what is asked.
    """
    query, key, value, additional_keys, additional_values, kv_mask, grid_sizes, position_bias = (
        None if x is None else jnp.asarray(x)
        for x in (
            *(query, key, value, additional_keys, additional_values),
            *(kv_mask, grid_sizes, position_bias),
        )
    )
    problem = Problem.of(query, spec, layout, grid, q_tile, kv_tile)
    _check(
        *(problem, query, key, value, additional_keys, additional_values),
        *(kv_mask, grid_sizes, position_bias),
    )
    scale = _scale(scale, query)
    if grid_sizes is not None and layout == "grid":
        # Whatever padding holds, also in gradients.
        real = real_tokens(problem.grid, grid_sizes)[..., None, None]
        query, key, value = (jnp.where(real, x, 0) for x in (query, key, value))
    if kv_mask is not None:
        key, value = (jnp.where(kv_mask[..., None, None], x, 0) for x in (key, value))
    options = {"grid_sizes": grid_sizes, "position_bias": position_bias}
    arguments = {
        "additional_keys": additional_keys,
        "additional_values": additional_values,
        "kv_mask": kv_mask,
    }
    dtype = jnp.result_type(*(x for x in (query, key, value, additional_keys) if x is not None))
    width = max(query.shape[-1], value.shape[-1])
    implementation = _choose(implementation, problem, options, kv_tile, dtype, width)
    if implementation != "pallas":
        arrays = arguments | options | {"scale": scale}
        out, lse = _compiled(query, key, value, arrays, problem, implementation, precision)
    else:
        if isinstance(scale, jax.core.Tracer):
            query, scale = (query * scale).astype(query.dtype), 1.0
        out, lse = kernels.kernel_attention(
            *(query, key, value, spec),
            scale=float(scale),
            **arguments,
            q_tile=problem.q_tile,
            kv_tile=problem.kv_tile,
            layout=layout,
            grid=grid,
            platform=jax.default_backend(),
        )
    return (out, lse) if return_lse else out


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _compiled(
    query: Array,
    key: Array,
    value: Array,
    arrays: dict[str, Any],
    problem: Problem,
    implementation: str,
    precision: jax.lax.PrecisionLike,
) -> tuple[Array, Array]:
    """One program for each problem, so that calls outside of `jax.jit` do not compile again."""
    if implementation == "reference":
        return masked_attention(query, key, value, problem.spec, **arrays, precision=precision)
    return attend_in_boxes(problem, query, key, value, **arrays, precision=precision)


def _scale(scale: Any, query: Array) -> Any:
    """The factor of the logits; ValueError if it is no finite number."""
    if scale is None:
        return 1 / math.sqrt(query.shape[-1])
    if not isinstance(scale, jax.core.Tracer):
        try:
            is_number = np.ndim(scale) == 0 and math.isfinite(scale)
        except TypeError:
            is_number = False
        if not is_number:
            raise ValueError(f"scale must be a finite number, got {scale!r}")
    elif scale.ndim:
        raise ValueError(f"scale must be a number, got shape {scale.shape}")
    return scale


def _choose(
    implementation: str | None,
    problem: Problem,
    options: dict[str, Any],
    kv_tile: Any,
    dtype: Any,
    width: int,
) -> str:
    """The implementation that runs; ValueError if it cannot."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation is {implementation!r}, not in {IMPLEMENTATIONS}")
    unsupported = [name for name, value in options.items() if value is not None]
    if any(axis.border == "wrap" for axis in problem.axes):
        unsupported.append("border='wrap'")
    has_kernel = jax.default_backend() in ("gpu", "tpu")
    if implementation is None:
        is_kernels = has_kernel and not unsupported
        is_kernels = is_kernels and not kernels.obstacle(
            problem, dtype, width, jax.default_backend()
        )
        implementation = "pallas" if is_kernels else "xla"
    if implementation == "pallas" and (unsupported or not has_kernel):
        raise ValueError(
            "implementation='pallas' is for GPUs and TPUs and does not do grid_sizes, position_bias"
            f" or border='wrap', got {', '.join(unsupported) or jax.default_backend()!r}; "
            "implementation='xla' does"
        )
    if problem.layout == "tiled" and implementation == "reference":
        raise ValueError("layout='tiled' needs implementation 'xla', 'pallas' or None")
    if problem.layout == "tiled" and "border='wrap'" in unsupported:
        raise ValueError("border='wrap' needs layout='grid'")
    if kv_tile is not None and implementation != "pallas" and problem.layout == "grid":
        raise ValueError(f"kv_tile is for implementation='pallas', got {implementation!r}")
    return implementation


def _check(
    problem: Problem,
    query: Array,
    key: Array,
    value: Array,
    additional_keys: Array | None,
    additional_values: Array | None,
    kv_mask: Array | None,
    grid_sizes: Array | None,
    position_bias: Array | None,
) -> None:
    """Raises a ValueError unless the arrays form one attention problem."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != query.ndim or array.size == 0:
            raise ValueError(
                f"{name} must be [batch, *grid, heads, head_dim] with the grid of query, none of "
                f"them empty, got shape {array.shape}"
            )
    for name, array in (
        *(("query", query), ("key", key), ("value", value)),
        *(("additional_keys", additional_keys), ("additional_values", additional_values)),
        ("position_bias", position_bias),
    ):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {array.dtype}")
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        raise ValueError(
            "query, key and value must agree in batch and grid, got shapes "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    groups = problem.num_groups if problem.layout == "tiled" else 1
    if query.shape[1:-2] != problem.stored or query.shape[0] % groups:
        raise ValueError(
            f"with layout='tiled' and grid={problem.grid} query must be [batch * {groups}, "
            f"{problem.stored[0]}, heads, head_dim], got shape {query.shape}"
        )
    batch = query.shape[0] // groups
    if key.shape[-2] != value.shape[-2] or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            "key and value must have as many heads, and query a multiple of them, got shapes "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must agree in head_dim, got shapes {query.shape} and {key.shape}"
        )
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    if additional_keys is not None:
        extra = additional_keys.shape[1] if additional_keys.ndim == 4 else "extra"
        for name, array, like in (
            ("additional_keys", additional_keys, key),
            ("additional_values", additional_values, value),
        ):
            expected = (batch, extra, *like.shape[-2:])
            if array.shape != expected:
                raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
    if kv_mask is not None and (kv_mask.shape != key.shape[:-2] or kv_mask.dtype != jnp.bool_):
        raise ValueError(
            f"kv_mask must be bool {key.shape[:-2]}, got {kv_mask.dtype} {kv_mask.shape}"
        )
    if grid_sizes is not None:
        expected = (batch, len(problem.grid))
        if grid_sizes.shape != expected or not jnp.issubdtype(grid_sizes.dtype, jnp.integer):
            raise ValueError(
                f"grid_sizes must be integers {expected}, got {grid_sizes.dtype} {grid_sizes.shape}"
            )
        if not isinstance(grid_sizes, jax.core.Tracer) and not jnp.all(
            (grid_sizes >= 1) & (grid_sizes <= jnp.asarray(problem.grid))
        ):
            raise ValueError(
                f"grid_sizes must be at least 1 and at most the grid {problem.grid}, got "
                f"{grid_sizes.tolist()}"
            )
    if position_bias is not None:
        expected = (query.shape[-2], *(2 * axis.window - 1 for axis in problem.axes))
        if position_bias.shape != expected:
            raise ValueError(f"position_bias must be {expected}, got shape {position_bias.shape}")
        if grid_sizes is not None and any(axis.border == "wrap" for axis in problem.axes):
            raise ValueError("position_bias with border='wrap' needs grid_sizes=None")
