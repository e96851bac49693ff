"""What keeps compilation, which takes nearly all of these tests' time, short."""

import functools

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def quick_jit():
    """Return `jax.jit` that compiles about twice as fast, for functions that run once."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return functools.partial(jax.jit, compiler_options=options)


@pytest.fixture(scope="session")
def random_variables():
    """Return `fill(module, *inputs, scale)`: every variable of the module, drawn by NumPy.

    Initialisers are only traced, not compiled. Unlike initial values these are nowhere zero, so
    that every parameter has an effect.
    """

    def fill(module, *inputs, scale=0.3, seed=0):
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        rng = np.random.default_rng(seed)

        def draw(leaf):
            return (scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

        return jax.tree.map(draw, shapes)

    return fill
