"""The joint transformer of text and image: its attention, its tiles, and its published size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab import processes, samplers
from genjax_lab.attention import NeighborhoodSpec, dense_attention, neighborhood_mask
from genjax_lab.networks import token_grid
from genjax_lab.networks.mmdit import MMDiT, TextCondition, mmdit_flux
from genjax_lab.networks.mmdit_block import (
    MMDiTBlock,
    ParallelBlock,
    QueriesKeysValues,
    joint_attention,
)
from genjax_lab.networks.token_grid import TokenLayout

GRID, WHOLE = (3, 5), NeighborhoodSpec((3, 5))
NEAR = NeighborhoodSpec((1, 2), (1, 2), (2, 2))
TILE = (2, 2)
MASK = np.array([[True, True, False, True], [False, True, True, False]])


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def streams():
    image = QueriesKeysValues(*drawn(3, 2, *GRID, 2, 4))
    text = QueriesKeysValues(*drawn(3, 2, 4, 2, 4, seed=1))
    return image, text


def joint(image, text, neighborhood, tile=None, mask=None):
    layout = TokenLayout.of(GRID, (neighborhood,), tile)
    stored = QueriesKeysValues(*map(layout.store, image))
    image_out, text_out = joint_attention(
        stored, text, neighborhood=neighborhood, layout=layout, text_mask=mask
    )
    return layout.restore(image_out), text_out


def test_without_a_neighborhood_it_is_dense_attention_over_both(quick_jit):
    image, text = streams()
    both = [
        np.concatenate([y, x.reshape(2, 15, 2, 4)], axis=1)
        for x, y in zip(image, text, strict=True)
    ]
    expected, dense, whole, tiled = quick_jit(
        lambda: (
            dense_attention(*both),
            joint(image, text, None),
            joint(image, text, WHOLE),
            joint(image, text, None, TILE),
        )
    )()
    for image_out, text_out in (dense, whole, tiled):
        np.testing.assert_allclose(text_out, expected[:, :4], atol=1e-5)
        np.testing.assert_allclose(image_out.reshape(2, 15, 2, 4), expected[:, 4:], atol=1e-5)


def test_image_sees_its_neighborhood_and_all_see_the_text_that_there_is(quick_jit):
    image, text = streams()
    results = quick_jit(lambda: [joint(image, text, NEAR, tile, MASK) for tile in (None, TILE)])()
    query, key, value = (
        np.concatenate([y, x.reshape(2, 15, 2, 4)], axis=1).astype(np.float64)
        for x, y in zip(image, text, strict=True)
    )
    seen = np.ones((2, 19, 19), bool)
    seen[:, 4:, 4:] = neighborhood_mask(GRID, NEAR)
    seen[:, :, :4] &= MASK[:, None]
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / 2
    weights = np.where(seen[:, None], np.exp(logits), 0)
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)
    for image_out, text_out in results:
        np.testing.assert_allclose(text_out, expected[:, :4], atol=1e-5)
        np.testing.assert_allclose(image_out.reshape(2, 15, 2, 4), expected[:, 4:], atol=1e-5)


def network(token_tile=None, **attributes):
    attributes = {"width": 8, "depth": 1, "parallel_depth": 1, "num_heads": 2} | attributes
    attributes = {"neighborhood": NEAR, "patch_size": 1, "uses_pooled": True} | attributes
    return MMDiT(**attributes, token_tile=token_tile)


def inputs():
    text = TextCondition(drawn(2, 4, 6, seed=2), MASK, drawn(2, 3, seed=3))
    return drawn(2, *GRID, 1), np.array([3, 700], np.float32), text


def test_every_parameter_has_a_gradient_and_tiles_and_padding_of_the_text_change_nothing(
    random_variables, quick_jit
):
    net, (x, c_noise, text) = network(neighborhood=None), inputs()
    variables = random_variables(net, x, c_noise, text)

    def loss(variables, text):
        out = net.apply(variables, x, c_noise, text)
        return jnp.mean(jnp.sin(out)), out

    run = quick_jit(jax.grad(loss, has_aux=True))
    slope, out = jax.device_get(run(variables, text))
    idle = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(slope)
        if not np.any(leaf)
    ]
    assert not idle
    other = text._replace(tokens=np.where(MASK[..., None], text.tokens, 7))
    np.testing.assert_allclose(run(variables, other)[1], out, atol=1e-5)
    assert np.abs(run(variables, text._replace(mask=~MASK))[1] - out).max() > 1e-2
    tiled = quick_jit(net.clone(token_tile=TILE).apply)(variables, x, c_noise, text)
    np.testing.assert_allclose(tiled, out, atol=1e-5)


@pytest.mark.parametrize("block", [MMDiTBlock(2), ParallelBlock(2)])
def test_a_fresh_block_is_the_identity(block, random_variables, quick_jit):
    x, text, condition = drawn(2, *GRID, 8), drawn(2, 4, 8, seed=1), drawn(2, 8, seed=2)
    variables = random_variables(block, x, text, condition)

    def fresh(path, leaf):
        return 0 * leaf if "adaln" in jax.tree_util.keystr(path) else leaf

    variables = jax.tree_util.tree_map_with_path(fresh, variables)
    image_out, text_out = quick_jit(block.apply)(variables, x, text, condition)
    np.testing.assert_array_equal(image_out, x)
    np.testing.assert_array_equal(text_out, text)


def test_the_last_block_of_two_streams_has_no_weights_for_text_that_nobody_reads():
    net = network(depth=2, parallel_depth=0, neighborhood=None)
    params = jax.eval_shape(net.init, jax.random.key(0), *inputs())["params"]
    assert set(params["block_0"]["text"]) > set(params["block_1"]["text"])
    assert set(params["block_1"]["text"]) == {"adaln", "qkv", "key_norm"}
    assert params["block_1"]["text"]["qkv"]["kernel"].shape == (8, 16)


def test_tokens_are_permuted_once_at_each_end(monkeypatch):
    calls = []

    def counted(function):
        def call(x, *args):
            calls.append((function, x.ndim))
            return function(x, *args)

        return call

    functions = (token_grid.token_permute, token_grid.token_unpermute)
    for function in functions:
        monkeypatch.setattr(token_grid, function.__name__, counted(function))
    jax.eval_shape(network(TILE, depth=2).init, jax.random.key(0), *inputs())
    # Which tokens are padding, [1, *grid], has no features.
    assert [call for call in calls if call != (functions[0], 3)] == [
        (functions[0], 4),
        (functions[1], 3),
    ]


def test_samplers_take_the_text_as_their_condition():
    x, _, text = inputs()
    variables = jax.eval_shape(network().init, jax.random.key(0), *inputs())

    def predict(variables):
        denoise = samplers.denoiser(network(), variables, processes.edm())
        null = jax.tree.map(lambda leaf: np.zeros_like(leaf[:1]), text)
        guided = samplers.classifier_free(denoise, guidance_scale=2.0, null_condition=null)
        return guided.predict(guided.memory, x, jnp.float32(1), text)[0]

    assert jax.eval_shape(predict, variables).shape == x.shape


def test_flux_has_its_published_size_and_its_windows_fit_its_grid():
    full, small = mmdit_flux(), mmdit_flux(depth=1, parallel_depth=1)
    out, variables = jax.eval_shape(
        small.init_with_output,
        jax.random.key(0),
        jnp.zeros((1, 512, 512, 16)),
        jnp.zeros(1),
        TextCondition(jnp.zeros((1, 8, 4096)), None, jnp.zeros((1, 768))),
    )
    assert out.shape == (1, 512, 512, 16)
    blocks = {"block_0": full.depth, "block_1": full.parallel_depth}
    count = sum(
        blocks.get(name, 1) * math.prod(leaf.shape)
        for name, part in variables["params"].items()
        for leaf in jax.tree.leaves(part)
    )
    # 11.90 billion with its embedding of the guidance scale, which is left out.
    assert count / 1e9 == pytest.approx(11.89, abs=0.005)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": drawn(2, 6)}, "text must have tokens"),
        ({"text": drawn(1, 4, 6)}, "text must have tokens"),
        ({"text": TextCondition(drawn(2, 4, 6), MASK[:, :3], drawn(2, 3))}, "text.mask must be"),
        ({"text": TextCondition(drawn(2, 4, 6))}, "text.pooled is missing"),
        ({"text": TextCondition(drawn(2, 4, 6), None, drawn(1, 3))}, "text.pooled must be"),
        ({"c_noise": drawn(2, 1)}, "c_noise"),
        ({"neighborhood": (NEAR,)}, "each of the 2 blocks"),
        ({"token_tile": (2,)}, "token_tile"),
        ({"num_heads": 3}, "width must be"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    x, c_noise, text = inputs()
    arguments = {"c_noise": c_noise, "text": text}
    arguments |= {name: change.pop(name) for name in arguments if name in change}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network(**change).init, jax.random.key(0), x, *arguments.values())
