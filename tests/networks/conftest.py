"""Variables for networks without compiling their initialisers, which is what takes longest."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def random_variables():
    """Return `fill(module, *inputs, scale)`: every variable of the module, drawn by NumPy.

    Unlike initial values these are nowhere zero, so that every parameter has an effect.
    """

    def fill(module, *inputs, scale=0.3, seed=0):
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        rng = np.random.default_rng(seed)

        def draw(leaf):
            return (scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

        return jax.tree.map(draw, shapes)

    return fill
