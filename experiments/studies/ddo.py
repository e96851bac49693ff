"""DDO against what else one could do with the same network, data and sampler, on digits.

    python -m experiments.studies.ddo [--seeds=3] [--rounds=4] [--out=experiments/results]

For every seed: a small network is trained by EDM's objective until more steps help little; then
DDO (arXiv 2503.01103), with alpha = 4 and three values of beta, is compared, at the same cost of
sampling, with

  continued MLE     the same objective for as many steps as all rounds together, of twice the batch
  SPIN              rounds with the pairwise loss and the same values of beta (arXiv 2401.01335)
  Neon              theta = ref + gain (ref - theta trained on its own samples) (arXiv 2510.03597)
  autoguidance      at twice the cost of sampling: extrapolated from an early checkpoint
                    (arXiv 2406.02507)

Each alternative is chosen, over its own grid and its checkpoints, on the seeds that DDO is chosen
on, and reported on fresh ones. The claim under test: Frechet distance falls by at least 15 % in at
most 4 rounds, each of less than 5 % of pretraining, and below continued MLE by more than three
standard deviations of the evaluation. Writes ddo.json, ddo.png, and ddo_curves.png: what the
rounds of the first seed logged.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import ml_collections
import numpy as np
from absl import app, flags

import experiments
from configs import digits_ddo, digits_edm
from experiments import images, self_play
from experiments.image_data import make_batches
from experiments.launch import quiet_libraries, shown_command
from genjax_lab import data, evaluation, training
from genjax_lab.objectives import extrapolate

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt

_SEEDS = flags.DEFINE_integer("seeds", 3, "Models to train.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 4, "Rounds of self-play.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "experiments/results", "Where table and figure go.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/study_ddo", "Where the models go.")
_STEPS = flags.DEFINE_integer("num_steps", 10_000, "Steps of pretraining.", lower_bound=100)
_ROUND_STEPS = flags.DEFINE_integer("round_steps", 300, "Steps of a round.", lower_bound=50)
_SAMPLES = flags.DEFINE_integer("num_samples", 8_000, "Samples behind each distance.")
_BLOCKS = flags.DEFINE_integer("num_blocks", 3, "Of the network.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 256, "Examples in a step.", lower_bound=1)
_RATES = flags.DEFINE_list("learning_rates", ["3e-4", "1e-3"], "Of continued training.")
_GAINS = flags.DEFINE_list("gains", ["0.25", "0.5", "1", "2"], "Of extrapolation.")
_SCALES = flags.DEFINE_list("guidance", ["1.25", "1.5", "2", "3"], "Of autoguidance.")


class Score(NamedTuple):
    """A chosen model: its distance where it was chosen, on fresh seeds, and how it was chosen."""

    selection: float
    fresh: float
    choice: str


class Model:
    """A pretrained network: its run, and distances of other weights under its sampler."""

    def __init__(self, seed: int, workdir: Path, settings: Mapping[str, int]):
        self.directory, self.settings = workdir / "base", settings
        self.config = _pretraining(seed, settings["num_steps"])
        self._experiment = images.build(self.config)
        training.train(self._experiment, workdir=self.directory, config=self.config)
        self.state = training.restore(self.directory).state
        self.variables = self.state.variables("ema")

    def distance(self, variables: Mapping[str, Any], first: int = 0) -> float:
        """Frechet distance of samples of the seeds from `first` on."""
        state = self.state.replace(ema={"ema": variables["params"]})
        seeds = range(first, first + self.settings["num_samples"])
        return self._experiment.evaluate(state, seeds=seeds)["frechet"]

    @property
    def first_fresh(self) -> int:
        """The first seed on which nothing is chosen."""
        return self.settings["num_samples"]

    def choose(self, candidates: Mapping[str, Any], distance: Callable[..., float]) -> Score:
        """The best of some candidates, which are whatever `distance` takes."""
        values = {name: distance(candidate) for name, candidate in candidates.items()}
        best = min(values, key=values.get)
        return Score(values[best], distance(candidates[best], self.first_fresh), best)

    def memorization(self, variables: Mapping[str, Any]) -> dict[str, float]:
        """How much nearer samples are to the training images than to held-out ones, in pixels."""
        state = self.state.replace(ema={"ema": variables["params"]})
        count = min(self.settings["num_samples"], 1500)
        drawn = self._experiment.sample(state, range(self.first_fresh, self.first_fresh + count))
        info = data.dataset_info("digits")
        vectors = [data.dequantize(np.concatenate([part for _, part in drawn]), info)]
        for split in ("train", "test"):
            loader = make_batches(
                self.config, split, 512, num_epochs=1, shuffle=False, drop_remainder=False
            )
            vectors.append(np.concatenate([batch["image"] for batch in loader]))
        report = evaluation.memorization_report(*(v.reshape(len(v), -1) for v in vectors))
        return {
            name: round(getattr(report, name), 4)
            for name in ("distance_ratio", "copying_z", "copied_fraction")
        }


def _pretraining(seed: int, num_steps: int) -> ml_collections.ConfigDict:
    config = digits_edm.get_config()
    config.seed = seed
    config.network = {"name": "ResidualMLP", "width": 64, "dropout": 0.0}
    config.network.num_blocks = _BLOCKS.value
    config.optimizer.update({"warmup_steps": 0, "decay_steps": num_steps})
    config.batch_size, config.num_steps = _BATCH.value, num_steps
    config.checkpoint_every = config.keep_every = max(num_steps // 4 // 50 * 50, 50)
    config.keep_checkpoints = 1
    config.ema = {"ema": {"half_life_images": 88_600.0, "rampup_ratio": 0.05}}  # 0.998 a step
    config.evaluation.batch_size = 2_000
    config.evaluation.num_samples = min(config.evaluation.num_samples, _SAMPLES.value)
    config.progress = config.tensorboard = False
    return config


def play(model: Model, workdir: Path, rounds: int, **changes: Any) -> list[Score]:
    """Rounds of self-play; the score of the model after each."""
    config = digits_ddo.get_config()
    config.base = str(model.directory)
    config.rounds = rounds
    config.num_fakes = min(config.num_fakes, model.settings["num_samples"])
    config.batch_size, config.num_steps = _BATCH.value, model.settings["round_steps"]
    config.log_every = min(config.log_every, config.num_steps)
    config.selection_seeds = config.fresh_seeds = model.settings["num_samples"]
    config.progress = config.tensorboard = False
    config.seed = model.config.seed
    config.update(changes)
    experiments.run(config, workdir)
    scores = []
    for index in range(1, rounds + 1):
        result = json.loads((workdir / f"round_{index}/result.json").read_text())
        choice = f"alpha {result['alpha']}, beta {result['beta']}, step {result['step']}"
        scores.append(Score(result["selection"], result["fresh"], choice))
    return scores


def continued(model: Model, workdir: Path, rounds: int, **changes: Any) -> dict[str, Any]:
    """EDM's objective from the pretrained weights on, with twice the batch; averages by name."""
    steps = rounds * model.settings["round_steps"]
    candidates = {}
    for rate in map(float, _RATES.value):
        config = _pretraining(model.config.seed, steps)
        config.batch_size *= 2
        config.optimizer.update({"learning_rate": rate, "schedule": "constant", "warmup_steps": 60})
        config.checkpoint_every = config.keep_every = max(steps // 4 // 50 * 50, 50)
        config.ema = {"ema": {"half_life_images": 17_600.0, "rampup_ratio": None}}
        config.update(changes)
        experiment = images.build(config)._replace(init=lambda key: model.variables)
        directory = workdir / f"rate{rate}"
        training.train(experiment, workdir=directory, config=config)
        for path in sorted((directory / "checkpoints").iterdir(), key=lambda path: int(path.name)):
            variables = training.restore(directory, int(path.name)).state.variables("ema")
            candidates[f"rate {rate}, step {path.name}"] = variables
    return candidates


def self_trained(model: Model, workdir: Path) -> dict[str, Any]:
    """The pretrained weights after a round's steps of EDM's objective on their own samples."""
    config = _pretraining(model.config.seed, model.settings["round_steps"])
    config.optimizer.update({"learning_rate": 3e-4, "schedule": "constant", "warmup_steps": 60})
    config.ema = {"ema": {"half_life_images": 8_800.0, "rampup_ratio": None}}
    rounds = digits_ddo.get_config()
    rounds.base = str(model.directory)
    rounds.num_fakes = min(rounds.num_fakes, model.settings["num_samples"])
    parts, _ = self_play.build(rounds)
    first = 2**30
    pool = data.draw_pool(
        workdir / "pool",
        lambda seeds: parts.draw(model.variables, seeds),
        seeds=range(first, first + rounds.num_fakes),
        provenance=parts.provenance,
        label=parts.label,
    )
    experiment = images.build(config)._replace(
        init=lambda key: model.variables,
        batches=lambda state: data.make_loader_from_arrays(
            pool, config.batch_size, config.seed, num_classes=10, max_value=16
        ),
    )
    training.train(experiment, workdir=workdir / "run", config=config)
    return training.restore(workdir / "run").state.variables("ema")


def autoguidance(model: Model) -> Score:
    """The best of guides (early checkpoints) and scales, at twice the cost of sampling."""
    steps = sorted(int(path.name) for path in (model.directory / "checkpoints").iterdir())[:-1]
    candidates = {
        f"guide at step {step}, scale {scale}": (step, scale)
        for step in steps
        for scale in map(float, _SCALES.value)
    }

    def distance(candidate: tuple[int, float], first: int = 0) -> float:
        config = model.config.copy_and_resolve_references()
        guide, config.guidance.scale = candidate
        config.guidance.update({"guide": str(model.directory), "guide_step": guide})
        seeds = range(first, first + model.settings["num_samples"])
        return images.build(config).evaluate(model.state, seeds=seeds)["frechet"]

    return model.choose(candidates, distance)


def run_seed(seed: int, workdir: Path, rounds: int, settings: Mapping[str, int]) -> dict[str, Any]:
    """All arms for one seed."""
    model = Model(seed, workdir, settings)
    base = Score(
        model.distance(model.variables),
        model.distance(model.variables, model.first_fresh),
        "pretrained",
    )
    # The spread of the evaluation itself: the same model on other seeds.
    repeats = [model.distance(model.variables, (2 + i) * settings["num_samples"]) for i in range(4)]
    betas = (0.1, 0.5, 2.0)
    ddo = play(model, workdir / "ddo", rounds, alpha=(4.0,), beta=betas)
    spin = play(model, workdir / "spin", rounds, loss="spin", alpha=(1.0,), beta=betas)
    mle = model.choose(continued(model, workdir / "mle", rounds), model.distance)
    on_own = self_trained(model, workdir / "self_trained")
    extrapolated = {
        f"gain {gain}": {
            **model.variables,
            "params": extrapolate(model.variables["params"], on_own["params"], gain),
        }
        for gain in map(float, _GAINS.value)
    }
    final = training.restore(workdir / "ddo").state.variables("ema")
    return {
        "seed": seed,
        "evaluation_std": statistics.stdev(repeats),
        "base": base._asdict(),
        "ddo": [score._asdict() for score in ddo],
        "spin": [score._asdict() for score in spin],
        "continued_mle": mle._asdict(),
        "neon": model.choose(extrapolated, model.distance)._asdict(),
        "autoguidance": autoguidance(model)._asdict(),
        "memorization": {
            "base": model.memorization(model.variables),
            "ddo": model.memorization(final),
        },
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of distances on fresh seeds, and whether the claim shows."""

    def fresh(row: Mapping[str, Any], arm: str) -> float:
        entry = row[arm]
        return entry[-1]["fresh"] if isinstance(entry, list) else entry["fresh"]

    arms = ("base", "continued_mle", "spin", "neon", "autoguidance", "ddo")
    values = {arm: [fresh(row, arm) for row in rows] for arm in arms}
    noise = statistics.fmean(row["evaluation_std"] for row in rows)
    mean = {arm: statistics.fmean(values[arm]) for arm in arms}
    return {
        "mean": mean,
        "std": {arm: statistics.stdev(values[arm]) if len(rows) > 1 else 0.0 for arm in arms},
        "evaluation_std": noise,
        "ddo_below_base": 1 - mean["ddo"] / mean["base"],
        "ddo_below_continued_mle_in_evaluation_std": (mean["continued_mle"] - mean["ddo"]) / noise,
        "claim_shows": len(rows) >= 3
        and mean["ddo"] <= 0.85 * mean["base"]
        and mean["continued_mle"] - mean["ddo"] > 3 * noise,
    }


def draw(rows: list[dict[str, Any]], summary: Mapping[str, Any], path: Path) -> None:
    """Distance after each round for DDO and SPIN, and the alternatives as levels."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for arm, label, color in (("ddo", "DDO", "C0"), ("spin", "SPIN", "C1")):
        lines = [[row["base"]["fresh"], *(score["fresh"] for score in row[arm])] for row in rows]
        for line in lines:
            axis.plot(range(len(line)), line, color=color, alpha=0.3, linewidth=1)
        axis.plot(range(len(lines[0])), np.mean(lines, 0), color=color, marker="o", label=label)
    levels = {
        "continued_mle": "continued MLE, same steps",
        "neon": "Neon extrapolation",
        "autoguidance": "autoguidance, twice the cost",
    }
    for index, (arm, label) in enumerate(levels.items()):
        axis.axhline(summary["mean"][arm], color=f"C{index + 2}", linestyle="--", label=label)
    axis.set(
        xlabel="round",
        ylabel="Fréchet distance (classifier features, fresh seeds)",
        title=f"Digits: mean of {len(rows)} seeds",
        ylim=(0, None),
    )
    axis.set_xticks(range(len(rows[0]["ddo"]) + 1))
    axis.grid(alpha=0.3)
    axis.legend(framealpha=1)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curves(workdir: Path, rounds: int, path: Path) -> None:
    """What the chosen members of a seed's rounds logged while they trained, round after round."""
    panels = {
        "mean log-ratio": {"delta_real_mean": "data", "delta_fake_mean": "samples"},
        "accuracy of the discriminator": {"accuracy": None},
        "squared error on the data": {"mle_loss": None},
    }
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(12.8, 3.0), layout="constrained")
    start = 0
    for index in range(1, rounds + 1):
        grid = workdir / f"round_{index}" / "grid"
        result = json.loads((grid.parent / "result.json").read_text())
        members = json.loads((grid / "config.json").read_text())["members"]
        member = members.index([result["alpha"], result["beta"]])
        rows = training.read_metrics(grid)
        logged = [row for row in rows if "loss" in row]
        for axis, names in zip(axes, panels.values(), strict=False):
            for number, (name, label) in enumerate(names.items()):
                axis.plot(
                    [start + row["step"] for row in logged],
                    [row[f"{name}/{member}"] for row in logged],
                    color=f"C{number}",
                    label=label if index == 1 else None,
                )
        scored = [row for row in rows if "eval/frechet" in row]
        axes[-1].plot(
            [start + row["step"] for row in scored],
            [row[f"eval/frechet/{member}"] for row in scored],
            color="C0",
            marker=".",
        )
        axes[-1].plot(start + result["step"], result["selection"], color="C1", marker="o")
        start += logged[-1]["step"]
    for axis, title in zip(axes, [*panels, "Fréchet distance (selection)"], strict=True):
        axis.set(title=title, xlabel="step, all rounds")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    axes[-1].set_ylim(0, None)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str]) -> None:
    quiet_libraries()
    started = time.monotonic()
    whole = not Path(_WORKDIR.value).exists()  # otherwise some of the work was done before
    settings = {
        "num_steps": _STEPS.value,
        "round_steps": _ROUND_STEPS.value,
        "num_samples": _SAMPLES.value,
    }
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    command = shown_command("studies.ddo")
    rows: list[dict[str, Any]] = []
    for seed in range(_SEEDS.value):
        rows.append(run_seed(seed, Path(_WORKDIR.value) / f"seed{seed}", _ROUNDS.value, settings))
        summary = summarise(rows)
        print(json.dumps(rows[-1]), flush=True)
        minutes = round((time.monotonic() - started) / 60, 1) if whole else None
        result = {
            "command": command,
            **settings,
            "minutes": minutes,
            "summary": summary,
            "rows": rows,
        }
        (out / "ddo.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(rows, summary, out / "ddo.png")
    draw_curves(Path(_WORKDIR.value) / "seed0" / "ddo", _ROUNDS.value, out / "ddo_curves.png")
    print(json.dumps(summary, indent=1))
    print(f"written to {out}/ddo.json, .png and ddo_curves.png")


if __name__ == "__main__":
    app.run(main)
