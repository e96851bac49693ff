"""Frechet distance against network evaluations for the samplers of EDM's family, on digits.

    python -m experiments.studies.edm_digits [--seeds=3] [--out=experiments/results]

Trains `configs/digits_edm.py` with several seeds and draws the same number of samples from each
model with every sampler at every budget. The claim under test (arXiv 2206.00364, Figure 2; arXiv
2211.01095): higher-order solvers of the probability-flow ODE need fewer evaluations than DDIM for
the same quality. Writes edm_digits.json and edm_digits.png.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from absl import app, flags

from configs import digits_edm
from experiments import images
from experiments.launch import quiet_libraries, shown_command
from genjax_lab import training

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt

_SEEDS = flags.DEFINE_integer("seeds", 3, "Models to train.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "experiments/results", "Where table and figure go.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/study_edm_digits", "Where the models go.")
_BUDGETS = flags.DEFINE_list("budgets", ["5", "9", "13", "19", "35"], "Evaluations.")
_STEPS = flags.DEFINE_integer("num_steps", None, "Training steps; default the config's.")
_BLOCKS = flags.DEFINE_integer("num_blocks", None, "Of the network; default the config's.")
_SAMPLES = flags.DEFINE_integer("num_samples", 2000, "Samples behind each distance.")

# Settings of each sampler for a budget of network evaluations. Under EDM Euler's method is DDIM.
SAMPLERS = {
    "Heun": lambda budget: {"name": "heun", "num_steps": (budget + 1) // 2},
    "DDIM": lambda budget: {"name": "ddim", "num_steps": budget},
    "DDPM": lambda budget: {"name": "ddpm", "num_steps": budget},
    "DPM-Solver++(2M)": lambda budget: {"name": "dpm_solver_pp_2m", "num_steps": budget},
    "DPM-Solver-v3": lambda budget: {"name": "dpm_solver_v3", "num_steps": budget},
}


def run(
    seeds: Sequence[int],
    budgets: Sequence[int],
    num_steps: int | None,
    num_samples: int,
    workdir: Path,
) -> list[dict[str, Any]]:
    """One row per (seed, sampler, budget): {"seed", "sampler", "evaluations", "frechet"}."""
    rows = []
    for seed in seeds:
        config = digits_edm.get_config()
        config.seed, config.tensorboard = seed, False
        config.evaluation.num_samples = min(config.evaluation.num_samples, num_samples)
        if _BLOCKS.value is not None:
            config.network.num_blocks = _BLOCKS.value
        if num_steps is not None:
            config.num_steps = config.checkpoint_every = num_steps
        state = training.train(images.build(config), workdir=workdir / f"seed{seed}", config=config)
        for name, settings in SAMPLERS.items():
            for budget in budgets:
                config.sampler = settings(budget)
                drawn = range(100_000, 100_000 + num_samples)
                metrics = images.build(config).evaluate(state, seeds=drawn, metrics=("frechet",))
                row = {"seed": seed, "sampler": name, "evaluations": budget}
                rows.append(row | {"frechet": metrics["frechet"]})
                print(row, f"{metrics['frechet']:.3f}", flush=True)
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    """Mean and standard deviation over seeds by sampler and budget."""
    table: dict[str, dict[int, dict[str, float]]] = {}
    for name in dict.fromkeys(row["sampler"] for row in rows):
        for budget in dict.fromkeys(row["evaluations"] for row in rows):
            values = [
                row["frechet"]
                for row in rows
                if (row["sampler"], row["evaluations"]) == (name, budget)
            ]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            table.setdefault(name, {})[budget] = {
                "mean": statistics.fmean(values),
                "std": spread,
            }
    return table


def draw(table: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Distance against evaluations, one line per sampler, bars of one standard deviation."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, line in table.items():
        axis.errorbar(
            list(line),
            [cell["mean"] for cell in line.values()],
            [cell["std"] for cell in line.values()],
            marker="o",
            markersize=3,
            capsize=2,
            label=name,
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="network evaluations per sample",
        ylabel="Fréchet distance (classifier features)",
        title="Digits, EDM: quality against sampling cost",
    )
    ticks = list(next(iter(table.values())))
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str]) -> None:
    quiet_libraries()
    started = time.monotonic()
    budgets = [int(budget) for budget in _BUDGETS.value]
    if any(budget % 2 == 0 for budget in budgets):
        raise app.UsageError("budgets must be odd: Heun's method makes 2N - 1 evaluations")
    rows = run(range(_SEEDS.value), budgets, _STEPS.value, _SAMPLES.value, Path(_WORKDIR.value))
    table = summarise(rows)
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": shown_command("studies.edm_digits"),
        "num_seeds": _SEEDS.value,
        "num_samples": _SAMPLES.value,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "table": table,
        "rows": rows,
    }
    (out / "edm_digits.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(table, out / "edm_digits.png")
    print(f"{'evaluations':18s}" + "".join(f"{budget:>9d}" for budget in budgets))
    for name, line in table.items():
        print(f"{name:18s}" + "".join(f"{line[budget]['mean']:9.3f}" for budget in budgets))
    print(f"written to {out}/edm_digits.json and .png")


if __name__ == "__main__":
    app.run(main)
