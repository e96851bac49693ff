"""Every config builds its experiment; the full-size ones are the papers' sizes, without running."""

import importlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import pytest

import configs
import experiments
from experiments import images, next_scale, reasoning, self_play, token_rounds
from genjax_lab.attention import NeighborhoodSpec
from genjax_lab.objectives import Groups
from genjax_lab.parallel import make_mesh, parameter_shardings
from genjax_lab.training import (
    TrainState,
    default_config,
    default_self_play_config,
    make_train_step,
)
from genjax_lab.training.config import resolve_config
from genjax_lab.training.ema import ema_from_config

NAMES = sorted(
    path.stem for path in Path(configs.__file__).parent.glob("*.py") if path.stem != "__init__"
)
# Millions of parameters as published: arXiv 2206.00364 (Table 7), arXiv 2312.02696 (Table 2), arXiv
# 2404.02905 (Table 1).
PUBLISHED = {
    "cifar10_edm": 55.7,
    "imagenet64_edm": 296.0,
    "imagenet512_edm2": 280.0,
    "imagenet256_var": 310.0,
}
# Rounds of self-play, and the config of the run that they start from.
ROUNDS = {
    "digits_ddo": "digits_edm",
    "cifar10_ddo": "cifar10_edm",
    "imagenet64_ddo": "imagenet64_edm2",
    "digits_var_ddo": "digits_var",
    "mnist5k_ddo": "mnist5k_dit",
    "imagenet256_var_ddo": "imagenet256_var",
}


@pytest.fixture(autouse=True)
def tokenizer_without_weights(monkeypatch):
    """Next-scale models are told the shapes of a tokenizer that is not at hand."""

    def variables(config, codec):
        return codec.tokenizer.init(jax.random.key(0), jnp.zeros((1, *config.data.image_shape)))

    monkeypatch.setattr(next_scale, "tokenizer_variables", variables)
    monkeypatch.setattr(token_rounds, "max_value_of", lambda model: 255)


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


def load_shallow(name):
    """With one block of each kind: the others have the same shapes and take as long to trace."""
    config = load(name)
    depth = "depth" if config.network.name in ("DiT", "VAR", "var_imagenet") else "num_blocks"
    config.network = config.network.to_dict() | {depth: 1}
    return config


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(ROUNDS)))
def test_config_holds_what_the_loop_reads_and_builds_an_experiment(name):
    config = load(name)
    resolve_config(config)
    assert set(default_config()) <= set(config)
    experiments.build(config)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_full_size_network_has_the_published_size(name):
    variables = jax.eval_shape(experiments.build(load(name)).init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count / 1e6 == pytest.approx(PUBLISHED[name], rel=0.015)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_full_size_train_step_keeps_its_shapes(name):
    config = load_shallow(name)
    experiment = experiments.build(config)
    variables = jax.eval_shape(experiment.init, jax.random.key(0))
    train = make_train_step(
        experiment.objective,
        experiment.optimizer,
        batch_size=config.batch_size,
        ema=ema_from_config(config.ema.to_dict()),
        project=experiment.project,
    )
    state = jax.eval_shape(train.init, variables, jax.random.key(0))
    batches = {
        "image": jax.ShapeDtypeStruct(
            (1, config.batch_size, *config.data.image_shape), jnp.float32
        ),
        "label": jax.ShapeDtypeStruct((1, config.batch_size), jnp.int32),
    }
    after, metrics = jax.eval_shape(train.step, state, batches)
    assert metrics["loss"].shape == (1,)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )


def test_full_size_text_model_has_the_size_of_its_layers_and_keeps_its_shapes():
    config = load("openwebtext_mdm")
    whole = jax.eval_shape(experiments.build(config).init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(whole["params"]))
    block = 768 * (3 + 1 + 4 + 4) * 768 + 5 * 768 + 2 * 768 + 129 * 6 * 768
    rest = (2 * 50_257 + 1) * 768 + 50_257 + 768 + 129 * 2 * 768 + 257 * 128 + 129 * 128
    assert count == 12 * block + rest  # 169.6 million
    config.network.depth = 1
    experiment = experiments.build(config)
    train = make_train_step(
        experiment.objective,
        experiment.optimizer,
        batch_size=config.batch_size,
        ema=ema_from_config(config.ema.to_dict()),
    )
    variables = jax.eval_shape(experiment.init, jax.random.key(0))
    state = jax.eval_shape(train.init, variables, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, config.batch_size, config.data.length), jnp.int32)
    after, metrics = jax.eval_shape(train.step, state, {"tokens": tokens})
    assert metrics["nelbo"].shape == (1,)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


def answers_of(config, steps):
    """Shapes of the batches of a rollout."""
    rows = (steps, config.batch_size)
    prompt, answer = (*rows, config.prompt_length), (*rows, config.answer_length)
    shapes = {
        "prompt": (prompt, jnp.int32),
        "prompt_mask": (prompt, bool),
        "answer": (answer, jnp.int32),
        "answer_mask": (answer, bool),
        "counted": (answer, bool),
        "old_log_probs": (answer, jnp.float32),
        "outcome": (rows, jnp.float32),
        "weights": (rows, jnp.float32),
        "group_ids": (rows, jnp.int32),
    }
    shapes |= {f"group_{name}": (rows, jnp.float32) for name in Groups._fields[1:]}
    return {name: jax.ShapeDtypeStruct(*both) for name, both in shapes.items()}


@pytest.mark.parametrize(
    ("name", "count"),
    [("qwen2_5_math_7b_nft", 7_615_616_512), ("qwen2_5_32b_nft", 32_763_876_352)],
)
def test_full_size_policy_has_the_published_size_and_is_split_over_a_mesh(name, count):
    config = load(name)
    settings = reasoning.settings_of(config)
    assert settings.num_groups * settings.num_samples == 16 * config.batch_size == 8192
    experiment = experiments.build(config)
    variables = jax.eval_shape(experiment.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    train = make_train_step(
        experiment.objective,
        experiment.optimizer,
        batch_size=config.batch_size,
        mesh=mesh,
        ema={},
        accumulation_steps=config.accumulation_steps,
        steps_per_call=config.steps_per_call,
        max_grad_norm=config.max_grad_norm,
        compute_dtype=jnp.bfloat16,
    )
    state = jax.eval_shape(train.init, variables, jax.random.key(0))
    after, metrics = jax.eval_shape(train.step, state, answers_of(config, 16))
    assert metrics["share_floored"].shape == (16,)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    shardings = parameter_shardings(state, mesh)
    on_one = sum(
        math.prod(sharding.shard_shape(leaf.shape))
        for sharding, leaf in zip(jax.tree.leaves(shardings), jax.tree.leaves(state), strict=True)
    )
    # The parameters and the two moments of Adam: an eighth each, but for small leaves.
    assert on_one == pytest.approx(3 * count / 8, rel=0.001)


@pytest.mark.parametrize("name", sorted(ROUNDS))
def test_grid_of_a_round_at_full_size_keeps_its_shapes(name):
    config, model = load(name), load_shallow(ROUNDS[name])
    resolve_config(config)
    assert set(default_self_play_config()) <= set(config)
    experiment = experiments.build(model)
    train = make_train_step(
        experiment.objective,
        experiment.optimizer,
        batch_size=model.batch_size,
        ema=ema_from_config(model.ema.to_dict()),
    )
    variables = jax.eval_shape(experiment.init, jax.random.key(0))
    state = jax.eval_shape(train.init, variables, jax.random.key(0))
    parts = self_play.of_model(config, model, state)
    alpha, beta = config.alpha[:2], config.beta[:1] * 2
    train = make_train_step(
        parts.objective(alpha, beta, 20),
        parts.optimizer(),
        batch_size=config.batch_size,
        ema=ema_from_config(config.ema.to_dict()),
        project=parts.project and jax.vmap(parts.project),
    )
    members = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), parts.variables["params"]
    )
    variables = {**parts.variables, "params": members, "reference": parts.variables}
    state = jax.eval_shape(train.init, variables, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, config.batch_size, *model.data.image_shape), jnp.float32)
    label = jax.ShapeDtypeStruct((1, config.batch_size), jnp.int32)
    batches = {"image": image, "fake_image": image, "label": label, "fake_label": label}
    after, metrics = jax.eval_shape(train.step, state, batches)
    assert metrics["delta_real_mean/1"].shape == (1,)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("several", [False, True])
def test_neighborhoods_of_a_config_are_one_for_all_blocks_or_one_for_each(several):
    config, near = load("mnist5k_dit_gna"), NeighborhoodSpec(window=4, stride=2)
    if several:
        fields = {"neighborhood": [{"window": [4, 3]}, None, {"window": 4, "stride": 2}]}
        config.network = config.network.to_dict() | fields
        near = (NeighborhoodSpec((4, 3)), None, near)
    assert images.make_network(config).neighborhood == near
    read = ml_collections.ConfigDict(json.loads(config.to_json_best_effort()))
    assert images.make_network(read).neighborhood == near


def test_a_misspelt_neighborhood_is_named():
    config = load("mnist5k_dit")
    config.network = config.network.to_dict() | {"neighborhood": {"width": 4}}
    with pytest.raises(ValueError, match=r"neighborhood.*width"):
        images.make_network(config)


def test_rounds_of_an_unconditional_model_need_no_labels():
    model = load("digits_edm")
    model.data.num_classes = 0
    variables = jax.eval_shape(experiments.build(model).init, jax.random.key(0))
    state = TrainState(*[None] * 8).replace(constants={}, ema={"ema": variables["params"]})
    objective = self_play.of_model(load("digits_ddo"), model, state).objective((1.0,), (1.0,), 1)
    members = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), variables["params"]
    )
    image, label = jnp.zeros((4, 8, 8, 1)), jnp.zeros(4, jnp.int32)
    batch = {"image": image, "fake_image": image, "label": label, "fake_label": label}
    both = {**variables, "params": members, "reference": variables}
    assert jax.eval_shape(objective, both, batch, jax.random.key(0))[0].shape == ()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("domain", "sculptures", "images"),
        ("network.name", "Perceptron", "ResidualMLP"),
        ("network.name", "annotations", "ResidualMLP"),
        ("network.depth_of_field", 3, "depth_of_field"),
        ("process.name", "poisson", "edm"),
        ("optimizer.schedule", "step", "cosine"),
    ],
)
def test_unknown_names_say_what_there_is(path, value, message):
    config = load("digits_edm")
    with config.unlocked():
        section, _, field = path.rpartition(".")
        (config[section] if section else config)[field] = value
    with pytest.raises(ValueError, match=message):
        experiments.build(config)
