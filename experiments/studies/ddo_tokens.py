"""DDO on a token model whose likelihood is exact: what moves it, and what does not, on digits.

    python -m experiments.studies.ddo_tokens [--seeds=3] [--rounds=2] [--out=experiments/results]

A next-scale model is at, or near, the optimum of its likelihood, and its samples are exactly its
own: then the gradient of DDO (arXiv 2503.01103) starts as that of the likelihood, whatever alpha
is. What may give the samples a direction is tried one by one and together:

  exact       the tokens that the reference draws
  roundtrip   decoded to pixels and encoded again, as the data are; the paper's way
  hot         drawn at temperature 1.2, which the paper does not do
  hot roundtrip

For every seed a small model is trained until more steps help little; each variant plays its rounds
over the same grid of alpha and learning rates. The alternatives: as many more steps of maximum
likelihood with twice the batch, over learning rates; and classifier-free guidance, for every arm,
at twice the cost. All are chosen on the same seeds and reported on fresh ones. Beside them stands
the ratio ||E_fake s|| / ||E_data s|| of the scores s = grad log p at the start of the first round;
exact samples leave only the noise of sampling of it. Writes ddo_tokens.json and ddo_tokens.png.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags

import experiments
from configs import digits_tokenizer, digits_var, digits_var_ddo
from experiments import next_scale
from experiments.image_data import make_batches
from experiments.launch import quiet_libraries, shown_command
from genjax_lab import data, objectives, training

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt

_SEEDS = flags.DEFINE_integer("seeds", 3, "Models to train.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Rounds of self-play.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "experiments/results", "Where table and figure go.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/study_ddo_tokens", "Where the models go.")
_STEPS = flags.DEFINE_integer("num_steps", 2_000, "Steps of pretraining.", lower_bound=50)
_ROUND_STEPS = flags.DEFINE_integer("round_steps", 100, "Steps of a round.", lower_bound=2)
_DEPTH = flags.DEFINE_integer("depth", 2, "Blocks of the model.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("num_samples", 4_000, "Samples behind each distance.")
_BATCH = flags.DEFINE_integer("batch_size", 256, "Examples in a step.", lower_bound=1)
_VARIANTS = flags.DEFINE_list("variants", None, "Kinds of samples; default all.")
_RATES = flags.DEFINE_list("learning_rates", ["3e-4", "1e-3"], "Learning rates to choose from.")
_GUIDANCE = flags.DEFINE_list("guidance", ["0.25", "0.5", "1"], "Scales of guidance beside none.")

VARIANTS = {
    "exact": {"fake_roundtrip": False},
    "roundtrip": {"fake_roundtrip": True},
    "hot": {"fake_roundtrip": False, "fake_temperature": 1.2},
    "hot roundtrip": {"fake_roundtrip": True, "fake_temperature": 1.2},
}
ALPHAS = (1.0, 4.0)


class Model:
    """A pretrained model: its run, and distances of other weights under its sampler."""

    def __init__(self, seed: int, workdir: Path, tokenizer: Path, settings: Mapping[str, int]):
        self.directory, self.settings = workdir / "base", settings
        self.config = _pretraining(seed, settings["num_steps"])
        self.config.tokenizer.run = str(tokenizer)
        training.train(experiments.build(self.config), workdir=self.directory, config=self.config)
        self.state = training.restore(self.directory).state
        self.variables = self.state.variables("ema")
        self._guided: dict[float, Any] = {}

    def distance(self, variables: Mapping[str, Any], first: int = 0, cfg: float = 0.0) -> float:
        """Frechet distance of samples of the seeds from `first` on."""
        if cfg not in self._guided:
            config = self.config.copy_and_resolve_references()
            config.sampler.cfg = cfg
            self._guided[cfg] = experiments.build(config)
        state = self.state.replace(ema={"ema": variables["params"]})
        seeds = range(first, first + self.settings["num_samples"])
        return self._guided[cfg].evaluate(state, seeds=seeds)["frechet"]

    def judged(self, variables: Mapping[str, Any], choice: str = "") -> dict[str, Any]:
        """Distances without guidance and with the best of some, on fresh seeds."""
        first, scales = self.settings["num_samples"], map(float, _GUIDANCE.value)
        by_scale = {cfg: self.distance(variables, cfg=cfg) for cfg in (0.0, *scales)}
        best = min(by_scale, key=by_scale.get)
        return {
            "choice": choice,
            "fresh": self.distance(variables, first),
            "guided": self.distance(variables, first, best),
            "cfg": best,
        }


def _pretraining(seed: int, num_steps: int) -> Any:
    config = digits_var.get_config()
    config.seed = seed
    config.network = {"name": "VAR", "width": 32, "depth": _DEPTH.value, "num_heads": 2}
    config.batch_size = _BATCH.value
    config.num_steps = config.optimizer.decay_steps = num_steps
    config.optimizer.warmup_steps = min(100, num_steps // 4)
    config.steps_per_call = 25
    config.log_every = config.checkpoint_every = max(num_steps // 4 // 25 * 25, 25)
    config.evaluation.batch_size = 2_000
    config.evaluation.num_samples = min(config.evaluation.num_samples, _SAMPLES.value)
    config.progress = config.tensorboard = False
    return config


def play(model: Model, workdir: Path, rounds: int, **changes: Any) -> dict[str, Any]:
    """Rounds over the grid of alphas, for each learning rate; the better of them."""
    runs = []
    for rate in map(float, _RATES.value):
        config = digits_var_ddo.get_config()
        config.base, config.rounds = str(model.directory), rounds
        config.num_fakes = min(config.num_fakes, model.settings["num_samples"])
        config.batch_size, config.num_steps = _BATCH.value, model.settings["round_steps"]
        config.steps_per_call = max(config.num_steps // 4, 1)
        config.eval_every = config.checkpoint_every = config.log_every = config.steps_per_call
        config.alpha, config.optimizer.learning_rate = ALPHAS, rate
        config.optimizer.warmup_steps = config.num_steps // 5
        config.selection_seeds = config.fresh_seeds = model.settings["num_samples"]
        config.seed = model.config.seed
        config.progress = config.tensorboard = False
        config.update(changes)
        directory = workdir / f"rate{rate}"
        experiments.run(config, directory)
        results = [
            json.loads((directory / f"round_{i}/result.json").read_text())
            for i in range(1, rounds + 1)
        ]
        runs.append((results[-1]["selection"], rate, directory, results))
    _, rate, directory, results = min(runs, key=lambda run: run[0])
    choice = [f"alpha {r['alpha']}, step {r['step']}" for r in results]
    variables = training.restore(directory).state.variables("ema")
    rounds_fresh = [result["fresh"] for result in results]
    judged = model.judged(variables, f"rate {rate}: " + "; ".join(choice))
    return judged | {"rounds": rounds_fresh, "nll": held_out_nll(model, variables)}


def continued(model: Model, workdir: Path, rounds: int) -> dict[str, Any]:
    """As many steps of maximum likelihood with twice the batch; the best rate and checkpoint."""
    steps = rounds * model.settings["round_steps"]
    candidates = {}
    for rate in map(float, _RATES.value):
        config = _pretraining(model.config.seed, steps)
        config.tokenizer.run = model.config.tokenizer.run
        config.batch_size *= 2
        config.optimizer.update({"learning_rate": rate, "schedule": "constant"})
        config.optimizer.warmup_steps = steps // 10
        config.steps_per_call = max(steps // 4 // rounds, 1)
        config.log_every = config.checkpoint_every = config.keep_every = config.steps_per_call
        config.ema = digits_var_ddo.get_config().ema
        experiment = experiments.build(config)._replace(init=lambda key: model.variables)
        directory = workdir / f"rate{rate}"
        training.train(experiment, workdir=directory, config=config)
        for path in sorted((directory / "checkpoints").iterdir(), key=lambda path: int(path.name)):
            variables = training.restore(directory, int(path.name)).state.variables("ema")
            candidates[f"rate {rate}, step {path.name}"] = variables
    distances = {name: model.distance(variables) for name, variables in candidates.items()}
    best = min(distances, key=distances.get)
    return model.judged(candidates[best], best) | {"nll": held_out_nll(model, candidates[best])}


@functools.lru_cache(maxsize=1)
def _log_likelihood(model: Model) -> tuple[Callable[..., Any], ...]:
    """(params, tokens, labels) -> mean log-likelihood, its gradient; and images -> tokens."""
    codec = next_scale.Codec(next_scale.tokenizer_of(model.config))
    network = next_scale.make_network(model.config, codec)
    of_inputs = objectives.autoregressive_log_likelihood(next_scale.apply_to_inputs(network))
    tokenizer = model.variables["tokenizer"]

    def mean(params, tokens, labels):
        condition = (labels, codec.inputs(tokenizer, tokens))
        return jnp.mean(of_inputs({"params": params}, tokens, condition))

    encode = jax.jit(codec.encode)
    return jax.jit(mean), jax.jit(jax.grad(mean)), functools.partial(encode, tokenizer)


def _images(model: Model, split: str) -> tuple[np.ndarray, np.ndarray]:
    loader = make_batches(
        model.config, split, 512, num_epochs=1, shuffle=False, drop_remainder=False
    )
    batches = list(loader)
    return tuple(np.concatenate([b[name] for b in batches]) for name in ("image", "label"))


def held_out_nll(model: Model, variables: Mapping[str, Any]) -> float:
    """Negative log-likelihood of the test split, in nats for an image."""
    mean, _, encode = _log_likelihood(model)
    images, labels = _images(model, "test")
    return -float(mean(variables["params"], encode(images), labels))


def start_ratio(model: Model, directory: Path, roundtrip: bool) -> float:
    """||E_fake s|| / ||E_data s|| at the start of the first round, of its own pool."""
    _, gradient, encode = _log_likelihood(model)
    images, labels = _images(model, "train")
    real = gradient(model.variables["params"], encode(images), labels)
    pool = data.read_pool(directory)
    info = data.dataset_info("digits")
    tokens = encode(data.dequantize(pool["image"], info)) if roundtrip else pool["tokens"]
    fake = gradient(model.variables["params"], tokens, pool["label"])
    return float(objectives.start_of_round_ratio(fake, real))


def run_seed(
    seed: int, workdir: Path, tokenizer: Path, rounds: int, settings: Mapping[str, int]
) -> dict[str, Any]:
    """All arms for one seed."""
    model = Model(seed, workdir, tokenizer, settings)
    base = model.judged(model.variables) | {"nll": held_out_nll(model, model.variables)}
    repeats = [model.distance(model.variables, (2 + i) * settings["num_samples"]) for i in range(4)]
    row = {
        "seed": seed,
        "evaluation_std": statistics.stdev(repeats),
        "base": base,
        "continued_mle": continued(model, workdir / "mle", rounds),
    }
    for name in _VARIANTS.value or VARIANTS:
        changes, folder = VARIANTS[name], workdir / name.replace(" ", "_")
        row[name] = play(model, folder, rounds, **changes)
        pool = folder / f"rate{float(_RATES.value[0])}" / "round_1/pool"
        row[name]["start_ratio"] = start_ratio(model, pool, changes["fake_roundtrip"])
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over seeds, and how far each arm is below continued MLE."""
    arms = [name for name, value in rows[0].items() if isinstance(value, dict)]
    table = {}
    for arm in arms:
        table[arm] = {}
        for name in ("fresh", "guided", "nll", "start_ratio"):
            if name in rows[0][arm]:
                values = [row[arm][name] for row in rows]
                table[arm][name] = statistics.fmean(values)
                table[arm][f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    noise = statistics.fmean(row["evaluation_std"] for row in rows)
    below = {arm: (table["continued_mle"]["fresh"] - table[arm]["fresh"]) / noise for arm in arms}
    return {"table": table, "evaluation_std": noise, "below_continued_mle_in_evaluation_std": below}


def draw(summary: Mapping[str, Any], num_seeds: int, path: Path) -> None:
    """Distances of every arm without and with guidance."""
    table = summary["table"]
    figure, axis = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    places = np.arange(len(table))
    for shift, name, label in (
        (-0.2, "fresh", "without guidance"),
        (0.2, "guided", "best guidance"),
    ):
        axis.bar(
            places + shift,
            [row[name] for row in table.values()],
            0.38,
            yerr=[row[f"{name}_std"] for row in table.values()],
            capsize=3,
            label=label,
        )
    labels = {"base": "base", "continued_mle": "continued\nMLE"}
    names = [labels.get(arm, "DDO,\n" + arm.replace(" ", "\n")) for arm in table]
    axis.set_xticks(places, names)
    axis.set(
        ylabel="Fréchet distance (fresh seeds)",
        title=f"Next-scale model of digits: mean and deviation over {num_seeds} seeds",
    )
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])
    axis.legend(frameon=False, ncols=2, loc="upper right")
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str]) -> None:
    quiet_libraries()
    started = time.monotonic()
    settings = {
        "num_steps": _STEPS.value,
        "round_steps": _ROUND_STEPS.value,
        "num_samples": _SAMPLES.value,
    }
    out, workdir = Path(_OUT.value), Path(_WORKDIR.value)
    whole = not workdir.exists()  # otherwise some of the work was done before
    out.mkdir(parents=True, exist_ok=True)
    config = digits_tokenizer.get_config()
    config.batch_size = _BATCH.value
    config.num_steps = config.optimizer.decay_steps = _STEPS.value
    config.steps_per_call = 25
    config.checkpoint_every = config.log_every = max(_STEPS.value // 4 // 25 * 25, 25)
    config.progress = config.tensorboard = False
    training.train(experiments.build(config), workdir=workdir / "tokenizer", config=config)
    rows: list[dict[str, Any]] = []
    for seed in range(_SEEDS.value):
        folder = workdir / f"seed{seed}"
        rows.append(run_seed(seed, folder, workdir / "tokenizer", _ROUNDS.value, settings))
        summary = summarise(rows)
        print(json.dumps(rows[-1]), flush=True)
        result = {
            "command": shown_command("studies.ddo_tokens"),
            **settings,
            "minutes": round((time.monotonic() - started) / 60, 1) if whole else None,
            "summary": summary,
            "rows": rows,
        }
        (out / "ddo_tokens.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(summary, len(rows), out / "ddo_tokens.png")
    print(json.dumps(summary, indent=1))
    print(f"written to {out}/ddo_tokens.json and .png")


if __name__ == "__main__":
    app.run(main)
