"""The DDO objective of diffusion models: what it evaluates, on which draws, one or many at once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax_lab import processes
from genjax_lab.objectives import (
    ddo_denoising,
    ddo_denoising_grid,
    ddo_loss,
    diffusion_log_likelihood,
    draw_times_and_noise,
    seeded_log_likelihoods,
    spin_loss,
)
from genjax_lab.parallel import batch_sharding, make_mesh
from genjax_lab.training.step import make_train_step

PROCESS = processes.edm()
ROWS, SHAPE = 16, (2, 2, 1)


class Network(nn.Module):
    """A small network with dropout, which the objective must not turn on."""

    @nn.compact
    def __call__(self, x, c_noise, labels=None, *, train=False):
        told = [x.reshape(len(x), -1), c_noise[:, None]]
        if labels is not None:
            told.append(jax.nn.one_hot(labels, 3))
        hidden = nn.tanh(nn.Dense(8)(jnp.concatenate(told, axis=-1)))
        hidden = nn.Dropout(0.5, deterministic=not train)(hidden)
        return nn.Dense(x[0].size)(hidden).reshape(x.shape)


def weights(seed):
    batch = make_batch()
    told = np.ones(ROWS), batch["label"]
    shapes = jax.eval_shape(Network().init, jax.random.key(0), batch["image"], *told)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: 0.4 * rng.standard_normal(s.shape).astype(np.float32), shapes)


def make_batch(rows=ROWS):
    rng = np.random.default_rng(7)
    image, fake = rng.uniform(-1, 1, (2, rows, *SHAPE)).astype(np.float32)
    return {
        "image": image,
        "fake_image": fake,
        "label": np.arange(rows, dtype=np.int32) % 3,
        "fake_label": (np.arange(rows, dtype=np.int32) + 1) % 3,
    }


def objective(**options):
    return ddo_denoising(Network().apply, PROCESS, **({"alpha": 2.0, "beta": 0.3} | options))


def evaluate(variables, batch, key, **options):
    return jax.jit(objective(**options))(variables, batch, key)


@pytest.fixture(scope="module")
def variables():
    return weights(0) | {"reference": weights(1)}


KEY = jax.random.key(5)


@jax.jit
def by_hand(variables, batch, draws):
    """Log-ratios of data and samples, one call for each of the four evaluations."""
    log_p = diffusion_log_likelihood(Network().apply, PROCESS)
    own, frozen = {"params": variables["params"]}, variables["reference"]
    return [
        log_p(own, batch[x], batch[c], *draws) - log_p(frozen, batch[x], batch[c], *draws)
        for x, c in (("image", "label"), ("fake_image", "fake_label"))
    ]


def draws_of(index):
    key = jax.random.fold_in(KEY, index)
    return draw_times_and_noise(PROCESS, key, (ROWS, *SHAPE))


# One objective


def test_the_four_evaluations_share_their_draws_and_each_has_its_own_label(variables):
    batch = make_batch()
    expected, metrics = ddo_loss(*by_hand(variables, batch, draws_of(0)), 2.0, 0.3)
    loss, found = evaluate(variables, batch, KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    own = diffusion_log_likelihood(Network().apply, PROCESS, reduce="mean")(
        {"params": variables["params"]}, batch["image"], batch["label"], *draws_of(0)
    )
    np.testing.assert_allclose(found["mle_loss"], -np.mean(own), rtol=1e-5)
    mean, found = evaluate(variables, batch, KEY, reduce="mean", beta=0.3 * 4)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    np.testing.assert_allclose(found["mle_loss"], -np.mean(own), rtol=1e-5)


def test_samples_belong_to_their_rows_draws_and_labels(variables):
    batch = make_batch()
    order = np.random.default_rng(0).permutation(ROWS)
    mixed = batch | {name: batch[name][order] for name in ("fake_image", "fake_label")}
    real, fake = by_hand(variables, batch, draws_of(0))
    t, noise = draws_of(0)
    permuted = by_hand(variables, mixed, (t[order], noise[order]))[1]
    plain = ddo_loss(real, fake, 2.0, 0.3)[0]
    # With their draws permuted too nothing changes; with samples or labels alone, much does.
    np.testing.assert_allclose(ddo_loss(real, permuted, 2.0, 0.3)[0], plain, rtol=1e-5)
    value = jax.jit(objective())
    np.testing.assert_allclose(value(variables, batch, KEY)[0], plain, rtol=1e-5)
    assert abs(value(variables, mixed, KEY)[0] - plain) > 1e-3
    mislabelled = batch | {"fake_label": batch["label"]}
    assert abs(value(variables, mislabelled, KEY)[0] - plain) > 1e-3


def test_equal_networks_start_at_a_coin_and_random_ones_do_not(variables):
    same = weights(1) | {"reference": weights(1)}
    gradient = jax.jit(jax.value_and_grad(objective(num_draws=2), has_aux=True))
    (loss, metrics), slope = gradient(same, make_batch(), KEY)
    np.testing.assert_allclose(loss, 3 * np.log(2), atol=1e-6)
    assert metrics["delta_real_std"] == metrics["delta_fake_std"] == metrics["margin"] == 0
    assert metrics["accuracy"] == 0.5
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(slope["params"]))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(slope["reference"]))
    assert evaluate(variables, make_batch(), KEY)[1]["delta_real_std"] > 0.1


def test_draws_are_averaged_inside_the_sigmoid_or_outside(variables):
    batch = make_batch()
    ratios = [by_hand(variables, batch, draws_of(index)) for index in range(4)]
    inside = ddo_loss(*np.mean(ratios, axis=0), 2.0, 0.3)[0]
    outside = np.mean([ddo_loss(*ratio, 2.0, 0.3)[0] for ratio in ratios])
    found = evaluate(variables, batch, KEY, num_draws=4)[0]
    np.testing.assert_allclose(found, inside, rtol=1e-5)
    found = evaluate(variables, batch, KEY, num_draws=4, inside=False)[0]
    np.testing.assert_allclose(found, outside, rtol=1e-5)


def test_more_draws_inside_the_sigmoid_never_raise_the_bound(variables):
    # Means over nested subsets of 16 draws: Jensen's inequality holds for each batch, exactly.
    batch = make_batch()
    ratios = np.array([by_hand(variables, batch, draws_of(index)) for index in range(16)])
    bounds = [
        np.mean(
            [ddo_loss(*part.mean(axis=0), 2.0, 0.3)[0] for part in np.split(ratios, 16 // size)]
        )
        for size in (1, 4, 16)
    ]
    assert bounds[0] > bounds[1] > bounds[2]


def test_antithetic_draws_are_pairs_of_opposite_noise(variables):
    batch = make_batch()
    ratios = [
        by_hand(variables, batch, (t, sign * noise))
        for t, noise in (draws_of(0), draws_of(1))
        for sign in (1, -1)
    ]
    expected = ddo_loss(*np.mean(ratios, axis=0), 2.0, 0.3)[0]
    found = evaluate(variables, batch, KEY, num_draws=4, antithetic=True)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_another_loss_of_log_ratios_takes_its_place(variables):
    spin = lambda real, fake, alpha, beta: spin_loss(real, fake, beta)  # noqa: E731
    batch = make_batch()
    expected = spin_loss(*by_hand(variables, batch, draws_of(0)), 0.3)[0]
    found = evaluate(variables, batch, KEY, loss=spin)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_recorded_terms_replace_the_reference(variables):
    batch = make_batch() | {"seed": np.arange(ROWS), "fake_seed": np.arange(ROWS) + 100}
    options = {"num_draws": 2, "antithetic": True}
    terms = {
        f"{kind}reference_terms": seeded_log_likelihoods(
            *(Network().apply, PROCESS, variables["reference"]),
            *(batch[f"{kind}{name}"] for name in ("image", "label", "seed")),
            **options,
        )
        for kind in ("", "fake_")
    }
    value = jax.jit(objective(**options))
    expected, metrics = value(variables, batch, KEY)
    network = {"params": variables["params"]}
    found, _ = value(network, batch | terms, jax.random.key(99))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert metrics["delta_real_std"] > 0.1
    shifted = batch | {"seed": batch["seed"] + 1}
    assert abs(value(variables, shifted, KEY)[0] - expected) > 1e-4


# A grid


@pytest.fixture(scope="module")
def grid():
    alpha, beta = (0.5, 2.0, 6.0), (1.0, 0.3, 0.1)
    members = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(weights(s) for s in (3, 0, 4)))
    value = ddo_denoising_grid(Network().apply, PROCESS, alpha=alpha, beta=beta)
    return (
        alpha,
        beta,
        members | {"reference": weights(1)},
        jax.jit(jax.value_and_grad(value, has_aux=True)),
    )


def test_every_member_of_a_grid_is_the_objective_alone(grid):
    alpha, beta, members, gradient = grid
    (loss, metrics), slopes = gradient(members, make_batch(), KEY)
    total = 0.0
    for i in range(3):
        alone = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], members["params"])}
        (value, expected), slope = jax.jit(
            jax.value_and_grad(objective(alpha=alpha[i], beta=beta[i]), has_aux=True)
        )(alone | {"reference": weights(1)}, make_batch(), KEY)
        total += value
        np.testing.assert_allclose(metrics[f"loss/{i}"], value, rtol=1e-5)
        for name in expected:
            np.testing.assert_allclose(
                metrics[f"{name}/{i}"], expected[name], rtol=1e-3, atol=1e-4, err_msg=name
            )
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-5),
            slopes["params"],
            slope["params"],
        )
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert all(np.shape(value) == () for value in metrics.values())


def test_members_equal_to_the_reference_start_at_exactly_zero(grid):
    _, _, members, gradient = grid
    same = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), weights(1))
    (_, metrics), _ = gradient(same | {"reference": members["reference"]}, make_batch(), KEY)
    assert all(metrics[f"delta_{x}_std/{i}"] == 0 for x in ("real", "fake") for i in range(3))
    assert all(metrics[f"margin/{i}"] == 0 for i in range(3))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_member_that_is_not_finite_stops_alone(grid, bad):
    _, _, members, gradient = grid
    (_, healthy), expected = gradient(members, make_batch(), KEY)
    broken = jax.tree.map(lambda leaf: leaf.at[1].set(bad), members["params"])
    (loss, metrics), slopes = gradient(members | {"params": broken}, make_batch(), KEY)
    np.testing.assert_allclose(loss, healthy["loss/0"] + healthy["loss/2"], rtol=1e-6)
    assert [bool(metrics[f"finite/{i}"]) for i in range(3)] == [True, False, True]
    for found, other in zip(
        *map(jax.tree.leaves, (slopes["params"], expected["params"])), strict=True
    ):
        assert np.all(found[1] == 0)
        np.testing.assert_allclose(found[::2], other[::2], rtol=1e-6)


# Training


def test_the_train_step_moves_the_network_and_not_the_reference(variables):
    train = make_train_step(objective(), optax.sgd(0.05), batch_size=ROWS, ema={})
    state = train.init(weights(1) | {"reference": weights(1)}, jax.random.key(0))
    batch = jax.tree.map(lambda leaf: leaf[None], make_batch())
    losses = []
    for step in range(20):
        state, metrics = train.step(state, batch)
        losses.append(float(metrics["loss"][0]))
        if step == 0:
            assert metrics["delta_real_std"][0] == metrics["margin"][0] == 0
    assert abs(losses[0] - 3 * np.log(2)) < 1e-5
    assert np.mean(losses[-5:]) < losses[0] - 0.05
    assert np.all(metrics["margin"] > 0)
    for found, before in zip(
        *map(jax.tree.leaves, (state.constants["reference"], weights(1))), strict=True
    ):
        np.testing.assert_array_equal(found, before)


def test_sharded_loss_and_gradient_equal_those_of_one_device(variables):
    gradient = jax.value_and_grad(objective(num_draws=2), has_aux=True)
    expected = jax.jit(gradient)(variables, make_batch(), KEY)
    mesh = make_mesh(data=8)
    whole = jax.NamedSharding(mesh, jax.P())
    split = jax.jit(gradient, in_shardings=(whole, batch_sharding(mesh), whole))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
        split(variables, make_batch(), KEY),
        expected,
    )


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, '"image"'),
        ({"fake_image": None}, '"fake_image"'),
        ({"fake_image": np.zeros((ROWS - 1, *SHAPE), np.float32)}, r"fake_image.*\[16, 2, 2, 1\]"),
        ({"fake_image": np.zeros((ROWS, *SHAPE), np.uint8)}, "fake_image.*uint8"),
        ({"fake_label": None}, '"fake_label"'),
        ({"seed": np.arange(ROWS)}, '"fake_seed"'),
        ({"reference_terms": np.zeros(ROWS, np.float32)}, '"fake_reference_terms"'),
        (
            {f"{x}reference_terms": np.zeros(ROWS, np.float32) for x in ("", "fake_")},
            '"seed"',
        ),
        (
            {f"{x}reference_terms": np.zeros(3, np.float32) for x in ("", "fake_")},
            r"\[16, 1\].*num_draws.*\[3\]",
        ),
    ],
)
def test_refuses_batches_that_are_not_as_described(variables, change, message):
    batch = {k: v for k, v in (make_batch() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(objective(), variables, batch, KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha.*-1"),
        ({"beta": 0.0}, "beta"),
        ({"num_draws": 0}, "num_draws.*0"),
        ({"num_draws": 3, "antithetic": True}, "num_draws.*3"),
        ({"reduce": "max"}, "reduce"),
    ],
)
def test_refuses_options_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        objective(**options)


def test_refuses_variables_without_reference_and_members_of_another_number(variables, grid):
    with pytest.raises(ValueError, match='"reference"'):
        jax.eval_shape(objective(), weights(0), make_batch(), KEY)
    with pytest.raises(ValueError, match=r"reference.*structure"):
        jax.eval_shape(objective(), weights(0) | {"reference": {}}, make_batch(), KEY)
    value = ddo_denoising_grid(Network().apply, PROCESS, alpha=[1.0, 2.0], beta=[1.0, 1.0])
    with pytest.raises(ValueError, match="2 members"):
        jax.eval_shape(value, grid[2], make_batch(), KEY)
    with pytest.raises(ValueError, match="alpha and beta"):
        ddo_denoising_grid(Network().apply, PROCESS, alpha=[1.0], beta=[1.0, 2.0])
