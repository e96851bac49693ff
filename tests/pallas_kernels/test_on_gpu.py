"""The compiled GPU kernels against attention over all pairs; needs a GPU.

JAX_PLATFORMS=cuda python -m pytest tests/pallas_kernels/test_on_gpu.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.attention import NeighborhoodSpec, neighborhood_attention

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")

# Matrix units round float32 to 10 bits of mantissa, and bfloat16 has 7.
TOLERANCE = {"float32": 2e-3, "float16": 3e-3, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention problem."""

    grid: tuple[int, ...]
    spec: NeighborhoodSpec
    heads: tuple[int, int] = (2, 2)
    widths: tuple[int, int] = (64, 64)
    extra: int = 0
    masked: bool = False


CASES = {
    "line": Case((1000,), NeighborhoodSpec(200, 16)),
    "causal line": Case((512,), NeighborhoodSpec(130, is_causal=True), heads=(8, 2)),
    "dilated line": Case((515,), NeighborhoodSpec(60, 7, 4), masked=True),
    "image": Case((33, 40), NeighborhoodSpec((13, 16), (1, 8)), widths=(128, 128)),
    "cut windows": Case((24, 24), NeighborhoodSpec(9, 3, border="mask"), widths=(48, 24)),
    "image with text": Case((32, 32), NeighborhoodSpec(16, 8), (4, 2), (64, 32), extra=77),
    "masked image with text": Case((30, 21), NeighborhoodSpec((7, 5)), extra=130, masked=True),
    "video": Case((5, 17, 19), NeighborhoodSpec((3, 8, 6), (1, 4, 2), 1, (True, False, False))),
    "dilated video": Case((8, 16, 16), NeighborhoodSpec(4, 2, (1, 2, 3)), widths=(32, 32)),
    "wide heads": Case((20, 20), NeighborhoodSpec(10, 2), widths=(256, 256)),
}


def problem(case, dtype):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    (heads, kv_heads), (width, value_width) = case.heads, case.widths
    made = [normal(2, *case.grid, number, width) for number in (heads, kv_heads)]
    made.append(normal(2, *case.grid, kv_heads, value_width))
    if case.extra:
        made.extend(normal(2, case.extra, kv_heads, size) for size in case.widths)
    mask = jnp.asarray(rng.random((2, *case.grid)) < 0.7) if case.masked else None
    dlse = jnp.asarray(rng.normal(size=(2, *case.grid, heads)), jnp.float32)
    return made, mask, (normal(2, *case.grid, heads, value_width), dlse)


def solution(case, implementation, made, mask, cotangents):
    @jax.jit
    def run(made, cotangents):
        def attend(made):
            more = dict(zip(("additional_keys", "additional_values"), made[3:], strict=False))
            return neighborhood_attention(
                *(*made[:3], case.spec),
                kv_mask=mask,
                return_lse=True,
                implementation=implementation,
                **more,
            )

        outputs, backward = jax.vjp(attend, made)
        return outputs, backward(cotangents)[0]

    with jax.default_matmul_precision("highest"):
        return run(made, cotangents)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_all_pairs(name, dtype):
    made, mask, cotangents = problem(CASES[name], dtype)
    found = solution(CASES[name], "pallas", made, mask, cotangents)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (made, cotangents))
    expected = solution(CASES[name], "reference", exact[0], mask, exact[1])
    names = ("out", "lse", "query", "key", "value", "text keys", "text values")
    pairs = zip(names, jax.tree.leaves(found), jax.tree.leaves(expected), strict=False)
    for part, ours, theirs in pairs:
        error = np.linalg.norm(ours.astype(jnp.float32) - theirs) / np.linalg.norm(theirs)
        assert error < TOLERANCE[dtype], part


def test_results_are_deterministic():
    made, mask, cotangents = problem(CASES["masked image with text"], "bfloat16")
    runs = [
        solution(CASES["masked image with text"], "pallas", made, mask, cotangents)
        for _ in range(2)
    ]
    for first, second in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_array_equal(first, second)
