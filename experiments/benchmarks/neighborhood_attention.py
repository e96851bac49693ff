"""Neighborhood attention on one core, beside dense attention and beside the simulator's bound.

    python -m experiments.benchmarks.neighborhood_attention [--repeats=7] ["--cases=flux-4k / 4"]

Every case is timed against the best of four dense attentions: PyTorch's, three with a loop over
chunks of queries, and our own with a window of the whole grid. Programs take turns in one process
that is pinned to one core; what counts is its processor time, the least of the repetitions, and
memory that is freed stays with the process, or pages are mapped anew by chance in some calls. The
bound is that of `simulate` with the tiles of queries that are used and exact boxes of keys:
tile pairs of dense attention / tile pairs visited. `fraction` is the speed-up over the bound.

Writes experiments/results/neighborhood_attention.json and a figure of bounds against speed-ups.
"""

import ctypes
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import torch
from absl import app, flags

from experiments.benchmarks.interleaved import Program, interleaved_seconds
from experiments.launch import quiet_libraries, shown_command
from genjax_lab.attention import NeighborhoodSpec, box_tile, neighborhood_attention, simulate
from genjax_lab.attention.shapes import SMALL_SHAPES

_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed repetitions of each program.", lower_bound=1)
_CASES = flags.DEFINE_list("cases", None, "Names of cases; all by default.")
_OUT = flags.DEFINE_string(
    "out", "experiments/results/neighborhood_attention.json", "Where the table goes."
)


class Case(NamedTuple):
    """An attention that is timed.

    Attributes:
        grid: tokens along each axis.
        spec: the neighborhood.
        backward: whether gradients are timed too.
        heads, head_dim: of the attention.
        q_tile: edges of the tiles of queries; None for what the library chooses.
    """

    grid: tuple[int, ...]
    spec: NeighborhoodSpec
    backward: bool = False
    heads: int = 2
    head_dim: int = 64
    q_tile: tuple[int, ...] | None = None


def _image(window: int, stride: int = 1, q_tile: int | None = None) -> Case:
    tile = None if q_tile is None else (q_tile, q_tile)
    return Case((64, 64), NeighborhoodSpec(window, stride), q_tile=tile)


def _model_cases() -> dict[str, Case]:
    """FLUX 4K and HunyuanVideo, each axis a quarter and a half as long; the same with stride 1."""
    cases = {}
    for shape in SMALL_SHAPES:
        case = Case(shape.grid, shape.spec, True, shape.heads, shape.head_dim)
        cases[shape.name] = case
        sliding = dataclasses.replace(shape.spec, stride=1)
        cases[f"{shape.name} stride 1"] = case._replace(spec=sliding)
    return cases


CASES = {
    "tiny": Case((8, 8), NeighborhoodSpec(4, 4), backward=True),  # to see that all works
    **_model_cases(),
    "window 40 stride 8": _image(40, 8, 8),
    "window 40 stride 1": _image(40, 1, 8),
    "window 24 stride 8": _image(24, 8, 8),
    "window 24 stride 1": _image(24, 1, 8),
    "window 16 stride 16": _image(16, 16, 16),
    "window 16 stride 8": _image(16, 8, 8),
    "window 16 stride 1": _image(16, 1, 8),
    "window 20 stride 4 tile 4": _image(20, 4, 4),
    "window 20 stride 1 tile 16": _image(20, 1, 16),
    "window 48 stride 16": _image(48, 16, 16),
    "line of 8192": Case((8192,), NeighborhoodSpec(1024, 256), q_tile=(256,), heads=1),
}


def chunked_dense(query: Any, key: Any, value: Any, *, chunk: int) -> Any:
    """Dense attention in a loop over heads and chunks of queries, without the softmax's maximum."""
    heads, width = query.shape[-2:]
    rows = [jnp.moveaxis(x.reshape(-1, heads, width), 1, 0) for x in (query, key, value)]
    tokens = math.prod(query.shape[1:-2])
    chunk = max(c for c in range(1, chunk + 1) if tokens % c == 0)

    def of_head(arrays):
        query, key, value = arrays

        def of_chunk(queries):
            weights = jnp.exp(queries * width**-0.5 @ key.T)
            return weights @ value / jnp.sum(weights, axis=-1, keepdims=True)

        return jax.lax.map(of_chunk, query.reshape(-1, chunk, width)).reshape(tokens, width)

    return jnp.moveaxis(jax.lax.map(of_head, rows), 0, 1).reshape(query.shape)


def jax_program(attention: Callable, arrays: Sequence[Any], backward: bool) -> Program:
    def total(*arrays):
        return jnp.sum(attention(*arrays) ** 2)

    function = jax.jit(jax.grad(total, argnums=(0, 1, 2)) if backward else attention)
    return lambda: jax.block_until_ready(function(*arrays))


def torch_program(arrays: Sequence[Any], backward: bool) -> Program:
    """PyTorch's, on its own order of axes, put in place beforehand."""
    tensors = [
        torch.from_numpy(np.array(x)).flatten(1, -3).transpose(1, 2).contiguous() for x in arrays
    ]
    tensors = [tensor.requires_grad_(backward) for tensor in tensors]

    def program():
        out = torch.nn.functional.scaled_dot_product_attention(*tensors)
        if backward:
            torch.autograd.grad(torch.sum(out**2), tensors)

    return program


def keep_memory() -> None:
    """Lets glibc keep what is freed: one arena, up to 1 GB untrimmed, nothing mapped by itself."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        arena_max, trim_threshold, mmap_max = -8, -1, -4
        for option, number in ((arena_max, 1), (trim_threshold, 2**30), (mmap_max, 0)):
            mallopt(option, number)


def run(case: Case, backward: bool, repeats: int) -> dict[str, Any]:
    """Times one case."""
    normal = np.random.default_rng(0).normal
    shape = (1, *case.grid, case.heads, case.head_dim)
    arrays = [jnp.asarray(normal(size=shape), jnp.float32) for _ in range(3)]
    q_tile = case.q_tile or box_tile(case.grid, case.spec, head_dim=case.head_dim)
    attend = functools.partial(neighborhood_attention, implementation="xla")
    attentions = {
        f"chunks of {chunk}": functools.partial(chunked_dense, chunk=chunk)
        for chunk in (128, 256, 512)
    }
    attentions["whole window"] = functools.partial(attend, spec=NeighborhoodSpec(case.grid))
    attentions["ours"] = functools.partial(attend, spec=case.spec, q_tile=q_tile)
    programs = {
        name: jax_program(attention, arrays, backward) for name, attention in attentions.items()
    }
    programs["PyTorch"] = torch_program(arrays, backward)
    seconds = interleaved_seconds(
        programs, repeats=repeats, warm_up=2, clock=time.process_time, summary=min
    )
    dense = {name: value for name, value in seconds.items() if name != "ours"}
    best = min(dense, key=dense.get)
    result = simulate(case.grid, case.spec, q_tile, (1,) * len(case.grid))
    speed_up = dense[best] / seconds["ours"]
    return {
        "q_tile": list(q_tile),
        "bound": round(result.bound, 3),
        "bound_by_keys": round(result.flop_bound, 3),
        "speed_up": round(speed_up, 3),
        "fraction": round(speed_up / result.bound, 3),
        "best_dense": best,
        "over_pytorch": round(seconds["PyTorch"] / seconds["ours"], 3),
        "milliseconds": {name: round(value * 1e3, 2) for name, value in seconds.items()},
    }


def draw(table: dict[str, dict[str, Any]], path: Path) -> float | None:
    """Draws speed-ups against bounds; their rank correlation, if there are enough."""
    bounds = [row["forward"]["bound"] for row in table.values()]
    reached = [row["forward"]["speed_up"] for row in table.values()]
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.plot([1, max(bounds)], [1, max(bounds)], color="0.6", label="the bound itself")
    for is_sliding, label in ((False, "stride > 1"), (True, "stride 1")):
        chosen = [(CASES[name].spec.stride == 1) == is_sliding for name in table]
        points = [(b, r) for b, r, keep in zip(bounds, reached, chosen, strict=True) if keep]
        if points:
            axes.plot(*zip(*points, strict=True), "o", label=label)
    by_height = sorted(zip(reached, bounds, table, strict=True))
    for rank, (y, x, name) in enumerate(by_height):  # neighbors' labels on two sides
        side = {"ha": "right", "xytext": (-5, -2)} if rank % 2 else {"xytext": (5, -2)}
        axes.annotate(name, (x, y), fontsize=6, textcoords="offset points", **side)
    axes.set(
        xlim=(0.5, 2.5 * max(bounds)),
        xscale="log",
        yscale="log",
        xlabel="simulated bound",
        ylabel="measured speed-up over the best dense attention",
    )
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    if len(table) < 3:
        return None
    return round(float(scipy.stats.spearmanr(bounds, reached).statistic), 3)


def main(_: Sequence[str]) -> None:
    names = _CASES.value or [name for name in CASES if name != "tiny"]
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        raise app.UsageError(f"--cases has {unknown}; there are {list(CASES)}")
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    keep_memory()
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    table = {}
    for name in names:
        case = CASES[name]
        table[name] = {"forward": run(case, False, _REPEATS.value)}
        if case.backward:
            table[name]["forward and backward"] = run(case, True, _REPEATS.value)
        for kind, row in table[name].items():
            print(
                f"{name:28s} {kind:21s} bound {row['bound']:6.2f}  reached {row['speed_up']:6.2f} "
                f"({row['fraction']:.0%})  over PyTorch {row['over_pytorch']:.2f}",
                flush=True,
            )
        write(table, out)  # what there is so far


def write(table: dict[str, dict[str, Any]], out: Path) -> None:
    """Writes table and figure."""
    summary = {
        "command": shown_command("benchmarks.neighborhood_attention"),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "repeats": _REPEATS.value,
        "rank_correlation": draw(table, out.with_suffix(".png")),
        "cases": table,
    }
    out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    quiet_libraries()
    app.run(main)
