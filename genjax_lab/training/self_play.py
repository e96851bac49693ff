"""Rounds of self-play: draw samples of a reference, learn to tell data from them, choose, repeat.

A round (DDO, arXiv 2503.01103, section 3.4) draws a pool from the reference, starts every member of
a grid of (alpha, beta) at the reference's weights with a fresh optimiser, trains all of them
together on the same batches (parameters have a leading axis of members), scores every average at
every checkpoint, and makes the best one the next reference. The metric falls and then rises within
a round, so the last checkpoint is not the one to take; and because the best of many is chosen on
some seeds, it is reported on others.

The directory of a run holds

    checkpoints/r     the model after round r, r = 0 being the pretrained one: what `evaluate.py`
                      and `sample.py` read
    round_r/pool      the samples of the reference, with their provenance, unless they are drawn
                      within the training steps
    round_r/grid      the training run of the grid, as `train` leaves it
    round_r/result.json  the score of every member at every checkpoint, and what was chosen

Killed at any instant and started again with the same arguments, it goes on to the same result.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from tqdm import tqdm

from genjax_lab.data.sample_pool import draw_pool
from genjax_lab.training.checkpoint import Checkpoints, checkpoint_steps
from genjax_lab.training.checksum import tree_digest
from genjax_lab.training.config import config_differences, default_config, resolve_config
from genjax_lab.training.experiment import BatchIterator, Experiment
from genjax_lab.training.loop import train
from genjax_lab.training.metric_log import read_metrics
from genjax_lab.training.restoration import restore
from genjax_lab.training.state import TrainState
from genjax_lab.training.step import Objective, Variables

_AVERAGE = "ema"
# Samples of the pools have seeds of their own, apart from those of selection and of reporting.
_FIRST_POOL_SEED = 2**31
_FREE = ("rounds", "progress", "tensorboard", "log_every", "mesh.*")


class SelfPlay(NamedTuple):
    """What the rounds know of a model and its data.

    Attributes:
        variables: the pretrained linen variables, of the average that is sampled from.
        draw: `(variables, seeds) -> iterable of (seeds, samples)`, samples as the data are stored;
            see `draw_pool`. None where the objective draws samples of the reference itself: then
            there is no pool.
        label: seeds -> the classes that `draw` draws them for; None for an unconditional model.
        provenance: what beside the weights and seeds decides the samples, as JSON values.
        objective: `(alpha, beta, round) -> objective` of the grid's members, one entry of `alpha`
            and `beta` for each: parameters have a leading axis of members, the collection
            "reference" holds the reference's variables, batches have "fake_" entries.
        optimizer: made anew for every round.
        batches: `(pool, seed, reference, round) -> iterator` over the real data and the pool side
            by side; over the real data alone where `pool` is None. `reference` are the round's
            frozen variables, of which batches may hold what was computed beforehand.
        score: `(variables, seeds) -> {metric: value}` of samples drawn for these seeds; infinite
            for a model that has diverged.
        project: see `make_train_step`, for one member.
    """

    variables: Variables
    draw: Callable[[Variables, range], Iterable[tuple[np.ndarray, Any]]] | None
    label: Callable[[range], np.ndarray] | None
    provenance: Mapping[str, Any]
    objective: Callable[[Sequence[float], Sequence[float], int], Objective]
    optimizer: Callable[[], optax.GradientTransformation]
    batches: Callable[[Mapping[str, np.ndarray] | None, int, Variables, int], BatchIterator]
    score: Callable[[Variables, range], Mapping[str, float]]
    project: Callable[[PyTree], PyTree] | None = None


class RoundResult(NamedTuple):
    """What a round chose.

    Attributes:
        variables: the chosen average: the next reference.
        alpha, beta: its member's.
        step: the optimiser step in the round at which it stood.
        selection: its metric on the seeds of selection; optimistic, as the best of many.
        fresh: its metric on the seeds of reporting, by which nothing in the round is chosen.
        table: a row {"step", "alpha", "beta", <metric>} for every member and checkpoint.
    """

    variables: Variables
    alpha: float
    beta: float
    step: int
    selection: float
    fresh: float
    table: list[dict[str, float]]


def default_self_play_config() -> ml_collections.ConfigDict:
    """The fields that the rounds read; those of `default_config` are of a round's training.

    rounds: how many.
    alpha, beta: the grid is their product. No beta: it is calibrated once, by a probe.
    probe_steps: optimiser steps of the probe.
    probe_beta: beta in the probe.
    num_fakes: samples in a round's pool.
    metric: name of the score to be minimised.
    selection_seeds, fresh_seeds: numbers of samples for choosing and for reporting.
    """
    config = default_config()
    config.update(
        {
            "rounds": 1,
            "alpha": (1.0, 4.0),
            "beta": (),
            "probe_steps": 100,
            "probe_beta": 1.0,
            "num_fakes": 50_000,
            "metric": "frechet",
            "selection_seeds": 5_000,
            "fresh_seeds": 5_000,
            "num_steps": 300,
            "eval_every": 50,
            "checkpoint_every": 50,
            "keep_checkpoints": 1,
        }
    )
    config.ema = {_AVERAGE: {"half_life_images": 10_000.0, "rampup_ratio": None}}
    return config


def run_self_play(
    self_play: SelfPlay,
    *,
    workdir: str | os.PathLike,
    config: Mapping[str, Any] | ml_collections.ConfigDict,
    model_config: Mapping[str, Any],
) -> Variables:
    """Runs rounds to the end, or on from where their directory stands.

    Args:
        self_play: the model and its data.
        workdir: the directory of the run; made if missing.
        config: all fields of `default_self_play_config()`, and any others.
        model_config: the config that builds the model's experiment; stored with every round.

    Returns:
        The variables after the last round.

    Raises:
        ValueError: bad settings; other settings than those of the run in `workdir`; a pool or a
            checkpoint that is damaged or foreign.
    """
    config = _resolve(config)
    workdir = Path(workdir).absolute()
    for index in range(1, config["rounds"] + 1):  # what is wrong shall be known before the work
        pairs = itertools.product(config["alpha"], config["beta"] or [config["probe_beta"]])
        self_play.objective(*zip(*pairs, strict=True), index)
    stored_config = {
        **model_config,
        **{"checkpoint_every": 1, "keep_every": 1, "steps_per_call": 1, "eval_every": 1},
        "best_metric": config["metric"],
        "self_play": config,
    }
    average = model_config["evaluation"]["ema"]
    with Checkpoints(workdir / "checkpoints", resolve_config(stored_config)) as store:

        def save(index: int, variables: Variables, value: float, log: Mapping[str, Any]) -> None:
            state = _as_state(variables, average, index)
            store.save(index, state, iterator_state={}, metrics={config["metric"]: value}, log=log)
            store.wait()

        if not (done := checkpoint_steps(workdir / "checkpoints")):
            value = _fresh_score(self_play, self_play.variables, config)
            save(0, self_play.variables, value, {"beta": list(config["beta"])})
            done = [0]
        stored = restore(workdir / "checkpoints", done[-1])
        _require_same_run(stored.config["self_play"], config, workdir)
        if tree_digest(restore(workdir / "checkpoints", 0).state.params) != tree_digest(
            self_play.variables["params"]
        ):
            raise ValueError(
                f"workdir={str(workdir)!r} holds rounds from other pretrained weights than these"
            )
        variables, log = stored.state.variables(), stored.log
        before = stored.metrics[config["metric"]]
        for index in range(done[-1] + 1, config["rounds"] + 1):
            directory = workdir / f"round_{index}"
            if not log["beta"]:
                log = {"beta": [_calibrated_beta(self_play, variables, directory, config, index)]}
            grid = {**config, "beta": log["beta"]}
            result = run_round(self_play, variables, directory=directory, config=grid, index=index)
            save(index, result.variables, result.fresh, log)
            _say(
                f"round {index}: {config['metric']} {before:.4g} -> {result.fresh:.4g} (fresh "
                f"seeds; alpha {result.alpha:.4g}, beta {result.beta:.4g}, step {result.step})"
            )
            variables, before = result.variables, result.fresh
    return variables


def run_round(
    self_play: SelfPlay,
    reference: Variables,
    *,
    directory: str | os.PathLike,
    config: Mapping[str, Any] | ml_collections.ConfigDict,
    index: int = 1,
) -> RoundResult:
    """One round: pool, grid, choice.

    Args:
        self_play: the model and its data; its own `variables` are not used.
        reference: the variables to start from and to learn against.
        directory: the directory of the round.
        config: as for `run_self_play`, with at least one beta.
        index: number of the round, from 1, which decides its seeds.

    Raises:
        ValueError: as `run_self_play`.
    """
    config, directory = _resolve(config), Path(directory).absolute()
    if not config["beta"]:
        raise ValueError("config.beta is empty; a round needs one (run_self_play calibrates it)")
    members = list(itertools.product(config["alpha"], config["beta"]))
    metric = config["metric"]

    def evaluate(state: TrainState) -> dict[str, float]:
        values = [
            _score(self_play, _member(state, number), range(config["selection_seeds"]), metric)
            for number in range(len(members))
        ]
        best = min(math.inf if math.isnan(value) else value for value in values)
        return {metric: best} | {f"{metric}/{n}": value for n, value in enumerate(values)}

    _train_members(self_play, reference, directory, "grid", config, index, members, evaluate)
    best = restore(directory / "grid", "best")
    values = [best.metrics[f"{metric}/{number}"] for number in range(len(members))]
    if not np.any(np.isfinite(values)):
        raise ValueError(
            f"no member of the grid {members} has a finite {metric!r} at any checkpoint: {values}; "
            "a smaller learning rate, alpha or beta may help"
        )
    chosen = int(np.argmin([math.inf if math.isnan(value) else value for value in values]))
    variables = _member(best.state, chosen)
    result = RoundResult(
        variables=variables,
        alpha=members[chosen][0],
        beta=members[chosen][1],
        step=best.step,
        selection=values[chosen],
        fresh=_fresh_score(self_play, variables, config),
        table=[
            {"step": row["step"], "alpha": alpha, "beta": beta, metric: row[f"eval/{metric}/{n}"]}
            for row in read_metrics(directory / "grid")
            if f"eval/{metric}" in row
            for n, (alpha, beta) in enumerate(members)
        ],
    )
    if jax.process_index() == 0:
        content = {name: value for name, value in result._asdict().items() if name != "variables"}
        (directory / "result.json").write_text(json.dumps(content, indent=2) + "\n")
    return result


def _train_members(
    self_play: SelfPlay,
    reference: Variables,
    directory: Path,
    name: str,
    config: Mapping[str, Any],
    index: int,
    members: Sequence[tuple[float, float]],
    evaluate: Callable[[TrainState], Mapping[str, float]],
) -> TrainState:
    """Trains copies of the reference on its pool, into `directory/name`."""
    copies = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (len(members), *leaf.shape)), reference["params"]
    )
    project = self_play.project and jax.vmap(self_play.project)
    if project:  # as the train step projects the members, or they would not start at the reference
        projected = jax.tree.map(lambda leaf: np.asarray(leaf[0]), jax.jit(project)(copies))
        reference = {**reference, "params": projected}
    first = _FIRST_POOL_SEED + (index - 1) * config["num_fakes"]
    origin = {"model": tree_digest(reference), **self_play.provenance}
    pool = None
    if self_play.draw is not None:
        pool = draw_pool(
            directory / "pool",
            lambda seeds: self_play.draw(reference, seeds),
            seeds=range(first, first + config["num_fakes"]),
            provenance=origin,
            label=self_play.label,
        )
    seed = int(np.random.SeedSequence([config["seed"], index]).generate_state(1)[0])
    experiment = Experiment(
        init=lambda key: {**reference, "params": copies, "reference": reference},
        objective=self_play.objective(*zip(*members, strict=True), index),
        optimizer=self_play.optimizer(),
        batches=lambda state: self_play.batches(pool, seed, reference, index),
        evaluate=evaluate,
        project=project,
    )
    settings = {
        **config,
        "seed": seed,
        "best_metric": config["metric"] if config["eval_every"] else None,
        "members": [list(member) for member in members],
        "origin": origin,
        "index": index,
    }
    return train(experiment, workdir=directory / name, config=settings, allow_changes=("rounds",))


def _calibrated_beta(
    self_play: SelfPlay,
    variables: Variables,
    directory: Path,
    config: Mapping[str, Any],
    index: int,
) -> float:
    """1 / (standard deviation of log-ratios of data and samples) after a short run, the probe."""
    steps = config["probe_steps"]
    settings = {
        **config,
        **{"num_steps": steps, "eval_every": 0, "checkpoint_every": steps},
        "log_every": max(steps // 5, 1),  # the last row averages the last fifth
        "steps_per_call": math.gcd(steps, config["steps_per_call"]),
    }
    members = [(1.0, config["probe_beta"])]
    none = lambda state: {}  # noqa: E731
    _train_members(self_play, variables, directory, "probe", settings, index, members, none)
    deviation = 0.0
    if jax.process_index() == 0:  # which alone writes the log
        row = read_metrics(directory / "probe")[-1]
        of = {
            name: row[f"delta_{name}/0"]
            for name in ("real_mean", "real_std", "fake_mean", "fake_std")
        }
        within = (of["real_std"] ** 2 + of["fake_std"] ** 2) / 2
        deviation = math.sqrt(within + (of["real_mean"] - of["fake_mean"]) ** 2 / 4)
    if jax.process_count() > 1:  # as bits, or in float32 it would not be the beta of one process
        bits = multihost_utils.broadcast_one_to_all(np.array([deviation]).view(np.uint32))
        deviation = float(np.asarray(bits).view(np.float64)[0])
    if not deviation:
        raise ValueError(
            f"config.probe_steps={steps} steps left the log-ratios at {deviation}; a longer probe "
            "or a larger learning rate is needed to calibrate beta"
        )
    return 1.0 / deviation


def _member(state: TrainState, number: int) -> Variables:
    constants = {name: tree for name, tree in state.constants.items() if name != "reference"}
    return {"params": jax.tree.map(lambda leaf: leaf[number], state.ema[_AVERAGE]), **constants}


def _fresh_score(self_play: SelfPlay, variables: Variables, config: Mapping[str, Any]) -> float:
    first = config["selection_seeds"]
    seeds = range(first, first + config["fresh_seeds"])
    return _score(self_play, variables, seeds, config["metric"])


def _score(self_play: SelfPlay, variables: Variables, seeds: range, metric: str) -> float:
    scores = self_play.score(variables, seeds)
    if metric not in scores:
        raise ValueError(
            f"config.metric={metric!r} is not among the model's scores {sorted(scores)}"
        )
    return float(scores[metric])


def _as_state(variables: Variables, average: str | None, index: int) -> TrainState:
    params = variables["params"]
    return TrainState(
        step=np.int32(index),
        params=params,
        constants={name: tree for name, tree in variables.items() if name != "params"},
        opt_state=(),
        ema={} if average is None else {average: params},
        key=jax.random.key(index),
        num_skipped=np.int32(0),
        consecutive_skips=np.int32(0),
    )


def _resolve(config: Mapping[str, Any] | ml_collections.ConfigDict) -> dict[str, Any]:
    config = resolve_config(config)
    if missing := sorted(set(default_self_play_config()) - set(config)):
        raise ValueError(f"config lacks {missing}; start from default_self_play_config()")
    for name in ("rounds", "probe_steps", "num_fakes", "selection_seeds", "fresh_seeds"):
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"config.{name} must be a positive integer, got {config[name]!r}")
    if not config["alpha"]:
        raise ValueError("config.alpha is empty; the grid needs at least one")
    if not config["eval_every"]:
        raise ValueError("config.eval_every is 0; the members are chosen by their scores")
    resolve_config({**config, "best_metric": config["metric"]})
    if set(config["ema"]) != {_AVERAGE}:
        raise ValueError(
            f"config.ema must hold one average, named {_AVERAGE!r}; got {sorted(config['ema'])}"
        )
    if config["max_grad_norm"] is not None:
        raise ValueError(
            "config.max_grad_norm would couple the members of the grid; clip by value, or not"
        )
    return config


def _require_same_run(stored: Mapping[str, Any], given: Mapping[str, Any], workdir: Path) -> None:
    if differences := config_differences(stored, given, free=_FREE):
        raise ValueError(
            f"config differs from that of the rounds in {str(workdir)!r}:\n  "
            + "\n  ".join(differences)
            + "\nUse another workdir"
        )


def _say(line: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(line)
