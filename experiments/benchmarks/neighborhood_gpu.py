"""The GPU kernels of neighborhood attention beside dense attention and the simulator's bound.

    python -m experiments.benchmarks.neighborhood_gpu [--shapes=flux-4k,nat-t] [--repeats=10]

Needs a GPU. The attention problems are those of `genjax_lab.attention.shapes`, at full size. Each
is first checked: for 128 random queries, outputs, log-sum-exps and gradients against a softmax in
float32 over all keys. Then programs take turns: ours on grids, the kernel alone on tokens that are
in tiles already, the same on grids with a window of the whole grid, and cuDNN's dense attention;
the last two once for all shapes that differ in their windows only. Times are medians of wall-clock
seconds, of several calls in a row where one takes less than some milliseconds. `bound` is the
simulator's for these tiles, the text's keys counted on both sides; `over_same_kernel` is the
speed-up that it bounds, with the permutations on both sides, `over_cudnn` what one gains with them,
and `kernel_over_cudnn` without. TFLOP/s count the products of the tile pairs that are visited.

Writes experiments/results/neighborhood_gpu.json after each shape.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array

from experiments.benchmarks.interleaved import Program, interleaved_seconds
from genjax_lab.attention import NeighborhoodSpec, plan_tiles, simulate, token_permute
from genjax_lab.attention.kernels import kernel_attention
from genjax_lab.attention.shapes import SHAPES, AttentionShape
from genjax_lab.attention.windows import axis_mask
from pallas_kernels.neighborhood_triton import neighborhood_attention_triton

_SHAPES = flags.DEFINE_list("shapes", None, "Names of attention shapes; all by default.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed calls of each program.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "experiments/results/neighborhood_gpu.json", "Where they go.")

QUERIES = 128  # that are checked
CALLS = 20  # in a row, at most


def arrays_of(shape: AttentionShape) -> list[Array]:
    """Query, key, value, and text keys and values if the shape has text."""
    sizes = [
        (shape.batch, *shape.grid, shape.heads, shape.head_dim),
        *[(shape.batch, *shape.grid, shape.kv_heads, shape.head_dim)] * 2,
    ]
    if shape.num_additional:
        sizes += [(shape.batch, shape.num_additional, shape.kv_heads, shape.head_dim)] * 2
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return [
        jax.random.normal(key, size, shape.dtype) for key, size in zip(keys, sizes, strict=True)
    ]


def on_grid(shape: AttentionShape, spec: NeighborhoodSpec, arrays: Sequence[Array]) -> Any:
    """(out, lse) of the kernel."""
    return kernel_attention(
        *(*arrays[:3], spec),
        platform="gpu",
        q_tile=shape.q_tile,
        kv_tile=shape.kv_tile,
        **dict(zip(("additional_keys", "additional_values"), arrays[3:], strict=False)),
    )


def errors(shape: AttentionShape, arrays: Sequence[Array]) -> dict[str, float]:
    """Norms of the kernel's errors over the norms of the results, for random queries."""
    rng = np.random.default_rng(0)
    tokens = math.prod(shape.grid)
    rows = np.sort(rng.choice(tokens, QUERIES, replace=False))
    places = np.unravel_index(rows, shape.grid)
    seen = np.ones((QUERIES, 1), bool)
    for axis, place in zip(shape.spec.axes(shape.grid), places, strict=True):
        seen = (seen[:, :, None] & axis_mask(axis)[place][:, None]).reshape(QUERIES, -1)
    seen = np.pad(seen, ((0, 0), (0, shape.num_additional)), constant_values=True)
    normal = functools.partial(jax.random.normal, dtype=shape.dtype)
    dout = normal(jax.random.key(1), (shape.batch, QUERIES, shape.heads, shape.head_dim))
    dlse = jax.random.normal(jax.random.key(2), dout.shape[:-1])

    def chosen(arrays):
        results = on_grid(shape, shape.spec, arrays)
        return tuple(
            x.reshape(x.shape[0], tokens, *x.shape[len(places) + 1 :])[:, rows] for x in results
        )

    def exactly(arrays):
        query, key, value, *more = arrays
        flat = lambda x: x.reshape(x.shape[0], tokens, *x.shape[-2:])  # noqa: E731
        query, key, value = flat(query)[:, rows], flat(key), flat(value)
        if more:
            key, value = (jnp.concatenate(x, 1) for x in ((key, more[0]), (value, more[1])))
        key, value = (jnp.repeat(x, shape.heads // shape.kv_heads, axis=2) for x in (key, value))
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * shape.head_dim**-0.5
        logits = jnp.where(seen, logits, -jnp.inf)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
        return out, jnp.swapaxes(jax.nn.logsumexp(logits, axis=-1), 1, 2)

    @functools.partial(jax.jit, static_argnums=0)
    def both(attend, arrays, cotangents):
        results, backward = jax.vjp(attend, arrays)
        return *results, *backward(cotangents)[0]

    found = both(chosen, list(arrays), (dout, dlse))
    single = lambda arrays: [x.astype(jnp.float32) for x in arrays]  # noqa: E731
    with jax.default_matmul_precision("highest"):
        expected = both(exactly, single(arrays), (*single([dout]), dlse))
    names = ("out", "lse", "query", "key", "value", "text_keys", "text_values")
    result = {}
    for name, ours, theirs in zip(names, found, expected, strict=False):
        error = jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs)
        result[name] = float(f"{float(error):.2g}")
    return result


def our_programs(shape: AttentionShape, arrays: list[Array], backward: bool) -> dict[str, Program]:
    """Our ways to the same result."""
    dilation = tuple(axis.dilation for axis in shape.spec.axes(shape.grid))
    tiles = (shape.q_tile, shape.kv_tile, shape.kv_tile)
    in_tiles = [token_permute(x, tile, dilation) for x, tile in zip(arrays[:3], tiles, strict=True)]
    plan = plan_tiles(shape.grid, shape.spec, shape.q_tile, shape.kv_tile)

    def tiled(arrays):
        more = dict(zip(("additional_keys", "additional_values"), arrays[3:], strict=False))
        return neighborhood_attention_triton(*arrays[:3], plan, scale=shape.head_dim**-0.5, **more)[
            0
        ]

    return {
        "ours": _program(lambda arrays: on_grid(shape, shape.spec, arrays)[0], arrays, backward),
        "ours in tiles": _program(tiled, in_tiles + arrays[3:], backward),
    }


def dense_programs(
    shape: AttentionShape, arrays: list[Array], backward: bool
) -> dict[str, Program]:
    """Every query sees every key."""
    whole = NeighborhoodSpec(shape.grid)

    def cudnn(arrays):
        query, key, value, *more = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in arrays)
        if more:
            key, value = (jnp.concatenate(x, 1) for x in ((key, more[0]), (value, more[1])))
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")

    return {
        "whole window": _program(lambda arrays: on_grid(shape, whole, arrays)[0], arrays, backward),
        "cuDNN": _program(cudnn, arrays, backward),
    }


def _program(attend: Callable, arrays: list[Array], backward: bool) -> Program:
    def gradient(arrays):
        out, pullback = jax.vjp(attend, arrays)
        return pullback(out)

    function = jax.jit(gradient if backward else attend)
    return _several(lambda: function(arrays), jax.block_until_ready)


def _several(call: Callable[[], Any], wait: Callable[[Any], Any]) -> Program:
    """Calls often enough that starting one takes no part of the time."""
    wait(call())  # compiles
    start = time.perf_counter()
    wait(call())
    calls = max(1, min(CALLS, int(5e-3 / (time.perf_counter() - start))))

    def program():
        for _ in range(calls - 1):
            call()
        wait(call())

    program.calls = calls
    return program


def measure(shape: AttentionShape, repeats: int, dense: dict[Any, Any]) -> dict[str, Any]:
    """A row of the table.

    Args:
        shape: of the attention.
        repeats: timed calls of each program.
        dense: seconds of dense attention by what it depends on; those that it lacks come in.
    """
    arrays = arrays_of(shape)
    row: dict[str, Any] = {"errors": errors(shape, arrays)}
    plan = plan_tiles(shape.grid, shape.spec, shape.q_tile, shape.kv_tile)
    visited = plan.num_visited * math.prod(shape.q_tile) * math.prod(shape.kv_tile)
    result = simulate(shape.grid, shape.spec, shape.q_tile, shape.kv_tile)
    text = math.prod(shape.grid) * shape.num_additional
    pairs = visited + text
    row["bound"] = round((result.bound * visited + text) / pairs, 3)
    product = 2 * pairs * shape.batch * shape.heads * shape.head_dim  # operations
    for kind, products in (("forward", 2), ("forward and backward", 2 + 7)):
        backward = kind != "forward"
        seconds = timed(our_programs(shape, arrays, backward), repeats)
        same = (backward, shape._replace(name="", spec=None))
        if same not in dense:
            dense[same] = timed(dense_programs(shape, arrays, backward), min(repeats, 5))
        seconds |= dense[same]
        row[kind] = {
            "milliseconds": {name: round(value * 1e3, 3) for name, value in seconds.items()},
            "tflops": round(product * products / seconds["ours in tiles"] / 1e12, 1),
            "over_same_kernel": round(seconds["whole window"] / seconds["ours"], 3),
            "over_cudnn": round(seconds["cuDNN"] / seconds["ours"], 3),
            "kernel_over_cudnn": round(seconds["cuDNN"] / seconds["ours in tiles"], 3),
        }
    return row


def timed(programs: dict[str, Program], repeats: int) -> dict[str, float]:
    """Seconds of one call of each."""
    seconds = interleaved_seconds(programs, repeats=repeats)
    return {name: value / programs[name].calls for name, value in seconds.items()}


def main(_: Sequence[str]) -> None:
    if jax.default_backend() != "gpu":
        raise app.UsageError(f"a GPU is needed, this is {jax.default_backend()!r}")
    named = {shape.name: shape for shape in SHAPES}
    unknown = sorted(set(_SHAPES.value or ()) - set(named))
    if unknown:
        raise app.UsageError(f"--shapes has {unknown}, not in {sorted(named)}")
    table: dict[str, Any] = {}
    dense: dict[Any, Any] = {}
    for name in _SHAPES.value or named:
        table[name] = measure(named[name], _REPEATS.value, dense)
        print(name, json.dumps(table[name]), flush=True)
        summary = {
            "command": shown_command("benchmarks.neighborhood_gpu"),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "repeats": _REPEATS.value,
            "shapes": table,
        }
        Path(_OUT.value).write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
