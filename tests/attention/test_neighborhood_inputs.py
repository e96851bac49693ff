"""What hidden tokens may hold, what is refused, and which implementation is chosen for what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.attention import NeighborhoodSpec, kernels, neighborhood_attention, token_permute
from genjax_lab.attention.layouts import Problem

GRID = (6, 5)
SPEC = NeighborhoodSpec(3)


def arrays():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, *GRID, 2, 8)).astype(np.float32) for _ in range(3)]


def slopes_of(implementation, made, weight, **options):
    """(out, gradients) of the real tokens' outputs."""

    def total(made):
        out = neighborhood_attention(*made, SPEC, implementation=implementation, **options)
        return jnp.sum(jnp.where(weight > 0, out * weight, 0)), out

    return jax.jit(jax.grad(total, has_aux=True))(made)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("held", [np.nan, np.inf])
def test_masked_keys_and_values_may_hold_anything(implementation, held):
    made = arrays()
    mask = np.random.default_rng(1).random((2, *GRID)) < 0.7
    dirty = [made[0], *(np.where(mask[..., None, None], x, held) for x in made[1:])]
    weight = np.random.default_rng(2).random((2, *GRID, 2, 8)).astype(np.float32)
    found = slopes_of(implementation, dirty, weight, kv_mask=mask)
    expected = slopes_of(implementation, made, weight, kv_mask=mask)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_padding_may_hold_anything(implementation):
    made, sizes = arrays(), np.array([[4, 5], [6, 3]])
    real = np.zeros((2, *GRID), bool)
    for row, (height, width) in zip(real, sizes, strict=True):
        row[:height, :width] = True
    dirty = [np.where(real[..., None, None], x, np.nan) for x in made]
    weight = np.broadcast_to(real[..., None, None], made[0].shape).astype(np.float32)
    found = slopes_of(implementation, dirty, weight, grid_sizes=sizes)
    expected = slopes_of(implementation, made, weight, grid_sizes=sizes)
    assert not np.any(np.asarray(found[1])[~real])
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_padding_of_stored_tiles_may_hold_anything():
    made = [token_permute(jnp.asarray(x), (4, 4)) for x in arrays()]
    real = np.asarray(token_permute(jnp.ones((2, *GRID, 1, 1)), (4, 4)))
    dirty = [jnp.where(real > 0, x, jnp.nan) for x in made]
    options = {"layout": "tiled", "grid": GRID, "q_tile": (4, 4)}
    found = slopes_of("xla", dirty, real, **options)
    expected = slopes_of("xla", made, real, **options)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_norms_that_have_no_product_bound_no_logit():
    query, key, value = arrays()
    query, key = np.zeros_like(query), np.full_like(key, 1e20)
    out, lse = neighborhood_attention(
        query, key, value, SPEC, implementation="xla", return_lse=True
    )
    expected = neighborhood_attention(query, key, value, SPEC, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_allclose(lse, np.log(9), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": 7}, "spec must be a NeighborhoodSpec"),
        ({"spec": None}, "spec must be a NeighborhoodSpec"),
        ({"scale": np.nan}, "scale"),
        ({"scale": np.ones(8)}, "scale"),
        ({"scale": "a"}, "scale"),
        ({"grid_sizes": [[7, 5], [6, 5]]}, "grid_sizes"),
        ({"grid_sizes": [[6, 0], [6, 5]]}, "grid_sizes"),
        ({"q_tile": 2.5}, "q_tile"),
        ({"q_tile": (2.0, 2.0)}, "q_tile"),
        ({"position_bias": np.zeros((2, 5, 5), int)}, "position_bias"),
        (
            {
                name: np.zeros((2, 3, 2, 8), int)
                for name in ("additional_keys", "additional_values")
            },
            "additional_keys",
        ),
    ],
)
def test_mistakes_are_named(options, message):
    arguments = {"spec": SPEC, "implementation": "xla"} | options
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(*arrays(), **arguments)


def test_tiles_may_be_numpy_integers_and_scales_arrays():
    made = arrays()
    expected = neighborhood_attention(*made, SPEC, scale=0.5, implementation="xla")
    found = neighborhood_attention(
        *made, SPEC, scale=jnp.float32(0.5), q_tile=np.int64(2), implementation="xla"
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.fixture(params=["gpu", "tpu"])
def accelerator(request, monkeypatch):
    """A machine that is said to have one; its kernels are interpreted."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    interpreted = functools.partial(kernels.kernel_attention, interpret=True)
    calls = []

    def counted(*args, **options):
        calls.append(options)
        return interpreted(*args, **options)

    monkeypatch.setattr(kernels, "kernel_attention", counted)
    return request.param, calls


def test_kernels_are_chosen_for_what_they_are_made_for(accelerator):
    _, calls = accelerator
    out = neighborhood_attention(*arrays(), SPEC)
    assert len(calls) == 1
    expected = neighborhood_attention(*arrays(), SPEC, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"q_tile": 3},
        {"position_bias": np.zeros((2, 5, 5), np.float32)},
        {"grid_sizes": np.array([[4, 5], [6, 3]])},
    ],
)
def test_what_kernels_do_not_know_is_not_theirs(accelerator, options):
    _, calls = accelerator
    out = neighborhood_attention(*arrays(), SPEC, **options)
    assert not calls
    options = {name: value for name, value in options.items() if name != "q_tile"}
    expected = neighborhood_attention(*arrays(), SPEC, implementation="reference", **options)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("grid", [(8,), (2, 2), (1, 8), (56, 56)])
def test_default_tiles_suit_every_grid(grid):
    dilation = 28 if grid == (56, 56) else 1
    spec = NeighborhoodSpec(tuple(min(length, 2) for length in grid), 1, dilation)
    query = jnp.zeros((1, *grid, 1, 16))
    problem = Problem.of(query, spec, "grid", None, None, None)
    assert kernels.obstacle(problem, query.dtype, 16, "gpu") is None
    assert kernels.obstacle(problem, np.dtype("float64"), 16, "gpu")
    assert kernels.obstacle(problem, np.dtype("float16"), 16, "tpu")


def test_a_traced_scale_reaches_the_kernel(accelerator):
    slope = jax.grad(lambda scale: jnp.sum(neighborhood_attention(*arrays(), SPEC, scale=scale)))
    expected = jax.grad(
        lambda scale: jnp.sum(
            neighborhood_attention(*arrays(), SPEC, scale=scale, implementation="reference")
        )
    )
    assert slope(0.4) == pytest.approx(float(expected(0.4)), rel=1e-4)
