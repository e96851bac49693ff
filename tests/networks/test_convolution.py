"""Our convolution is `jax.lax`'s, with gradients in the order of axes that is fast on a CPU."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.networks.convolution import conv2d, conv_general_dilated

PADDINGS = ["SAME", "VALID", ((2, 2), (0, 1))]
AXES = ("NHWC", "HWIO", "NHWC")


def reference(x, kernel, padding="SAME"):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=AXES)


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def score(convolve, padding):
    return lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel, padding)))


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), ours, theirs)


@pytest.mark.parametrize("padding", PADDINGS)
def test_values_and_derivatives_of_every_kind_are_those_of_lax(padding):
    x, kernel, dx, dk = arrays((2, 5, 4, 3), (3, 3, 3, 2), (2, 5, 4, 3), (3, 3, 3, 2))

    def all_of(convolve):
        loss = score(convolve, padding)
        both = jax.jvp(lambda *inputs: convolve(*inputs, padding), (x, kernel), (dx, dk))
        curvature = jax.jvp(jax.grad(loss, (0, 1)), (x, kernel), (dx, dk))
        return both, curvature, jax.grad(lambda k: jnp.sum(jax.grad(loss)(x, k) ** 2))(kernel)

    assert_same(jax.jit(lambda: all_of(conv2d))(), jax.jit(lambda: all_of(reference))())


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 0), (0, 4)])
def test_vmap_over_images_or_kernels_or_both(axes):
    x, kernel = arrays((2, 5, 4, 3), (3, 3, 3, 2))
    parts = [
        value if axis is None else jnp.stack([value, 2 * value, -value], axis)
        for value, axis in zip((x, kernel), axes, strict=True)
    ]

    def of(convolve):
        return jax.jit(jax.vmap(jax.value_and_grad(score(convolve, "SAME"), (0, 1)), axes))(*parts)

    assert_same(of(conv2d), of(reference))


def test_gradients_in_a_loop_use_the_order_of_axes_that_is_fast():
    """The compiler reorders other convolutions outside of loops only."""
    x, kernel = arrays((2, 8, 8, 4), (3, 3, 4, 4))

    def descend(convolve):
        def body(kernel, _):
            inner = lambda kernel, x: score(convolve, "SAME")(convolve(x, kernel), kernel)  # noqa: E731
            return kernel - 1e-4 * jax.grad(inner)(kernel, x), None

        return jax.jit(lambda kernel: jax.lax.scan(body, kernel, length=3)[0])

    def orders(convolve):
        text = descend(convolve).lower(kernel).compile().as_text()
        return set(re.findall(r" convolution\(.*dim_labels=(\S+?),? ", text))

    assert orders(conv2d) == {"b01f_01io->b01f"}
    assert orders(reference) != {"b01f_01io->b01f"}  # or this file is not needed any more
    assert_same(descend(conv2d)(kernel), descend(reference)(kernel))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_plain_convolutions_without_loops(platform):
    x, kernel = arrays((2, 3, 8, 8, 4), (2, 3, 3, 4, 4))
    gradient = jax.vmap(jax.grad(score(conv2d, "SAME"), (0, 1)))
    text = jax.jit(gradient).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == 3  # forward, and a gradient for each
    assert "stablehlo.while" not in text
    assert "stablehlo.dot_general" not in text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 2},
        {"padding": 3},
        {"padding": ((-1, 0), (1, 1))},
        {"strides": 2},
        {"kernel_dilation": 2},
        {"feature_group_count": 2},
    ],
)
def test_a_flax_layer_that_takes_it_is_the_layer(options):
    (x,) = arrays((2, 8, 8, 4))
    layers = [
        nn.Conv(4, (3, 3), conv_general_dilated=convolve, **options)
        for convolve in (None, conv_general_dilated)
    ]
    variables = layers[0].init(jax.random.key(0), x)
    assert_same(*[layer.apply(variables, x) for layer in layers])


def test_half_precision_stays():
    x, kernel = (value.astype(jnp.bfloat16) for value in arrays((1, 4, 4, 2), (3, 3, 2, 2)))

    def of(convolve):
        loss = lambda x, k: (convolve(x, k).astype(jnp.float32) ** 2).sum()  # noqa: E731
        return [convolve(x, kernel), *jax.grad(loss, (0, 1))(x, kernel)]

    for ours, theirs in zip(of(conv2d), of(reference), strict=True):
        assert ours.dtype == jnp.bfloat16
        scale = np.abs(theirs.astype(np.float32)).max()
        np.testing.assert_allclose(
            ours.astype(np.float32), theirs.astype(np.float32), atol=0.02 * scale
        )


@pytest.mark.parametrize(
    ("shape", "kernel_shape", "padding", "message"),
    [
        ((2, 4, 4), (3, 3, 4, 2), "SAME", "x must be"),
        ((2, 4, 4, 3), (3, 3, 4, 2), "SAME", "x must be"),
        ((2, 4, 4, 3), (3, 3, 3, 2), ((3, 0), (1, 1)), "padding must be"),
        ((2, 4, 4, 3), (3, 3, 3, 2), ((-1, 0), (1, 1)), "padding must be"),
    ],
)
def test_mistakes_are_named(shape, kernel_shape, padding, message):
    with pytest.raises(ValueError, match=message):
        conv2d(*arrays(shape, kernel_shape), padding)


def test_mixed_dtypes_are_refused():
    x, kernel = arrays((1, 4, 4, 2), (3, 3, 2, 2))
    with pytest.raises(ValueError, match="one dtype"):
        conv2d(x, kernel.astype(jnp.bfloat16))
