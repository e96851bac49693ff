"""The decoder: what a token sees, packing and padding, judged answers, scans, and its sizes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.networks import Decoder, stacked, unstacked
from genjax_lab.parallel import batch_sharding, make_mesh, parameter_shardings

VOCAB = 24
NETWORK = Decoder(
    vocab_size=VOCAB, width=16, depth=2, num_heads=4, num_kv_heads=2, mlp_width=20, rope_theta=100.0
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 7)), jnp.int32)
LENGTHS = np.array([7, 4])  # of what is not padding


@pytest.fixture(scope="module")
def variables(random_variables):
    return random_variables(NETWORK, TOKENS)


@pytest.fixture(scope="module")
def logits_of(quick_jit):
    """Return `NETWORK.apply`, compiled once for each set of arguments."""
    return quick_jit(NETWORK.apply)


@pytest.fixture(scope="module")
def whole(logits_of, variables):
    return np.asarray(logits_of(variables, TOKENS))


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)


# What a token sees.


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_whatever_is_in_it(logits_of, variables, whole, side):
    short = np.asarray(TOKENS[1:, :4])
    alone = np.asarray(logits_of(variables, short))
    mask = np.arange(7) < LENGTHS[:, None]
    real = slice(0, 4)
    if side == "left":
        mask, real = mask[:, ::-1], slice(3, 7)
    for filling in (0, VOCAB - 1):
        padded = np.array(TOKENS)
        padded[1] = filling
        padded[1, real] = short
        found = np.asarray(logits_of(variables, padded, token_mask=mask))
        close(found[0], whole[0])
        close(found[1, real], alone[0])
        assert np.isfinite(found).all()


def test_packed_sequences_are_as_if_they_were_apart(logits_of, variables, whole):
    lengths = [3, 4]
    segments = np.repeat([[5, 2]], lengths, axis=1).repeat(2, axis=0)
    mask = np.ones((2, 7), bool)
    mask[1, 6] = False  # padding in a pack
    found = np.asarray(
        logits_of(variables, TOKENS, token_mask=mask, segments=jnp.asarray(segments))
    )
    close(found[:, :3], whole[:, :3])
    later = np.asarray(logits_of(variables, TOKENS[:, 3:]))
    close(found[0, 3:], later[0])
    close(found[1, 3:6], later[1, :3])
    # Positions are a sequence's own, also where sequences alternate.
    woven = np.zeros((2, 7), int)
    woven[:, 1::2] = 1
    found = np.asarray(logits_of(variables, TOKENS, token_mask=mask, segments=jnp.asarray(woven)))
    close(found[:, 1::2], np.asarray(logits_of(variables, TOKENS[:, 1::2])))


@pytest.mark.parametrize("causal", [True, False])
def test_later_tokens_matter_only_if_not_causal(quick_jit, variables, causal):
    apply = quick_jit(NETWORK.clone(causal=causal).apply)
    changed = TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % VOCAB)
    before, after = (np.asarray(apply(variables, tokens)) for tokens in (TOKENS, changed))
    moved = np.abs(after - before).max(axis=-1)
    assert (moved[:, 4:] > 1e-3).all()
    assert (moved[:, :4] > 1e-3).all() if not causal else (moved[:, :4] == 0).all()


def test_positions_are_relative_and_matter(logits_of, variables, whole):
    mask = np.arange(9) >= 2
    shifted = np.pad(np.asarray(TOKENS), ((0, 0), (2, 0)))
    found = logits_of(variables, shifted, token_mask=np.broadcast_to(mask, (2, 9)))
    close(np.asarray(found)[:, 2:], whole)
    swapped = np.asarray(TOKENS)[:, [1, 0, 2, 3, 4, 5, 6]]
    assert np.abs(np.asarray(logits_of(variables, swapped))[:, -1] - whole[:, -1]).max() > 1e-3


def test_rows_are_those_of_the_whole(logits_of, variables, whole):
    rows = jnp.array([[6, 0, 0], [2, 3, 6]])
    found = np.asarray(logits_of(variables, TOKENS, rows=rows))
    close(found, np.take_along_axis(whole, np.asarray(rows)[..., None], axis=1))


def test_a_mask_has_a_row_and_is_never_predicted(quick_jit, random_variables):
    network = NETWORK.clone(causal=False, with_mask=True)
    variables = random_variables(network, TOKENS)
    assert variables["params"]["embedding"].shape == (VOCAB + 1, 16)
    apply = quick_jit(network.apply)
    logits = apply(variables, TOKENS.at[:, 2].set(VOCAB))
    assert logits.shape == (2, 7, VOCAB)
    # A copy: a computation that has not begun may still read what it was given.
    embedding = variables["params"]["embedding"].copy()
    embedding[VOCAB] += 1.0
    other = {"params": {**variables["params"], "embedding": embedding}}
    moved = np.abs(apply(other, TOKENS.at[:, 2].set(VOCAB)) - logits)
    assert moved.max() > 1e-3
    close(apply(other, TOKENS), apply(variables, TOKENS))


# Scans, recomputation, precision.


def test_a_scan_is_the_same_network(quick_jit, variables, whole):
    network, in_scan = stacked(NETWORK, variables)
    assert network.scan and in_scan["params"]["blocks"]["up"]["kernel"].shape == (2, 16, 20)
    close(quick_jit(network.apply)(in_scan, TOKENS), whole)
    again, apart = unstacked(network, in_scan)
    assert again == NETWORK
    jax.tree.map(np.testing.assert_array_equal, apart, {"params": dict(variables["params"])})
    for function, one in ((stacked, (network, in_scan)), (unstacked, (NETWORK, variables))):
        jax.tree.map(np.testing.assert_array_equal, function(*one)[1], one[1])


def test_recomputation_changes_no_gradient(quick_jit, variables):
    def loss(variables, network):
        return jnp.sum(network.apply(variables, TOKENS, method="log_probs")[0])

    network, own = stacked(NETWORK, variables)
    plain, again = (
        quick_jit(jax.grad(lambda v, n=n: loss(v, n)))(own)
        for n in (network, network.clone(remat=True))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(plain))


def test_queries_in_parts_change_nothing_but_memory(quick_jit, variables):
    mask = np.arange(7) >= np.array([[2], [0]])

    def gradient(network):
        def loss(variables):
            judged = network.apply(variables, TOKENS, token_mask=mask, method="log_probs")[0]
            return jnp.sum(jnp.where(mask[:, 1:], judged, 0))

        return quick_jit(jax.value_and_grad(loss))(variables)

    expected = gradient(NETWORK)
    for chunk in (3, 7):  # 7 are not a multiple of 3
        found = gradient(NETWORK.clone(attention_chunk=chunk))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    with pytest.raises(ValueError, match="chunk is 0"):
        jax.eval_shape(NETWORK.clone(attention_chunk=0).init, jax.random.key(0), TOKENS)

    def temporary(chunk):
        network = NETWORK.clone(attention_chunk=chunk)
        tokens = jnp.zeros((1, 256), jnp.int32)
        summed = jax.grad(lambda v: jnp.sum(network.apply(v, tokens, method="log_probs")[0]))
        return quick_jit(summed).lower(variables).compile().memory_analysis().temp_size_in_bytes

    # 2 blocks, 4 heads, [256, 256] or [16, 256] logits and weights.
    assert temporary(None) - temporary(16) > 2 * 4 * 256 * 240 * 4


def test_bfloat16_keeps_float32_logits(quick_jit, variables, whole):
    network = NETWORK.clone(dtype=jnp.bfloat16)
    logits = quick_jit(network.apply)(variables, TOKENS)
    assert logits.dtype == jnp.float32
    scale = np.abs(whole).max()
    assert 1e-4 < np.abs(np.asarray(logits) - whole).max() / scale < 0.1
    # Logits are no bfloat16 numbers in float32: the last product keeps its digits.
    assert (np.asarray(logits) != np.asarray(logits.astype(jnp.bfloat16), np.float32)).any()
    told = jax.eval_shape(lambda: network.apply(variables, TOKENS, method="log_probs"))
    assert all(x.dtype == jnp.float32 for x in told)


# Judged answers.


def test_log_probs_are_those_of_the_logits(quick_jit, variables, whole):
    for start, temperature in ((1, 1.0), (3, 0.7)):
        found, entropies = quick_jit(
            lambda v, t, start=start: NETWORK.apply(
                v, TOKENS, start=start, temperature=t, method="log_probs"
            )
        )(variables, temperature)
        logits = whole[:, start - 1 : -1].astype(np.float64) / temperature
        log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        targets = np.asarray(TOKENS)[:, start:, None]
        close(found, np.take_along_axis(log_p, targets, axis=-1)[..., 0])
        close(entropies, -np.sum(np.exp(log_p) * log_p, axis=-1))


def test_chunks_change_neither_values_nor_gradients(quick_jit, variables):
    mask = np.arange(7) < LENGTHS[:, None]

    def judged(variables, chunk):
        out = NETWORK.apply(
            variables, TOKENS, start=2, token_mask=mask, chunk=chunk, method="log_probs"
        )
        return jnp.sum(out[0] * 0.3 + out[1]), out

    value_and_grad = quick_jit(jax.value_and_grad(judged, has_aux=True), static_argnums=1)
    (_, expected), expected_grad = value_and_grad(variables, None)
    for chunk in (2, 5):  # five positions: with padding, and as many
        (_, found), grad = value_and_grad(variables, chunk)
        jax.tree.map(close, found, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grad, expected_grad)


def test_chunks_never_hold_the_logits_of_all_positions(variables):
    def program(chunk):
        loss = lambda v: jnp.sum(NETWORK.apply(v, TOKENS, chunk=chunk, method="log_probs")[0])  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(variables))

    assert f"[2,6,{VOCAB}]" in program(None)
    assert f"[2,6,{VOCAB}]" not in program(2) and f"[3,2,2,{VOCAB}]" not in program(2)
    assert f"[2,2,{VOCAB}]" in program(2)


# Shapes and sizes.


@pytest.mark.parametrize("head_dim", [None, 6])
def test_steps_with_kept_keys_are_whole_forwards(quick_jit, random_variables, head_dim):
    network = NETWORK.clone(head_dim=head_dim, tied=False)
    variables = random_variables(network, TOKENS)
    size = head_dim or 4
    assert variables["params"]["block_0"]["query"]["kernel"].shape == (16, 4 * size)
    assert variables["params"]["block_0"]["value"]["kernel"].shape == (16, 2 * size)
    assert variables["params"]["block_0"]["out"]["kernel"].shape == (4 * size, 16)
    assert variables["params"]["head"].shape == (16, VOCAB)
    expected = np.asarray(quick_jit(network.apply)(variables, TOKENS))
    prefill = quick_jit(lambda *a: network.apply(variables, *a, method="prefill"))
    shared = prefill(TOKENS[:, :3], jnp.ones((2, 3), bool))
    assert shared.keys_values[0][0].shape == (2, 2, size, 3)
    ring = network.apply(variables, 2, 5, method="empty_ring")
    step = quick_jit(lambda *a: network.apply(variables, *a, method="decode"))
    for place in range(3, 7):
        column = (place + 1) % 5  # a ring that begins anywhere and goes over its end
        ages = jnp.full(2, place - 3)
        logits, ring = step(
            TOKENS[:, place], jnp.full(2, place), shared, ring, jnp.int32(column), ages
        )
        close(logits, expected[:, place])


# Of the published configurations: width, blocks, heads, heads of keys, MLP, rows, tied, parameters.
PUBLISHED = {
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151_936, True, 494_032_768),
    "Qwen2.5-7B": (3584, 28, 28, 4, 18_944, 152_064, False, 7_615_616_512),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_numbers_of_parameters(name):
    width, depth, heads, kv_heads, mlp, rows, tied, published = PUBLISHED[name]
    network = Decoder(rows, width, depth, heads, kv_heads, mlp, tied=tied, scan=True)
    shapes = jax.eval_shape(network.init, jax.random.key(0), TOKENS)
    kv_width = width // heads * kv_heads
    attention = 2 * width * (width + kv_width) + width + 2 * kv_width
    expected = depth * (attention + 3 * width * mlp + 2 * width) + width
    expected += rows * width * (1 if tied else 2)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == expected == published


@pytest.mark.parametrize(
    ("change", "call", "message"),
    [
        ({"num_kv_heads": 3}, {}, "num_kv_heads=3"),
        ({"head_dim": 5}, {}, "head_dim=5"),
        ({}, {"tokens": TOKENS[0]}, r"\[batch, length\]"),
        ({}, {"tokens": TOKENS * 1.0}, "float32"),
        ({}, {"token_mask": jnp.ones((2, 6), bool)}, "token_mask"),
        ({}, {"segments": jnp.ones((2, 6), int)}, "segments"),
        ({}, {"t": jnp.ones(2)}, "time"),
        ({}, {"condition": jnp.ones(2)}, "condition"),
        ({}, {"method": "log_probs", "start": 0}, "start is 0"),
        ({}, {"method": "log_probs", "start": 7}, "start is 7"),
        ({"causal": False}, {"method": "log_probs"}, "not causal"),
    ],
)
def test_what_does_not_fit_is_refused(variables, change, call, message):
    network = NETWORK.clone(**change)
    arguments = {"tokens": TOKENS} | call
    tokens = arguments.pop("tokens")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: network.apply(variables, tokens, **arguments))


@pytest.mark.parametrize("change", [{"scan": True}, {"causal": False}])
def test_steps_need_blocks_apart_and_a_causal_network(variables, change):
    network, own = stacked(NETWORK, variables) if "scan" in change else (NETWORK, variables)
    network = network.clone(**change)
    ring = NETWORK.apply(variables, 2, 5, method="empty_ring")
    mask = jnp.ones((2, 7), bool)

    def step():
        shared = network.apply(own, TOKENS, mask, method="prefill")
        return network.apply(own, *[TOKENS[:, 0]] * 2, shared, ring, 0, 0, method="decode")

    with pytest.raises(ValueError, match="causal=True and scan=False"):
        jax.eval_shape(step)


@pytest.mark.parametrize("chunk", [None, 8])
def test_logits_of_a_split_vocabulary_are_not_gathered(quick_jit, chunk):
    """Devices send each other sums over their tokens, and parts of gradients, but no logits."""
    mesh = make_mesh(data=2, tensor=4)
    network = Decoder(4096, 64, 1, 4, 2, 64, tied=False)
    tokens = jax.ShapeDtypeStruct((4, 33), jnp.int32, sharding=batch_sharding(mesh))
    shapes = jax.eval_shape(network.init, jax.random.key(0), TOKENS)
    variables = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        parameter_shardings(shapes, mesh),
    )

    def gradient(variables, tokens):
        def loss(variables):
            return network.apply(variables, tokens, chunk=chunk, method="log_probs")[0].sum()

        return jax.grad(loss)(variables)

    program = quick_jit(gradient).lower(variables, tokens).compile().as_text()
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    sent = re.findall(rf"= (.*?) (?:{names})(?:-start)?\(", program)
    shapes = [
        tuple(map(int, shape.split(",")))
        for line in sent
        for shape in re.findall(r"\w\[([\d,]+)\]", line)
    ]
    assert (2, chunk or 32) in shapes  # the sums over the vocabulary
    assert any(1024 in shape or 4096 in shape for shape in shapes)  # gradients, which are matrices
    assert not any((1024 in shape or 4096 in shape) and len(shape) > 2 for shape in shapes)
