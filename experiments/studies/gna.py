"""A denoiser whose windows are made smaller after training, and one that is trained with windows.

    taskset -c 0 python -m experiments.studies.gna [--seeds=3] [--num_steps=500]

Two photographs that scikit-learn ships are cut at column 440: the left is trained on, the right
tested. A transformer of three blocks denoises crops of 128 x 128 pixels, 32 x 32 tokens, at
sigma 0.5. Trained with dense attention, it is then tested with windows in its place (arXiv
2504.16922 does so without fine-tuning), at several strides, beside controls that see as many keys:
the same run of the row-major sequence, and keys drawn at random. Last, the same transformer is
trained with windows of 16 and stride 8. All errors are relative to the dense network's of the
same seed. Writes gna.json and gna.png.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import app, flags
from sklearn.datasets import load_sample_images
from tqdm import tqdm

from experiments.launch import quiet_libraries, shown_command
from genjax_lab.attention import NeighborhoodSpec, dense_attention, neighborhood_attention
from genjax_lab.networks import DiT

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt

_OUT = flags.DEFINE_string("out", "experiments/results", "Where table and figure go.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Networks that are trained.", lower_bound=1)
_STEPS = flags.DEFINE_integer("num_steps", 500, "Optimiser steps of each.", lower_bound=2)
_DEPTH = flags.DEFINE_integer("depth", 3, "Blocks of the network.", lower_bound=1)
_WINDOWS = flags.DEFINE_list("windows", ["24", "16", "12", "8", "4"], "Edges of the windows.")
_CROP = flags.DEFINE_integer(
    "crop", 128, "Edge of the crops in pixels.", lower_bound=16, upper_bound=200
)

PATCH, SPLIT, SIGMA = 4, 440, 0.5
BATCH, TEST_CROPS = 4, 8
NETWORK = {"patch_size": PATCH, "width": 96, "num_heads": 3}

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def make_network(**fields: Any) -> DiT:
    return DiT(**NETWORK, depth=_DEPTH.value, **fields)


def side() -> int:
    """Tokens along an edge of a crop."""
    return _CROP.value // PATCH


def crops(rng: np.random.Generator, count: int, *, test: bool) -> np.ndarray:
    """[count, crop, crop, 3] in -1 .. 1."""
    out, crop = [], _CROP.value
    for _ in range(count):
        image = load_images()[rng.integers(2)]
        image = image[:, SPLIT:] if test else image[:, :SPLIT]
        row, column = (rng.integers(size - crop + 1) for size in image.shape[:2])
        out.append(image[row : row + crop, column : column + crop])
    return np.stack(out).astype(np.float32) / 127.5 - 1


@functools.cache
def load_images() -> list[np.ndarray]:
    return load_sample_images().images


def denoise(attention: Attention, variables: Any, noisy: jax.Array) -> jax.Array:
    network = make_network(attention=attention)
    return noisy + network.apply(variables, noisy, jnp.zeros(len(noisy)))


def flat_window(query: jax.Array, key: jax.Array, value: jax.Array, *, keys: int) -> jax.Array:
    """Each query sees the nearest tokens of the row-major sequence."""
    flat = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (query, key, value))
    return neighborhood_attention(*flat, NeighborhoodSpec(keys)).reshape(query.shape)


def random_keys(query: jax.Array, key: jax.Array, value: jax.Array, *, keys: int) -> jax.Array:
    """Each query sees itself and tokens that are drawn for it, the same in all blocks."""
    rng = np.random.default_rng(0)
    tokens = side() ** 2
    mask = np.zeros((tokens, tokens), bool)
    for row in range(tokens):
        others = np.delete(np.arange(tokens), row)
        mask[row, [row, *rng.choice(others, keys - 1, replace=False)]] = True
    flat = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (query, key, value))
    return jax.nn.dot_product_attention(*flat, mask=jnp.asarray(mask)).reshape(query.shape)


def variants(window: int) -> dict[str, Attention]:
    """Attentions that all see window^2 keys."""
    strides = {
        window: "blocks",
        window // 2: "stride w/2",
        window // 4: "stride w/4",
        1: "stride 1",  # of a window of 4 the last two are the same
    }
    made = {
        name: functools.partial(neighborhood_attention, spec=NeighborhoodSpec(window, stride))
        for stride, name in strides.items()
    }
    made["flat"] = functools.partial(flat_window, keys=window**2)
    made["random"] = functools.partial(random_keys, keys=window**2)
    return made


def train(seed: int, attention: Attention, num_steps: int) -> tuple[Any, float]:
    """(variables, seconds of the processor), compiling not counted."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, num_steps))
    network = make_network()
    example = jnp.zeros((1, _CROP.value, _CROP.value, 3))
    variables = network.init(jax.random.key(seed), example, jnp.zeros(1))
    rng = np.random.default_rng(seed)

    def loss(variables, clean, noise):
        return jnp.mean((denoise(attention, variables, clean + SIGMA * noise) - clean) ** 2)

    @jax.jit
    def step(variables, state, clean, noise):
        value, slopes = jax.value_and_grad(loss)(variables, clean, noise)
        updates, state = optimizer.update(slopes, state, variables)
        return optax.apply_updates(variables, updates), state, value

    def batch():
        clean = crops(rng, BATCH, test=False)
        return clean, rng.normal(size=clean.shape).astype(np.float32)

    state = optimizer.init(variables)
    arguments = variables, state, *batch()
    compiled = step.lower(*arguments).compile()
    start = time.process_time()
    for _ in tqdm(range(num_steps), desc=f"seed {seed}", mininterval=10):
        variables, state, value = compiled(variables, state, *batch())
    jax.block_until_ready(value)
    return variables, time.process_time() - start


def measure(attention: Attention, trained: list[Any]) -> list[float]:
    """Error of each network on the same noisy crops."""
    rng = np.random.default_rng(1234)
    clean = crops(rng, TEST_CROPS, test=True)
    noisy = clean + SIGMA * rng.normal(size=clean.shape).astype(np.float32)
    run = jax.jit(functools.partial(denoise, attention))
    return [float(jnp.mean((run(variables, noisy) - clean) ** 2)) for variables in trained]


def mass_inside(variables: Any, windows: list[int]) -> dict[str, list[float]]:
    """Share of the dense network's attention that falls into windows, for each block.

    With the share of keys that are inside, it tells how local the attention is that windows cut.
    """
    found: dict[str, list[float]] = {str(window): [] for window in windows}

    def watched(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        whole = NeighborhoodSpec(side())
        out, lse = neighborhood_attention(query, key, value, whole, return_lse=True)
        for window in windows:
            spec = NeighborhoodSpec(window)
            inside = neighborhood_attention(query, key, value, spec, return_lse=True)[1]
            found[str(window)].append(round(float(jnp.mean(jnp.exp(inside - lse))), 4))
        return out

    clean = crops(np.random.default_rng(1234), 2, test=True)
    noisy = clean + SIGMA * np.random.default_rng(0).normal(size=clean.shape).astype(np.float32)
    denoise(watched, variables, jnp.asarray(noisy))
    return found


def summary(values: list[float], dense: list[float]) -> dict[str, Any]:
    relative = [value / base for value, base in zip(values, dense, strict=True)]
    return {
        "mean": round(float(np.mean(relative)), 4),
        "seeds": [round(value, 4) for value in relative],
    }


def study(seeds: int, num_steps: int, windows: list[int]) -> dict[str, Any]:
    # The same as dense attention, and faster to train with here.
    whole = functools.partial(neighborhood_attention, spec=NeighborhoodSpec(side()))
    runs = [train(seed, whole, num_steps) for seed in range(seeds)]
    trained, seconds = [variables for variables, _ in runs], [run[1] for run in runs]
    dense = measure(dense_attention, trained)
    swapped: dict[str, dict[str, Any]] = {}
    for window in windows:
        swapped[str(window)] = {
            name: summary(measure(attention, trained), dense)
            for name, attention in variants(window).items()
        }
        row = ", ".join(f"{name} {cell['mean']:.3f}" for name, cell in swapped[str(window)].items())
        print(f"window {window} ({1 - window**2 / side() ** 2:.0%} sparse): {row}", flush=True)
    spec = NeighborhoodSpec(side() // 2, side() // 4)
    near = functools.partial(neighborhood_attention, spec=spec)
    near_runs = [train(seed, near, num_steps) for seed in range(seeds)]
    errors = measure(near, [variables for variables, _ in near_runs])
    return {
        "dense_mse": [round(value, 6) for value in dense],
        "noisy_mse": round(SIGMA**2, 4),
        "swapped": swapped,
        "attention_mass_inside": [mass_inside(variables, windows) for variables in trained],
        "trained_with_windows": {
            "spec": {"window": spec.window, "stride": spec.stride},
            "relative_mse": summary(errors, dense),
            "processor_seconds_over_dense": [
                round(near_seconds / dense_seconds, 3)
                for (_, near_seconds), dense_seconds in zip(near_runs, seconds, strict=True)
            ],
        },
        "claims": claims(swapped),
    }


def claims(swapped: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """What is to be shown, seed by seed."""
    found = {}
    for window, row in swapped.items():
        cells = {name: np.array(cell["seeds"]) for name, cell in row.items()}
        sliding = cells["stride 1"]
        if window in ("16", "12"):
            found[f"window {window} within 2 % of dense"] = bool(np.all(sliding < 1.02))
        if window in ("16", "12", "8"):
            better = (sliding < cells["flat"]) & (sliding < cells["random"])
            found[f"window {window} better than both controls"] = bool(np.all(better))
            found[f"window {window}, stride w/2 within 1 % of stride 1"] = bool(
                np.all(cells["stride w/2"] < 1.01 * sliding)
            )
    return found


def draw(swapped: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    names = list(next(iter(swapped.values())))
    for name in names:
        rows = [(int(window), row[name]) for window, row in swapped.items() if name in row]
        sparsity = [100 * (1 - window**2 / side() ** 2) for window, _ in rows]
        style = "--" if name in ("flat", "random") else "-"
        (line,) = axes.plot(
            sparsity, [cell["mean"] for _, cell in rows], style, marker="o", label=name
        )
        for x, (_, cell) in zip(sparsity, rows, strict=True):
            axes.plot(
                [x] * len(cell["seeds"]), cell["seeds"], ".", color=line.get_color(), alpha=0.4
            )
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(
        xlabel="keys that are not seen, %",
        ylabel="error relative to dense attention",
        title="trained dense, tested with windows",
    )
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(_: list[str]) -> None:
    quiet_libraries()
    windows = [int(window) for window in _WINDOWS.value]
    if not all(4 <= window <= side() for window in windows):
        raise app.UsageError(f"--windows must be from 4 to {side()}, got {windows}")
    start = time.perf_counter()
    result = study(_SEEDS.value, _STEPS.value, windows)
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": shown_command("studies.gna"),
        "num_steps": _STEPS.value,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        **result,
    }
    (out / "gna.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result["swapped"], out / "gna.png")
    print(json.dumps(result["trained_with_windows"] | {"claims": result["claims"]}, indent=1))
    print(f"written to {out}/gna.json and .png")


if __name__ == "__main__":
    app.run(main)
