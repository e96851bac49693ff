"""A decoder learns from its own answers: resumed, on any mesh, by any method, from any base."""

import concurrent.futures
import json
import shutil
import socket

import jax
import ml_collections
import numpy as np
import optax
import pytest
import tokenizers
from started_programs import start

import experiments
from configs import arithmetic_nft, digit_sum_sft
from experiments import reasoning
from experiments.answering import AnswerJudge
from experiments.questions import Questions
from genjax_lab import evaluation, networks, pretrained
from genjax_lab.reasoning import STATISTICS, digit_sum
from genjax_lab.training import read_metrics, restore, train

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
    config.update({"num_steps": 8, "checkpoint_every": 4})
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
    found = restore(base)
    config = ml_collections.ConfigDict(found.config)
    return experiments.build(config), found.state


@pytest.fixture(scope="module")
def questions():
    return Questions(negative_aware())


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


def carrying(base, **changes):
    config = negative_aware(str(base), **changes)
    config.rollout.update({"carry_over": True, "batch_questions": 64})
    return config


@pytest.fixture(scope="module")
def four_rollouts(base, tmp_path_factory):
    """A run with a checkpoint after two of them."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    config = carrying(base)
    return workdir, train(experiments.build(config), workdir=workdir, config=config)


def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(base, four_rollouts, tmp_path):
    """Check: two rollouts, a checkpoint and two more, with questions that are carried over."""
    whole, final = four_rollouts
    shutil.copytree(whole / "checkpoints/4", tmp_path / "checkpoints/4")
    position = restore(tmp_path).iterators[0]
    assert position["rollouts"] == 2 and position["carried"]
    config = carrying(base)
    state = train(experiments.build(config), workdir=tmp_path, config=config)
    assert_same_trees(host(state.params), host(final.params))
    assert_same_trees(host(state.opt_state), host(final.opt_state))
    assert restore(tmp_path).iterators == restore(whole).iterators
    rows = [[r for r in read_metrics(d) if r["step"] > 4] for d in (tmp_path, whole)]
    for row in (*rows[0], *rows[1]):
        row.pop("seconds")
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [6, 8]


def test_a_mesh_gives_the_same_answers_and_nearly_the_same_parameters(
    base, four_rollouts, tmp_path
):
    config = carrying(base, num_steps=4)
    config.mesh.update({"data": 2, "fsdp": 4})
    state = train(experiments.build(config), workdir=tmp_path, config=config)
    one = restore(four_rollouts[0], 4)
    # How many were right, how long they were; and what is carried, token by token.
    (found,), (expected,) = restore(tmp_path).iterators, one.iterators
    assert len(found["carried"]) == len(expected["carried"])
    for ours, theirs in zip(found["carried"], expected["carried"], strict=True):
        np.testing.assert_allclose(ours.pop("log_probs"), theirs.pop("log_probs"), atol=1e-5)
    assert found == expected
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), b, atol=1e-5),
        state.params,
        one.state.params,
    )


def test_the_log_tells_of_rollouts(four_rollouts):
    rows = [row for row in read_metrics(four_rollouts[0]) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    ledger = restore(four_rollouts[0]).iterators[0]["ledger"]
    for row in rows:
        assert {f"rollout_{name}" for name in STATISTICS} <= set(row)
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


# Methods.


@pytest.fixture(scope="module")
def first_rollout(base):
    config = negative_aware(str(base))
    return rollout_of(config, experiments.build(config))


@pytest.fixture(scope="module")
def steps(base, first_rollout):
    """(before, after, loss, metrics) of a step of every method, compiled together."""
    built = {}
    for method in reasoning.METHODS:
        config = negative_aware(str(base), method=method)
        config.optimizer.warmup_steps = 0
        assert reasoning.settings_of(config).aggregation == reasoning.METHODS[method].aggregation
        built[method] = experiments.build(config)
    variables = built["nft"].init(jax.random.key(0))

    @jax.jit
    def step(variables, batch):
        result = {}
        for method, experiment in built.items():
            both = jax.value_and_grad(experiment.objective, has_aux=True)
            (loss, metrics), gradient = both(variables, batch, None)
            state = experiment.optimizer.init(variables)
            update, _ = experiment.optimizer.update(gradient, state, variables)
            result[method] = optax.apply_updates(variables, update), loss, metrics
        return result

    return variables, step(variables, first_rollout[0])


@pytest.mark.parametrize("method", reasoning.METHODS)
def test_every_method_takes_a_step(steps, first_rollout, method):
    before, (after, loss, metrics) = steps[0], steps[1][method]
    assert np.isfinite(loss) and all(np.isfinite(value) for value in metrics.values())
    assert metrics["rollout_kept"] == pytest.approx(first_rollout[0]["rollout_kept"][0])
    assert metrics["max_ratio"] == pytest.approx(1, abs=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
    assert 1e-4 < max(jax.tree.leaves(moved)) < 1


def test_the_first_step_is_on_the_policy_in_halves_of_bfloat16(base, tmp_path):
    """Old log-probabilities come from the training's own dtypes and microbatches."""
    config = negative_aware(str(base), compute_dtype="bfloat16", accumulation_steps=2)
    config.update({"num_steps": 2, "log_every": 1, "eval_every": 2, "checkpoint_every": 2})
    config.network = NETWORK | {"dtype": "bfloat16"}
    config.objective.diagnostics = True
    config.rollout.update({"rate": "history", "bucket": 2})
    config.optimizer.update({"learning_rate": 3e-2, "warmup_steps": 0})
    experiments.run(config, str(tmp_path))
    first, second = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert first["max_ratio"] == pytest.approx(1, abs=1e-5)
    assert first["loss"] == pytest.approx(0, abs=1e-6)
    assert second["max_ratio"] > 1.01  # the same rollout after a step
    assert first["ratio_0.01"] == first["ratio_0.99"] == pytest.approx(1, abs=1e-5)
    assert -1 <= first["gradient_cosine"] < 1 and first["gradient_wrong_norm"] > 0
    assert any(name.startswith("loss_at_rate") for name in second)
    assert first["ledger/generated_tokens"] == second["ledger/generated_tokens"] > 0


def test_a_reward_of_ones_own_sees_questions_and_texts(base, first_rollout):
    def reward(answers):
        assert answers.outcome.shape == answers.lengths.shape == answers.truncated.shape
        pairs = zip(answers.problems, answers.texts, strict=True)
        return [float(text == problem.gold) - 0.125 * len(text) for problem, text in pairs]

    config = negative_aware(str(base))
    with pytest.raises(ValueError, match="method='nft' learns without a reward"):
        reasoning.build(config, reward=reward)
    config.method = "grpo"
    experiment = reasoning.build(config, reward=reward)
    for batch, plain in zip(rollout_of(config, experiment), first_rollout, strict=True):
        np.testing.assert_array_equal(batch["group_rate"], plain["group_rate"])
        ended = batch["answer_mask"] & (batch["answer"] == 0)
        letters = batch["answer_mask"].sum(axis=1) - ended.sum(axis=1)
        exact = batch["group_reward"] + 0.125 * letters
        assert set(exact) <= {0.0, 1.0} and (exact >= batch["outcome"]).all()


def test_a_divergence_from_the_base_is_added(base, first_rollout):
    config = negative_aware(str(base))
    config.objective = {"kl_coefficient": 0.5, "kl_kind": "k1", "entropy_coefficient": 0.01}
    experiment = experiments.build(config)
    variables = experiment.init(jax.random.key(0))
    other = jax.tree.map(lambda x: 1.1 * x, variables)
    batch = rollout_of(config, experiment, other)[0]
    np.testing.assert_array_equal(batch["prompt"].shape, first_rollout[0]["prompt"].shape)
    loss, metrics = jax.jit(experiment.objective)(other, batch, None)
    # What answers say is drawn from `other`, whose divergence is k1's mean over tokens.
    shown = batch["counted"]
    difference = (batch["old_log_probs"] - batch["reference_log_probs"])[shown]
    assert np.abs(difference).max() > 0.01
    assert metrics["kl"] == pytest.approx(difference.mean(), abs=1e-5)
    entropy = float(metrics["entropy"])
    scale = shown.sum() / 1000  # NFT's constant
    expected = scale * (0.5 * difference.mean() - 0.01 * entropy)
    assert loss == pytest.approx(expected, abs=1e-5)


def test_two_processes_learn_what_one_learns(base, tmp_path):
    """Answers are gathered, and judged in the first process alone."""
    config = negative_aware(str(base), num_steps=4, eval_every=4)
    config.evaluation.num_samples = config.evaluation.batch_size = 16
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    model = f"--config={config_file(tmp_path, config)}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    several = ("--distributed", f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        programs = [
            pool.submit(
                *(start, "train", model, f"--workdir={tmp_path}/two", *several),
                f"--process_id={index}",
            )
            for index in range(2)
        ]
        for program in programs:
            program.result()
    experiments.run(config, str(tmp_path / "one"))
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for row, other in zip(one, two, strict=True):
        del row["seconds"], other["seconds"]
        assert other == pytest.approx(row, abs=1e-5, nan_ok=True)


# Where training begins.


def test_a_directory_of_hugging_face_is_a_base(base, restored, tmp_path):
    config = negative_aware(str(base))
    network = reasoning.make_network(config, Questions(config))
    variables = {"params": restored[1].params}
    pretrained.qwen2.save(tmp_path / "hf", network, variables)
    for scan in (False, True):
        there = negative_aware(str(tmp_path / "hf"))
        there.network = NETWORK | {"scan": scan}
        found = experiments.build(there).init(jax.random.key(0))
        if scan:
            found = networks.unstacked(network.clone(scan=True), found)[1]
        assert_same_trees(host(found["params"]), host(variables["params"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 32}, r"'width': \(16, 32\)"),
        ({"depth": 2}, r"'depth': \(1, 2\)"),
        ({"rope_theta": 1e6}, r"'rope_theta': \(100\.0, 1000000\.0\)"),
        ({"tied": False, "qkv_bias": False}, r"'tied': .*'qkv_bias'"),
        ({"vocab_size": 13}, r"'vocab_size': \(12, 13\)"),
    ],
)
def test_a_base_of_another_network_is_named(base, change, message):
    config = negative_aware(str(base))
    config.network = NETWORK | change
    with pytest.raises(ValueError, match=f"differs from the network in .*{message}"):
        experiments.build(config).init(jax.random.key(0))


def test_a_base_of_another_domain_is_named(base, tmp_path, monkeypatch):
    other = restore(base)
    monkeypatch.setattr(
        reasoning, "restore", lambda path: other._replace(config={"domain": "images"})
    )
    with pytest.raises(ValueError, match="is a run of 'images'"):
        experiments.build(negative_aware(str(base))).init(jax.random.key(0))


# Answers to the questions for testing.


@pytest.fixture(scope="module")
def drawn(restored):
    """(seeds, tokens) of 32 answers, drawn in one batch."""
    parts = list(restored[0].sample(restored[1], range(32)))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def test_evaluation_is_that_of_the_samples_of_the_same_seeds(restored, drawn, questions):
    experiment, state = restored
    found = experiment.evaluate(state)
    seeds, tokens = drawn
    np.testing.assert_array_equal(seeds, np.arange(32))
    prompts, answers = tokens[:, :3], tokens[:, 3:]
    codec = questions.codec
    # Four answers in a row are to the same question, and those to the questions in order.
    texts = codec.decode(prompts, prompts > 0)
    assert texts == [f"{n:02d}=" for n in range(8) for _ in range(4)]
    ends = answers == 0
    shown = np.cumsum(ends, axis=1) - ends == 0
    told = codec.decode(answers, shown)
    right = [t == str(n) for t, n in zip(told, np.repeat(np.arange(8), 4), strict=True)]
    outcomes = (np.array(right) & ends.any(axis=1)).reshape(8, 4)
    expected = evaluation.answer_summary(
        outcomes,
        lengths=shown.sum(axis=1).reshape(8, 4),
        truncated=~ends.any(axis=1).reshape(8, 4),
        ks=(1, 4),
        answers=[told[i : i + 4] for i in range(0, 32, 4)],
    )
    entropy = found.pop("entropy")
    assert found == pytest.approx(expected) and 0 < outcomes.sum() < 32
    assert 0 < entropy < np.log(12)
    # Some of them alone, and another batch size, for which entropies must be summed up by tokens.
    (part,) = experiment.sample(state, [5])
    np.testing.assert_array_equal(part[1][0], tokens[5])
    config = small(arithmetic_nft.get_config())
    config.evaluation.batch_size = 2  # fewer than answers to a question
    again = experiments.build(config).evaluate(state)
    assert again.pop("entropy") == pytest.approx(entropy, rel=1e-5)
    assert again == pytest.approx(found)


def test_truncated_answers_are_wrong_in_evaluation(restored):
    config = small(arithmetic_nft.get_config())
    lenient = Questions(config)
    lenient.task = lenient.task._replace(verify=lambda problems, answers: np.ones(len(answers)))
    judge = AnswerJudge(config, reasoning.make_network(config, lenient), lenient)
    found = judge.evaluate(restored[1], metrics=("avg_at_4", "truncation_rate"))
    assert 0 < found["truncation_rate"] < 1
    assert found["avg_at_4"] == pytest.approx(1 - found["truncation_rate"])


def config_file(directory, config):
    """A config as a file that programs take."""
    lines = ["import ml_collections", f"FIELDS = {config.to_dict()!r}", "", "def get_config():"]
    lines += ["    return ml_collections.ConfigDict(FIELDS)", ""]
    (directory / "config.py").write_text("\n".join(lines))
    return directory / "config.py"


def test_published_weights_are_evaluated_without_a_run(base, restored, tmp_path):
    config = negative_aware(str(tmp_path / "hf"))
    network = reasoning.make_network(config, Questions(config))
    pretrained.qwen2.save(tmp_path / "hf", network, {"params": restored[1].params})
    model = f"--config={config_file(tmp_path, config)}"
    start("evaluate", model, "--num=16", f"--out={tmp_path}/hf.json")
    start("evaluate", f"--checkpoint={base}", "--num=16", f"--out={tmp_path}/run.json")
    found, expected = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("hf", "run"))
    assert found.pop("checkpoint") == str(tmp_path / "hf") and found.pop("step") == 0
    assert expected.pop("checkpoint") == str(base) and expected.pop("step") == 8
    assert found == expected
    start("sample", model, "--num=3", f"--out={tmp_path}/answers.txt")
    assert len((tmp_path / "answers.txt").read_text().splitlines()) == 3
    for arguments, message in (
        ([model, f"--checkpoint={base}", f"--out={tmp_path}/x.json"], "not both"),
        ([model], "--out must say"),
        ([model, "--step=8", f"--out={tmp_path}/x.json"], "--step is about a run"),
        ([f"--out={tmp_path}/x.json"], "not both"),
    ):
        ended = start("evaluate", *arguments, check=False)
        assert ended.returncode and message in ended.stdout + ended.stderr


def test_evaluation_tells_what_all_ranges_of_seeds_have(base, tmp_path):
    """Four answers to a question are often all right or all wrong, and have no such lengths."""
    start("evaluate", f"--checkpoint={base}", "--num=4", f"--out={tmp_path}/e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    assert 0 <= found["avg_at_4_mean"] <= 1 and found["mean_length_fresh"] > 1
    assert not {"mean_length_right_mean", "mean_length_wrong_mean"} <= set(found)
    assert found["sampler"]["temperature"] == 1.0 and "set" not in found
    assert "avg_at_4_low_fresh" in found and "avg_at_4_low_mean" not in found  # no interval
    warm = (f"--checkpoint={base}", "--num=4", "--set=sampler.temperature=0.5")
    start("evaluate", *warm, f"--out={tmp_path}/warm.json")
    found = json.loads((tmp_path / "warm.json").read_text())
    assert found["sampler"]["temperature"] == 0.5
    assert found["set"] == ["sampler.temperature=0.5"]


def test_metrics_and_seeds_may_be_chosen(restored):
    experiment, state = restored
    found = experiment.evaluate(state, seeds=range(16, 48), metrics=("pass_at_4", "entropy"))
    assert list(found) == ["pass_at_4", "entropy"]
    # Asked for more, the questions come again, and are not others for it.
    found = experiment.evaluate(state, seeds=range(4 * 24), metrics=("num_questions",))
    assert found["num_questions"] == len(digit_sum(1).test) < 24
    with pytest.raises(ValueError, match="metrics \\['beauty'\\] are not in"):
        experiment.evaluate(state, metrics=("beauty",))
    for seeds in (range(30), range(2, 34)):
        with pytest.raises(ValueError, match="whole blocks of answers_per_problem=4"):
            experiment.evaluate(state, seeds=seeds)


def test_answers_are_written_as_objects_text_or_tokens(restored, drawn, tmp_path):
    experiment, tokens = restored[0], drawn[1]
    experiment.write(tokens, tmp_path / "s.jsonl", before=tokens[4:6])
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["group"] for row in rows] == ["samples"] * 32 + ["before"] * 2
    assert [row["prompt"] for row in rows[:32:4]] == [f"{n:02d}=" for n in range(8)]
    assert [row["gold"] for row in rows[32:]] == ["1", "1"]
    for row in rows:
        assert not row["outcome"] or row["answer"] == row["gold"]
        assert row["outcome"] or row["answer"] != row["gold"] or len(row["answer"]) == 3
    found = restored[0].evaluate(restored[1], metrics=("avg_at_4",))
    assert np.mean([row["outcome"] for row in rows[:32]]) == pytest.approx(found["avg_at_4"])
    experiment.write(tokens, tmp_path / "s.txt")
    lines = (tmp_path / "s.txt").read_text().splitlines()
    assert len(lines) == 32 and lines[4].startswith("[samples] 01= ")
    right = sum(row["outcome"] for row in rows[:32])
    assert sum(line.endswith("(right)") for line in lines) == right > 0
    assert sum(line.endswith("(wrong)") for line in lines) == 32 - right
    experiment.write(tokens, tmp_path / "s.npz", before=tokens[:1])
    with np.load(tmp_path / "s.npz") as file:
        np.testing.assert_array_equal(file["samples"], tokens)
        np.testing.assert_array_equal(file["before"], tokens[:1])
    with pytest.raises(ValueError, match=r"s\.png.*\.jsonl, \.txt or \.npz"):
        experiment.write(tokens, tmp_path / "s.png")


def test_questions_whose_tokens_are_no_text_are_recognised(tmp_path):
    """Chat templates have the token that ends answers in prompts, too."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<end>": 0, "7": 1, "5": 2, "?": 3}, unk_token="?")
    )
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = [{"problem": "5", "answer": 5}, {"problem": "7", "answer": "7"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small(arithmetic_nft.get_config())
    with config.unlocked():
        config.task = {"name": "jsonl", "path": str(tmp_path / "q.jsonl")}
        config.task.template = "{problem}<end>5"
    config.tokenizer.update({"path": str(tmp_path / "tokenizer.json"), "end_tokens": ("<end>",)})
    experiment = experiments.build(config)
    tokens = np.array([[1, 0, 2, 1, 0, 0], [2, 0, 2, 1, 0, 0], [1, 0, 2, 1, 1, 1]])
    experiment.write(tokens, tmp_path / "s.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["7<end>5", "5<end>5", "7<end>5"]
    assert [row["gold"] for row in rows] == ["7", "5", "7"]
    assert [row["outcome"] for row in rows] == [1, 0, 0]


# Mistakes.


def change_of(config, path, value):
    with config.unlocked():
        section, _, field = path.rpartition(".")
        (config[section] if section else config)[field] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("batch_size", 16, r"batch_size=16 must be .* = 8"),
        ("steps_per_call", 4, r"steps_per_call=4 .*minibatches epochs = 2"),
        ("rollout.epochs", 2, r"steps_per_call=2 .*minibatches epochs = 4"),
        ("rollout.num_samples", 1, "num_samples=1"),
        ("reward.signed", True, "learns from outcomes"),
        ("rollout.temperature", 0.0, "temperature=0.0 must be positive"),
        ("rollout.num_sample", 4, "rollout does not fit"),
        ("rollout.band", (0.8, 0.2), r"band=\(0\.8, 0\.2\) must be two increasing"),
        ("rollout.strategy", "wait", "strategy is 'wait', not in"),
        ("objective.aggregation", "mean", "aggregation is 'mean', not in"),
        ("objective.beta", 0.1, r"beta.* It takes .*'epsilon', .*'weighting'"),
        ("reward.overlong_buffer", 99, "learns from outcomes"),
        ("base", "nowhere", r"config\.base='nowhere' is not a directory"),
        ("method", "ppo", r"method is 'ppo', not 'sft' or in \['dapo'"),
        ("method", "online_dpo", "accumulation_steps must be 1"),
        ("task.name", "subtraction", r"task\.name is 'subtraction'"),
        ("task.name", "Problem", r"task\.name is 'Problem'"),
        ("task.digits", 4, "task does not fit digit_sum"),
        ("network.widths", 4, "network does not fit Decoder"),
        ("objective.epsilon", -1.0, "epsilon=-1.0 must be positive"),
        ("objective.epsilonn", 0.5, "objective does not fit.*epsilonn"),
        ("objective.kl_coefficient", 0.1, r"kl_coefficient needs config\.base"),
        ("tokenizer.path", "nothing.json", "holds no tokenizer"),
    ],
)
def test_mistakes_in_a_config_are_named(path, value, message):
    config = negative_aware(accumulation_steps=2 if value == "online_dpo" else 1)
    change_of(config, path, value)
    with pytest.raises(ValueError, match=message):
        experiment = experiments.build(config)
        experiment.batches(None)
        experiment.init(jax.random.key(0))


@pytest.mark.parametrize(
    ("method", "path", "value", "message"),
    [
        ("dapo", "rollout.rate", "history", "method='dapo' does not look at rates"),
        ("dapo", "reward.overlong_buffer", 99, r"overlong_buffer=99 must be in \[0, .*=3\]"),
        ("grpo", "objective.epsilon", 0.5, r"It takes .*'epsilon_high', 'epsilon_low'"),
        ("rft", "objective.negative_weight", 0.5, "negative_weight is 0 for 'rft'"),
        ("rft", "objective.beta", 0.5, "It takes .*'weighting'"),
    ],
)
def test_switches_that_a_method_has_not_are_named(method, path, value, message):
    config = negative_aware(method=method)
    change_of(config, path, value)
    with pytest.raises(ValueError, match=message):
        experiments.build(config).batches(None)


@pytest.mark.parametrize("change", ["sampler.temprature=0.6", "evaluations.num_samples=4"])
def test_changes_of_what_a_run_has_not_are_named(base, change):
    with pytest.raises(ValueError, match="does not change the run's config"):
        experiments.from_checkpoint(str(base), changes=[change])


@pytest.mark.parametrize("name", ["kl_coefficient", "epsilon"])
def test_examples_are_learnt_without_options_of_methods(name):
    with pytest.raises(ValueError, match=f"objective does not fit 'sft'.*{name}"):
        experiments.build(supervised(objective={name: 0.1}))


def test_questions_of_a_file_need_a_tokenizer_and_the_end(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}\n')
    config = negative_aware()
    change_of(config, "task", {"name": "jsonl", "path": str(tmp_path / "q.jsonl")})
    with pytest.raises(ValueError, match=r"tokenizer\.path is missing"):
        experiments.build(config).batches(None)
    codec = Questions(negative_aware()).codec
    codec.tokenizer.save(str(tmp_path / "tokenizer.json"))
    config.tokenizer.path = str(tmp_path / "tokenizer.json")
    for ends in ((), ("<stop>",)):
        config.tokenizer.end_tokens = ends
        with pytest.raises(ValueError, match="end_tokens"):
            experiments.build(config).batches(None)
    config.update({"method": "sft"})
    config.tokenizer.end_tokens = ("<end>",)
    with pytest.raises(ValueError, match="'jsonl' has no answers of its own"):
        experiments.build(config).batches(None)


def test_demonstrations_go_on_where_they_were():
    config = supervised()
    batches = [experiments.build(config).batches(None) for _ in range(2)]
    next(batches[0])
    batches[1].set_state(json.loads(json.dumps(batches[0].get_state())))
    expected, found = next(batches[0]), next(batches[1])
    assert_same_trees(found, expected)
    lengths = found["answer_mask"].sum(axis=1)
    np.testing.assert_allclose(found["weights"], 1 / lengths)
    assert set(lengths) == {2}
    with pytest.raises(ValueError, match="seed 0, this one of 1"):
        experiments.build(supervised(seed=1)).batches(None).set_state(batches[0].get_state())
