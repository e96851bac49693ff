"""The kernels that draw tokens: lowered without a GPU or TPU, and compared on a GPU if there is."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import kernel_resources
from pallas_kernels import categorical

ROWS = [(5, 1000), (64, 5753), (8, 50_257)]
TYPES = ["float32", "bfloat16"]


def shapes(rows, vocabulary, dtype):
    struct = jax.ShapeDtypeStruct
    return (
        struct((rows, 2), jnp.uint32),
        struct((rows,), jnp.uint32),
        struct((rows, vocabulary), dtype),
        struct((), jnp.float32),
        struct((rows,), jnp.float32),
    )


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), ROWS)
def test_draws_are_one_kernel(rows, vocabulary, dtype, platform, wide):
    arrays = shapes(rows, vocabulary, dtype)
    with jax.enable_x64(wide):
        if platform == "gpu":
            with kernel_resources.on_described_gpu():
                traced = jax.jit(categorical.draw_on_gpu).trace(*arrays)
                text = traced.lower(lowering_platforms=("cuda",)).as_text()
        else:
            traced = jax.jit(categorical.draw_on_tpu).trace(*arrays)
            text = traced.lower(lowering_platforms=("tpu",)).as_text()
    calls = re.findall(r"@(__gpu\$xla\.gpu\.triton|triton_kernel_call\w*|tpu_custom_call)\b", text)
    assert len(calls) == 1
    # No array beside the logits is as wide as the vocabulary.
    widths = {int(width) for width in re.findall(r"tensor<\d+x(\d+)x\w+>", text)}
    assert max(widths - {vocabulary}) <= 8


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), ROWS)
def test_a_gpu_draws_the_same_tokens(rows, vocabulary, dtype, temperature):
    """Run with JAX_PLATFORMS=cuda."""
    key = jax.random.key(rows)
    floor = np.full(rows, -np.inf, np.float32)
    floor[::2] = 1.0
    arrays = (
        jax.random.bits(key, (rows, 2), jnp.uint32),
        jnp.arange(rows, dtype=jnp.uint32),
        (3 * jax.random.normal(key, (rows, vocabulary))).astype(dtype),
        jnp.float32(temperature),
        jnp.asarray(floor),
    )
    found, expected = (
        categorical.finish(jax.jit(functools.partial(draw))(*arrays), vocabulary)
        for draw in (categorical.draw_on_gpu, categorical.draw_in_jnp)
    )
    np.testing.assert_array_equal(found.token, expected.token)
    for left, right in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)
