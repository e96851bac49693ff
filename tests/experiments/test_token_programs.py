"""Tokenizer, next-scale model and rounds of DDO, each on the run of the one before."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import experiments
from configs import digits_tokenizer, digits_var, digits_var_ddo
from experiments import next_scale, self_play, token_rounds
from genjax_lab import data
from genjax_lab.training import restore, train

SHORT = {
    **{"num_steps": 20, "steps_per_call": 10, "checkpoint_every": 20, "progress": False},
    "tensorboard": False,
}
ROUND = {
    **{"num_fakes": 64, "batch_size": 32, "num_steps": 4, "steps_per_call": 2, "eval_every": 4},
    **{"checkpoint_every": 4, "log_every": 2, "selection_seeds": 48, "fresh_seeds": 48},
    **{"optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 0, "progress": False},
    "tensorboard": False,
}


def shortened(config, changes):
    config.update_from_flattened_dict(changes)
    config.mesh.data = 1
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("runs")
    evaluation = {
        **{"evaluation.num_samples": 48, "evaluation.batch_size": 48},
        "evaluation.cache_dir": str(cache),
    }
    config = shortened(digits_tokenizer.get_config(), SHORT | evaluation)
    train(experiments.build(config), workdir=folder / "tokenizer", config=config)
    config = shortened(digits_var.get_config(), SHORT | evaluation)
    config.update_from_flattened_dict({"network.width": 16, "network.depth": 1, "batch_size": 64})
    config.tokenizer.run = str(folder / "tokenizer")
    train(experiments.build(config), workdir=folder / "var", config=config)
    return folder


def rounds(runs, **changes):
    config = shortened(digits_var_ddo.get_config(), ROUND | changes)
    config.base = str(runs / "var")
    return config


def test_a_tokenizer_is_judged_by_its_reconstructions(runs):
    experiment, restored = experiments.from_checkpoint(runs / "tokenizer")
    seeds, images = zip(*experiment.sample(restored.state, range(30, 60)), strict=True)
    assert np.array_equal(np.concatenate(seeds), range(30, 60))
    restored.state.variables("ema")
    config = ml_collections.ConfigDict(restored.config)
    real = np.concatenate([x["image"] for x in _reference(config)])[30:60]
    network = experiments.tokenizer.make_tokenizer(config.network)
    expected = network.apply(restored.state.variables("ema"), real).reconstruction
    info = data.dataset_info("digits")
    differences = np.concatenate(images).astype(int) - data.quantize(np.asarray(expected), info)
    assert np.abs(differences).max() <= 1  # rounding at a level's edge

    values = experiment.evaluate(restored.state)
    everything = np.concatenate([x["image"] for x in _reference(config)])
    output = network.apply(restored.state.variables("ema"), everything)
    error = np.mean((np.asarray(output.reconstruction) - everything) ** 2)
    np.testing.assert_allclose(values["reconstruction_error"], error, rtol=1e-4)
    for side in (1, 2, 4):
        assert 0 < values[f"used_codes/scale_{side}"] <= 1
    # Seeds go round: the image after the last is the first.
    ((_, again),) = experiment.sample(restored.state, range(len(everything), len(everything) + 3))
    ((_, first),) = experiment.sample(restored.state, range(3))
    np.testing.assert_array_equal(again, first)


def _reference(config):
    return experiments.image_data.make_batches(
        config, "train+test", 500, num_epochs=1, shuffle=False, drop_remainder=False
    )


def test_a_model_is_sampled_without_its_tokenizers_run(runs, tmp_path):
    elsewhere = tmp_path / "moved"
    (runs / "tokenizer").rename(elsewhere)
    try:
        experiment, restored = experiments.from_checkpoint(runs / "var")
        ((_, images),) = experiment.sample(restored.state, range(40))
        experiment.write(images, tmp_path / "x.png")
    finally:
        elsewhere.rename(runs / "tokenizer")
    assert images.shape == (40, 8, 8, 1) and images.dtype == np.uint8
    assert (tmp_path / "x.png").stat().st_size > 1000


FAKES = {
    "pool": {},
    "tokens": {"fake_roundtrip": False, "fake_temperature": 1.2, "uncond_mode": "mle"},
    "online": {"fake_online": True},
}


@pytest.mark.parametrize("fakes", ["pool", "online"])
def test_rounds_end_in_a_run_of_the_same_kind(runs, tmp_path, fakes):
    experiments.run(rounds(runs, **FAKES[fakes]), tmp_path)
    assert (tmp_path / "round_1/pool").exists() == (fakes != "online")
    restored = experiments.from_checkpoint(tmp_path)[1]
    base = restore(runs / "var").state.variables("ema")
    jax.tree.map(
        np.testing.assert_array_equal, restored.state.constants["tokenizer"], base["tokenizer"]
    )
    moved = jax.tree.leaves(
        jax.tree.map(lambda a, b: np.any(a != b), restored.state.params, base["params"])
    )
    assert np.mean(moved) > 0.9


def drawn_pool(parts):
    drawn = [samples for _, samples in parts.draw(parts.variables, range(64))]
    pool = {name: np.concatenate([part[name] for part in drawn]) for name in drawn[0]}
    return {**pool, "label": parts.label(range(64))}


@pytest.mark.parametrize("fakes", sorted(FAKES))
def test_the_ratios_are_exactly_zero_at_the_start_of_a_round(runs, fakes):
    parts, _ = self_play.build(rounds(runs, **FAKES[fakes]))
    pool = None if parts.draw is None else drawn_pool(parts)
    batch = next(parts.batches(pool, 0, parts.variables, 1))
    copies = jax.tree.map(lambda x: jnp.stack([x, x]), parts.variables["params"])
    variables = {**parts.variables, "params": copies, "reference": parts.variables}
    objective = jax.jit(parts.objective((1.0, 4.0), (0.1, 0.1), 1))
    _, metrics = objective(variables, batch, jax.random.key(0))
    for member, alpha in enumerate((1.0, 4.0)):
        assert metrics[f"delta_real_std/{member}"] == metrics[f"delta_fake_std/{member}"] == 0
        assert metrics[f"loss/{member}"] > 0.5 * (1 + alpha) * np.log(2) / max(alpha, 1)


def test_a_pool_holds_images_as_the_data_and_the_tokens_that_they_were(runs):
    parts, model = self_play.build(rounds(runs))
    pool = drawn_pool(parts)
    assert pool["image"].dtype == np.uint8 and pool["tokens"].shape == (64, 21)
    codec = next_scale.Codec(next_scale.tokenizer_of(ml_collections.ConfigDict(model)))
    levels = token_rounds.to_levels(codec.decode(parts.variables["tokenizer"], pool["tokens"]), 16)
    info = data.dataset_info("digits")
    np.testing.assert_array_equal(np.asarray(levels), data.dequantize(pool["image"], info))
    batch = next(parts.batches(pool, 0, parts.variables, 1))
    row = np.flatnonzero([np.array_equal(batch["fake_tokens"][0], x) for x in pool["tokens"]])[0]
    np.testing.assert_array_equal(batch["fake_image"][0], data.dequantize(pool["image"], info)[row])
    assert batch["fake_label"][0] == pool["label"][row]


@pytest.mark.parametrize("fakes", ["pool", "tokens"])
def test_recorded_terms_give_the_loss_of_the_reference(runs, fakes):
    losses, pool = [], None
    for recorded in (0, 1):
        parts, _ = self_play.build(rounds(runs, recorded_draws=recorded, **FAKES[fakes]))
        pool = pool or drawn_pool(parts)
        batch = next(parts.batches(pool, 0, parts.variables, 1))
        assert ("reference_terms" in batch) == bool(recorded)
        moved = jax.tree.map(lambda x: 1.1 * x[None], parts.variables["params"])
        variables = {**parts.variables, "params": moved, "reference": parts.variables}
        objective = jax.jit(parts.objective((4.0,), (0.1,), 1))
        if recorded:  # these are what the step sees
            batch |= {name: np.zeros_like(batch[name]) for name in ("image", "fake_image")}
        losses.append(float(objective(variables, batch, jax.random.key(0))[0]))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_samples_drawn_online_are_decoded_and_encoded_again(runs):
    model = ml_collections.ConfigDict(restore(runs / "var").config)
    variables = restore(runs / "var").state.variables("ema")
    codec = next_scale.Codec(next_scale.tokenizer_of(model))
    network = next_scale.make_network(model, codec)
    batch = {"image": np.zeros((16, 8, 8, 1)), "label": np.arange(16) % 10}
    plain, again = (
        token_rounds.fake_tokens(
            rounds(runs, fake_online=True, fake_roundtrip=roundtrip),
            *(model, network, codec, variables, batch, jax.random.key(0)),
        )
        for roundtrip in (False, True)
    )
    levels = token_rounds.to_levels(codec.decode(variables["tokenizer"], plain), 16)
    np.testing.assert_array_equal(again, codec.encode(variables["tokenizer"], levels))
    assert np.any(again != plain)


def test_levels_are_those_of_the_data():
    info = data.dataset_info("digits")
    images = np.random.default_rng(0).uniform(-1.2, 1.2, (50, 8, 8, 1)).astype(np.float32)
    expected = data.dequantize(data.quantize(images, info), info)
    np.testing.assert_array_equal(np.asarray(token_rounds.to_levels(images, 16)), expected)


def test_the_temperature_of_fakes_reaches_the_sampler(runs):
    pools = [
        drawn_pool(self_play.build(rounds(runs, fake_temperature=t))[0])["tokens"]
        for t in (1e-3, 1.0)  # of a model that has learned next to nothing
    ]
    cold, warm = (np.bincount(tokens.ravel(), minlength=64) / tokens.size for tokens in pools)
    assert np.sum(cold**2) > 1.2 * np.sum(warm**2)  # colder samples repeat themselves


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "spin"}, "spin.*ddo_normalized"),
        ({"uncond_mode": "cfg"}, "cfg"),
        ({"label_dropout": 2.0}, r"\[0, 1\]"),
        ({"num_draws": 4}, "num_draws.*images"),
        ({"recorded_draws": 2}, "0 or 1"),
        ({"recorded_draws": 1, "fake_online": True}, "fake_online"),
        ({"fake_temperature": 0.0}, "temperature"),
    ],
)
def test_rounds_refuse_what_does_not_fit(runs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        experiments.run(rounds(runs, **changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.run": None}, "tokenizer.*run"),
        ({"tokenizer.vocab_size": 32}, "another tokenizer"),
        ({"tokenizer.name": "DiT"}, "no ImageTokenizer"),
        ({"network.name": "DiT"}, "does not fit DiT"),
        ({"network.vocab_size": 32}, "vocab_size"),
        ({"sampler.temperature": -1.0}, "temperature"),
    ],
)
def test_a_model_refuses_what_does_not_fit(runs, changes, message):
    config = digits_var.get_config()
    config.tokenizer.run = str(runs / "tokenizer")
    with config.unlocked():
        for path, value in changes.items():
            section, _, name = path.rpartition(".")
            config[section][name] = value
    with pytest.raises(ValueError, match=message):
        experiment = experiments.build(config)
        variables = experiment.init(jax.random.key(0))
        state = restore(runs / "var").state.replace(params=variables["params"])
        next(experiment.sample(state, range(4)))
