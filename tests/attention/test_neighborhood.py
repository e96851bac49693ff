"""Neighborhood attention against a masked softmax in float64, and against what it falls back to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from genjax_lab.attention import (
    NeighborhoodSpec,
    dense_attention,
    merge_attentions,
    neighborhood_attention,
    neighborhood_mask,
)
from genjax_lab.networks import DiT

attend = jax.jit(neighborhood_attention, static_argnames=("spec", "return_lse"))
CASES = {
    "line": ((13,), NeighborhoodSpec(5)),
    "strided line": ((14,), NeighborhoodSpec(6, 4)),
    "causal line": ((13,), NeighborhoodSpec(6, 3, 2, True)),
    "image": ((6, 7), NeighborhoodSpec((4, 3), (2, 3), (1, 2))),
    "around": ((6, 4), NeighborhoodSpec(3, border=("wrap", "mask"))),
    "video": ((4, 3, 5), NeighborhoodSpec((2, 3, 4), (1, 3, 2), 1, (True, False, False))),
}


def arrays(grid, heads=2, kv_heads=2, head_dim=8, value_dim=8, extra=0, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    made = {
        "query": normal(batch, *grid, heads, head_dim),
        "key": normal(batch, *grid, kv_heads, head_dim),
        "value": normal(batch, *grid, kv_heads, value_dim),
    }
    if extra:
        made["additional_keys"] = normal(batch, extra, kv_heads, head_dim)
        made["additional_values"] = normal(batch, extra, kv_heads, value_dim)
    return made


def in_float64(made, mask, scale=None):
    """(out, lse) of a masked softmax; additional keys come after those of the grid."""
    made = {name: np.asarray(value, np.float64) for name, value in made.items()}
    query, key, value = made["query"], made["key"], made["value"]
    batch, *grid, heads, head_dim = query.shape
    tokens = int(np.prod(grid))
    key, value = (x.reshape(batch, tokens, *x.shape[-2:]) for x in (key, value))
    mask = np.broadcast_to(mask, (batch, tokens, tokens))
    if "additional_keys" in made:
        key = np.concatenate([key, made["additional_keys"]], 1)
        value = np.concatenate([value, made["additional_values"]], 1)
        more = np.ones((batch, tokens, key.shape[1] - tokens), bool)
        mask = np.concatenate([mask, more], -1)
    key, value = (np.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    logits = np.einsum("bqhd,bkhd->bhqk", query.reshape(batch, tokens, heads, head_dim), key)
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    logits = np.where(mask[:, None], logits, -np.inf)
    lse = np.log(np.sum(np.exp(logits), -1))
    out = np.einsum("bhqk,bkhd->bqhd", np.exp(logits - lse[..., None]), value)
    return out.reshape(batch, *grid, heads, -1), np.moveaxis(lse, 1, 2).reshape(batch, *grid, heads)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_lses_are_those_of_a_masked_softmax(name):
    grid, spec = CASES[name]
    made = arrays(grid, heads=4, kv_heads=2, value_dim=3, extra=5)
    run = functools.partial(attend, spec=spec, return_lse=True)
    for changes, atol in (({}, 5e-6), ({"scale": 0.0}, 5e-6), ({"scale": 10.0}, 2e-5)):
        out, lse = run(**made, **changes)
        expected = in_float64(made, neighborhood_mask(grid, spec), **changes)
        np.testing.assert_allclose(out, expected[0], atol=atol)
        np.testing.assert_allclose(lse, expected[1], atol=5e-6, rtol=1e-6)
    small = {name: jnp.asarray(value, jnp.bfloat16) for name, value in made.items()}
    out, lse = run(**small)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(
        out.astype(float), in_float64(made, neighborhood_mask(grid, spec))[0], atol=2e-2
    )


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["line", "strided line", "causal line", "image", "video"])
@pytest.mark.filterwarnings("ignore")  # of flex attention, about running without a compiler
def test_outputs_and_lses_are_those_of_the_original(name):
    reason = "run `make oracles` for comparisons with PyTorch"
    torch = pytest.importorskip("torch", reason=reason)
    natten = pytest.importorskip("natten", reason=reason)
    grid, spec = CASES[name]
    made = arrays(grid, heads=4, kv_heads=4, head_dim=16, value_dim=16)
    original = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(grid)]
    windows = spec.axes(grid)
    expected = original(
        *(torch.from_numpy(value) for value in made.values()),
        kernel_size=tuple(axis.window for axis in windows),
        stride=tuple(axis.stride for axis in windows),
        dilation=tuple(axis.dilation for axis in windows),
        is_causal=tuple(axis.is_causal for axis in windows),
        backend="flex-fna",
        return_lse=True,
    )
    found = attend(**made, spec=spec, return_lse=True)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-6)


def test_windows_of_whole_axes_are_dense_attention():
    made = arrays((4, 5), heads=4)
    spec = NeighborhoodSpec((4, 5), (3, 2))
    out = attend(**made, spec=spec)
    np.testing.assert_allclose(out, dense_attention(**made), atol=1e-5)


def test_blocks_are_attention_within_each():
    made = arrays((6, 4))
    out = attend(**made, spec=NeighborhoodSpec((3, 2), (3, 2)))
    cut = lambda x: x.reshape(2, 2, 3, 2, 2, *x.shape[3:])  # noqa: E731
    blocks = {
        name: cut(value).transpose(0, 1, 3, 2, 4, 5, 6).reshape(8, 3, 2, *value.shape[3:])
        for name, value in made.items()
    }
    expected = dense_attention(**blocks).reshape(2, 2, 2, 3, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5, 6)
    np.testing.assert_allclose(out, expected.reshape(out.shape), atol=1e-6)


def test_dilated_attention_is_that_of_each_subgrid():
    made = arrays((7, 9))
    out = attend(**made, spec=NeighborhoodSpec(3, 2, (2, 3)))
    for first in range(2):
        for second in range(3):
            part = {name: x[:, first::2, second::3] for name, x in made.items()}
            expected = attend(**part, spec=NeighborhoodSpec(3, 2))
            np.testing.assert_allclose(out[:, first::2, second::3], expected, atol=1e-6)


@pytest.mark.parametrize("extra", [1, 5])
def test_additional_keys_are_a_merged_attention(extra):
    grid, spec = CASES["image"]
    made = arrays(grid, heads=4, extra=extra)
    plain = {name: made[name] for name in ("query", "key", "value")}
    text = {
        "query": made["query"],
        "key": made["additional_keys"],
        "value": made["additional_values"],
    }
    whole = attend(**made, spec=spec, return_lse=True)
    near = attend(**plain, spec=spec, return_lse=True)
    out = dense_attention(**text)
    queries = text["query"].reshape(2, -1, 4, 8)
    logits = np.einsum("bqhd,bkhd->bqhk", queries, np.repeat(text["key"], 2, 2)) / np.sqrt(8)
    lse = jax.scipy.special.logsumexp(logits, axis=-1).reshape(near[1].shape)
    merged = merge_attentions([near[0], out], [near[1], lse])
    np.testing.assert_allclose(whole[0], merged[0], atol=1e-6)
    np.testing.assert_allclose(whole[1], merged[1], atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_nothing_outside_its_window_reaches_a_query(name):
    grid, spec = CASES[name]
    made = arrays(grid, extra=2)
    seen = neighborhood_mask(grid, spec)
    query = seen.shape[0] // 2
    outside = ~seen[query].reshape(grid)

    def of_query(made):
        out, lse = attend(**made, spec=spec, return_lse=True)
        return out.reshape(2, -1, 2, 8)[:, query], lse.reshape(2, -1, 2)[:, query]

    planted = {name: np.array(value) for name, value in made.items()}
    planted["key"][:, outside], planted["value"][:, outside] = 1e30, -1e30
    jax.tree.map(np.testing.assert_array_equal, of_query(made), of_query(planted))
    slopes = jax.grad(lambda m: sum(jnp.sum(x) for x in of_query(m)))(made)
    assert not np.any(slopes["key"][:, outside]) and not np.any(slopes["value"][:, outside])
    assert np.any(slopes["value"][:, ~outside]) and np.all(np.isfinite(slopes["key"]))


def test_the_gradient_of_lse_is_that_of_a_log_sum():
    grid, spec = CASES["strided line"]
    made = arrays(grid)

    def total(query, value):
        options = {"spec": spec, "return_lse": True}
        return jnp.sum(attend(query, made["key"], value, **options)[1])

    dq, dv = jax.grad(total, argnums=(0, 1))(made["query"], made["value"])
    assert not np.any(dv)
    keys = {"query": made["query"], "key": made["key"], "value": made["key"]}
    mean_key = in_float64(keys, neighborhood_mask(grid, spec))[0]
    np.testing.assert_allclose(dq, mean_key / np.sqrt(8), atol=2e-5)


def test_gradients_are_those_of_finite_differences_to_second_order():
    made = arrays((5,), heads=1, kv_heads=1, head_dim=2, value_dim=2, extra=1, batch=1)
    spec = NeighborhoodSpec(3, 2)
    with jax.enable_x64(True):
        exact = tuple(jnp.asarray(value, jnp.float64) for value in made.values())

        def run(query, key, value, more_keys, more_values):
            return attend(
                *(query, key, value, spec),
                additional_keys=more_keys,
                additional_values=more_values,
                return_lse=True,
            )

        check_grads(run, exact, order=2, modes=("rev",), rtol=1e-4)


def test_masked_keys_and_smaller_grids():
    grid, spec = (5, 6), NeighborhoodSpec((3, 4), (2, 1))
    made = arrays(grid, extra=2)
    kv_mask = np.random.default_rng(3).random((2, *grid)) < 0.7
    sizes = np.array([[5, 6], [4, 5]])
    out, lse = attend(**made, spec=spec, kv_mask=kv_mask, return_lse=True)
    mask = neighborhood_mask(grid, spec) & kv_mask.reshape(2, 1, -1)
    expected = in_float64(made, mask)
    np.testing.assert_allclose(out, expected[0], atol=5e-6)
    np.testing.assert_allclose(lse, expected[1], atol=5e-6)

    out, lse = attend(**made, spec=spec, grid_sizes=sizes, return_lse=True)
    inside = {
        name: x[1:, :4, :5] if "additional" not in name else x[1:] for name, x in made.items()
    }
    expected = attend(**inside, spec=spec, return_lse=True)
    np.testing.assert_allclose(out[1:, :4, :5], expected[0], atol=1e-6)
    np.testing.assert_allclose(lse[1:, :4, :5], expected[1], atol=1e-6)
    assert not np.any(out[1, 4:]) and not np.any(out[1, :, 5:])
    assert np.all(np.isneginf(lse[1, 4:])) and np.all(np.isfinite(lse[0]))


def test_queries_without_keys_give_zero_and_no_nan():
    made = arrays((6,))
    kv_mask = np.zeros((2, 6), bool)
    kv_mask[:, 5] = True

    def of_queries(query):
        return attend(
            **made | {"query": query}, spec=NeighborhoodSpec(3), kv_mask=kv_mask, return_lse=True
        )

    out, lse = of_queries(made["query"])
    assert not np.any(out[:, :4]) and np.all(np.isneginf(lse[:, :4]))
    np.testing.assert_allclose(out[:, 5], made["value"][:, 5], rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda q: jnp.sum(of_queries(q)[0]))(made["query"])))


def test_easy_cases_have_their_closed_forms():
    grid, spec = CASES["video"]
    made = arrays(grid)
    big = {name: value * 100 for name, value in made.items()}
    assert np.all(np.isfinite(attend(**big, spec=spec)))
    same = made | {"value": np.ones_like(made["value"])}
    np.testing.assert_allclose(attend(**same, spec=spec), 1, rtol=1e-6)
    flat = made | {"key": np.zeros_like(made["key"])}
    out, lse = attend(**flat, spec=spec, return_lse=True)
    mask = neighborhood_mask(grid, spec)
    np.testing.assert_allclose(lse[0, ..., 0].ravel(), np.log(mask.sum(1)), rtol=1e-6)
    mean = mask @ made["value"].reshape(2, -1, 16) / mask.sum(1)[:, None]
    np.testing.assert_allclose(out.reshape(2, -1, 16), mean, atol=1e-6)


def test_inner_queries_move_with_the_input_by_multiples_of_the_stride():
    spec = NeighborhoodSpec((5, 4), (2, 1))
    made = arrays((16, 12))
    out = attend(**made, spec=spec)
    moved = attend(**{k: np.roll(v, (4, 3), (1, 2)) for k, v in made.items()}, spec=spec)
    inner = (slice(None), slice(4, 8), slice(4, 6))
    shifted = (slice(None), slice(8, 12), slice(7, 9))
    np.testing.assert_allclose(moved[shifted], out[inner], atol=1e-6)


def test_networks_take_it_as_their_attention():
    grid = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    options = {"patch_size": 2, "width": 16, "depth": 1, "num_heads": 2}
    spec = NeighborhoodSpec(4, 4)
    near = DiT(**options, attention=functools.partial(neighborhood_attention, spec=spec))
    dense = DiT(**options)
    arguments = (grid, jnp.zeros(2))
    variables = jax.jit(dense.init)(jax.random.key(0), *arguments)
    variables = jax.tree.map(lambda x: x + 0.1, variables)
    outputs = [jax.jit(network.apply)(variables, *arguments) for network in (near, dense)]
    np.testing.assert_allclose(*outputs, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": np.zeros((2, 13, 8), np.float32)}, "query must be"),
        ({"key": np.zeros((2, 12, 2, 8), np.float32)}, "agree in batch and grid"),
        ({"key": np.zeros((2, 13, 2, 8), int)}, "key must be floating"),
        ({"query": np.zeros((2, 13, 3, 8), np.float32)}, "multiple"),
        ({"query": np.zeros((2, 13, 2, 4), np.float32)}, "head_dim"),
        ({"additional_keys": np.zeros((2, 4, 2, 8), np.float32)}, "together"),
        (
            {f"additional_{x}": np.zeros((2, 4, 1, 8), np.float32) for x in ("keys", "values")},
            r"additional_keys.*\(2, 4, 2, 8\)",
        ),
        ({"kv_mask": np.zeros((2, 13))}, "kv_mask must be bool"),
        ({"grid_sizes": np.ones((2, 2), int)}, r"grid_sizes.*\(2, 1\)"),
        ({"implementation": "cuda"}, "cuda.*reference"),
        ({"spec": NeighborhoodSpec(14)}, "window"),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    arguments = arrays((13,)) | {"spec": NeighborhoodSpec(5)} | changes
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**arguments)
