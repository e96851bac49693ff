"""Attention over disjoint sets of keys, merged, is attention over all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.attention import merge_attentions


def attend(logits, values):
    lse = jax.scipy.special.logsumexp(logits, axis=-1)
    return jnp.exp(logits - lse[..., None]) @ values, lse


@pytest.fixture(scope="module")
def parts():
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(2, 5, n)).astype(np.float32) * 3 for n in (4, 1, 7)]
    values = [rng.normal(size=(2, n, 3)).astype(np.float32) for n in (4, 1, 7)]
    return logits, values


def test_merged_is_whole_in_any_order_and_grouping(parts):
    logits, values = parts
    out, lse = attend(jnp.concatenate(logits, -1), jnp.concatenate(values, -2))
    pieces = [attend(*part) for part in zip(*parts, strict=True)]
    for order in itertools.permutations(pieces):
        merged = merge_attentions(*zip(*order, strict=True))
        np.testing.assert_allclose(merged[0], out, atol=1e-6)
        np.testing.assert_allclose(merged[1], lse, atol=1e-6)
    pair = merge_attentions(*zip(*pieces[:2], strict=True))
    both = merge_attentions(*zip(pair, pieces[2], strict=True))
    np.testing.assert_allclose(both[0], out, atol=1e-6)


def test_gradients_pass_through_outputs_and_lses(parts):
    def of_whole(logits):
        out, lse = attend(jnp.concatenate(logits, -1), jnp.concatenate(parts[1], -2))
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    def of_parts(logits):
        pieces = [attend(*part) for part in zip(logits, parts[1], strict=True)]
        out, lse = merge_attentions(*zip(*pieces, strict=True))
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    for found, expected in zip(*(jax.grad(f)(parts[0]) for f in (of_parts, of_whole)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_empty_sets_do_not_count():
    out = [jnp.full((1, 2, 3), jnp.nan), jnp.ones((1, 2, 3))]
    lse = [jnp.full((1, 2), -jnp.inf), jnp.array([[0.5, -jnp.inf]])]
    merged, total = merge_attentions(out, lse)
    np.testing.assert_array_equal(merged, [[[1, 1, 1], [0, 0, 0]]])
    np.testing.assert_allclose(total, [[0.5, -jnp.inf]])
    slope = jax.grad(lambda x: jnp.sum(merge_attentions(out, [lse[0], x])[0]))(lse[1])
    assert jnp.all(jnp.isfinite(slope))


def test_large_logits_and_small_types():
    out = [jnp.zeros((1, 1, 2), jnp.bfloat16), jnp.ones((1, 1, 2), jnp.bfloat16)]
    merged, total = merge_attentions(out, [jnp.full((1, 1), 1e4), jnp.full((1, 1), 1e4)])
    assert merged.dtype == jnp.bfloat16 and total.dtype == jnp.float32
    np.testing.assert_allclose(merged.astype(float), 0.5)
    np.testing.assert_allclose(total, 1e4 + np.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "equally many"),
        ([np.zeros((1, 2, 3))], [], "equally many"),
        ([np.zeros((1, 2, 3))], [np.zeros((1, 3))], r"\(1, 2\).*\(1, 3\)"),
    ],
)
def test_refuses_what_does_not_fit(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        merge_attentions(outs, lses)
