"""The kernels of published models' attention are lowered for GPUs and TPUs on a machine without."""

import re

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import kernel_resources
from genjax_lab.attention.kernels import kernel_attention
from genjax_lab.attention.shapes import SHAPES, SMALL_SHAPES

NAMED = {shape.name: shape for shape in SHAPES + SMALL_SHAPES}


def operands(shape, platform):
    dtype = jnp.dtype("bfloat16" if platform == "tpu" else shape.dtype)
    array = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
    query = array(shape.batch, *shape.grid, shape.heads, shape.head_dim)
    key = array(shape.batch, *shape.grid, shape.kv_heads, shape.head_dim)
    extra = None
    if shape.num_additional:
        extra = array(shape.batch, shape.num_additional, shape.kv_heads, shape.head_dim)
    return query, key, key, extra, extra


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("name", NAMED)
def test_forward_and_gradients_are_lowered(name, platform):
    shape = NAMED[name]
    tiles = {"q_tile": shape.q_tile, "kv_tile": shape.kv_tile} if platform == "gpu" else {}

    def attend(query, key, value, more_keys, more_values):
        more = {"additional_keys": more_keys, "additional_values": more_values}
        return kernel_attention(query, key, value, shape.spec, platform=platform, **more, **tiles)

    def gradient(*arrays):
        outputs, backward = jax.vjp(attend, *arrays)
        return outputs, backward(outputs)

    arrays = operands(shape, platform)
    if platform == "gpu":
        with kernel_resources.on_described_gpu():
            lowered = jax.jit(gradient).trace(*arrays).lower(lowering_platforms=("cuda",))
    else:
        lowered = jax.jit(gradient).trace(*arrays).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    calls = re.findall(r"@(__gpu\$xla\.gpu\.triton|triton_kernel_call\w*|tpu_custom_call)\b", text)
    # Forward, gradients of queries, of keys and, with a text, of additional keys.
    assert len(calls) == 3 + (shape.num_additional > 0)


@pytest.mark.parametrize("capability", kernel_resources.MAX_SHARED)
def test_kernels_use_tensor_cores_and_fit_a_gpu(capability):
    pytest.importorskip("triton", reason="compiling for GPUs needs PyPI's triton")
    expected = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for kernel in kernel_resources.kernels_of(NAMED["hunyuan-video sliding"])[:3]:
        found = kernel_resources.resources(kernel, capability)
        assert found.tensor_cores == expected[capability]
        assert found.spill <= kernel_resources.MAX_SPILL
        assert found.shared <= kernel_resources.MAX_SHARED[capability]
