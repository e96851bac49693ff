"""Our train step against the same network, loss, optimiser and average in PyTorch, on this machine.

    python -m experiments.benchmarks.train_step [--cases=mlp,dit,unet] [--repeats=7]

Both sides take the same batches through EDM's loss, Adam and an exponential moving average; ours
scans `steps_per_call` steps in one dispatch, PyTorch runs eagerly with fused Adam. Prints
milliseconds per step and their ratio (above 1: we are faster); writes
experiments/results/train_step.json.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import torch
from absl import app, flags

from experiments.benchmarks.cases import CASES, Case
from experiments.benchmarks.interleaved import interleaved_seconds
from experiments.launch import quiet_libraries, shown_command
from genjax_lab import processes
from genjax_lab.objectives import denoising
from genjax_lab.training import half_life_ema, make_train_step

_CASES = flags.DEFINE_list("cases", ["mlp", "dit", "unet"], "Which networks.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed repetitions of each side.", lower_bound=1)
_STEPS = flags.DEFINE_integer(
    "steps", None, "Optimiser steps in a timed call; default the case's.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", "experiments/results/train_step.json", "Where the table goes.")

SIGMA_DATA = 0.5


def our_program(case: Case, images: np.ndarray, labels: np.ndarray) -> Callable[[], None]:
    """`case.steps` optimiser steps in one dispatch."""
    variables = jax.jit(case.network.init)(
        jax.random.key(0), images[0, :1], np.zeros(1, np.float32), labels[0, :1]
    )
    train = make_train_step(
        denoising(case.network.apply, processes.edm(sigma_data=SIGMA_DATA)),
        optax.adam(1e-3),
        batch_size=case.batch_size,
        steps_per_call=case.steps,
        ema={"ema": half_life_ema(50_000)},
    )
    state = [train.init(variables, jax.random.key(1))]
    batches = {"image": images, "label": labels}

    def program():
        state[0], metrics = train.step(state[0], batches)
        jax.block_until_ready(metrics)

    return program


def torch_program(case: Case, images: np.ndarray, labels: np.ndarray) -> Callable[[], None]:
    """The same steps, one by one."""
    model, average = case.twin(), case.twin()
    parameters, averages = list(model.parameters()), list(average.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    pictures = torch.from_numpy(images).permute(0, 1, 4, 2, 3).contiguous()
    classes = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 10).float()
    decay = 0.5 ** (case.batch_size / 50_000)

    def program():
        for x, label in zip(pictures, classes, strict=True):
            sigma = torch.exp(torch.randn(len(x), 1, 1, 1) * 1.2 - 1.2)
            noisy = x + sigma * torch.randn_like(x)
            square = sigma**2 + SIGMA_DATA**2
            output = model(noisy / square.sqrt(), sigma.flatten().log() / 4, label)
            target = (x - SIGMA_DATA**2 / square * noisy) * square.sqrt() / (sigma * SIGMA_DATA)
            loss = torch.mean((output - target) ** 2)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - decay)
        loss.item()

    return program


def measure(case: Case, repeats: int) -> dict[str, float]:
    """Milliseconds per optimiser step of both sides, and how many times faster we are."""
    rng = np.random.default_rng(0)
    shape = (case.steps, case.batch_size)
    images = rng.uniform(-1, 1, (*shape, *case.image_shape)).astype(np.float32)
    labels = rng.integers(0, 10, shape).astype(np.int32)
    seconds = interleaved_seconds(
        {"ours": our_program(case, images, labels), "torch": torch_program(case, images, labels)},
        repeats=repeats,
    )
    ours, theirs = (1e3 * seconds[name] / case.steps for name in ("ours", "torch"))
    return {
        "ours_ms": round(ours, 3),
        "torch_ms": round(theirs, 3),
        "ratio": round(theirs / ours, 2),
    }


def main(argv: list[str]) -> None:
    quiet_libraries()
    torch.set_num_threads(os.cpu_count() or 1)
    table = {}
    for name in _CASES.value:
        if name not in CASES:
            raise app.UsageError(f"unknown case {name!r}; there are {sorted(CASES)}")
        case = CASES[name]
        case = case._replace(steps=_STEPS.value or case.steps)
        table[name] = measure(case, _REPEATS.value)
        print(name, table[name], flush=True)
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": shown_command("benchmarks.train_step"),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "table": table,
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    app.run(main)
