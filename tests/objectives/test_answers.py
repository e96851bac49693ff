"""Losses of answers through a decoder: which agree, and that cutting a batch changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax_lab.networks import Decoder
from genjax_lab.objectives import (
    answer_batch,
    answer_likelihood,
    answer_objective,
    group_statistics,
    grpo_loss,
    nft_loss,
    online_dpo_loss,
    rft_loss,
)
from genjax_lab.parallel import make_mesh
from genjax_lab.training import make_train_step

VOCAB, COLUMNS, LENGTH, SIZE, GROUPS = 13, 4, 6, 4, 4
BATCH = GROUPS * SIZE
KEY = jax.random.key(0)
EPSILONS = (0.01, 0.5, 1.0, 2.0)
WEIGHTINGS = ("grpo", "dr_grpo")
NETWORK = Decoder(VOCAB, width=16, depth=2, num_heads=4, num_kv_heads=2, mlp_width=24, scan=True)


def random_variables(network, dtype=np.float32):
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 2), int))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(dtype), shapes)


def draw_answers():
    """Left-padded prompts of 1 to 4 tokens and answers of 1 to 6; r_q is 1/4, 3/4, 3/4 and 1/4."""
    rng = np.random.default_rng(1)
    prompts = np.repeat(rng.integers(0, VOCAB, size=(GROUPS, COLUMNS)), SIZE, axis=0)
    starts = np.repeat(rng.permutation(COLUMNS), SIZE)
    answers = rng.integers(0, VOCAB, size=(BATCH, LENGTH))
    lengths = rng.permutation(np.resize(np.arange(1, LENGTH + 1), BATCH))
    outcome = np.float64([1, 0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1, 0])
    return {
        "prompts": prompts,
        "prompt_mask": np.arange(COLUMNS) >= starts[:, None],
        "answers": answers,
        "answer_mask": np.arange(LENGTH) < lengths[:, None],
        "outcome": outcome,
        "group": group_statistics(outcome, np.repeat(np.arange(GROUPS), SIZE)),
    }


def judge(network, variables, data, **options):
    """Log-probabilities and entropies of the answers' tokens."""
    tokens = np.concatenate([data["prompts"], data["answers"]], axis=1)
    seen = np.concatenate([data["prompt_mask"], data["answer_mask"]], axis=1)
    return network.apply(
        variables, tokens, start=COLUMNS, token_mask=seen, method="log_probs", **options
    )


@functools.partial(jax.jit, static_argnames="chunk")
def jitted_judge(variables, tokens, seen, chunk=None):
    options = {"start": COLUMNS, "token_mask": seen, "chunk": chunk, "temperature": 0.7}
    return NETWORK.apply(variables, tokens, method="log_probs", **options)


@pytest.fixture(scope="module")
def variables():
    return random_variables(NETWORK)


@pytest.fixture(scope="module")
def batch(variables):
    """Answers of a policy that is not the network, with a reference and weights of their tokens."""
    data, rng = draw_answers(), np.random.default_rng(2)
    log_probs, _ = jitted_judge(variables, *tokens_of(data))
    noise = lambda: rng.normal(size=log_probs.shape).astype(np.float32)  # noqa: E731
    return answer_batch(
        **data,
        old_log_probs=log_probs + 0.5 * noise(),
        aggregation="token-mean",
        reference_log_probs=log_probs + 0.3 * noise(),
        importance=np.exp(0.2 * noise()),
    )


def tokens_of(data):
    tokens = np.concatenate([data["prompts"], data["answers"]], axis=1)
    return tokens, np.concatenate([data["prompt_mask"], data["answer_mask"]], axis=1)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def rows_of(tree):
    return np.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(tree)], axis=1)


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def several_losses(*arguments, weights, importance):
    """NFT's for two weightings, each with four epsilons and without wrong answers; then GRPO's."""
    del importance

    def nft(weighting, epsilon, negative_weight):
        options = {"epsilon": epsilon, "negative_weight": negative_weight, "weights": weights}
        return nft_loss(*arguments, weighting=weighting, **options)[0]

    switches = jnp.array([*EPSILONS, 1.0]), jnp.array([1.0, 1.0, 1.0, 1.0, 0.0])
    values = [jax.vmap(functools.partial(nft, name))(*switches) for name in WEIGHTINGS]
    # The deviations of r_q = 1/4 and 3/4, to which GRPO adds 1e-6.
    population, sample = np.sqrt(3) / 4, 1 / 2
    for std, factor in (
        ("population", 1 + 1e-6 / population),
        (None, 1.0),
        ("sample", (1 + 1e-6 / sample) * np.sqrt(SIZE / (SIZE - 1))),
    ):
        values.append(factor * grpo_loss(*arguments, std=std, weights=weights)[0][None])
    return jnp.concatenate(values), {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_on_policy_gradients_are_those_of_grpo_and_of_dr_grpo(dtype):
    """Seen: a difference of 0 (float32) and 4e-16 (float64); of 0.31 with epsilon 2."""
    tolerance = 1e-6 if dtype == np.float32 else 1e-12
    with jax.enable_x64(dtype == np.float64):
        network = NETWORK.clone(dtype=dtype)
        variables, data = random_variables(network, dtype), draw_answers()
        data["group"] = group_statistics(data["outcome"], np.asarray(data["group"].ids))

        @jax.jit
        def jacobian(variables, batch):
            objective = answer_objective(network.apply, several_losses)
            old, _ = judge(network, variables, data)
            batch = batch | {"old_log_probs": jax.lax.stop_gradient(old)}
            values, pull = jax.vjp(lambda v: objective(v, batch, KEY)[0], variables)
            return jax.lax.map(lambda row: pull(row)[0], jnp.eye(len(values), dtype=dtype))

        old = np.zeros((BATCH, LENGTH), dtype)
        batch = answer_batch(**data, old_log_probs=old, aggregation="seq-mean-token-sum")
        tree = jacobian(variables, batch)
        gradients = rows_of(tree)
    assert gradients.dtype == dtype
    nft, grpo = gradients[:10].reshape(2, 5, -1), gradients[10:]
    for (*of_epsilon, of_two, right), expected in zip(nft, grpo[:2], strict=True):
        for gradient in of_epsilon:
            assert distance(gradient, expected) < tolerance
        # At epsilon 2 wrong answers count half.
        assert distance(of_two, expected) > 0.1
        assert distance(of_two, (right + expected) / 2) < 2e-6
    # The network's softmax and rotations are float32, whatever its type.
    assert distance(grpo[2], grpo[0]) < 1e-6
    assert distance(nft[0, 2], nft[1, 2]) > 0.01


def step_of(batch_size, accumulation=1, devices=1):
    """A training step whose optimiser's state is the gradient."""
    loss = functools.partial(nft_loss, epsilon=0.5)
    return make_train_step(
        answer_objective(NETWORK.apply, loss, kl_coefficient=0.1, entropy_coefficient=0.01),
        optax.trace(decay=0.0),
        batch_size=batch_size,
        ema={},
        accumulation_steps=accumulation,
        mesh=make_mesh(devices, devices=jax.devices()[:devices]),
    )


def gradient_of(step, variables, batch):
    state = step.init(variables, KEY)
    state, metrics = step.step(state, {name: value[None] for name, value in batch.items()})
    assert metrics["skipped"] == 0
    return flat(state.opt_state.trace), float(metrics["loss"][0])


@pytest.fixture(scope="module")
def whole_step():
    return step_of(BATCH)


@pytest.fixture(scope="module")
def whole(whole_step, variables, batch):
    return gradient_of(whole_step, variables, batch)


@pytest.mark.parametrize(("accumulation", "devices"), [(2, 8), (4, 4), (8, 2)])
def test_microbatches_and_devices_give_the_gradient_of_the_batch(
    variables, batch, whole, accumulation, devices
):
    gradient, loss = gradient_of(step_of(BATCH, accumulation, devices), variables, batch)
    assert distance(gradient, whole[0]) < 1e-5
    assert loss == pytest.approx(whole[1], rel=1e-5)


def test_the_order_of_answers_does_not_matter(whole_step, variables, batch, whole):
    order = np.random.default_rng(3).permutation(BATCH)
    shuffled = {name: value[order] for name, value in batch.items()}
    gradient, loss = gradient_of(whole_step, variables, shuffled)
    assert distance(gradient, whole[0]) < 1e-5
    assert loss == pytest.approx(whole[1], rel=1e-5)


def test_rows_of_padding_do_not_matter(variables, batch, whole):
    """They have no tokens, and log-probabilities that are not numbers."""
    more = 8
    padded = {}
    for name, value in batch.items():
        fill = np.nan if name.endswith("log_probs") else 0
        rows = np.full((more, *value.shape[1:]), fill, value.dtype)
        padded[name] = np.concatenate([value[:5], rows, value[5:]])
    names = ("prompt", "prompt_mask", "answer", "answer_mask", "old_log_probs", "outcome")
    group = group_statistics(batch["outcome"], batch["group_ids"])
    group = type(group)(*(padded[f"group_{name}"] for name in group._fields))
    made = answer_batch(
        *(padded[name] for name in names),
        group,
        aggregation="token-mean",
        **{name: padded[name] for name in ("reference_log_probs", "importance")},
    )
    np.testing.assert_allclose(made["weights"], (BATCH + more) / batch["answer_mask"].sum())
    gradient, loss = gradient_of(step_of(BATCH + more), variables, made)
    assert distance(gradient, whole[0]) < 1e-5
    assert loss == pytest.approx(whole[1], rel=1e-5)


def test_first_ratios_are_one(variables, batch):
    """Exactly, if the same program made both; nearly, if others cut positions or the batch."""
    tokens = tokens_of(draw_answers())
    mask, group = batch["answer_mask"], group_statistics(batch["outcome"], batch["group_ids"])
    old, _ = jitted_judge(variables, *tokens)
    again, _ = jitted_judge(variables, *tokens)
    value, metrics = nft_loss(again, old, mask, batch["outcome"], group)
    assert value == 0 and metrics["ratio"] == metrics["max_ratio"] == 1
    parts = [jitted_judge(variables, *(x[i : i + 4] for x in tokens))[0] for i in (0, 4, 8, 12)]
    chunked, _ = jitted_judge(variables, *tokens, chunk=4)
    for other in (np.concatenate(parts), chunked):
        assert np.max(np.abs(np.expm1(other - old)[mask])) < 1e-5
        assert np.std(old[mask]) > 0.1


@pytest.fixture(scope="module")
def unchunked(variables, batch):
    return of_answers(variables, batch)


@functools.partial(jax.jit, static_argnames="chunk")
def of_answers(variables, batch, chunk=None):
    loss = functools.partial(nft_loss, epsilon=0.5)
    options = {"temperature": 0.7, "kl_coefficient": 0.3, "entropy_coefficient": 0.2}
    objective = answer_objective(NETWORK.apply, loss, chunk=chunk, **options)
    return jax.value_and_grad(objective, has_aux=True)(variables, batch, KEY)


def test_chunks_change_neither_value_nor_gradient(variables, batch, unchunked):
    """The answers' length, 6, is not a multiple of 4."""
    (value, metrics), gradient = of_answers(variables, batch, chunk=4)
    (expected, others), slopes = unchunked
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert metrics == {name: pytest.approx(float(x), rel=1e-4) for name, x in others.items()}
    assert distance(flat(gradient), flat(slopes)) < 1e-5


def test_chunks_hold_fewer_logits_at_a_time():
    """Seen: 9.1 MB of temporary memory instead of 37.4 MB, of which logits are 16.8 MB each."""
    network = NETWORK.clone(vocab_size=8192)
    variables = jax.eval_shape(network.init, KEY, jnp.zeros((1, 2), int))
    tokens = jax.ShapeDtypeStruct((8, 65), jnp.int32)

    def memory(chunk):
        def loss(variables, tokens):
            return jnp.sum(network.apply(variables, tokens, chunk=chunk, method="log_probs")[0])

        compiled = jax.jit(jax.grad(loss)).lower(variables, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, parts = memory(None), memory(8)
    assert whole > 3 * parts


def test_terms_of_divergence_and_entropy_are_added(variables, batch, unchunked):
    (value, metrics), _ = unchunked
    tokens, seen = tokens_of(draw_answers())
    logits = jax.jit(NETWORK.apply)(variables, tokens, token_mask=seen)
    logits = np.float64(logits) / 0.7
    laws = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    laws, mask = laws[:, COLUMNS - 1 : -1], batch["answer_mask"]
    log_probs = np.take_along_axis(laws, tokens[:, COLUMNS:, None], axis=-1)[..., 0]
    entropy = -np.sum(np.exp(laws) * laws, axis=-1)[mask].mean()
    less = (batch["reference_log_probs"] - log_probs)[mask]
    divergence = np.mean(np.exp(less) - 1 - less)
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert metrics["kl"] == pytest.approx(divergence, rel=1e-4)
    group = group_statistics(batch["outcome"], batch["group_ids"])
    loss, _ = nft_loss(
        log_probs.astype(np.float32),
        batch["old_log_probs"],
        mask,
        batch["outcome"],
        group,
        epsilon=0.5,
        aggregation="token-mean",
        importance=batch["importance"],
    )
    expected = loss + 0.3 * divergence - 0.2 * entropy
    assert value == pytest.approx(float(expected), rel=1e-4)


def test_what_is_hidden_harms_no_gradient(variables, batch, unchunked):
    (value, _), gradient = unchunked
    names = ("old_log_probs", "reference_log_probs", "importance")
    dirty = batch | {name: np.where(batch["answer_mask"], batch[name], np.nan) for name in names}
    # Tokens of padding are of no importance either.
    dirty["answer"] = np.where(batch["answer_mask"], batch["answer"], VOCAB - 1)
    dirty["prompt"] = np.where(batch["prompt_mask"], batch["prompt"], 0)
    (found, metrics), slopes = of_answers(variables, dirty)
    assert found == pytest.approx(float(value), rel=1e-5)
    assert distance(flat(slopes), flat(gradient)) < 1e-5
    assert all(np.isfinite(x) for x in metrics.values())


def test_rejection_sampling_is_supervised_learning_from_right_answers(variables, batch):
    @jax.jit
    @jax.jacrev
    def slopes(variables):
        rft = answer_objective(NETWORK.apply, rft_loss)
        right = batch | {"weights": batch["weights"] * batch["outcome"]}
        plain = {name: value for name, value in batch.items() if name != "importance"}
        supervised = answer_likelihood(NETWORK.apply)
        return jnp.stack([rft(variables, plain, KEY)[0], supervised(variables, right, KEY)[0]])

    rft, supervised = rows_of(slopes(variables))
    assert distance(rft, supervised) < 1e-5


def test_tokens_that_are_not_counted_are_seen_but_not_learned_from(variables, batch):
    data = draw_answers()
    data["counted"] = data["answer_mask"] & (np.arange(LENGTH) > 1)
    names = ("old_log_probs", "reference_log_probs", "importance")
    made = answer_batch(**data, aggregation="token-mean", **{name: batch[name] for name in names})
    np.testing.assert_allclose(made["weights"], BATCH / made["counted"].sum(), rtol=1e-6)
    (value, metrics), gradient = of_answers(variables, made)
    dirty = made | {name: np.where(made["counted"], made[name], np.nan) for name in names}
    (again, _), slopes = of_answers(variables, dirty)
    assert again == pytest.approx(float(value), rel=1e-5)
    assert distance(flat(slopes), flat(gradient)) < 1e-5
    # A network that does not see the others judges what is counted in another way.
    (other, _), _ = of_answers(variables, made | {"answer_mask": made["counted"]})
    assert abs(other - value) > 1e-3
    _, entropies = jitted_judge(variables, *tokens_of(data))
    expected = np.asarray(entropies)[made["counted"]].mean()
    assert metrics["entropy"] == pytest.approx(expected, rel=1e-5)


def test_losses_of_pairs_take_no_weights(variables, batch):
    objective = answer_objective(NETWORK.apply, online_dpo_loss, takes_weights=False)
    value, metrics = jax.jit(objective)(variables, batch, KEY)
    log_probs, _ = jax.jit(lambda v: judge(NETWORK, v, draw_answers()))(variables)
    group = group_statistics(batch["outcome"], batch["group_ids"])
    arguments = (log_probs, batch["old_log_probs"], batch["answer_mask"], batch["outcome"], group)
    expected, _ = online_dpo_loss(*arguments)
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert metrics["pairs"] == 4 / BATCH and np.isfinite(metrics["entropy"])


def test_mistakes_are_named(variables, batch):
    for options, message in (
        ({"kl_coefficient": np.nan}, "kl_coefficient"),
        ({"entropy_coefficient": np.inf}, "entropy_coefficient"),
    ):
        with pytest.raises(ValueError, match=message):
            answer_objective(NETWORK.apply, nft_loss, **options)
    for name in ("prompt", "answer_mask", "counted", "weights", "group_rate", "outcome"):
        lacking = {key: value for key, value in batch.items() if key != name}
        with pytest.raises(ValueError, match=name):
            answer_objective(NETWORK.apply, nft_loss)(variables, lacking, KEY)
    lacking = {key: value for key, value in batch.items() if key != "reference_log_probs"}
    objective = answer_objective(NETWORK.apply, nft_loss, kl_coefficient=0.1)
    with pytest.raises(ValueError, match="reference_log_probs"):
        objective(variables, lacking, KEY)
    with pytest.raises(ValueError, match="kind"):
        wrong = answer_objective(NETWORK.apply, nft_loss, kl_coefficient=0.1, kl_kind="k9")
        wrong(variables, batch, KEY)
    with pytest.raises(ValueError, match="aggregation"):
        answer_batch(**draw_answers(), old_log_probs=batch["old_log_probs"], aggregation="mean")
