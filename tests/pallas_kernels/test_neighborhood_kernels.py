"""Both neighborhood kernels, interpreted, against attention over all pairs of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.attention import NeighborhoodSpec, neighborhood_attention, neighborhood_mask
from genjax_lab.attention.kernels import kernel_attention
from genjax_lab.attention.tiling import plan_tiles, token_permute, token_unpermute
from pallas_kernels.tiles import attention_reference

PLATFORMS = ("gpu", "tpu")
CASES = {
    "line": {
        "grid": (13,),
        "spec": NeighborhoodSpec(6, 3, 2, True),
        "tiles": ((4,), (2,)),
        "masked": True,
    },
    "image": {
        "grid": (6, 7),
        "spec": NeighborhoodSpec((4, 3), (2, 3), (1, 2)),
        "tiles": ((2, 2), (2, 4)),
        "heads": (4, 2),
        "widths": (8, 3),
        "extra": 21,
    },
    "video": {
        "grid": (4, 3, 9),
        "spec": NeighborhoodSpec((2, 3, 6), (1, 3, 2), 1, (True, False, False)),
        "tiles": ((2, 2, 2), (1, 2, 2)),
        "extra": 1,
    },
}


def arrays(grid, heads=(2, 2), widths=(8, 8), extra=0, masked=False, seed=0, **_):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    (heads, kv_heads), (width, value_width) = heads, widths
    made = {
        "query": normal(2, *grid, heads, width),
        "key": normal(2, *grid, kv_heads, width),
        "value": normal(2, *grid, kv_heads, value_width),
    }
    if extra:
        made["additional_keys"] = normal(2, extra, kv_heads, width)
        made["additional_values"] = normal(2, extra, kv_heads, value_width)
    mask = (rng.random((2, *grid)) < 0.7) if masked else None
    return made, mask, (normal(2, *grid, heads, value_width), normal(2, *grid, heads))


@functools.cache
def program(name, platform):
    """Compiled (arrays, kv_mask, cotangents) -> (outputs, gradients); platform None: all pairs."""
    case = CASES[name]

    def attend(made, kv_mask):
        made = dict(made)
        tokens = [made.pop(part) for part in ("query", "key", "value")]
        if platform is None:
            options = {"implementation": "reference", "return_lse": True}
            return neighborhood_attention(*tokens, case["spec"], kv_mask=kv_mask, **options, **made)
        return kernel_attention(
            *(*tokens, case["spec"]),
            kv_mask=kv_mask,
            platform=platform,
            interpret=True,
            q_tile=case["tiles"][0],
            kv_tile=case["tiles"][1],
            **made,
        )

    @jax.jit
    def run(made, kv_mask, cotangents):
        outputs, backward = jax.vjp(lambda made: attend(made, kv_mask), made)
        return outputs, backward(cotangents)[0]

    return run


def assert_close(found, expected, atol):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_all_pairs(name, platform):
    made, mask, cotangents = arrays(**CASES[name])
    outputs, slopes = program(name, platform)(made, mask, cotangents)
    expected, expected_slopes = program(name, None)(made, mask, cotangents)
    # A tile's sums are in another order: some roundings of numbers below 10.
    assert_close(outputs, expected, atol=5e-6)
    assert slopes.keys() == expected_slopes.keys()
    assert_close(slopes, expected_slopes, atol=2e-5)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_lse_alone_has_a_gradient(platform):
    made, mask, (dout, dlse) = arrays(**CASES["image"])
    cotangents = (np.zeros_like(dout), dlse)
    _, slopes = program("image", platform)(made, mask, cotangents)
    _, expected = program("image", None)(made, mask, cotangents)
    assert not np.any(slopes["value"]) and np.any(slopes["additional_keys"])
    assert_close(slopes, expected, atol=2e-5)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", ["image", "video"])
def test_nothing_outside_its_window_reaches_a_query(name, platform):
    case = CASES[name]
    made, mask, cotangents = arrays(**case)
    seen = neighborhood_mask(case["grid"], case["spec"])
    query = len(seen) // 2
    outside = ~seen[query].reshape(case["grid"])
    place = (slice(None), *np.unravel_index(query, case["grid"]))
    only = jax.tree.map(np.zeros_like, cotangents)
    for zeros, full in zip(only, cotangents, strict=True):
        zeros[place] = full[place]
    planted = {part: np.array(array) for part, array in made.items()}
    planted["key"][:, outside], planted["value"][:, outside] = 1e30, -1e30
    run = program(name, platform)
    outputs, slopes = run(made, mask, only)
    others, planted_slopes = run(planted, mask, only)
    for ours, theirs in zip(outputs, others, strict=True):
        np.testing.assert_array_equal(ours[place], theirs[place])
    np.testing.assert_array_equal(slopes["query"][place], planted_slopes["query"][place])
    for part in ("key", "value"):
        assert not np.any(slopes[part][:, outside]) and np.any(slopes[part][:, ~outside])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_queries_without_keys_give_zero_and_no_nan(platform):
    made, mask, cotangents = arrays(**CASES["line"])
    mask = np.zeros_like(mask)
    mask[:, 12] = True
    (out, lse), slopes = program("line", platform)(made, mask, cotangents)
    assert not np.any(out[:, :12]) and np.all(np.isneginf(lse[:, :12]))
    np.testing.assert_array_equal(out[:, 12], made["value"][:, 12])
    assert not np.any(slopes["query"][:, :12])
    assert all(np.all(np.isfinite(slope)) for slope in slopes.values())


@pytest.mark.parametrize("platform", [None, *PLATFORMS])
def test_tokens_may_stay_in_tiles(platform):
    grid, spec, tile = (5, 7), NeighborhoodSpec((3, 3), (1, 2), (1, 2)), (4, 2)
    made, _, _ = arrays(grid, extra=3)
    options = {part: made[part] for part in ("additional_keys", "additional_values")}
    tokens = [made[part] for part in ("query", "key", "value")]
    expected = neighborhood_attention(
        *tokens, spec, return_lse=True, implementation="reference", **options
    )
    # Padding of a residual stream is not zero.
    padding = token_permute(np.ones((2, *grid, 1, 1)), tile, (1, 2)) == 0
    tiled = [jnp.where(padding, 7.0, token_permute(array, tile, (1, 2))) for array in tokens]
    if platform is None:
        plan = plan_tiles(grid, spec, tile, tile)
        outputs = attention_reference(*tiled, plan, scale=8**-0.5, **options)
    else:
        options |= {"platform": platform, "layout": "tiled", "grid": grid, "q_tile": tile}
        outputs = kernel_attention(*tiled, spec, interpret=True, **options)
    assert not np.any(np.where(padding, outputs[0], 0))
    assert np.all(np.isneginf(outputs[1]) == padding[..., 0])
    found = [token_unpermute(array, grid, tile, (1, 2)) for array in outputs]
    assert_close(found, expected, atol=5e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_half_precision_accumulates_in_float32(platform):
    made, _, _ = arrays((16,), widths=(16, 16))
    small = [jnp.asarray(array, jnp.bfloat16) for array in made.values()]
    spec = NeighborhoodSpec(8, 4)
    tile = {"q_tile": (8,), "kv_tile": (8,)}
    out, lse = kernel_attention(*small, spec, platform=platform, interpret=True, **tile)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    exact = (array.astype(jnp.float32) for array in small)
    expected = neighborhood_attention(*exact, spec, return_lse=True, implementation="reference")
    np.testing.assert_allclose(out.astype(jnp.float32), expected[0], atol=2e-2)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)
