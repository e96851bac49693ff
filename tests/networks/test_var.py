"""VAR: sizes, mask, cache, likelihood and contract; its parity is in test_var_weights.py."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.networks.multi_scale_quantizer import MultiScaleQuantizer, scale_bounds
from genjax_lab.networks.var import VAR, block_causal_mask, drop_class, teacher_forced, var_imagenet

PATCH_NUMS = (1, 2, 3)
NET = VAR(
    num_classes=3,
    vocab_size=7,
    codebook_channels=4,
    patch_nums=PATCH_NUMS,
    width=16,
    depth=2,
    num_heads=2,
)
QUANTIZER = MultiScaleQuantizer(vocab_size=7, channels=4, patch_nums=PATCH_NUMS, num_phi=2)
LABELS = jnp.array([1, 3])  # the second has no class


def inputs(seed=0, batch=2):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, 13, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def variables(random_variables):
    return random_variables(NET, inputs(), LABELS)


@pytest.fixture(scope="module")
def step(quick_jit):
    """Compiled `((loss, logits), gradients)` of a module."""

    @functools.partial(quick_jit, static_argnums=0)
    def step(module, variables, *args):
        def loss(variables):
            logits = module.apply(variables, *args)
            return jnp.mean(jnp.sin(logits)), logits

        return jax.value_and_grad(loss, has_aux=True)(variables)

    return step


@pytest.fixture(scope="module")
def result(step, variables):
    (_, logits), grads = step(NET, variables, inputs(), LABELS)
    return logits, grads


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("size", "millions"), [("d16", 310), ("d20", 601), ("d24", 1033), ("d30", 2010)]
)
def test_presets_have_the_papers_parameter_counts(size, millions, scan):
    net = var_imagenet(size, scan=scan, remat=scan)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 679, 32)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6) == millions
    assert net.num_tokens == 680


@pytest.mark.parametrize("patch_nums", [(1, 2, 3), (2, 3), (1,), (1, 2, 4, 7)])
def test_the_mask_is_the_loop_over_scales(patch_nums):
    length = sum(side * side for side in patch_nums)
    expected = np.zeros((length, length), bool)
    end = 0
    for side in patch_nums:
        start, end = end, end + side * side
        for i in range(start, end):
            for j in range(end):
                expected[i, j] = True
    np.testing.assert_array_equal(block_causal_mask(patch_nums), expected)


def test_a_scale_sees_itself_and_the_coarser_ones_alone(variables, result, quick_jit):
    apply = quick_jit(NET.apply)
    bounds = scale_bounds(PATCH_NUMS)
    for scale, (start, end) in enumerate(bounds[1:], 1):
        for token in (start, end - 1):
            changed = inputs()
            changed[:, token - 1] += 1.0
            moved = np.abs(apply(variables, changed, LABELS) - result[0]).max(axis=(0, 2)) > 1e-6
            # All tokens of the scale, also those before this one, and all of the finer scales.
            expected = np.arange(14) >= bounds[scale][0]
            np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scan", [False, True])
def test_cached_logits_are_the_teacher_forced_ones(scan, normalize, random_variables, quick_jit):
    net = NET.clone(scan=scan, normalize=normalize)
    quantizer_variables = random_variables(QUANTIZER, jnp.zeros((1, 3, 3, 4)))
    variables = random_variables(net, inputs(), LABELS)
    tokens = np.random.default_rng(1).integers(0, 7, (2, 14))

    @quick_jit
    def both(tokens):
        apply = functools.partial(QUANTIZER.apply, quantizer_variables)
        forced = net.apply(variables, apply(tokens, method="tokens_to_inputs"), LABELS)
        cache, f_hat, logits = net.init_cache(2), jnp.zeros((2, 3, 3, 4)), []
        for scale, (start, end) in enumerate(scale_bounds(PATCH_NUMS)):
            seen = apply(f_hat, scale, method="scale_inputs") if scale else None
            part, cache = net.apply(variables, seen, LABELS, cache, scale, method="predict_scale")
            logits.append(part)
            f_hat = apply(f_hat, tokens[:, start:end], scale, method="add_scale")
        return forced, jnp.concatenate(logits, axis=1)

    forced, cached = both(tokens)
    assert float(jnp.std(forced)) > 0.1
    np.testing.assert_allclose(cached, forced, atol=1e-5)


def test_likelihoods_of_all_sequences_sum_to_one(random_variables, quick_jit):
    """The inputs of a scale are functions of the coarser scales' tokens alone."""
    sides, codes = (1, 2), 4
    net = NET.clone(patch_nums=sides, vocab_size=codes, depth=1)
    quantizer = QUANTIZER.clone(patch_nums=sides, vocab_size=codes)
    quantizer_variables = random_variables(quantizer, jnp.zeros((1, 2, 2, 4)), scale=1.0)
    variables = random_variables(net, jnp.zeros((1, 4, 4)), scale=0.5)
    tokens = np.array(list(itertools.product(range(codes), repeat=5)))

    apply = teacher_forced(net, quantizer, quantizer_variables)

    @quick_jit
    def log_likelihoods(tokens):
        logits = apply(variables, tokens, jnp.full(len(tokens), 2), train=False)
        log_probs = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0].sum(axis=1)

    likelihoods = np.exp(np.asarray(log_likelihoods(tokens), np.float64))
    assert likelihoods.max() / likelihoods.min() > 100
    np.testing.assert_allclose(likelihoods.sum(), 1, atol=1e-5)


def test_learned_scales_of_queries_stop_at_one_hundred(variables, quick_jit):
    apply = quick_jit(NET.apply)

    def logits_with(log_scale):
        def set_scales(path, leaf):
            return jnp.full_like(leaf, log_scale) if path[-1].key == "log_scale" else leaf

        return apply(jax.tree_util.tree_map_with_path(set_scales, variables), inputs(), LABELS)

    at_limit = logits_with(math.log(100))
    np.testing.assert_array_equal(logits_with(10.0), at_limit)
    assert np.abs(logits_with(2.0) - at_limit).max() > 1e-3


def test_every_parameter_has_a_gradient(result):
    _, grads = result
    idle = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if float(jnp.abs(leaf).max()) == 0
    }
    assert idle == set()


def stack_blocks(variables):
    params = dict(variables["params"])
    blocks = [params.pop(f"block_{i}") for i in range(2)]
    return {"params": params | {"blocks": jax.tree.map(lambda *w: jnp.stack(w), *blocks)}}


def test_scanned_and_recomputed_blocks_equal_the_loop(variables, step, result):
    logits, grads = result
    net = NET.clone(scan=True, remat=True)
    stacked = stack_blocks(variables)
    assert "remat" in str(jax.make_jaxpr(net.apply)(stacked, inputs(), LABELS))
    (_, scanned_logits), scanned_grads = step(net, stacked, inputs(), LABELS)
    np.testing.assert_allclose(scanned_logits, logits, atol=1e-5)
    expected = stack_blocks(grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scanned_grads, expected)


def test_bfloat16_computes_coarsely_and_returns_float32(variables, result, quick_jit):
    coarse = quick_jit(NET.clone(dtype=jnp.bfloat16).apply)(variables, inputs(), LABELS)
    assert coarse.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((coarse - result[0]) ** 2) / jnp.mean(result[0] ** 2)))
    assert 1e-5 < error < 0.05


def test_initial_weights_are_those_of_the_paper(quick_jit):
    net = NET.clone(width=64, num_heads=1)
    key = jax.random.key(0, impl="rbg")  # compiles faster
    block = quick_jit(net.init)(key, inputs())["params"]["block_0"]
    std = 1 / math.sqrt(3 * 64)
    np.testing.assert_allclose(np.std(block["qkv"]["kernel"]), std, rtol=0.05)
    np.testing.assert_allclose(np.std(block["mlp_out"]["kernel"]), std / 2, rtol=0.05)
    gates, others = np.split(block["adaln"]["kernel"], [128], axis=1)
    np.testing.assert_allclose(np.std(gates), 1e-5 * std, rtol=0.05)
    np.testing.assert_allclose(np.std(others), 0.5 * std, rtol=0.05)
    np.testing.assert_allclose(np.exp(block["log_scale"]), 4, rtol=1e-6)


def test_dropped_labels_are_no_class_at_the_stated_rate():
    labels = jnp.arange(20_000) % 3
    dropped = drop_class(jax.random.key(0), labels, num_classes=3, rate=0.1)
    assert np.all((dropped == labels) | (dropped == 3))
    # A binomial frequency deviates by 5 standard errors with probability 6e-7.
    assert abs(float(jnp.mean(dropped == 3)) - 0.1) < 5 * math.sqrt(0.09 / 20_000)


def test_two_networks_with_one_rng_drop_the_same_labels(variables, result, quick_jit):
    net = NET.clone(label_dropout=0.5)
    many, labels = np.repeat(inputs()[:1], 32, axis=0), jnp.ones(32, jnp.int32)

    @quick_jit
    def train(variables, key):
        return net.apply(variables, many, labels, train=True, rngs={"dropout": key})

    @quick_jit
    def evaluate(variables, labels):
        return net.apply(variables, many[:2], labels)

    other = jax.tree.map(lambda leaf: 1.1 * leaf, variables)
    rows = []
    for weights in (variables, other):
        logits = train(weights, jax.random.key(3))
        with_class, without = evaluate(weights, LABELS)
        near = np.abs(logits - without).max(axis=(1, 2)) < 1e-5
        np.testing.assert_allclose(logits[~near], np.stack([with_class] * 32)[~near], atol=1e-5)
        rows.append(near)
    np.testing.assert_array_equal(rows[0], rows[1])
    assert 0 < rows[0].sum() < 32
    assert np.abs(train(variables, jax.random.key(3)) - train(variables, jax.random.key(4))).max()


def test_no_labels_are_no_class(variables, quick_jit):
    apply = quick_jit(NET.apply)
    null = apply(variables, inputs(), jnp.full(2, 3))
    np.testing.assert_array_equal(apply(variables, inputs()), null)
    assert np.abs(apply(variables, inputs(), jnp.full(2, 0)) - null).max() > 1e-2


def test_a_foreign_label_within_a_compiled_function_becomes_nan(variables, quick_jit):
    apply = quick_jit(NET.apply)
    for foreign in (4, -1):
        logits = apply(variables, inputs(), jnp.array([foreign, 3]))
        assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"inputs": np.zeros((2, 14, 4), np.float32)}, r"inputs must be \[batch, 13, 4\]"),
        ({"inputs": np.zeros((2, 13, 5), np.float32)}, r"inputs must be \[batch, 13, 4\]"),
        ({"inputs": np.zeros((2, 13, 4), np.int32)}, "floating point"),
        ({"labels": jnp.zeros((2, 1), jnp.int32)}, r"shape \(2,\)"),
        ({"labels": jnp.zeros(2)}, "integers"),
        ({"labels": jnp.array([0, 4])}, r"in \[0, 3\].*0 to 4"),
        ({"labels": jnp.array([-1, 0])}, r"in \[0, 3\].*-1 to 0"),
    ],
)
def test_wrong_inputs_are_refused(variables, change, match):
    with pytest.raises(ValueError, match=match):
        NET.apply(variables, **({"inputs": inputs(), "labels": LABELS} | change))


@pytest.mark.parametrize(
    ("scale", "seen", "match"),
    [
        (3, None, r"scale must be in \[0, 3\)"),
        (-1, None, r"scale must be in \[0, 3\)"),
        (0, np.zeros((2, 1, 4), np.float32), "inputs of scale 0 must be None"),
        (1, None, r"inputs of scale 1 must be \(2, 4, 4\), got None"),
        (1, np.zeros((2, 9, 4), np.float32), r"inputs of scale 1 must be \(2, 4, 4\)"),
    ],
)
def test_wrong_inputs_of_a_scale_are_refused(variables, scale, seen, match):
    with pytest.raises(ValueError, match=match):
        NET.apply(variables, seen, LABELS, NET.init_cache(2), scale, method="predict_scale")


@pytest.mark.parametrize(
    ("attributes", "match"),
    [
        ({"num_heads": 3}, "num_heads=3"),
        ({"patch_nums": (1, 3, 2)}, "patch_nums must be positive and increase"),
        ({"patch_nums": ()}, "patch_nums must be positive and increase"),
        ({"depth": 0}, "depth"),
    ],
)
def test_impossible_attributes_are_refused(attributes, match):
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(NET.clone(**attributes).init, jax.random.key(0), inputs())


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 3\), 7, 4\), but \(\(1, 2\), 7, 4\)"):
        teacher_forced(NET, QUANTIZER.clone(patch_nums=(1, 2)), {})
    with pytest.raises(ValueError, match="'d17'"):
        var_imagenet("d17")
    with pytest.raises(ValueError, match="rate"):
        drop_class(jax.random.key(0), jnp.zeros(2, jnp.int32), num_classes=3, rate=1.5)
    with pytest.raises(ValueError, match="labels must be integers"):
        drop_class(jax.random.key(0), jnp.zeros((2, 3)), num_classes=3)
