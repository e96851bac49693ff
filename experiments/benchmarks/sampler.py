"""Our Heun sampler against an EDM-style PyTorch loop over the same network, on this machine.

    python -m experiments.benchmarks.sampler [--cases=mlp,dit] [--repeats=5]

Both draw the same number of images in the same number of network evaluations (35). Prints samples
per second and their ratio (above 1: we are faster); writes experiments/results/sampler.json.
"""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from experiments.benchmarks.cases import CASES, Case
from experiments.benchmarks.interleaved import interleaved_seconds
from experiments.launch import quiet_libraries, shown_command
from genjax_lab import processes, samplers

_CASES = flags.DEFINE_list("cases", ["mlp", "dit"], "Which networks.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repetitions of each side.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "experiments/results/sampler.json", "Where the table goes.")

NUM_STEPS = 18
BATCH = 256


def our_program(case: Case) -> Callable[[], None]:
    """A batch of samples in one compiled loop."""
    variables = jax.jit(case.network.init)(
        jax.random.key(0),
        jnp.zeros((1, *case.image_shape)),
        jnp.zeros(1),
        jnp.zeros(1, jnp.int32),
    )
    process = processes.edm()
    sampler = samplers.heun(
        samplers.denoiser(case.network, variables, process), num_steps=NUM_STEPS
    )
    labels = np.arange(BATCH, dtype=np.int32) % 10

    def program():
        images, _ = samplers.sample(
            sampler, jax.random.key(1), shape=(BATCH, *case.image_shape), condition=labels
        )
        jax.block_until_ready(images)

    return program


def torch_program(case: Case) -> Callable[[], None]:
    """EDM's deterministic sampler as its users run it: float64 iterate, float32 network."""
    model = case.twin().eval()
    height, width, channels = case.image_shape
    label = torch.nn.functional.one_hot(torch.arange(BATCH) % 10, 10).float()
    low, high, rho = 0.002 ** (1 / 7), 80 ** (1 / 7), 7
    grid = (
        high + torch.arange(NUM_STEPS, dtype=torch.float64) / (NUM_STEPS - 1) * (low - high)
    ) ** rho
    times = torch.cat([grid, torch.zeros(1, dtype=torch.float64)])

    def slope(x, t):
        sigma = t.float()
        square = sigma**2 + 0.25
        noise = (sigma.log() / 4).expand(len(x))
        output = model(x.float() / square.sqrt(), noise, label)
        denoised = 0.25 / square * x + sigma * 0.5 / square.sqrt() * output
        return (x - denoised) / t

    @torch.no_grad()
    def program():
        x = torch.randn(BATCH, channels, height, width, dtype=torch.float64) * times[0]
        for t, after in itertools.pairwise(times):
            first = slope(x, t)
            moved = x + (after - t) * first
            x = x + (after - t) * (first + slope(moved, after)) / 2 if after > 0 else moved

    return program


def main(argv: list[str]) -> None:
    quiet_libraries()
    torch.set_num_threads(os.cpu_count() or 1)
    table = {}
    for name in _CASES.value:
        case = CASES[name]
        programs = {"ours": our_program(case), "torch": torch_program(case)}
        seconds = interleaved_seconds(programs, repeats=_REPEATS.value)
        ours, theirs = (BATCH / seconds[side] for side in ("ours", "torch"))
        table[name] = {
            "ours_per_second": round(ours, 1),
            "torch_per_second": round(theirs, 1),
            "ratio": round(ours / theirs, 2),
        }
        print(name, table[name], flush=True)
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": shown_command("benchmarks.sampler"),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "table": table,
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    app.run(main)
