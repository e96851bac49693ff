"""A masked diffusion model of text is trained, evaluated and sampled from its path."""

import json

import ml_collections
import numpy as np
import pytest

import experiments
from configs import digits_mdm, pydoc_mdm
from experiments import text
from genjax_lab import data


def small_config(folder):
    config = pydoc_mdm.get_config()
    config.data.data_dir = str(folder)
    config.data.length = 16
    config.data.tokenizer = ml_collections.ConfigDict({"kind": "byte"})
    config.network.update({"width": 16, "depth": 1, "num_heads": 2})
    config.objective.max_rows = 4
    config.optimizer.update({"decay_steps": 4, "warmup_steps": 1})
    config.update({"batch_size": 8, "num_steps": 4, "steps_per_call": 2, "log_every": 2})
    config.update({"checkpoint_every": 2, "eval_every": 4, "progress": False, "tensorboard": False})
    config.evaluation.update({"num_samples": 16, "batch_size": 16, "num_draws": 1})
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "text"
    experiments.run(small_config(folder), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def restored(run):
    return experiments.from_checkpoint(str(run))


def test_the_log_holds_bound_and_samples(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"nelbo", "masked_nll", "masked_accuracy"} <= set(rows[0])
    (last,) = [row for row in rows if any("perplexity" in name for name in row)]
    found = {name.split("/")[-1]: value for name, value in last.items()}
    assert 0 < found["nelbo"] < 10 and found["perplexity"] > 1 and 0 < found["entropy"] < 3
    assert found["evaluations"] == 16 and found["share_with_masks"] == 0


def test_samples_are_text_of_their_own_seed(restored, tmp_path):
    experiment, state = restored[0], restored[1].state
    ((seeds, tokens),) = experiment.sample(state, range(3, 8))
    assert list(seeds) == [3, 4, 5, 6, 7] and tokens.shape == (5, 16)
    ((_, again),) = experiment.sample(state, [6])
    np.testing.assert_array_equal(again[0], tokens[3])
    experiment.write(tokens, tmp_path / "s.jsonl", before=tokens[:1])
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["group"] for row in rows] == ["samples"] * 5 + ["before"]
    experiment.write(tokens, tmp_path / "s.txt")
    assert "[samples 4]" in (tmp_path / "s.txt").read_text()
    experiment.write(tokens, tmp_path / "s.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "s.npz")["samples"], tokens)
    with pytest.raises(ValueError, match="path"):
        experiment.write(tokens, tmp_path / "s.png")


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "ancestral", "num_steps": 4, "schedule": "cosine"},
        {"name": "confidence", "num_steps": 4, "rank": "margin"},
        {"name": "remasking", "num_steps": 4, "strategy": "confidence"},
        {"name": "first_hitting", "tokens_per_step": 4, "top_p": 0.9},
    ],
)
def test_samplers_are_named_by_the_config(restored, folder, sampler):
    config = small_config(folder)
    config.sampler = ml_collections.ConfigDict(sampler)
    experiment = experiments.build(config)
    found = experiment.evaluate(restored[1].state, metrics=("entropy", "evaluations"))
    assert found["evaluations"] == 4 and found["share_with_masks"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": {"name": "heun"}}, "sampler.name"),
        ({"sampler": {"name": "ancestral"}}, "sampler does not fit"),
        ({"objective": {"schedule": "square"}}, "schedule"),
        ({"objective": {"form": "sum"}}, "form"),
        ({"objective": {"forms": "count"}}, "objective does not fit"),
        ({"data": {"tokenizer": {"kind": "letters"}}}, "kind"),
        ({"data": {"feature": "body"}}, "feature"),
        ({"network": {"widths": 3}}, "network does not fit"),
    ],
)
def test_mistakes_in_a_config_are_named(restored, folder, change, message):
    config = small_config(folder)
    with config.unlocked():
        config.update(change)
    with pytest.raises(ValueError, match=message):
        experiment = experiments.build(config)
        experiment.evaluate(restored[1].state, metrics=("entropy",))


def test_models_of_blocks_are_trained_and_sampled(folder, tmp_path):
    config = small_config(folder)
    config.objective.block = 8
    config.sampler = ml_collections.ConfigDict({"name": "block_diffusion", "tokens_per_step": 2})
    experiments.run(config, str(tmp_path / "run"))
    experiment, restored = experiments.from_checkpoint(str(tmp_path / "run"))[:2]
    found = experiment.evaluate(restored.state, metrics=("entropy", "evaluations"))
    assert found["evaluations"] == 2 * 5 - 1 and found["share_with_masks"] == 0
    config.sampler = ml_collections.ConfigDict({"name": "first_hitting"})
    with pytest.raises(ValueError, match=r"objective\.block"):
        experiments.build(config).evaluate(restored.state, metrics=("entropy",))


def test_pixels_are_tokens_too(folder, tmp_path):
    config = digits_mdm.get_config()
    config.data.data_dir = str(folder)
    small = small_config(folder)
    for name in ("network", "optimizer", "evaluation"):
        config[name] = small[name]
    config.update({"batch_size": 8, "num_steps": 2, "steps_per_call": 2, "log_every": 2})
    config.update({"checkpoint_every": 2, "eval_every": 2, "progress": False})
    config.tensorboard = False
    experiments.run(config, str(tmp_path / "run"))
    experiment, restored = experiments.from_checkpoint(str(tmp_path / "run"))[:2]
    ((_, tokens),) = experiment.sample(restored.state, range(3))
    assert tokens.shape == (3, 64) and tokens.max() < 17
    experiment.write(tokens, tmp_path / "s.png", before=tokens[:1])
    assert (tmp_path / "s.png").stat().st_size > 1000
    experiment.write(tokens, tmp_path / "s.npz")
    images = np.load(tmp_path / "s.npz")["images"]
    np.testing.assert_array_equal(images.reshape(3, 64), tokens)
    config.data.tokenizer.vocab_size = 16
    with pytest.raises(ValueError, match="vocab_size=16"):
        text.Text(config).tokens("train")
    for size in (None, 300):
        config.data.tokenizer.vocab_size = size
        with pytest.raises(ValueError, match="number of levels"):
            experiments.build(config)
    config.data.tokenizer.vocab_size = 17
    config.network = config.network.to_dict() | {"vocab_size": 10}
    with pytest.raises(ValueError, match="number of levels"):
        experiments.build(config)


def test_runs_from_before_there_were_blocks_are_sampled(restored, folder):
    config = small_config(folder)
    with config.unlocked():
        del config.objective.block
    found = experiments.build(config).evaluate(restored[1].state, metrics=("evaluations",))
    assert found["evaluations"] == 16


def test_unknown_metrics_are_named(restored):
    with pytest.raises(ValueError, match="metrics"):
        restored[0].evaluate(restored[1].state, metrics=("frechet",))


def test_a_tokenizer_from_a_file_needs_no_other_data(folder, tmp_path):
    path = tmp_path / "tokenizer.json"
    data.learn_tokenizer("bpe", ["some text to learn from"], vocab_size=270).save(str(path))
    config = small_config(folder)
    config.data.tokenizer = ml_collections.ConfigDict({"kind": "bpe", "path": str(path)})
    config.data.name = "no such data set"
    assert text.Text(config).tokenizer.get_vocab_size() <= 270
    experiments.build(config)
