"""The DDO objective of token models, above all what happens to rows with a dropped label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.objectives import (
    LabelDropout,
    autoregressive_log_likelihood,
    ddo_loss,
    ddo_tokens,
    ddo_tokens_grid,
    draw_times_and_masks,
    masked_log_likelihood,
)

ROWS, LENGTH, VOCAB, CLASSES = 8, 5, 4, 3
KEY = jax.random.key(3)


def markov(variables, tokens, label, *, train):
    """Logits by class and the token before; class 3 is none."""
    assert train is False
    before = jnp.concatenate([jnp.full_like(tokens[:, :1], VOCAB), tokens[:, :-1]], axis=1)
    return variables["params"][label[:, None], before]


def masked(variables, tokens, t, label, *, train):
    neighbour = jnp.roll(tokens, 1, axis=1)
    return variables["params"][label[:, None], neighbour] * t[:, None, None]


def table(seed):
    return np.random.default_rng(seed).standard_normal((CLASSES + 1, VOCAB + 1, VOCAB)) * 0.5


@pytest.fixture(scope="module")
def variables():
    return {"params": jnp.float32(table(0)), "reference": {"params": jnp.float32(table(1))}}


def make_batch():
    rng = np.random.default_rng(2)
    tokens, fake = rng.integers(0, VOCAB, (2, ROWS, LENGTH))
    return {
        "tokens": tokens,
        "fake_tokens": fake,
        "label": np.arange(ROWS) % CLASSES,
        "fake_label": (np.arange(ROWS) + 1) % CLASSES,
    }


def objective(**options):
    options = {"alpha": 10.0, "beta": 0.4} | options
    dropout = {n: options.pop(n) for n in ("null_label", "rate", "mode") if n in options}
    return ddo_tokens(
        autoregressive_log_likelihood(markov), label_dropout=LabelDropout(**dropout), **options
    )


def log_p(table, tokens, label):
    return autoregressive_log_likelihood(markov)({"params": table}, tokens, label)


def ratios(variables, batch):
    own, frozen = variables["params"], variables["reference"]["params"]
    return [
        log_p(own, batch[x], batch[c]) - log_p(frozen, batch[x], batch[c])
        for x, c in (("tokens", "label"), ("fake_tokens", "fake_label"))
    ]


DROPPED = np.arange(ROWS) % 3 == 0


def test_the_loss_is_that_of_exact_log_ratios_over_the_larger_of_alpha_and_one(variables):
    batch = make_batch()
    expected = ddo_loss(*ratios(variables, batch), 10.0, 0.4)[0]
    loss, metrics = objective()(variables, batch, KEY)
    np.testing.assert_allclose(loss, expected / 10, rtol=1e-5)
    nll = -np.mean(log_p(variables["params"], batch["tokens"], batch["label"])) / LENGTH
    np.testing.assert_allclose(metrics["mle_loss"], nll, rtol=1e-5)
    plain = objective(normalize_by_alpha=False)(variables, batch, KEY)[0]
    np.testing.assert_allclose(plain, expected, rtol=1e-5)


def test_equal_networks_start_at_a_coin(variables):
    same = {"params": variables["params"], "reference": {"params": variables["params"]}}
    gradient = jax.jit(jax.value_and_grad(objective(), has_aux=True))
    (loss, metrics), _ = gradient(same, make_batch(), KEY)
    np.testing.assert_allclose(loss, 11 * np.log(2) / 10, atol=1e-6)
    assert metrics["delta_real_std"] == metrics["delta_fake_std"] == metrics["margin"] == 0


def test_rows_with_a_dropped_label_see_no_samples(variables):
    batch = make_batch() | {"label_dropped": DROPPED}
    for mode in ("alpha0", "mle"):
        value = jax.jit(objective(null_label=CLASSES, mode=mode))
        loss, slope = jax.value_and_grad(lambda v, b, f=value: f(v, b, KEY)[0])(variables, batch)
        changed = np.where(
            DROPPED[:, None], (batch["fake_tokens"] + 1) % VOCAB, batch["fake_tokens"]
        )
        other = value(variables, batch | {"fake_tokens": changed}, KEY)[0]
        np.testing.assert_allclose(other, loss, rtol=1e-6)
        # The rows of "no class" are trained by the dropped rows' data alone, and are trained.
        assert np.any(slope["params"][CLASSES] != 0)
        only = batch | {"tokens": np.where(DROPPED[:, None], batch["tokens"], 0)}
        np.testing.assert_allclose(
            jax.grad(lambda v, b, f=value: f(v, b, KEY)[0])(variables, only)["params"][CLASSES],
            slope["params"][CLASSES],
            rtol=1e-5,
            atol=1e-7,
        )
        kept_changed = batch | {"fake_tokens": (batch["fake_tokens"] + 1) % VOCAB}
        assert abs(value(variables, kept_changed, KEY)[0] - loss) > 1e-4


def test_the_two_modes_are_the_data_term_and_the_likelihood(variables):
    batch = make_batch()
    null = {name: np.where(DROPPED, CLASSES, batch[name]) for name in ("label", "fake_label")}
    real, fake = ratios(variables, batch | null)
    kept = np.float32(~DROPPED)
    dropped = batch | {"label_dropped": DROPPED}
    data_term = ddo_loss(real, fake, 10.0, 0.4, fake_weight=kept)[0] / 10
    found = objective(null_label=CLASSES)(variables, dropped, KEY)[0]
    np.testing.assert_allclose(found, data_term, rtol=1e-5)
    nll = -log_p(variables["params"], batch["tokens"], null["label"]) / LENGTH
    likelihood = ddo_loss(real, fake, 10.0, 0.4, real_weight=kept, fake_weight=kept)[0] / 10
    likelihood += np.mean(DROPPED * nll)
    found = objective(null_label=CLASSES, mode="mle")(variables, dropped, KEY)[0]
    np.testing.assert_allclose(found, likelihood, rtol=1e-5)
    # Labels may come dropped already.
    found = objective()(variables, dropped | null, KEY)[0]
    np.testing.assert_allclose(found, data_term, rtol=1e-5)


def test_recorded_terms_replace_the_reference_exactly_where_the_likelihood_is_exact(variables):
    batch = make_batch()
    frozen = variables["reference"]["params"]
    terms = {
        "reference_terms": log_p(frozen, batch["tokens"], batch["label"]),
        "fake_reference_terms": log_p(frozen, batch["fake_tokens"], batch["fake_label"]),
    }
    alone = {"params": variables["params"]}
    found = objective()(alone, batch | terms, KEY)[0]
    np.testing.assert_allclose(found, objective()(variables, batch, KEY)[0], rtol=1e-5)
    # Where labels are dropped, the terms without them are needed too.
    without = np.full(ROWS, CLASSES)
    for name, tokens in (("reference_terms", "tokens"), ("fake_reference_terms", "fake_tokens")):
        terms[name] = np.stack([terms[name], log_p(frozen, batch[tokens], without)], axis=1)
    for mode in ("alpha0", "mle"):
        dropping = objective(null_label=CLASSES, rate=0.5, mode=mode)
        found = jax.jit(dropping)(alone, batch | terms, KEY)[0]
        expected = jax.jit(dropping)(variables, batch, KEY)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\[8, 2\].*null_label"):
        dropping(alone, batch | {name: term[:, 0] for name, term in terms.items()}, KEY)


def test_masks_are_shared_by_data_and_samples_and_by_both_networks(variables):
    batch = make_batch()
    log_likelihood = masked_log_likelihood(masked, VOCAB)
    value = ddo_tokens(log_likelihood, alpha=1.0, beta=0.4, draw=draw_times_and_masks)
    t, mask = draw_times_and_masks(KEY, (ROWS, LENGTH))
    deltas = [
        log_likelihood(variables, batch[x], batch[c], t, mask)
        - log_likelihood(variables["reference"], batch[x], batch[c], t, mask)
        for x, c in (("tokens", "label"), ("fake_tokens", "fake_label"))
    ]
    found = value(variables, batch, KEY)[0]
    np.testing.assert_allclose(found, ddo_loss(*deltas, 1.0, 0.4)[0], rtol=1e-5)


def test_a_rate_drops_that_share_of_labels_anew_with_every_key(variables):
    """The loss is that of some mask, as if the batch had said so, and of others for other keys."""
    batch = make_batch()
    drawn = objective(null_label=CLASSES, rate=0.5)
    given = jax.jit(
        lambda dropped: objective(null_label=CLASSES)(
            variables, batch | {"label_dropped": dropped}, KEY
        )[0]
    )
    masks = [np.array([i >> k & 1 for k in range(ROWS)], bool) for i in range(2**ROWS)]
    by_mask = np.array([given(mask) for mask in masks])
    chosen = []
    for seed in range(40):
        loss = drawn(variables, batch, jax.random.key(seed))[0]
        distances = abs(by_mask - loss)
        assert distances.min() < 1e-5
        chosen.append(masks[distances.argmin()])
    assert 0.4 < np.mean(chosen) < 0.6
    assert drawn(variables, batch | {"label_dropped": DROPPED}, KEY)[0] == given(DROPPED)


def test_inputs_of_the_network_come_with_its_labels(variables):
    batch = make_batch()
    extra = {"inputs": np.full((ROWS, 1), 2.0, np.float32), "fake_inputs": np.ones((ROWS, 1))}

    def scaled(variables, tokens, condition):
        label, inputs = condition
        return inputs[:, 0] * autoregressive_log_likelihood(markov)(variables, tokens, label)

    found = ddo_tokens(scaled, alpha=10.0, beta=0.4)(variables, batch | extra, KEY)[0]
    real, fake = ratios(variables, batch)
    np.testing.assert_allclose(found, ddo_loss(2 * real, fake, 10.0, 0.4)[0] / 10, rtol=1e-5)


@pytest.mark.parametrize("recorded", [False, True])
def test_every_member_of_a_grid_is_the_objective_alone(variables, recorded):
    batch, grid = make_batch(), [(10.0, 0.4), (0.5, 1.0), (0.0, 2.0)]
    frozen, dropout = variables["reference"]["params"], LabelDropout(CLASSES, 0.4, "mle")
    if recorded:
        dropout = LabelDropout()
        batch |= {
            "reference_terms": log_p(frozen, batch["tokens"], batch["label"]),
            "fake_reference_terms": log_p(frozen, batch["fake_tokens"], batch["fake_label"]),
        }
    log_likelihood = autoregressive_log_likelihood(markov)
    alpha, beta = zip(*grid, strict=True)
    together = ddo_tokens_grid(log_likelihood, alpha=alpha, beta=beta, label_dropout=dropout)
    members = variables | {"params": jnp.float32([table(seed) for seed in range(3)])}
    (loss, metrics), slope = jax.jit(
        jax.value_and_grad(lambda v: together(v, batch, KEY), has_aux=True)
    )(members)
    total = 0.0
    for i, (alpha, beta) in enumerate(grid):
        alone = ddo_tokens(log_likelihood, alpha=alpha, beta=beta, label_dropout=dropout)
        one = variables | {"params": members["params"][i]}
        (value, numbers), expected = jax.value_and_grad(
            lambda v, f=alone: f(v, batch, KEY), has_aux=True
        )(one)
        total += value
        np.testing.assert_allclose(metrics[f"loss/{i}"], value, rtol=1e-5)
        np.testing.assert_allclose(slope["params"][i], expected["params"], rtol=1e-4, atol=1e-6)
        for name, number in numbers.items():
            np.testing.assert_allclose(metrics[f"{name}/{i}"], number, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, total, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"fake_tokens": None}, {}, '"fake_tokens"'),
        ({"fake_tokens": np.zeros((ROWS, 4), int)}, {}, r"fake_tokens.*\[8, 5\].*\[8, 4\]"),
        ({"tokens": np.zeros((ROWS, LENGTH))}, {}, "integers.*float"),
        ({"fake_label": None}, {}, "fake_label"),
        ({"label_dropped": np.zeros(ROWS)}, {}, "bool"),
        ({"inputs": np.zeros((ROWS, 2), np.float32)}, {}, "fake_inputs"),
        (
            {"label": None, "fake_label": None, "label_dropped": DROPPED},
            {"null_label": CLASSES},
            "label_dropped",
        ),
        (
            {f"{kind}reference_terms": np.zeros(ROWS, np.float32) for kind in ("", "fake_")},
            {"draw": draw_times_and_masks},
            "recorded",
        ),
    ],
)
def test_refuses_batches_that_are_not_as_described(variables, change, options, message):
    batch = {k: v for k, v in (make_batch() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        objective(**options)(variables, batch, KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1}, "alpha"),
        ({"beta": 0}, "beta"),
        ({"mode": "cfg"}, "cfg.*alpha0"),
        ({"rate": 1.5}, "1.5"),
        ({"rate": 0.5}, "null_label"),
    ],
)
def test_refuses_options_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        objective(**options)
