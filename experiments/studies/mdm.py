"""What float32 draws do to masked diffusion, and what first hitting saves (arXiv 2409.02908).

    python -m experiments.studies.mdm [--seeds=3] [--num_steps=1500] [--num_samples=256]

Three models of Python's language reference (configs/pydoc_mdm.py) are trained without time, and
draw sequences; 4.4 minutes on an H100, most of them float32's:

  first hitting   a token for each call, from 64 bits of noise
  exact           ancestral sampling in T steps: whether a token is unmasked, then which one
  float32         the same from V + 1 classes, the mask among them, with the float32 noise that
                  `jax.random.gumbel` has by default

all of them with a clock for each sequence, so that none needs more than length + 1 calls. Samples
are judged by a trigram model of the training text and by the entropy of their own tokens. In exact
arithmetic float32 would draw from the law of "exact", and both tend to first hitting as T grows.

Beside it: how often tokens of the models' own predictions are unmasked by float32 noise, and by the
law of `evaluation.lattice_categorical_probs`; and, on a model small enough to enumerate, how far
the law of ancestral sampling in T steps is from that of first hitting. Writes mdm.json and mdm.png.

Whether first hitting is as good as exact sampling takes more samples than the slow arm can draw:

    python -m experiments.studies.mdm --kinds=exact --sampling_steps=4096 --num_samples=1536 \
        --rates=1e-3,1e-4 --draws=200000 --name=mdm_quality
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags
from tqdm import tqdm

import experiments
from configs import pydoc_mdm
from experiments.launch import quiet_libraries, shown_command
from experiments.text import Text, make_network
from genjax_lab import evaluation, samplers, training

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt

_OUT = flags.DEFINE_string("out", "experiments/results", "Where table and figure go.")
_NAME = flags.DEFINE_string("name", "mdm", "Of table and figure.")
_KINDS = flags.DEFINE_list("kinds", ["exact", "float32"], "Kinds of ancestral sampling.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/study_mdm", "Where the models go.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Models that are trained.", lower_bound=1)
_STEPS = flags.DEFINE_integer("num_steps", 1_500, "Optimiser steps of each.", lower_bound=2)
_DEPTH = flags.DEFINE_integer("depth", 3, "Blocks of the network.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens of a sequence.", lower_bound=4)
_SAMPLES = flags.DEFINE_integer("num_samples", 256, "Sequences of each arm.", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch_size", 128, "Sequences that are drawn at once.", lower_bound=2)
_GRID = flags.DEFINE_list("sampling_steps", ["128", "1024", "4096"], "Values of T.")
_BOUND_DRAWS = flags.DEFINE_integer("bound_draws", 8, "Draws of masks for the held-out bound.")
_RATES = flags.DEFINE_list("rates", ["1e-2", "1e-3"], "Probabilities of being unmasked in a step.")
_DRAWS = flags.DEFINE_integer("draws", 20_000, "Draws of each row behind a rate.", lower_bound=10)

DRAW_OF = {"exact": "two_stage", "float32": "joint_float32"}
LATTICE_ROWS, LATTICE_BITS = 64, 23
TOY_STEPS = (2, 4, 8, 16, 32, 64, 128)


class Model:
    """A trained model."""

    def __init__(self, seed: int):
        config = pydoc_mdm.get_config()
        config.seed = seed
        config.num_steps = config.optimizer.decay_steps = _STEPS.value
        config.steps_per_call = min(config.steps_per_call, _STEPS.value)
        config.data.length, config.network.depth = _LENGTH.value, _DEPTH.value
        config.eval_every, config.checkpoint_every = 0, _STEPS.value
        config.evaluation.update({"metrics": ("nelbo",), "num_draws": _BOUND_DRAWS.value})
        config.tensorboard = False
        directory = Path(_WORKDIR.value) / str(seed)
        self.experiment = experiments.build(config)
        training.train(self.experiment, workdir=directory, config=config)
        state = training.restore(directory).state
        self.text = Text(config)
        self.test = self.text.tokens(config.data.test_split)
        self.nelbo = self.experiment.evaluate(state, metrics=("nelbo",))["nelbo"]
        network = make_network(config, self.text)
        self.vocab_size = network.vocab_size
        self.denoiser = samplers.token_denoiser(
            network.apply, state.variables("ema"), self.vocab_size
        )
        train = self.text.tokens(config.data.split)
        self.judge = evaluation.TrigramJudge(train, self.vocab_size)
        self.seed = seed


def arms(denoiser: samplers.TokenDenoiser, grid: Sequence[int]) -> dict[str, samplers.Sampler]:
    made = {"first hitting": samplers.first_hitting(denoiser, _LENGTH.value)}
    for steps in grid:
        for kind in _KINDS.value:
            made[f"{kind} T={steps}"] = samplers.ancestral(
                denoiser, _LENGTH.value, num_steps=steps, draw=DRAW_OF[kind], asynchronous=True
            )
    return made


def draw_samples(model: Model, sampler: samplers.Sampler, steps: int | None) -> dict[str, Any]:
    """Samples of an arm and what the judge says of them."""
    parts, seconds, calls, reveals = [], [], [], []
    for first in range(0, _SAMPLES.value, _BATCH.value):
        seeds = np.arange(first, min(first + _BATCH.value, _SAMPLES.value))
        start = time.perf_counter()
        tokens, info = samplers.sample(
            sampler,
            jax.random.key(1000 + model.seed),
            shape=(len(seeds), _LENGTH.value),
            seeds=seeds,
        )
        parts.append(np.asarray(tokens))
        if len(seeds) == min(_BATCH.value, _SAMPLES.value):
            seconds.append(time.perf_counter() - start)
        calls.append(int(info.num_evaluations))
        reveals.append(np.asarray(info.report.revealed_at))
        if np.any(info.report.masks_left):
            raise ValueError("samples have masks left: the network gives no finite logits")
    found = evaluation.generative_perplexity(model.judge, np.concatenate(parts))
    row = {
        "nats": round(found.nats, 4),
        "nats_error": round(found.standard_error, 4),
        "perplexity": round(found.perplexity, 1),
        "entropy": round(found.entropy, 4),
        "entropy_error": round(found.entropy_error, 4),
        "evaluations": round(float(np.mean(calls)), 1),
        # The first batch also compiles, and is all there is at a meaningless size.
        "seconds_for_a_batch": round(min(seconds[1:] or seconds), 3),
    }
    if steps is not None:
        at = np.concatenate(reveals)
        row["unmasked_at_quarters"] = [
            round(float(np.mean(at < steps * share)), 4) for share in (0.25, 0.5, 0.75)
        ]
    return row


def lattice(model: Model, rates: Sequence[float]) -> list[dict[str, Any]]:
    """How often predicted tokens win against a mask of probability 1 - rate."""
    rows = min(LATTICE_ROWS, len(model.test))
    rng = np.random.default_rng(model.seed)
    tokens = np.array(model.test[:rows])
    hidden = rng.random(tokens.shape) < rng.random((rows, 1))
    hidden[:, 0] = True  # the row that is looked at
    shown = jnp.asarray(np.where(hidden, model.denoiser.mask_id, tokens))
    logits = model.denoiser.predict(shown, None, None, jnp.zeros((rows, 1), jnp.int32))[:, 0]
    log_probs = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)), np.float64)
    found = []
    for rate in rates:
        stays = np.full((rows, 1), math.log1p(-rate))
        classes = np.concatenate([log_probs + math.log(rate), stays], axis=1)
        law = evaluation.lattice_categorical_probs(classes, LATTICE_BITS)
        capped = evaluation.truncated_categorical_probs(classes, evaluation.gumbel_cap())
        count = won(jnp.asarray(classes, jnp.float32), jax.random.key(model.seed), _DRAWS.value)
        total = rows * _DRAWS.value * rate
        found.append(
            {
                "rate": rate,
                "measured": round(count / total, 4),
                "standard_error": round(math.sqrt(max(count, 1)) / total, 4),
                "lattice": round(float(np.mean(1 - law[:, -1])) / rate, 4),
                "continuous_cap": round(float(np.mean(1 - capped[:, -1])) / rate, 4),
            }
        )
    return found


def won(classes: jax.Array, key: jax.Array, draws: int) -> int:
    """How often another class than the last is drawn by float32 noise."""

    @jax.jit
    def once(key):
        return jnp.sum(jax.random.categorical(key, classes, axis=-1) < classes.shape[1] - 1)

    keys = jax.random.split(key, draws)
    return int(np.sum(jax.lax.map(once, keys, batch_size=8)))


def toy() -> dict[str, Any]:
    """A random table of predictions that belong to no joint law, four tokens of three."""
    length, vocabulary = 4, 3
    table = np.random.default_rng(0).dirichlet(
        np.ones(vocabulary) / 2, size=(vocabulary + 1,) * length + (length,)
    )
    for state in np.ndindex(*(vocabulary + 1,) * length):
        for i, token in enumerate(state):
            if token < vocabulary:
                table[(*state, i)] = np.eye(vocabulary)[token]
    law = evaluation.first_hitting_law(table)
    distances = {
        str(steps): round(
            evaluation.total_variation(
                evaluation.ancestral_law(table, 1 / np.arange(steps, 0, -1)), law
            ),
            5,
        )
        for steps in TOY_STEPS
    }
    joint = np.random.default_rng(1).random((vocabulary,) * length)
    joint /= joint.sum()
    perfect = evaluation.first_hitting_law(evaluation.consistent_table(joint))
    return {
        "distance_of_ancestral": distances,
        "distance_of_perfect_model": float(f"{evaluation.total_variation(perfect, joint):.1e}"),
    }


def pooled(runs: list[dict[str, Any]], arm: str, field: str) -> tuple[float, float]:
    """(mean over models, standard error over all their sequences)."""
    rows = [run["arms"][arm] for run in runs]
    errors = [row[f"{field}_error"] for row in rows]
    mean = float(np.mean([row[field] for row in rows]))
    return mean, float(np.sqrt(np.sum(np.square(errors)))) / len(rows)


def contrast(runs: list[dict[str, Any]], one: str, other: str, field: str) -> dict[str, float]:
    """Difference of two arms, and in how many standard errors."""
    (a, a_error), (b, b_error) = (pooled(runs, arm, field) for arm in (one, other))
    error = math.hypot(a_error, b_error)
    return {
        "difference": round(a - b, 4),
        "standard_error": round(error, 4),
        "standard_errors": round((a - b) / error, 2) if error else math.nan,
    }


def summarise(runs: list[dict[str, Any]], grid: Sequence[int]) -> dict[str, Any]:
    largest = max(grid)
    seconds = {
        arm: [run["arms"][arm]["seconds_for_a_batch"] for run in runs] for arm in runs[0]["arms"]
    }
    hits = float(np.median(seconds["first hitting"]))
    result: dict[str, Any] = {
        "seconds_over_first_hitting": {
            arm: round(float(np.median(values)) / hits, 2) for arm, values in seconds.items()
        },
    }
    claims = {"held-out bound at most 4.5 nats": all(run["nelbo"] <= 4.5 for run in runs)}
    if "exact" in _KINDS.value:
        quality = contrast(runs, "first hitting", f"exact T={largest}", "nats")
        result["nats_of_first_hitting_less_exact"] = quality
        result["entropy_of_first_hitting_less_exact"] = contrast(
            runs, "first hitting", f"exact T={largest}", "entropy"
        )
        claims["first hitting is as good as exact, within 2 standard errors of at most 0.03"] = (
            abs(quality["standard_errors"]) < 2 and quality["standard_error"] <= 0.03
        )
    if set(_KINDS.value) == set(DRAW_OF):
        drops = {
            steps: contrast(runs, f"float32 T={steps}", f"exact T={steps}", "entropy")
            for steps in sorted(grid)
        }
        result["entropy_of_float32_less_exact"] = drops
        claims[f"float32 loses entropy at T={largest}, 4 standard errors"] = (
            drops[largest]["standard_errors"] < -4
        )
        claims["the loss grows with T"] = bool(
            np.all(np.diff([drop["difference"] for drop in drops.values()]) < 0)
        )
    return {**result, "claims": claims}


def figure(runs: list[dict[str, Any]], grid: list[int], toy_row: dict[str, Any], path: Path):
    canvas, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axes, field, label in (
        (panels[0], "entropy", "entropy of a sequence's tokens, nats"),
        (panels[1], "nats", "nats of a token under the trigram judge"),
    ):
        mean, error = pooled(runs, "first hitting", field)
        axes.axhspan(mean - 2 * error, mean + 2 * error, color="0.85")
        axes.axhline(mean, color="0.4", label=f"first hitting, {_LENGTH.value} calls")
        for kind in _KINDS.value:
            points = [pooled(runs, f"{kind} T={steps}", field) for steps in grid]
            means, errors = (np.array(values) for values in zip(*points, strict=True))
            axes.errorbar(grid, means, 2 * errors, marker="o", capsize=3, label=kind)
        axes.set(xscale="log", xlabel="steps T", ylabel=label)
        axes.set_xticks(grid, [str(steps) for steps in grid])
        axes.minorticks_off()
    panels[0].legend(frameon=False, fontsize=8)
    panels[0].set_title("means and two standard errors", fontsize=9)
    found = toy_row["distance_of_ancestral"]
    steps = [int(name) for name in found]
    panels[2].loglog(steps, list(found.values()), "o-", label="ancestral to first hitting")
    last = steps[-1] * found[str(steps[-1])]
    panels[2].loglog(steps, last / np.array(steps), "--", color="0.6", label=f"{last:.2f} / T")
    panels[2].set(xlabel="steps T", ylabel="total variation, by enumeration")
    panels[2].legend(frameon=False, fontsize=8)
    canvas.savefig(path, dpi=150)
    plt.close(canvas)


def main(_: Sequence[str]) -> None:
    quiet_libraries()
    grid = sorted(int(steps) for steps in _GRID.value)
    if unknown := set(_KINDS.value) - set(DRAW_OF):
        raise app.UsageError(f"--kinds has {sorted(unknown)}; there are {list(DRAW_OF)}")
    rates = [float(rate) for rate in _RATES.value]
    start = time.perf_counter()
    runs = []
    for seed in range(_SEEDS.value):
        model = Model(seed)
        print(f"seed {seed}: held-out bound {model.nelbo:.3f} nats a token", flush=True)
        run = {"nelbo": round(model.nelbo, 4), "vocab_size": model.vocab_size, "arms": {}}
        for name, sampler in tqdm(arms(model.denoiser, grid).items(), desc=f"seed {seed}"):
            steps = int(name.partition("=")[2]) if "=" in name else None
            run["arms"][name] = draw_samples(model, sampler, steps)
            print(f"{name:16s} {run['arms'][name]}", flush=True)
        run["lattice"] = lattice(model, rates)
        runs.append(run)
    toy_row = toy()
    result = {
        "command": shown_command("studies.mdm"),
        "device": jax.devices()[0].device_kind,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "num_steps": _STEPS.value,
        "num_samples": _SAMPLES.value,
        "summary": summarise(runs, grid),
        "toy": toy_row,
        "models": runs,
    }
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{_NAME.value}.json").write_text(json.dumps(result, indent=1) + "\n")
    figure(runs, grid, toy_row, out / f"{_NAME.value}.png")
    print(json.dumps(result["summary"], indent=1))
    print(f"written to {out}/{_NAME.value}.json and .png")


if __name__ == "__main__":
    app.run(main)
