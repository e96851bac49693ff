"""Rounds of self-play on a model of which every number is known: a Gaussian of unit variance."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_self_play import MODEL_CONFIG, TRUE_MEAN, config, deviation, gaussian

from genjax_lab.data import read_pool
from genjax_lab.training import (
    read_metrics,
    restore,
    restore_config,
    run_round,
    run_self_play,
    self_play,
)
from genjax_lab.training.checkpoint import checkpoint_steps


def play(workdir, model=None, **changes):
    return run_self_play(
        model or gaussian(), workdir=workdir, config=config(**changes), model_config=MODEL_CONFIG
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, play(workdir)


def by_threes(seeds):
    return np.arange(seeds.start, seeds.stop) % 3


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_rounds_come_closer_to_the_data(finished):
    workdir, variables = finished
    errors = [restore(workdir, step).metrics["error"] for step in range(3)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[0] == pytest.approx(TRUE_MEAN, abs=0.01)
    same(restore(workdir).state.variables("ema"), variables)


def test_a_round_keeps_the_best_member_at_its_best_step(finished):
    workdir, _ = finished
    result = json.loads((workdir / "round_1/result.json").read_text())
    assert [(row["step"], row["alpha"], row["beta"]) for row in result["table"]] == [
        (step, alpha, 0.5) for step in (4, 8, 12) for alpha in (1.0, 4.0)
    ]
    best = min(result["table"], key=lambda row: row["error"])
    assert (result["step"], result["alpha"]) == (best["step"], best["alpha"])
    assert result["selection"] == best["error"]
    # Reported on other seeds than those that chose it.
    assert result["fresh"] != result["selection"]
    assert restore(workdir, 1).metrics["error"] == result["fresh"]


def test_a_round_takes_the_average_that_scored_best(tmp_path):
    """Neither the last nor the first, not the weights themselves, and all that belongs to them."""
    model = gaussian()
    reference = model.variables | {"buffers": {"scale": np.ones(2, np.float32)}}
    values, scored = iter([5.0, 4.0, np.nan, 1.0, 2.0, 3.0, 7.5]), []
    rounds = []

    def score(variables, seeds):
        scored.append((jax.device_get(variables), seeds))
        return {"error": next(values)}

    def objective(alpha, beta, index):
        rounds.append(index)
        return model.objective(alpha, beta, index)

    play = model._replace(score=score, label=by_threes, objective=objective)
    result = run_round(play, reference, directory=tmp_path, config=config(), index=3)
    assert set(rounds) == {3}
    assert (result.step, result.alpha, result.selection, result.fresh) == (8, 4.0, 1.0, 7.5)
    same(result.variables, scored[3][0])
    same(result.variables, scored[6][0])
    same(result.variables["buffers"], reference["buffers"])
    assert set(result.variables) == {"params", "buffers"}
    stored = restore(tmp_path / "grid", 8).state
    same(result.variables["params"]["mean"], stored.ema["ema"]["mean"][1])
    assert np.all(stored.ema["ema"]["mean"][1] != stored.params["mean"][1])
    # Samples to choose by, to report by and to learn from are all different ones.
    assert [seeds for _, seeds in scored] == [range(50)] * 6 + [range(50, 100)]
    first, stop = json.loads((tmp_path / "pool/manifest.json").read_text())["seeds"]
    assert first == 2**31 + 2 * 64
    np.testing.assert_array_equal(
        read_pool(tmp_path / "pool")["label"], by_threes(range(first, stop))
    )


def test_each_round_learns_against_the_samples_of_the_one_before(finished):
    workdir, _ = finished
    pools = [
        json.loads((workdir / f"round_{index}/pool/manifest.json").read_text()) for index in (1, 2)
    ]
    assert pools[0]["seeds"][1] <= pools[1]["seeds"][0]
    references = [
        self_play.tree_digest(restore(workdir, index).state.variables()) for index in (0, 1)
    ]
    assert [pool["provenance"]["model"] for pool in pools] == references
    reference = restore(workdir / "round_2/grid").state.constants["reference"]
    same(reference, restore(workdir, 1).state.variables())
    seeds = [restore_config(workdir / f"round_{index}/grid")["seed"] for index in (1, 2)]
    assert seeds[0] != seeds[1]


def test_the_same_seed_gives_the_same_bits(finished, tmp_path):
    same(play(tmp_path), finished[1])
    other = play(tmp_path / "other", seed=1, rounds=1)
    assert np.any(other["params"]["mean"] != restore(finished[0], 1).state.params["mean"])


@pytest.mark.parametrize("after", [0, 4, 9])
def test_an_interrupted_run_goes_on_to_the_same_bits(finished, tmp_path, after):
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path, gaussian(interrupt_after=after))
    same(play(tmp_path), finished[1])
    for index in (1, 2):
        results = [root / f"round_{index}/result.json" for root in (tmp_path, finished[0])]
        assert results[0].read_text() == results[1].read_text()


def test_more_rounds_continue_a_finished_run(finished, tmp_path):
    play(tmp_path, rounds=1)
    same(play(tmp_path, rounds=2), finished[1])


def test_beta_is_calibrated_by_a_probe(tmp_path):
    play(tmp_path, beta=(), rounds=1)
    beta = json.loads((tmp_path / "round_1/result.json").read_text())["beta"]
    row = read_metrics(tmp_path / "round_1/probe")[-1]
    assert row["step"] == 10
    assert beta == pytest.approx(1 / deviation(row))
    assert restore(tmp_path, 1).log["beta"] == [beta]
    assert 0.1 < beta < 100
    assert restore_config(tmp_path / "round_1/probe")["members"] == [[1.0, 1.0]]
    # Once for all rounds, in another launch too.
    play(tmp_path, beta=(), rounds=2)
    assert not (tmp_path / "round_2/probe").exists()
    assert json.loads((tmp_path / "round_2/result.json").read_text())["beta"] == beta


def test_a_foreign_pool_is_refused(tmp_path):
    reference = gaussian().variables
    run_round(gaussian(), reference, directory=tmp_path, config=config())
    moved = jax.tree.map(lambda leaf: leaf + 1, reference)
    with pytest.raises(ValueError, match="another origin"):
        run_round(gaussian(), moved, directory=tmp_path, config=config())
    other = gaussian()._replace(provenance={"sampler": "another"})
    with pytest.raises(ValueError, match="another origin"):
        run_round(other, reference, directory=tmp_path, config=config())
    # Without a pool it is the training run that knows whose samples it learns from.
    model = gaussian()._replace(draw=None)
    with pytest.raises(ValueError, match=r"origin\.model"):
        run_round(model, moved, directory=tmp_path, config=config())


def test_other_weights_and_other_settings_are_refused(tmp_path):
    play(tmp_path, rounds=1)
    with pytest.raises(ValueError, match="other pretrained weights"):
        play(tmp_path, gaussian(start=1.0))
    with pytest.raises(ValueError, match=r"alpha"):
        play(tmp_path, alpha=(2.0,))


def test_a_model_with_a_constraint_starts_at_its_projection(tmp_path):
    """The reference is projected as the members are, or the first ratios would not be 0."""
    model = gaussian(start=0.1)._replace(
        project=lambda params: jax.tree.map(lambda leaf: jnp.round(leaf * 4) / 4, params)
    )
    play(tmp_path, model, rounds=1, log_every=1, steps_per_call=1)
    first = json.loads((tmp_path / "round_1/grid/metrics.jsonl").open().readline())
    assert first["delta_real_mean/0"] == first["delta_fake_mean/1"] == 0
    manifest = json.loads((tmp_path / "round_1/pool/manifest.json").read_text())
    start = {"params": {"mean": np.zeros((1, 1, 4), np.float32)}}
    assert manifest["provenance"]["model"] == self_play.tree_digest(start)


def test_a_member_that_diverges_does_not_stop_the_others(tmp_path):
    model = gaussian()

    def score(variables, seeds):
        first = float(variables["params"]["mean"].mean())
        return {"error": np.inf if first > 0.05 else abs(first - TRUE_MEAN)}

    play(tmp_path, model._replace(score=score), rounds=1)
    result = json.loads((tmp_path / "round_1/result.json").read_text())
    assert np.isfinite(result["selection"])
    assert None in [row["error"] for row in result["table"]]
    with pytest.raises(ValueError, match="no member of the grid"):
        broken = model._replace(score=lambda variables, seeds: {"error": np.nan})
        play(tmp_path / "none", broken, rounds=1)


def test_sigterm_at_an_evaluation_changes_no_choice(tmp_path):
    """The evaluation is stored with its checkpoint, or the next launch could not compare it."""
    model, calls = gaussian(), []

    def score(variables, seeds):
        calls.append(seeds)
        if len(calls) == 2:  # the first evaluation of the first round; it takes a call to be seen
            os.kill(os.getpid(), signal.SIGTERM)
        return model.score(variables, seeds)

    once = {"rounds": 1, "steps_per_call": 4}  # the next call ends at an evaluation, too
    with pytest.raises(SystemExit):
        play(tmp_path / "stopped", model._replace(score=score), **once)
    assert checkpoint_steps(tmp_path / "stopped/round_1/grid/checkpoints")[-1] == 8
    same(play(tmp_path / "stopped", **once), play(tmp_path / "whole", **once))
    results = [tmp_path / name / "round_1/result.json" for name in ("stopped", "whole")]
    assert results[0].read_text() == results[1].read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be a positive"),
        ({"alpha": ()}, "alpha is empty"),
        ({"max_grad_norm": 1.0}, "couple the members"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"checkpoint_every": 6, "eval_every": 4}, "checkpoint_every=6"),
        ({"metric": "beauty"}, "beauty"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        play(tmp_path, **changes)
