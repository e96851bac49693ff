"""The masked transformer: rows, caches, rotation, noise levels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.networks import MaskedTransformer
from genjax_lab.networks.rotary import rotary_angles, rotate

VOCAB, LENGTH = 11, 8
TOKENS = np.random.default_rng(0).integers(0, VOCAB + 1, (2, LENGTH)).astype(np.int32)


def make(**changes):
    fields = {"width": 16, "depth": 2, "num_heads": 2, "condition_width": 8} | changes
    return MaskedTransformer(VOCAB, **fields)


@functools.cache
def variables_of(network):
    """Random everywhere: fresh networks have zeros in their gates and last layer."""
    fresh = jax.eval_shape(network.init, jax.random.key(0), TOKENS)
    leaves, tree = jax.tree.flatten(fresh)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    )


def logits_of(network, tokens=TOKENS, *arguments, **options):
    return network.apply(variables_of(network), tokens, *arguments, **options)


@pytest.fixture(scope="module")
def network():
    return make()


def test_wanted_rows_are_those_of_all(network):
    rows = np.array([[5, 0, 5], [1, 7, 2]])
    every = logits_of(network)
    assert every.shape == (2, LENGTH, VOCAB)
    expected = np.take_along_axis(np.asarray(every), rows[..., None], axis=1)
    np.testing.assert_allclose(logits_of(network, rows=rows), expected, atol=1e-5)


def test_a_fresh_network_knows_nothing(network):
    fresh = network.init(jax.random.key(0), TOKENS)
    assert not np.any(network.apply(fresh, TOKENS))


def test_no_time_is_the_time_zero_and_others_differ(network):
    zero = logits_of(network, TOKENS, jnp.zeros(2))
    np.testing.assert_allclose(logits_of(network), zero, atol=1e-6)
    assert np.any(np.abs(np.asarray(logits_of(network, TOKENS, jnp.full(2, 0.7)) - zero)) > 1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_a_cache_of_earlier_blocks_changes_nothing(tied):
    """Blocks of four tokens see each other and all earlier ones."""
    network = make(tied=tied)
    block = np.arange(LENGTH) // 4
    whole = logits_of(network, mask=block[:, None] >= block[None])
    first, cache = logits_of(network, TOKENS[:, :4], with_cache=True)
    second = logits_of(network, TOKENS[:, 4:], past=cache)
    np.testing.assert_allclose(first, whole[:, :4], atol=1e-5)
    np.testing.assert_allclose(second, whole[:, 4:], atol=1e-5)
    assert cache[0].shape == (2, 2, 4, 2, 8)


def test_only_distances_matter_to_rotated_products():
    rng = np.random.default_rng(2)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(i, j):
        left, right = (
            rotate(x, rotary_angles(jnp.array([at]), 8)) for x, at in ((query, i), (key, j))
        )
        return float(jnp.sum(left * right))

    assert product(3, 1) == pytest.approx(product(12, 10), rel=1e-5)
    assert product(3, 1) != pytest.approx(product(3, 2), rel=1e-2)


def test_recomputed_blocks_have_the_same_gradient(network):
    def slope(network):
        loss = lambda v: jnp.sum(network.apply(v, TOKENS, train=True) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(variables_of(make()))

    slopes = [jax.tree.leaves(slope(n)) for n in (make(remat=True), network)]
    for ours, theirs in zip(*slopes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_every_parameter_has_a_gradient(network):
    t = jnp.array([0.3, 0.8])
    loss = lambda v: jnp.sum(jax.nn.log_softmax(network.apply(v, TOKENS, t))[..., 0])  # noqa: E731
    slopes = jax.jit(jax.grad(loss))(variables_of(network))
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
        assert np.any(slope), jax.tree_util.keystr(path)


def test_published_sizes():
    small = MaskedTransformer(50257, condition_width=128)
    shapes = jax.eval_shape(small.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count / 1e6 == pytest.approx(169.6, abs=0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: n.init(jax.random.key(0), jnp.zeros((2, 4))), "integers"),
        (lambda n: n.init(jax.random.key(0), TOKENS, None, jnp.zeros(2)), "condition"),
        (lambda n: n.clone(width=18).init(jax.random.key(0), TOKENS), "width"),
        (
            lambda n: n.clone(condition_width=0).init(jax.random.key(0), TOKENS, jnp.zeros(2)),
            "time",
        ),
    ],
)
def test_mistakes_are_named(network, call, message):
    with pytest.raises(ValueError, match=message):
        call(network)
