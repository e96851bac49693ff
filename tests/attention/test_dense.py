"""Dense attention against NumPy's softmax and against JAX's own implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.attention import dense_attention


def arrays(query_shape, key_shape, value_shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (query_shape, key_shape, value_shape)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def numpy_attention(query, key, value, scale):
    """One query at a time, in float64."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    group = query.shape[-2] // key.shape[-2]
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    for index in np.ndindex(query.shape[:-1]):
        batch, head = index[0], index[-1]
        keys = key[batch, ..., head // group, :].reshape(-1, key.shape[-1])
        values = value[batch, ..., head // group, :].reshape(-1, value.shape[-1])
        logits = scale * keys @ query[index]
        weights = np.exp(logits - logits.max())
        out[index] = weights @ values / weights.sum()
    return out


CASES = {
    "sequence": ((2, 5, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)),
    "image": ((2, 3, 2, 2, 4), (2, 3, 2, 2, 4), (2, 3, 2, 2, 4)),
    "video": ((1, 2, 3, 2, 1, 4), (1, 2, 3, 2, 1, 4), (1, 2, 3, 2, 1, 4)),
    "cross, other rank": ((2, 3, 2, 2, 4), (2, 7, 2, 4), (2, 7, 2, 4)),
    "wider values": ((2, 5, 2, 4), (2, 3, 2, 4), (2, 3, 2, 6)),
    "grouped heads": ((2, 5, 6, 4), (2, 5, 2, 4), (2, 5, 2, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_numpy(case):
    query, key, value = arrays(*CASES[case])
    out = jax.jit(dense_attention)(query, key, value)
    expected = numpy_attention(query, key, value, query.shape[-1] ** -0.5)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_scale_multiplies_the_logits():
    query, key, value = arrays(*CASES["sequence"])
    out = dense_attention(query, key, value, scale=0.7)
    np.testing.assert_allclose(out, numpy_attention(query, key, value, 0.7), atol=2e-6)


def test_agrees_with_jax():
    query, key, value = arrays((2, 9, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8))
    expected = jax.nn.dot_product_attention(query, key, value)
    np.testing.assert_allclose(dense_attention(query, key, value), expected, atol=2e-6)


def test_softmax_is_float32_in_bfloat16():
    # Logits 256 and 257 cannot be told apart in bfloat16, where the weights would both be 1/2.
    query = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    key = jnp.array([[128.0, 128.0], [128.0, 129.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    value = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    out = dense_attention(query, key, value, scale=1.0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(out.squeeze()), 1 / (1 + np.exp(-1.0)), rtol=2**-8)


def test_permuting_keys_changes_nothing_and_permuting_queries_permutes():
    query, key, value = arrays((1, 6, 2, 4), (1, 6, 2, 4), (1, 6, 2, 4))
    order = jnp.array([3, 1, 5, 0, 2, 4])
    out = dense_attention(query, key, value)
    np.testing.assert_allclose(
        dense_attention(query, key[:, order], value[:, order]), out, atol=1e-6
    )
    np.testing.assert_allclose(
        dense_attention(query[:, order], key, value), out[:, order], atol=1e-6
    )
    assert float(jnp.abs(dense_attention(query, key, value[:, order]) - out).max()) > 0.1


def test_works_under_jit_grad_and_vmap():
    query, key, value = arrays((3, 4, 2, 4), (3, 4, 2, 4), (3, 4, 2, 4))

    def loss(query, key, value):
        return jnp.sum(jnp.sin(dense_attention(query, key, value)))

    batched = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)
    split = [a[:, None] for a in (query, key, value)]
    each = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)))(*split)
    for whole, part in zip(batched, each, strict=True):
        np.testing.assert_allclose(whole, part[:, 0], atol=1e-6)
        assert float(jnp.abs(whole).max()) > 1e-3


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (((2, 4, 8), (2, 5, 2, 4), (2, 5, 2, 4)), "query must be"),
        (((2, 5, 2, 4), (2, 5, 2, 4), (2, 4, 2, 4)), "key and value"),
        (((2, 5, 2, 4), (2, 5, 1, 4), (2, 5, 2, 4)), "key and value"),
        (((2, 5, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4)), "batch"),
        (((2, 5, 2, 4), (2, 5, 2, 8), (2, 5, 2, 8)), "head_dim"),
        (((2, 5, 3, 4), (2, 5, 2, 4), (2, 5, 2, 4)), "multiple"),
        (((2, 5, 2, 4), (2, 0, 2, 4), (2, 0, 2, 4)), "empty"),
    ],
)
def test_wrong_shapes_are_refused(shapes, match):
    with pytest.raises(ValueError, match=match):
        dense_attention(*arrays(*shapes))


def test_integers_are_refused():
    with pytest.raises(ValueError, match="floating"):
        dense_attention(*arrays(*CASES["sequence"], dtype=jnp.int32))
