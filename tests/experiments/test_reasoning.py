"""A decoder learns from its own answers: runs that go on, on any mesh, by any method, from a base."""

import json

import jax
import ml_collections
import numpy as np
import pytest

import experiments
from configs import arithmetic_nft, digit_sum_sft
from experiments import reasoning
from genjax_lab import evaluation, networks, pretrained
from genjax_lab.parallel import make_mesh
from genjax_lab.training import make_train_step, read_metrics, restore, train

NETWORK = {
    "name": "Decoder",
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mlp_width": 24,
    "rope_theta": 100.0,
}
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def small(config, **changes):
    """Sums of a single digit, on one device."""
    config.task = {"name": "digit_sum", "num_digits": 1}
    config.prompt_length, config.answer_length = 3, 3
    config.network = dict(NETWORK)
    config.mesh.update(ONE)
    config.update({"log_every": 2, "eval_every": 0, "progress": False, "tensorboard": False})
    config.evaluation.update({"num_samples": 32, "answers_per_problem": 4, "batch_size": 32})
    config.update(changes)
    return config


def supervised(**changes):
    config = small(digit_sum_sft.get_config(), batch_size=16)
    config.update({"num_steps": 8, "steps_per_call": 8, "checkpoint_every": 8, "eval_every": 8})
    config.log_every = 8
    config.optimizer.update({"learning_rate": 3e-2, "warmup_steps": 1})
    config.update(changes)
    return config


def negative_aware(base=None, **changes):
    """Rollouts of 4 questions with 4 answers each in 2 mini-batches."""
    config = small(arithmetic_nft.get_config(), batch_size=8, steps_per_call=2)
    config.update({"num_steps": 8, "checkpoint_every": 8})
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 1})
    config.rollout.update({"num_groups": 4, "num_samples": 4, "minibatches": 2})
    config.rollout.update({"batch_questions": 16, "max_batches": 20})
    config.base = base
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run that has learnt a little from examples."""
    workdir = tmp_path_factory.mktemp("runs") / "base"
    experiments.run(supervised(), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def restored(base):
    experiment, restored = experiments.from_checkpoint(str(base))
    config = ml_collections.ConfigDict(restored.config | {"mesh": ONE})
    return experiments.build(config), restored.state


@pytest.fixture(scope="module")
def questions():
    return reasoning.Questions(negative_aware())


def assert_same_trees(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def host(tree):
    return jax.tree.map(np.asarray, tree)


# Runs.


def test_examples_are_learnt_and_logged(base):
    rows = read_metrics(base)
    (evaluated,) = [row for row in rows if "eval/entropy" in row]
    assert 0 < evaluated["eval/avg_at_4"] < 1 and evaluated["eval/num_questions"] == 8
    (trained,) = [row for row in rows if "loss" in row]
    assert 0 < trained["nll"] < np.log(12)
    assert restore(base).iterators == [{"step": 8, "seed": 0}]


@pytest.fixture(scope="module")
def four_rollouts(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    config = negative_aware(str(base))
    config.rollout.carry_over = True
    return workdir, train(experiments.build(config), workdir=workdir, config=config)


def test_interrupted_run_is_bit_equal_to_an_uninterrupted_one(base, four_rollouts, tmp_path):
    """Check: 4 rollouts are 2, a checkpoint, and 2, with questions that are carried over."""
    whole, final = four_rollouts
    config = negative_aware(str(base), num_steps=4, checkpoint_every=4)
    config.rollout.carry_over = True
    train(experiments.build(config), workdir=tmp_path, config=config)
    position = restore(tmp_path).iterators[0]
    assert position["rollouts"] == 2 and position["carried"]
    config.num_steps = 8
    state = train(experiments.build(config), workdir=tmp_path, config=config)
    assert_same_trees(host(state.params), host(final.params))
    assert_same_trees(host(state.opt_state), host(final.opt_state))
    assert restore(tmp_path).iterators == restore(whole).iterators
    rows, expected = read_metrics(tmp_path), read_metrics(whole)
    for row in (*rows, *expected):
        row.pop("seconds")
    assert rows == expected


def test_the_log_tells_of_rollouts(four_rollouts):
    rows = [row for row in read_metrics(four_rollouts[0]) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    ledger = restore(four_rollouts[0]).iterators[0]["ledger"]
    for row in rows:
        assert {f"rollout_{name}" for name in reasoning.reasoning.STATISTICS} <= set(row)
        assert row["skipped"] == 0 and row["entropy"] > 0
        # Exactly 1 in the first mini-batch of rollouts; this is the mean of both, and of carried.
        assert 0.5 < row["ratio"] < 2
    assert 0 < rows[0]["rollout_accuracy"] < 1
    assert ledger["kept_questions"] == 16 and ledger["answers"] == 4 * ledger["questions"]


def test_the_start_is_the_base(base, four_rollouts):
    config = negative_aware(str(base))
    variables = experiments.build(config).init(jax.random.key(3))
    assert_same_trees(host(variables["params"]), host(restore(base).state.params))
    changed = jax.tree.map(
        lambda a, b: np.abs(a - np.asarray(b)).max(), variables["params"], four_rollouts[1].params
    )
    assert max(jax.tree.leaves(changed)) > 1e-4


def rollout_of(config, experiment, variables=None):
    """The first rollout: its mini-batches."""
    batches = experiment.batches(None)
    batches.follow(experiment.init(jax.random.key(0)) if variables is None else variables)
    return [next(batches) for _ in range(config.steps_per_call)]


@pytest.mark.parametrize("mesh", [{"data": 8}, {"fsdp": 4, "data": 2}])
def test_a_mesh_gives_the_same_answers_and_nearly_the_same_parameters(base, tmp_path, mesh):
    states = []
    for name, sizes in (("one", ONE), ("many", ONE | mesh)):
        config = negative_aware(str(base), num_steps=2, checkpoint_every=2)
        config.mesh.update(sizes)
        config.rollout.batch_questions = 16
        states.append(train(experiments.build(config), workdir=tmp_path / name, config=config))
    ledgers = [restore(tmp_path / name).iterators[0]["ledger"] for name in ("one", "many")]
    assert ledgers[0] == ledgers[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-4),
        states[0].params,
        states[1].params,
    )


def test_a_mesh_answers_token_by_token_as_one_device_does(base):
    rollouts = []
    for sizes in (ONE, ONE | {"data": 8}):
        config = negative_aware(str(base))
        config.mesh.update(sizes)
        rollouts.append(rollout_of(config, experiments.build(config)))
    for one, many in zip(*rollouts, strict=True):
        for name in ("prompt", "answer", "answer_mask", "outcome", "group_ids", "weights"):
            np.testing.assert_array_equal(one[name], many[name])
        np.testing.assert_allclose(one["old_log_probs"], many["old_log_probs"], atol=1e-5)


# Methods.


@pytest.fixture(scope="module")
def first_rollout(base):
    config = negative_aware(str(base))
    return rollout_of(config, experiments.build(config))


@pytest.mark.parametrize("method", reasoning.METHODS)
def test_every_method_takes_a_step(base, first_rollout, method):
    config = negative_aware(str(base), method=method)
    assert reasoning.settings_of(config).aggregation == reasoning.METHODS[method].aggregation
    experiment = experiments.build(config)
    step = make_train_step(
        experiment.objective, experiment.optimizer, batch_size=8, ema={}, mesh=make_mesh(**ONE,
        devices=jax.devices()[:1])
    )
    variables = experiment.init(jax.random.key(0))
    state = step.init(variables, jax.random.key(1))
    # The optimiser's first step is one of warm-up, of length 0.
    for batch in first_rollout:
        state, metrics = step.step(state, jax.tree.map(lambda x: x[None], batch))
        assert np.isfinite(metrics["loss"]).all() and metrics["skipped"] == 0
        assert metrics["grad_norm"] > 0
    assert metrics["rollout_kept"] == pytest.approx(first_rollout[0]["rollout_kept"][0])
    moved = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - b).max(), state.params, variables["params"]
    )
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_a_divergence_from_the_base_is_added(base, tmp_path):
    config = negative_aware(str(base), num_steps=2, checkpoint_every=2, log_every=1)
    config.objective = {"kl_coefficient": 0.1, "kl_kind": "k3", "entropy_coefficient": 0.01}
    config.update({"steps_per_call": 2})
    train(experiments.build(config), workdir=tmp_path, config=config)
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    # 0 at the start, which is the base; more after a step.
    assert abs(rows[0]["kl"]) < 1e-9 and rows[-1]["kl"] >= 0
