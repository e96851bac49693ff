"""SongUNet and DhariwalUNet: sizes of the papers, conditioning, attention, precision, errors.

That they compute what the originals compute is tested in tests/pretrained/test_edm.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.attention import dense_attention
from genjax_lab.networks import (
    DhariwalUNet,
    SongUNet,
    adm_imagenet64,
    ddpmpp_cifar10,
    ncsnpp_cifar10,
)

X = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
C_NOISE = jnp.array([-1.0, 0.5])
KEY = jax.random.key(1)
LABELS = jnp.array([0, 2])
TINY = {
    "resolution": 4,
    "num_classes": 3,
    "augment_dim": 2,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "dropout": 0.0,
}
BLOCKS = 10  # 3 in the encoder (one of them downsamples), 7 in the decoder (in0, in1, up, 2 + 2)
NETWORKS = [SongUNet, DhariwalUNet]


def shapes_of(network, x=X, c_noise=C_NOISE, *arguments, **keywords):
    """Trace the initialisation without compiling or running anything."""
    init = jax.eval_shape(lambda key: network.init(key, x, c_noise, *arguments, **keywords), KEY)
    return init["params"]


def compiled(function, **keywords):
    """Compile without optimising: these programs run once or twice."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options, **keywords)


@pytest.fixture(scope="module", params=NETWORKS)
def tiny(request, random_variables):
    """A one-level network, its variables and its compiled apply."""
    overrides = {"channel_mult": (1,), "label_dropout": 1.0}
    network = request.param(**(TINY | overrides))
    variables = random_variables(network, X, C_NOISE)
    return network, variables, compiled(network.apply, static_argnames="train")


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (ddpmpp_cifar10(), 55_733_891),
        (ncsnpp_cifar10(), 56_397_827),
        (adm_imagenet64(), 295_899_267),
    ],
    ids=["ddpmpp", "ncsnpp", "adm"],
)
def test_presets_have_the_papers_parameter_counts(network, count):
    side = network.resolution
    params = shapes_of(network, jnp.zeros((1, side, side, 3)), jnp.zeros(1))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(
    ("network", "heads", "calls"),
    [
        # Encoder, bottom, and the last decoder block only.
        (SongUNet(**TINY | {"num_blocks": 2}), 1, {(4, 4): 3, (2, 2): 1}),
        # Every block of the level, and the bottom.
        (
            DhariwalUNet(**TINY | {"model_channels": 128, "num_blocks": 2}),
            2,
            {(4, 4): 5, (2, 2): 1},
        ),
        # The bottom is wide enough for one head, the upper level has none.
        (DhariwalUNet(**TINY | {"model_channels": 32}), 1, {(2, 2): 1}),
    ],
    ids=["song", "adm", "adm-narrow"],
)
def test_the_injected_attention_is_called_where_the_paper_puts_it(network, heads, calls):
    seen = []

    def attention(query, key, value):
        assert query.shape == key.shape == value.shape
        seen.append(query.shape)
        return dense_attention(query, key, value)

    shapes_of(network.clone(attention=attention))
    assert {grid: [s[1:3] for s in seen].count(grid) for grid in {s[1:3] for s in seen}} == calls
    assert all(shape[0] == 2 and len(shape) == 5 for shape in seen)
    assert all(
        shape[3] == heads * (2 if shape[1:3] == (2, 2) and heads == 2 else 1) for shape in seen
    )


@pytest.mark.parametrize("tiny", [SongUNet], indirect=True)  # ADM's 8 channels have no attention
def test_the_injected_attention_decides_the_output(tiny):
    network, variables, apply = tiny
    ours = compiled(network.clone(attention=lambda query, key, value: value).apply)
    difference = ours(variables, X, C_NOISE, LABELS) - apply(variables, X, C_NOISE, LABELS)
    assert float(jnp.abs(difference).max()) > 1e-3


def test_no_class_is_the_label_num_classes_or_zeros_or_none(tiny):
    _, variables, apply = tiny
    nobody = apply(variables, X, C_NOISE, jnp.zeros((2, 3)))
    # Three programs, which may round differently.
    for none in (jnp.array([3, 3]), None):
        np.testing.assert_allclose(apply(variables, X, C_NOISE, none), nobody, atol=1e-6)
    labelled = apply(variables, X, C_NOISE, jnp.array([3, 1]))
    np.testing.assert_allclose(labelled[0], nobody[0], atol=1e-6)
    assert float(jnp.abs(labelled[1] - nobody[1]).max()) > 1e-3


def test_label_vectors_equal_integer_labels(tiny):
    _, variables, apply = tiny
    integers = apply(variables, X, C_NOISE, LABELS)
    vectors = apply(variables, X, C_NOISE, jax.nn.one_hot(LABELS, 3))
    np.testing.assert_allclose(vectors, integers, atol=1e-6)


def test_labels_are_dropped_in_training_only(tiny):
    _, variables, apply = tiny
    nobody = apply(variables, X, C_NOISE, None)
    trained = apply(variables, X, C_NOISE, LABELS, train=True, rngs={"dropout": jax.random.key(2)})
    np.testing.assert_allclose(trained, nobody, atol=1e-6)
    assert float(jnp.abs(apply(variables, X, C_NOISE, LABELS) - nobody).max()) > 1e-3


def test_augmentation_labels_matter_and_none_means_zeros(tiny):
    _, variables, apply = tiny
    plain = apply(variables, X, C_NOISE, LABELS)
    zeros = apply(variables, X, C_NOISE, LABELS, augment_labels=jnp.zeros((2, 2)))
    ones = apply(variables, X, C_NOISE, LABELS, augment_labels=jnp.ones((2, 2)))
    np.testing.assert_array_equal(zeros, plain)
    assert float(jnp.abs(ones - plain).max()) > 1e-3


def test_examples_do_not_mix_and_vmap_agrees_with_batching(tiny):
    _, variables, apply = tiny

    def one(x, c_noise, label):
        return apply(variables, x[None], c_noise[None], label[None])[0]

    batched = apply(variables, X, C_NOISE, LABELS)
    np.testing.assert_allclose(jax.vmap(one)(X, C_NOISE, LABELS), batched, atol=1e-5)


def test_weights_are_drawn_as_the_originals_are(tiny):
    network = tiny[0]
    params = compiled(network.init)(KEY, X, C_NOISE)["params"]
    block = params["dec_4x4_in0"]

    def largest(leaf):
        return float(jnp.abs(leaf).max())

    fans = 9 * 8  # in and out alike: 8 channels, 3x3
    if isinstance(network, SongUNet):
        glorot = np.sqrt(6 / (fans + fans))
        assert 0.9 * glorot < largest(block["conv0"]["kernel"]) <= glorot
        assert 0.9e-5 * glorot < largest(block["conv1"]["kernel"]) <= 1e-5 * glorot
        qkv = np.sqrt(0.2 * 6 / (8 + 24))
        assert 0.9 * qkv < largest(block["qkv"]["kernel"]) <= qkv
        assert largest(block["conv0"]["bias"]) == 0
    else:
        bound = np.sqrt(1 / fans)
        assert 0.9 * bound < largest(block["conv0"]["kernel"]) <= bound
        assert 0.5 * bound < largest(block["conv0"]["bias"]) <= bound
        assert largest(block["conv1"]["kernel"]) == largest(params["map_augment"]["kernel"]) == 0
        # 96 normals: their deviation has a standard error of 7 %; 5 of them.
        np.testing.assert_allclose(params["map_label"]["kernel"].std(), 1.0, rtol=0.37)


def test_gradients_reach_every_parameter(tiny):
    network, variables, _ = tiny

    @compiled
    def gradients(params):
        def loss(params):
            augment = jnp.ones((2, 2))
            both = variables | {"params": params}
            out = network.apply(both, X, C_NOISE, LABELS, augment_labels=augment)
            return jnp.sum(jnp.square(out))

        return jax.tree.map(lambda g: jnp.abs(g).max(), jax.grad(loss)(params))

    largest = gradients(variables["params"])
    zero = [k for k, g in jax.tree_util.tree_leaves_with_path(largest) if not 0 < g < np.inf]
    assert not zero


@pytest.mark.parametrize("network_class", NETWORKS)
def test_remat_recomputes_but_keeps_the_parameters(network_class):
    plain, remat = network_class(**TINY), network_class(**TINY, remat=True)
    assert jax.tree.structure(shapes_of(plain)) == jax.tree.structure(shapes_of(remat))
    variables = jax.eval_shape(plain.init, KEY, X, C_NOISE)

    def program(network):
        return str(jax.make_jaxpr(lambda v: network.apply(v, X, C_NOISE))(variables))

    assert program(remat).count("remat") == BLOCKS
    assert "remat" not in program(plain)


@pytest.mark.parametrize("network_class", NETWORKS)
def test_bfloat16_computes_in_bfloat16_with_float32_parameters(network_class):
    seen = set()

    def attention(query, key, value):
        seen.add(query.dtype)
        return dense_attention(query, key, value)

    network = network_class(
        **TINY | {"model_channels": 64}, dtype=jnp.bfloat16, attention=attention
    )
    variables = jax.eval_shape(network.init, KEY, X, C_NOISE)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert seen == {jnp.dtype(jnp.bfloat16)}
    jaxpr = jax.make_jaxpr(network.apply)(variables, X, C_NOISE)
    assert jaxpr.out_avals[0].dtype == jnp.float32
    convolutions = [e for e in jaxpr.eqns if e.primitive.name == "conv2d_stride_1"]
    assert len(convolutions) == 2 + 2 * BLOCKS
    assert {e.outvars[0].aval.dtype for e in convolutions} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("network_class", NETWORKS)
def test_wrong_inputs_are_named(network_class):
    network = network_class(**TINY)
    with pytest.raises(ValueError, match=r"x must have shape \[batch, height, width, channels\]"):
        shapes_of(network, X[0])
    with pytest.raises(ValueError, match="multiples of 2 for 2 levels"):
        shapes_of(network, jnp.zeros((2, 5, 4, 3)))
    with pytest.raises(ValueError, match="floating point"):
        shapes_of(network, jnp.zeros((2, 4, 4, 3), jnp.uint8))
    with pytest.raises(ValueError, match=r"c_noise must have shape \(2,\), got \(3,\)"):
        shapes_of(network, X, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(2, 1\)"):
        shapes_of(network, X, C_NOISE, LABELS[:, None])
    with pytest.raises(ValueError, match=r"label vectors must have shape \(2, 3\)"):
        shapes_of(network, X, C_NOISE, jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"augment_labels must have shape \(2, 2\)"):
        shapes_of(network, X, C_NOISE, augment_labels=jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="unconditional"):
        shapes_of(network.clone(num_classes=0), X, C_NOISE, LABELS)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("embedding_type", "sinusoidal"),
        ("encoder_type", "resudual"),
        ("decoder_type", "residual"),
        ("resample_filter", (1, 2, 1)),
    ],
)
def test_unknown_options_are_named(option, value):
    with pytest.raises(ValueError, match=option):
        shapes_of(SongUNet(**TINY | {option: value}))


@pytest.mark.parametrize("network_class", NETWORKS)
def test_widths_that_group_norm_cannot_divide_are_refused(network_class):
    with pytest.raises(ValueError, match="18 channels do not divide into the 4 groups"):
        shapes_of(network_class(**TINY | {"model_channels": 18}))
