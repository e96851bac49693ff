"""Negative-aware fine-tuning of a small decoder, beside its baselines (arXiv 2505.18116).

    python -m experiments.studies.nft [--seeds=5] [--rollouts=1000] [--workers=2]

A decoder of 64 features and 2 layers learns from examples to write numbers as sums of four digits,
until a third of its answers is right (configs/digit_sum_sft.py). From there on it learns from its
own answers only: 1000 rollouts (configs/arithmetic_nft.py), for the late phase is the one in which
methods differ, each method at three learning rates and several seeds, a seed's methods from the
same start. Every rollout asks 64 questions 8 times and learns from the useful ones, 32 at most, so
that all methods generate equally many tokens. Losses are means over tokens for all methods.

Told are, at equal learning rates and with each method at its best: accuracy (mean of the last
three evaluations), the best answer of 8, entropy, what it took in tokens and operations, and tokens
generated until TARGET was reached; with 95 % intervals of the difference to NFT from resampled
seeds. And the identity behind it: at R = 1
the gradients of NFT and of GRPO are the same, through all parameters of the decoder.

Killed and started again with the same workdir, it goes on. `experiments.studies.nft_tabular` has
the same question without noise. Writes nft.json and nft.png.
"""

import concurrent.futures
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import app, flags
from tqdm import tqdm

import experiments
from configs import arithmetic_nft, digit_sum_sft
from experiments.launch import quiet_libraries, shown_command
from genjax_lab import networks, objectives, training
from genjax_lab.reasoning import Ledger

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt

_OUT = flags.DEFINE_string("out", "experiments/results", "Where table and figure go.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/study_nft", "Where the runs go.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Starts, and runs of each method.", lower_bound=1)
_ROLLOUTS = flags.DEFINE_integer("rollouts", 1000, "Of each run.", lower_bound=2)
_PRETRAINING = flags.DEFINE_integer("pretraining", 300, "Steps before.", lower_bound=20)
_RATES = flags.DEFINE_list("rates", ["1e-4", "2e-4", "4e-4"], "Learning rates.")
_METHODS = flags.DEFINE_list("methods", None, "Of METHODS; all by default.")
_EVALUATIONS = flags.DEFINE_integer("evaluations", 20, "Of each run.", lower_bound=1)
_ANSWERS = flags.DEFINE_integer("answers", 4096, "In each evaluation.", lower_bound=8)
_WORKERS = flags.DEFINE_integer("workers", 2, "Processes, each on a core; 0 for this one.")

METHODS: dict[str, dict[str, Any]] = {
    "NFT": {"method": "nft"},
    "GRPO": {"method": "grpo"},
    "DAPO": {"method": "dapo"},
    "RFT": {"method": "rft"},
    "RFT, omega = 1 - r": {"method": "rft", "objective": {"weighting": "dr_grpo"}},
    "naive +-": {"method": "signed_likelihood"},
}
CURVES = ("avg_at_8", "pass_at_8", "entropy")
TARGET = 0.95
COSTS = ("generated_tokens", "kept_tokens", "trained_tokens")


class Run(NamedTuple):
    """One training run of the study."""

    method: str
    rate: float
    seed: int


class Sizes(NamedTuple):
    """What flags say of every run."""

    workdir: str
    rollouts: int
    pretraining: int
    evaluations: int
    answers: int


def base_directory(sizes: Sizes, seed: int) -> str:
    return str(Path(sizes.workdir) / f"base_{seed}")


def pretrain(sizes: Sizes, seed: int) -> dict[str, float]:
    """Learns from examples; the accuracy from which a seed's methods start."""
    config = digit_sum_sft.get_config()
    config.seed, config.num_steps, config.progress = seed, sizes.pretraining, False
    config.eval_every = config.checkpoint_every = config.num_steps
    config.evaluation.num_samples = sizes.answers
    directory = base_directory(sizes, seed)
    training.train(experiments.build(config), workdir=directory, config=config)
    return curves_of(directory)[-1]


def learn(sizes: Sizes, run: Run) -> dict[str, Any]:
    """A run, and what it logged."""
    config = arithmetic_nft.get_config()
    config.base = base_directory(sizes, run.seed)
    config.seed, config.progress = 1000 + run.seed, False
    fields = METHODS[run.method]
    config.method = fields["method"]
    config.objective.update({"aggregation": "token-mean"} | fields.get("objective", {}))
    config.optimizer.learning_rate = run.rate
    config.rollout.update({"strategy": "partial", "max_batches": 1})
    config.num_steps = sizes.rollouts * config.steps_per_call
    every = max(1, sizes.rollouts // sizes.evaluations) * config.steps_per_call
    config.eval_every, config.checkpoint_every = every, config.num_steps
    config.log_every = config.steps_per_call  # what it has cost, wherever it is evaluated
    config.evaluation.num_samples = sizes.answers
    name = f"{run.method}_{run.rate}_{run.seed}".replace(" ", "").replace(",", "_")
    directory = str(Path(sizes.workdir) / name)
    training.train(experiments.build(config), workdir=directory, config=config)
    ledger = training.restore(directory).iterators[0]["ledger"]
    return {
        **run._asdict(),
        "curve": curves_of(directory),
        "ledger": ledger,
    }


def curves_of(directory: str) -> list[dict[str, float]]:
    rows = training.read_metrics(directory)
    spent = {row["step"]: row for row in rows if f"ledger/{COSTS[0]}" in row}
    return [
        {"step": row["step"]}
        | {name: row[f"eval/{name}"] for name in CURVES}
        | {name: spent[row["step"]][f"ledger/{name}"] for name in COSTS if spent}
        for row in rows
        if "eval/entropy" in row
    ]


def start_worker(cache: str, cores: Any) -> None:
    """Each process works on a core of its own and finds what others have compiled."""
    os.sched_setaffinity(0, {cores.get()})
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    quiet_libraries()


def in_parallel(function: Any, items: Sequence[Any], cache: str, name: str) -> list[Any]:
    if _WORKERS.value < 1:
        return [function(item) for item in tqdm(items, desc=name)]
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    available = sorted(os.sched_getaffinity(0))
    for number in range(_WORKERS.value):
        cores.put(available[number % len(available)])
    with concurrent.futures.ProcessPoolExecutor(
        _WORKERS.value, context, start_worker, (cache, cores)
    ) as pool:
        futures = [pool.submit(function, item) for item in items]
        for _ in tqdm(concurrent.futures.as_completed(futures), total=len(items), desc=name):
            pass
        return [future.result() for future in futures]


def identity(directory: str) -> dict[str, Any]:
    """Relative difference of gradients of NFT and GRPO at R = 1, through all parameters."""
    run = training.restore(directory)
    config = run.config
    result: dict[str, Any] = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            variables = optax.tree.cast(run.state.variables(), dtype)
            fields = {name: value for name, value in config["network"].items() if name != "name"}
            network = networks.Decoder(vocab_size=12, dtype=dtype, **fields)
            result[dtype] = _identity(network, variables)
    return result


def _identity(network: networks.Decoder, variables: Any) -> dict[str, float]:
    generator = np.random.default_rng(0)
    tokens = jnp.asarray(generator.integers(0, 12, (64, 8)))
    outcome = jnp.asarray(generator.uniform(size=64) < 0.4, jax.tree.leaves(variables)[0].dtype)
    group = objectives.group_statistics(outcome, jnp.arange(64) // 8)
    mask = jnp.ones((64, 5), bool)

    log_probs, pull_back = jax.vjp(
        jax.jit(lambda v: network.apply(v, tokens, start=3, method="log_probs")[0]), variables
    )
    through = jax.jit(lambda cotangent: jax.flatten_util.ravel_pytree(pull_back(cotangent))[0])

    def gradient(loss):
        def value(new):
            return loss(new, log_probs, mask, outcome, group, aggregation="token-mean")[0]

        return through(jax.jit(jax.grad(value))(log_probs))

    grpo = gradient(functools.partial(objectives.grpo_loss, std="population"))
    dr_grpo = gradient(objectives.dr_grpo_loss)
    result = {}
    for epsilon in (0.01, 0.5, 1.0, 2.0):
        for name, weighting, other in (("GRPO", "grpo", grpo), ("Dr.GRPO", "dr_grpo", dr_grpo)):
            nft = gradient(
                functools.partial(objectives.nft_loss, weighting=weighting, epsilon=epsilon)
            )
            difference = jnp.linalg.norm(nft - other) / jnp.linalg.norm(other)
            result[f"{name}, epsilon = {epsilon}"] = float(difference)
    return result


def tabulate(runs: Sequence[Mapping[str, Any]], num_params: int) -> dict[str, Any]:
    """Means over seeds of every method at every rate, and intervals of differences to NFT."""
    table: dict[str, Any] = {}
    final: dict[tuple[str, float], np.ndarray] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        table[method] = {}
        for rate in dict.fromkeys(run["rate"] for run in runs):
            chosen = [r for r in runs if r["method"] == method and r["rate"] == rate]
            last = {name: [_last(run, name) for run in chosen] for name in CURVES}
            final[method, rate] = np.array(last["avg_at_8"])
            ledger = {
                k: float(np.mean([r["ledger"][k] for r in chosen])) for k in chosen[0]["ledger"]
            }
            table[method][str(rate)] = {
                "accuracy": float(np.mean(last["avg_at_8"])),
                "accuracy_of_seeds": last["avg_at_8"],
                "pass_at_8": float(np.mean(last["pass_at_8"])),
                "entropy": float(np.mean(last["entropy"])),
                "generated_tokens_to_target": [tokens_to(run, TARGET) for run in chosen],
                "ledger": ledger,
                "floating_point_operations": Ledger(**ledger).floating_point_operations(num_params),
            }
        rates = [rate for name, rate in final if name == method]
        table[method]["best_rate"] = max(rates, key=lambda rate, m=method: final[m, rate].mean())
    if "NFT" not in table:
        return table
    generator = np.random.default_rng(0)
    for method in table:
        differences = {}
        rates = [str(rate) for name, rate in final if name == method]
        for where in (*rates, "best"):
            pair = [
                final[m, table[m]["best_rate"] if where == "best" else float(where)]
                for m in (method, "NFT")
            ]
            difference = pair[0] - pair[1]
            draws = generator.integers(len(difference), size=(10_000, len(difference)))
            low, high = np.quantile(difference[draws].mean(axis=1), [0.025, 0.975])
            differences[where] = [float(difference.mean()), float(low), float(high)]
        table[method]["difference_to_NFT"] = differences
    return table


def tokens_to(run: Mapping[str, Any], target: float) -> float | None:
    """Tokens generated until an evaluation was as good; None if none was."""
    reached = [row["generated_tokens"] for row in run["curve"] if row["avg_at_8"] >= target]
    return min(reached, default=None)


def operations(point: Mapping[str, float], num_params: int) -> float:
    """What it took to come there."""
    ledger = Ledger(**{name: point[name] for name in COSTS})
    return sum(ledger.floating_point_operations(num_params).values())


def _last(run: Mapping[str, Any], name: str) -> float:
    return float(np.mean([row[name] for row in run["curve"][-3:]]))


def draw(runs: Sequence[Mapping[str, Any]], start: float, num_params: int, path: Path) -> None:
    """Errors and entropies against rollouts, errors against operations; a column for each rate."""
    rates = list(dict.fromkeys(run["rate"] for run in runs))
    figure, axes = plt.subplots(3, len(rates), figsize=(4.2 * len(rates), 9), squeeze=False)
    for column, rate in enumerate(rates):
        for method in dict.fromkeys(run["method"] for run in runs):
            chosen = [r for r in runs if r["method"] == method and r["rate"] == rate]
            steps = [row["step"] / 4 for row in chosen[0]["curve"]]
            for row, name in enumerate(("avg_at_8", "entropy")):
                values = np.array([[point[name] for point in run["curve"]] for run in chosen])
                values = 1 - values if name == "avg_at_8" else values
                mean = values.mean(axis=0)
                axes[row, column].plot(steps, mean, label=method, lw=1.3)
                axes[row, column].fill_between(steps, values.min(0), values.max(0), alpha=0.08)
            costs = [[operations(point, num_params) for point in run["curve"]] for run in chosen]
            errors = [[1 - point["avg_at_8"] for point in run["curve"]] for run in chosen]
            axes[2, column].plot(np.mean(costs, axis=0), np.mean(errors, axis=0), lw=1.3)
        axes[0, column].axhline(start, color="gray", lw=0.8, ls=":")
        axes[0, column].set(title=f"learning rate {rate}", yscale="log")
        axes[1, column].set(xlabel="rollouts")
        axes[2, column].set(xlabel="floating point operations", yscale="log")
    for row in (0, 2):
        axes[row, 0].set_ylabel("share of wrong answers")
    axes[1, 0].set_ylabel("entropy, nats a token")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    quiet_libraries()
    start = time.perf_counter()
    methods = _METHODS.value or list(METHODS)
    if unknown := sorted(set(methods) - set(METHODS)):
        raise app.UsageError(f"methods {unknown} are not in {list(METHODS)}")
    sizes = Sizes(
        _WORKDIR.value, _ROLLOUTS.value, _PRETRAINING.value, _EVALUATIONS.value, _ANSWERS.value
    )
    cache = str(Path(_WORKDIR.value).absolute() / "compiled")
    seeds = range(_SEEDS.value)
    bases = in_parallel(functools.partial(pretrain, sizes), seeds, cache, "bases")
    runs = [
        Run(method, float(rate), seed)
        for seed in seeds
        for rate in _RATES.value
        for method in methods
    ]
    results = in_parallel(functools.partial(learn, sizes), runs, cache, "runs")
    directory = base_directory(sizes, 0)
    parameters = training.restore(directory).state.params
    num_params = sum(x.size for x in jax.tree.leaves(parameters))
    table = tabulate(results, num_params)
    result = {
        "command": shown_command("studies.nft"),
        "seconds": time.perf_counter() - start,
        "parameters": num_params,
        "start": bases,
        "gradient_identity": identity(directory),
        "methods": table,
        "curves": [
            {k: run[k] for k in Run._fields}
            | {k: [row[k] for row in run["curve"]] for k in ("step", *CURVES, *COSTS)}
            for run in results
        ],
    }
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "nft.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(
        results,
        1 - float(np.mean([base["avg_at_8"] for base in bases])),
        num_params,
        out / "nft.png",
    )
    for method, rows in table.items():
        for rate in _RATES.value:
            row = rows[str(float(rate))]
            low, high = rows.get("difference_to_NFT", {}).get(str(float(rate)), [0, 0, 0])[1:]
            ledger = row["ledger"]
            print(
                f"{method:20s} rate {rate:6s} accuracy {row['accuracy']:.3f}, less NFT's in "
                f"[{low:+.3f}, {high:+.3f}]; entropy {row['entropy']:.2f}; tokens generated "
                f"{ledger['generated_tokens']:.2e}, trained {ledger['trained_tokens']:.2e}; "
                f"{sum(row['floating_point_operations'].values()):.2e} operations"
            )
    print(json.dumps(result["gradient_identity"], indent=1))


if __name__ == "__main__":
    app.run(main)
