"""Negative-aware fine-tuning where accuracy is exact: sums of five digits, and tables of answers.

    python -m experiments.studies.nft_tabular [--seeds=8] [--num_steps=240]

"Write N as a sum of five digits", N being the sum of five random ones, has many right answers. The
policy is a table of logits for each place and what is left of N, so that its accuracy and entropy
are sums, without evaluation noise. In every step 64 questions get 8 answers each; the first 32
questions with right and wrong answers are learned from in 8 mini-batches (Adam, the same for all).
All methods are losses of `genjax_lab.objectives`, at equal learning rates and each at its best.
Under test (arXiv 2505.18116): rejection sampling (RFT) ends with more errors and less entropy than
NFT, which is as good as GRPO and DAPO. Why: RFT and NFT with omega = 1 - r_q have the same mean
gradient, but not the same variance, which is computed exactly for tables with one and with many
right answers.

Beside it Theorem 3.1 on a table of 50 answers, with exact expectations: right answers alone, wrong
ones alone and both lead to the policy of right answers pi+; and where epsilon leads if answers are
right with a probability only. Writes nft_tabular.json and nft_tabular.png.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import app, flags
from tqdm import tqdm

from experiments.launch import quiet_libraries, shown_command
from genjax_lab import objectives

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt

_OUT = flags.DEFINE_string("out", "experiments/results", "Where table and figure go.")
_SEEDS = flags.DEFINE_integer("seeds", 8, "Runs of each method and rate.", lower_bound=2)
_STEPS = flags.DEFINE_integer("num_steps", 240, "Rollouts of each run.", lower_bound=4)
_RATES = flags.DEFINE_list(
    "rates", ["0.01", "0.02", "0.06", "0.12", "0.24", "0.48", "0.96"], "Learning rates."
)
_METHODS = flags.DEFINE_list("methods", None, "Of METHODS; all by default.")
_DESCENT = flags.DEFINE_integer("descent", 4000, "Steps of Theorem 3.1.", lower_bound=10)

DIGITS, LARGEST, BONUS, NOISE = 5, 45, 2.0, 0.5
QUESTIONS, SAMPLES, KEPT, MINIBATCHES = 64, 8, 32, 8
SUMMED = {"aggregation": "token-sum-const"}  # so that methods differ in nothing else
METHODS: dict[str, Callable[..., Any]] = {
    "NFT": functools.partial(objectives.nft_loss, **SUMMED),
    "NFT, omega = 1": functools.partial(objectives.nft_loss, weighting="uniform", **SUMMED),
    "NFT, omega of GRPO": functools.partial(objectives.nft_loss, weighting="grpo", **SUMMED),
    "NFT, epsilon = 0.1": functools.partial(objectives.nft_loss, epsilon=0.1, **SUMMED),
    "NFT, lambda = 0.5": functools.partial(objectives.nft_loss, negative_weight=0.5, **SUMMED),
    "GRPO": functools.partial(objectives.grpo_loss, **SUMMED),
    "Dr.GRPO": functools.partial(objectives.dr_grpo_loss, **SUMMED),
    "DAPO": functools.partial(objectives.dapo_loss, **SUMMED),
    "RLOO": functools.partial(objectives.rloo_loss, **SUMMED),
    "RFT": functools.partial(objectives.rft_loss, **SUMMED),
    "RFT, omega = 1 - r": functools.partial(objectives.rft_loss, weighting="dr_grpo", **SUMMED),
    "naive +-": functools.partial(objectives.signed_likelihood_loss, **SUMMED),
    "online DPO": objectives.online_dpo_loss,
}
EPSILONS = (1e-6, 0.1, 0.5, 1.0)


def base_policy(key: jax.Array) -> jax.Array:
    """Logits [place, what is left, digit]; what is left runs from -45 to 45."""
    logits = NOISE * jax.random.normal(key, (DIGITS, 2 * LARGEST + 1, 10))
    right_last = jnp.arange(-LARGEST, LARGEST + 1)[:, None] == jnp.arange(10)
    return logits.at[-1].add(BONUS * right_last)


def number_weights() -> np.ndarray:
    """How often N = 0 .. 45 are asked for: as sums of five random digits."""
    weights = np.ones(1)
    for _ in range(DIGITS):
        weights = np.convolve(weights, np.full(10, 0.1))
    return np.float32(weights)


def exact(logits: jax.Array) -> dict[str, jax.Array]:
    """Mean accuracy, and entropy in nats a digit, computed from the last place to the first."""
    left = jnp.arange(-LARGEST, LARGEST + 1)
    after = jnp.clip(left[:, None] - jnp.arange(10) + LARGEST, 0, 2 * LARGEST)
    possible = left[:, None] - jnp.arange(10) >= -LARGEST
    right, entropy = jnp.float32(left == 0), jnp.zeros(left.shape)
    for place in reversed(range(DIGITS)):
        log_probs = jax.nn.log_softmax(logits[place])
        probs = jnp.exp(log_probs)
        right = jnp.sum(probs * jnp.where(possible, right[after], 0), axis=1)
        entropy = jnp.sum(probs * (entropy[after] - log_probs), axis=1)
    weights = number_weights()
    return {
        "error": 1 - weights @ right[LARGEST:],
        "entropy": weights @ entropy[LARGEST:] / DIGITS,
    }


def answer(key: jax.Array, logits: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Digits [batch, place] for numbers [batch], and what was left before each."""

    def draw(left, inputs):
        place, key = inputs
        rows = logits[place, jnp.clip(left + LARGEST, 0, 2 * LARGEST)]
        below = jnp.cumsum(jax.nn.softmax(rows), axis=-1)[:, :-1]
        digit = jnp.sum(jax.random.uniform(key, (len(rows), 1)) > below, axis=-1)
        return left - digit, (digit, left)

    keys = jax.random.split(key, DIGITS)
    _, (digits, left) = jax.lax.scan(draw, numbers, (jnp.arange(DIGITS), keys))
    return digits.T, left.T


def log_probs_of(logits: jax.Array, digits: jax.Array, left: jax.Array) -> jax.Array:
    rows = logits[jnp.arange(DIGITS), jnp.clip(left + LARGEST, 0, 2 * LARGEST)]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(rows), digits[..., None], axis=-1)
    return chosen[..., 0]


def rollout(key: jax.Array, logits: jax.Array) -> dict[str, Any]:
    """Answers to the first `KEPT` useful questions; `mask` hides those that there are too few."""
    ask, respond = jax.random.split(key)
    numbers = jax.random.randint(ask, (QUESTIONS, DIGITS), 0, 10).sum(axis=1).repeat(SAMPLES)
    digits, left = answer(respond, logits, numbers)
    outcome = jnp.float32(digits.sum(axis=1) == numbers)
    rate = outcome.reshape(QUESTIONS, SAMPLES).mean(axis=1)
    useful = (rate > 0) & (rate < 1)
    chosen = jnp.argsort(~useful, stable=True)[:KEPT]
    rows = (chosen[:, None] * SAMPLES + jnp.arange(SAMPLES)).reshape(-1)
    digits, left, outcome = digits[rows], left[rows], outcome[rows]
    ids = jnp.repeat(jnp.arange(KEPT), SAMPLES)
    return {
        "digits": digits,
        "left": left,
        "outcome": outcome,
        "group": objectives.group_statistics(outcome, ids, num_groups=KEPT),
        "old_log_probs": log_probs_of(logits, digits, left),
        "mask": jnp.broadcast_to(useful[chosen].repeat(SAMPLES)[:, None], digits.shape),
    }


@functools.partial(jax.jit, static_argnames=("method", "num_steps"))
def train(keys: jax.Array, rates: jax.Array, method: str, num_steps: int) -> dict[str, jax.Array]:
    """Curves [rates, seeds, steps + 1] of error and entropy."""
    loss, adam = METHODS[method], optax.scale_by_adam()

    def run(key, rate):
        start = base_policy(jax.random.fold_in(key, 0))

        def minibatch(carry, batch):
            logits, state = carry

            def value(logits):
                log_probs = log_probs_of(logits, batch["digits"], batch["left"])
                arguments = (batch["old_log_probs"], batch["mask"], batch["outcome"])
                return loss(log_probs, *arguments, batch["group"])[0]

            updates, state = adam.update(jax.grad(value)(logits), state)
            return (logits - rate * updates, state), None

        def step(carry, number):
            collected = rollout(jax.random.fold_in(key, number), carry[0])
            parts = jax.tree.map(lambda x: x.reshape(MINIBATCHES, -1, *x.shape[1:]), collected)
            carry, _ = jax.lax.scan(minibatch, carry, parts)
            return carry, exact(carry[0])

        _, curve = jax.lax.scan(step, (start, adam.init(start)), jnp.arange(1, num_steps + 1))
        return jax.tree.map(lambda x, y: jnp.append(x, y), exact(start), curve)

    over_seeds = jax.vmap(run, in_axes=(0, None))
    return jax.vmap(over_seeds, in_axes=(None, 0))(keys, rates)


def summary(curves: Mapping[str, np.ndarray], rates: list[float]) -> dict[str, Any]:
    """Numbers of a method: at every rate, and at the best of them."""
    steps = curves["error"].shape[-1] - 1
    marks = sorted({max(1, steps // 8), max(1, steps // 4), max(1, steps // 2), steps})
    table = {}
    for i, rate in enumerate(rates):
        error, entropy = (curves[name][i] for name in ("error", "entropy"))
        row = {f"error@{mark}": float(error[:, mark].mean()) for mark in marks}
        row["standard_error"] = float(error[:, -1].std(ddof=1) / len(error) ** 0.5)
        row["entropy"] = float(entropy[:, -1].mean())
        row["final_errors"] = error[:, -1].tolist()
        for target in (0.9, 0.99, 0.995):
            reached = error.mean(axis=0) <= 1 - target
            row[f"steps_to_{target}"] = int(reached.argmax()) if reached.any() else None
        table[str(rate)] = row
    table["best_rate"] = min(rates, key=lambda rate: table[str(rate)][f"error@{steps}"])
    return table


def compare(table: Mapping[str, Any], rates: list[float]) -> dict[str, Any]:
    """Ratios of final errors to NFT's, with 95 % intervals from resampled pairs of seeds."""
    generator = np.random.default_rng(0)
    result = {}
    for name in table:
        for where in (*map(str, rates), "best"):
            pair = []
            for method in (name, "NFT"):
                rate = str(table[method]["best_rate"]) if where == "best" else where
                pair.append(np.asarray(table[method][rate]["final_errors"]))
            draws = generator.integers(len(pair[0]), size=(10_000, len(pair[0])))
            ratios = pair[0][draws].mean(axis=1) / pair[1][draws].mean(axis=1)
            low, high = np.quantile(ratios, [0.025, 0.975])
            result.setdefault(name, {})[where] = {
                "ratio": float(pair[0].mean() / pair[1].mean()),
                "low": float(low),
                "high": float(high),
            }
    return result


def variances() -> dict[str, Any]:
    """Exact variance of one answer's gradient at R = 1, RFT (omega = 1) / NFT (omega = 1 - r)."""
    rows = {}
    for name, right, bonus in (
        ("one of 50 right", 1, 0.0),
        ("15 of 50 right", 15, 0.0),
        ("15 of 50 right, preferred", 15, 1.6),
    ):
        probs = np.full(50, 1.0)
        probs[:right] *= np.exp(bonus)
        probs /= probs.sum()
        outcome = np.arange(50) < right
        rate = probs[outcome].sum()
        scores = np.eye(50) - probs  # gradient of log pi(a) in the logits, a row each
        weights = {
            "RFT": 1.0 * outcome,
            "NFT": np.where(outcome, 1 - rate, -rate),
        }
        second = {
            method: float(probs @ (weight**2 * (scores**2).sum(axis=1)))
            for method, weight in weights.items()
        }
        means = {method: (probs * weight) @ scores for method, weight in weights.items()}
        square = float((means["RFT"] ** 2).sum())
        rows[name] = {
            "rate": float(rate),
            "difference_of_means": float(np.abs(means["RFT"] - means["NFT"]).max()),
            "variance_ratio": (second["RFT"] - square) / (second["NFT"] - square),
        }
    return rows


def theorem(num_steps: int) -> dict[str, Any]:
    """Theorem 3.1 and the fixed points of epsilon, with exact expectations in float64."""
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        logits = jnp.asarray(generator.normal(size=50))
        hard = jnp.asarray(generator.permutation(50) < 15, jnp.float64)
        soft = jnp.asarray(generator.uniform(size=50))
        policy = jax.nn.softmax(logits)
        result: dict[str, Any] = {"hard": {}, "soft": {}}
        for name, right, wrong in (("right", 1.0, 0.0), ("wrong", 0.0, 1.0), ("both", 1.0, 1.0)):
            result["hard"][name] = _descend(logits, hard, right, wrong, 1e-6, 0.1, num_steps)
        for epsilon in EPSILONS:
            result["soft"][str(epsilon)] = _descend(
                logits, soft, 1.0, 1.0, epsilon, 0.02, num_steps
            )
        result["soft"]["wrong alone, 1.0"] = _descend(logits, soft, 0.0, 1.0, 1.0, 0.02, num_steps)
        rate = float(policy @ soft)
        plus = policy * soft / rate
        result["soft"]["accuracy"] = {"base": rate, "pi+": float(plus @ soft)}
        return result


@functools.partial(jax.jit, static_argnames="num_steps")
def _fixed_point(logits, outcome, right, wrong, epsilon, learning_rate, num_steps):
    policy = jax.nn.softmax(logits)
    rate = policy @ outcome
    adam = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def loss(theta):
        log_ratio = jax.nn.log_softmax(theta) - jnp.log(policy)
        negative = objectives.implicit_negative_ratio(log_ratio, rate)
        term = right * outcome * log_ratio + wrong * (1 - outcome) * jnp.log(
            objectives.straight_through_max(negative, epsilon)
        )
        return -policy @ term

    def step(carry, _):
        theta, state = carry
        updates, state = adam.update(jax.grad(loss)(theta), state)
        return (theta + updates, state), None

    (theta, _), _ = jax.lax.scan(step, (logits, adam.init(logits)), length=num_steps)
    return jax.nn.softmax(theta)


def _descend(logits, outcome, *arguments) -> dict[str, float]:
    found = _fixed_point(logits, outcome, *arguments)
    policy = jax.nn.softmax(logits)
    plus = policy * outcome / (policy @ outcome)
    return {
        "total_variation": float(jnp.abs(found - plus).sum() / 2),
        "accuracy": float(found @ outcome),
    }


def draw(curves: Mapping[str, Any], rates: list[float], fixed: Mapping[str, Any], path: Path):
    """Errors against rollouts, errors and entropies at the end, and where epsilon leads."""
    shown = ("NFT", "GRPO", "DAPO", "RFT", "RFT, omega = 1 - r", "naive +-")
    columns = -(-(len(rates) + 1) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(4 * columns, 6.8), squeeze=False)
    axes = axes.reshape(-1)
    for unused in axes[len(rates) : -1]:
        unused.axis("off")
    for i, rate in enumerate(rates):
        for method in (name for name in shown if name in curves):
            error = curves[method]["error"][i].mean(axis=0)
            axes[i].plot(error, label=method, lw=1.2)
        axes[i].set(title=f"learning rate {rate}", xlabel="rollouts", yscale="log")
    axes[0].set_ylabel("1 - accuracy, exact")
    axes[0].legend(fontsize=7)
    names, at = [str(epsilon) for epsilon in EPSILONS], range(len(EPSILONS))
    accuracy = [fixed["soft"][name]["accuracy"] for name in names]
    distance = [fixed["soft"][name]["total_variation"] for name in names]
    axes[-1].plot(at, accuracy, "o-", label="accuracy")
    axes[-1].plot(at, distance, "s-", label="total variation to pi+")
    axes[-1].set_xticks(at, names)
    axes[-1].axhline(
        fixed["soft"]["accuracy"]["pi+"], color="gray", lw=0.8, label="accuracy of pi+"
    )
    axes[-1].set(title="where epsilon leads (soft outcomes)", xlabel="epsilon", ylim=(0, 1))
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    quiet_libraries()
    methods = _METHODS.value or list(METHODS)
    if unknown := sorted(set(methods) - set(METHODS)) or "NFT" not in methods:
        raise app.UsageError(f"methods must be NFT and others of {list(METHODS)}, not {unknown}")
    start, rates = time.perf_counter(), [float(rate) for rate in _RATES.value]
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(
        jnp.arange(_SEEDS.value)
    )
    curves = {
        method: jax.device_get(train(keys, jnp.asarray(rates), method, _STEPS.value))
        for method in tqdm(methods)
    }
    table = {method: summary(curve, rates) for method, curve in curves.items()}
    fixed = theorem(_DESCENT.value)
    result = {
        "command": shown_command("studies.nft_tabular"),
        "device": jax.devices()[0].device_kind,
        "seconds": time.perf_counter() - start,
        "base_error": float(curves["NFT"]["error"][0, :, 0].mean()),
        "methods": table,
        "ratios_to_nft": compare(table, rates),
        "variance_of_gradients": variances(),
        "theorem": fixed,
    }
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "nft_tabular.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(curves, rates, fixed, out / "nft_tabular.png")
    last = f"error@{_STEPS.value}"
    for rate in rates:
        print(f"learning rate {rate}")
        for method, row in table.items():
            row = row[str(rate)]
            print(
                f"  {method:22s} error {row[last]:.5f} +- {row['standard_error']:.5f}   "
                f"entropy {row['entropy']:.2f}   {row['steps_to_0.99']} rollouts to 99 %"
            )
    print(json.dumps(fixed, indent=1))


if __name__ == "__main__":
    app.run(main)
