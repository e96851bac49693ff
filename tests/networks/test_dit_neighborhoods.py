"""DiT on videos, and with neighborhood attention to tokens on a grid and in tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.attention import NeighborhoodSpec, dense_attention
from genjax_lab.networks import token_grid
from genjax_lab.networks.dit import DiT
from genjax_lab.networks.token_grid import TokenLayout, patchify, sine_cosine_positions, unpatchify

NEAR, BLOCKS = NeighborhoodSpec((3, 4), (2, 1)), NeighborhoodSpec(2, 2)
# Grids of tokens that no tile divides, and the neighborhoods of their blocks.
CASES = {
    "image": ((5, 7), (2, 4), (NEAR,)),
    "dilated": ((5, 7), (2, 2), (NeighborhoodSpec((2, 3), (1, 2), 2),)),
    "video": ((2, 3, 3), (2, 2, 2), NeighborhoodSpec(2, 2)),
}


def network(neighborhood, token_tile=None, **attributes):
    attributes = {"width": 12, "depth": 2, "num_heads": 2, "patch_size": 1} | attributes
    return DiT(**attributes, neighborhood=neighborhood, token_tile=token_tile)


def inputs(grid, batch=2):
    x = np.random.default_rng(0).normal(size=(batch, *grid, 1)).astype(np.float32)
    return x, np.linspace(3, 700, batch, dtype=np.float32)


def traced(net, grid):
    return jax.eval_shape(net.init_with_output, jax.random.key(0), *inputs(grid))[0]


@pytest.mark.parametrize("case", ["image", "dilated"])
def test_tiles_are_another_order_of_the_same_tokens(case, random_variables, quick_jit):
    grid, tile, neighborhood = CASES[case]
    args = inputs(grid)
    net = network(neighborhood, depth=len(neighborhood))
    variables = random_variables(net, *args)
    out, tiled = quick_jit(
        lambda: [net.clone(token_tile=t).apply(variables, *args) for t in (None, tile)]
    )()
    np.testing.assert_allclose(tiled, out, atol=1e-5)
    assert float(jnp.std(out)) > 0.1


def test_gradients_of_a_video_network_reach_every_parameter_through_tiles(
    random_variables, quick_jit
):
    grid, tile, neighborhood = CASES["video"]
    args = inputs(grid, batch=1)
    variables = random_variables(network(None, depth=1), *args)

    def loss(variables, tile=None):
        net = network(neighborhood, tile, depth=1)
        return jnp.mean(jnp.sin(net.apply(variables, *args)))

    slope = jax.device_get(quick_jit(jax.grad(functools.partial(loss, tile=tile)))(variables))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(slope))
    # The difference along the slope of the network whose tokens are in no tiles.
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(slope)))
    step = jax.tree.map(lambda leaf: 1e-2 / norm * leaf, slope)
    compiled = quick_jit(loss)
    ahead, behind = (compiled(jax.tree.map(add, variables, step)) for add in (np.add, np.subtract))
    np.testing.assert_allclose((ahead - behind) / 2e-2, norm, rtol=0.01)


def test_tokens_are_permuted_once_at_each_end(monkeypatch):
    calls = []

    def counted(function):
        def call(*args):
            calls.append(function)
            return function(*args)

        return call

    functions = (token_grid.token_permute, token_grid.token_unpermute)
    for function in functions:
        monkeypatch.setattr(token_grid, function.__name__, counted(function))
    grid, tile, _ = CASES["image"]
    out = traced(network(NEAR, tile, depth=3), grid)
    assert out.shape == (2, *grid, 1)
    assert calls == list(functions)


def test_each_block_has_its_own_neighborhood(monkeypatch):
    seen = []

    def near(query, key, value, *, spec, layout, **options):
        seen.append((spec, layout, options))
        return query

    def dense(query, key, value):
        seen.append("dense")
        return query

    monkeypatch.setattr(token_grid, "neighborhood_attention", near)
    traced(network((NEAR, None, BLOCKS), depth=3, attention=dense), (5, 7))
    assert seen == [(NEAR, "grid", {}), "dense", (BLOCKS, "grid", {})]
    seen.clear()
    traced(network((NEAR, None), (2, 4)), (5, 7))
    options = {"grid": (5, 7), "q_tile": (2, 4)}
    assert seen == [(spec, "tiled", options) for spec in (NEAR, NeighborhoodSpec(window=(5, 7)))]


def test_patches_of_a_video_are_boxes_and_come_back():
    video = np.arange(4 * 6 * 8 * 2).reshape(1, 4, 6, 8, 2)
    patches = patchify(video, (2, 3, 4))
    assert patches.shape == (1, 2, 2, 2, 48)
    np.testing.assert_array_equal(patches[0, 1, 0, 1], video[0, 2:, :3, 4:].ravel())
    np.testing.assert_array_equal(unpatchify(patches, (2, 3, 4)), video)
    assert traced(network(None, patch_size=(1, 2, 4), depth=1), (3, 4, 8)).shape == (2, 3, 4, 8, 1)


def test_positions_of_a_video_tell_columns_rows_and_frames_apart():
    positions = sine_cosine_positions((2, 3, 4), 16)
    for axis, part in ((2, slice(0, 6)), (1, slice(6, 12)), (0, slice(12, 16))):
        along = np.moveaxis(positions[..., part], axis, 0)
        np.testing.assert_array_equal(along, np.broadcast_to(along[:, :1, :1], along.shape))
        assert np.min(np.abs(np.diff(along, axis=0)).max(-1)) > 0.1
    # By hand: column 3 at frequencies 1, 10000^(-1/3) and 10000^(-2/3).
    angles = 3 * 10000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(
        positions[1, 0, 3, :6], [*np.sin(angles), *np.cos(angles)], atol=1e-6
    )


@pytest.mark.parametrize("grid", [(5, 7), (6, 8)])
def test_stored_tokens_that_are_padding_are_known(grid):
    layout = TokenLayout.of(grid, (NeighborhoodSpec(2, dilation=(2, 1)),), (2, 4))
    assert layout.num_groups == 2
    stored = layout.store(jnp.ones((1, *grid)))
    np.testing.assert_array_equal(layout.real_tokens(), stored.ravel() == 1)
    assert not np.all(layout.real_tokens())
    assert TokenLayout.of((4, 8), (None,), (2, 4)).real_tokens() is None


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"neighborhood": (NEAR,)}, "neighborhood must be.*each of the 2 blocks"),
        ({"neighborhood": "near"}, "neighborhood must be"),
        ({"neighborhood": NeighborhoodSpec(6)}, "neighborhood does not fit.*window"),
        ({"neighborhood": (NEAR, None), "scan": True}, "scan=True.*neighborhood"),
        (
            {"neighborhood": (NeighborhoodSpec(2, dilation=2), None), "token_tile": (2, 2)},
            "token_tile.*one dilation",
        ),
        ({"neighborhood": NEAR, "token_tile": (2, 2, 2)}, "token_tile must have a positive edge"),
        (
            {
                "neighborhood": (NEAR, None),
                "token_tile": (2, 2),
                "attention": functools.partial(dense_attention, scale=1.0),
            },
            "attention.*token_tile",
        ),
        ({"neighborhood": None, "patch_size": (1, 1, 1)}, "patch_size"),
    ],
)
def test_what_does_not_fit_together_is_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        traced(network(**attributes), (5, 7))
