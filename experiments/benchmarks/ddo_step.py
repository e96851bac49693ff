"""A DDO step beside a step of maximum likelihood, a grid beside its members, and PyTorch.

    python -m experiments.benchmarks.ddo_step [--repeats=7]

On the digits' residual MLP, batches of 256 real rows (and 256 fakes), all in one process,
interleaved, medians. In units of one forward pass of a row an MLE step costs 3 per real row; DDO 8
with the reference evaluated, 6 with its terms cached: ratios of 2.67 and 2.0. A grid of G members
that shares data and reference costs (6 G + 2) / (8 G) of G runs: 0.78 for 8. PyTorch runs the same
step (two evaluations of both networks, Adam, average) eagerly. Writes
experiments/results/ddo_step.json.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import torch
from absl import app, flags

from experiments.benchmarks import torch_networks
from experiments.benchmarks.interleaved import interleaved_seconds
from experiments.launch import quiet_libraries, shown_command
from genjax_lab import networks, processes
from genjax_lab.objectives import ddo_denoising, ddo_denoising_grid, denoising
from genjax_lab.training import half_life_ema, make_train_step

_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed repetitions of each program.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 20, "Optimiser steps in a timed call.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 256, "Real rows, and fakes, of a step.", lower_bound=1)
_BLOCKS = flags.DEFINE_integer("num_blocks", 4, "Blocks of the network.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "experiments/results/ddo_step.json", "Where the table goes.")

MEMBERS = 8
ALPHA, BETA, SIGMA_DATA = 4.0, 0.5, 0.5


def make_network() -> networks.ResidualMLP:
    return networks.ResidualMLP(num_classes=10, width=256, num_blocks=_BLOCKS.value)


def our_program(
    objective: Any, variables: Any, batches: dict[str, np.ndarray]
) -> Callable[[], None]:
    """As many optimiser steps as there are batches, in one dispatch."""
    train = make_train_step(
        objective,
        optax.adam(3e-4),
        batch_size=_BATCH.value,
        steps_per_call=len(batches["image"]),
        ema={"ema": half_life_ema(8_800, rampup_ratio=None)},
    )
    state = [train.init(variables, jax.random.key(1))]

    def program():
        state[0], metrics = train.step(state[0], batches)
        jax.block_until_ready(metrics)

    return program


def torch_program(batches: dict[str, np.ndarray]) -> Callable[[], None]:
    """The same DDO steps, one by one."""
    fields = {"num_classes": 10, "width": 256, "num_blocks": _BLOCKS.value}
    model, reference, average = (torch_networks.ResidualMLP(64, **fields) for _ in range(3))
    reference.load_state_dict(model.state_dict())
    parameters, averages = list(model.parameters()), list(average.parameters())
    optimizer = torch.optim.Adam(parameters, lr=3e-4, fused=True)
    decay = 0.5 ** (_BATCH.value / 8_800)
    tensors = {name: torch.from_numpy(value) for name, value in batches.items()}

    def log_likelihood(network, x, noise, sigma, label):
        noisy, square = x + noise, sigma**2 + SIGMA_DATA**2
        output = network(noisy / square.sqrt(), sigma.flatten().log() / 4, label)
        target = (x - SIGMA_DATA**2 / square * noisy) * square.sqrt() / (sigma * SIGMA_DATA)
        return -((output - target) ** 2).sum((1, 2, 3))

    def program():
        for step in range(len(tensors["image"])):
            real, fake = (
                tensors[name][step].permute(0, 3, 1, 2) for name in ("image", "fake_image")
            )
            labels = torch.cat([tensors[name][step] for name in ("label", "fake_label")]).long()
            label = torch.nn.functional.one_hot(labels, 10).float()
            sigma = torch.exp(torch.randn(len(real), 1, 1, 1) * 1.2 - 1.2)
            noise = (sigma * torch.randn_like(real)).repeat(2, 1, 1, 1)
            rows = (torch.cat([real, fake]), noise, sigma.repeat(2, 1, 1, 1), label)
            own = log_likelihood(model, *rows)
            with torch.no_grad():
                frozen = log_likelihood(reference, *rows)
            delta_real, delta_fake = (own - frozen).chunk(2)
            sigmoid = torch.nn.functional.logsigmoid
            loss = -(sigmoid(BETA * delta_real) + ALPHA * sigmoid(-BETA * delta_fake)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - decay)
        loss.item()

    return program


def measure(repeats: int, steps: int) -> dict[str, float]:
    """Milliseconds per optimiser step of every program, and the ratios that matter."""
    rng, network = np.random.default_rng(0), make_network()
    shape = (steps, _BATCH.value)
    batches = {}
    for prefix in ("", "fake_"):
        batches[f"{prefix}image"] = rng.uniform(-1, 1, (*shape, 8, 8, 1)).astype(np.float32)
        batches[f"{prefix}label"] = rng.integers(0, 10, shape).astype(np.int32)
    process = processes.edm(sigma_data=SIGMA_DATA)
    variables = jax.jit(network.init)(
        jax.random.key(0),
        batches["image"][0, :1],
        np.zeros(1, np.float32),
        batches["label"][0, :1],
    )
    variables = jax.device_get(variables)
    with_reference = {**variables, "reference": variables}
    copies = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf, (MEMBERS, *leaf.shape)), variables["params"]
    )
    cached = batches | {
        **{name: rng.integers(0, 2**31, shape) for name in ("seed", "fake_seed")},
        **{
            name: np.zeros(shape, np.float32)
            for name in ("reference_terms", "fake_reference_terms")
        },
    }
    real = {name: batches[name] for name in ("image", "label")}
    ddo = ddo_denoising(network.apply, process, alpha=ALPHA, beta=BETA)
    grid = ddo_denoising_grid(
        network.apply, process, alpha=(ALPHA,) * MEMBERS, beta=(BETA,) * MEMBERS
    )
    seconds = interleaved_seconds(
        {
            "mle": our_program(denoising(network.apply, process), variables, real),
            "ddo": our_program(ddo, with_reference, batches),
            "ddo_cached": our_program(ddo, variables, cached),
            "grid": our_program(grid, {**with_reference, "params": copies}, batches),
            "torch_ddo": torch_program(batches),
        },
        repeats=repeats,
    )
    each = {name: 1e3 * value / steps for name, value in seconds.items()}
    return {f"{name}_ms": round(value, 3) for name, value in each.items()} | {
        "ddo_over_mle": round(each["ddo"] / each["mle"], 3),
        "ddo_cached_over_mle": round(each["ddo_cached"] / each["mle"], 3),
        f"grid_of_{MEMBERS}_over_separate_runs": round(each["grid"] / (MEMBERS * each["ddo"]), 3),
        "torch_over_ours": round(each["torch_ddo"] / each["ddo"], 3),
    }


def main(argv: list[str]) -> None:
    quiet_libraries()
    torch.set_num_threads(os.cpu_count() or 1)
    table = measure(_REPEATS.value, _STEPS.value)
    print(json.dumps(table, indent=1))
    result = {
        "command": shown_command("benchmarks.ddo_step"),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "table": table,
    }
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    app.run(main)
