"""EDM2's network: its sizes, its magnitudes, its contract, and a PyTorch twin."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.attention import dense_attention
from genjax_lab.networks.edm2_unet import EDM2UNet, edm2_imagenet
from genjax_lab.networks.magnitude_preserving import normalize_weights
from genjax_lab.pretrained.edm import from_state_dict

ARCHITECTURE = {
    "resolution": 8,
    "num_classes": 3,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "channels_per_head": 8,
}


def inputs(batch=2, channels=2, size=8, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((batch, size, size, channels)), jnp.float32)
    return x, jnp.linspace(-1.2, 0.9, batch), jnp.arange(batch) % 3


@pytest.fixture(scope="module")
def net():
    return EDM2UNet(**ARCHITECTURE)


@pytest.fixture(scope="module")
def variables(net, random_variables):
    return random_variables(net, *inputs(), scale=1.0)


@pytest.fixture(scope="module")
def apply(net, quick_jit):
    """Compiled once for all tests: `(output, {"intermediates": ...})`."""
    return quick_jit(functools.partial(net.apply, capture_intermediates=True))


@pytest.fixture(scope="module")
def small():
    """One resolution only, for what would take several compilations."""
    return EDM2UNet(**ARCHITECTURE | {"channel_mult": (1,), "resolution": 4})


@pytest.fixture(scope="module")
def small_step(small, random_variables, quick_jit):
    """Variables of the small network and its compiled `((loss, output), gradients)`."""
    args = inputs(size=4)
    variables = random_variables(small, *args, scale=1.0)

    @functools.partial(quick_jit, static_argnums=0)
    def step(module, variables):
        def loss(params):
            out = module.apply(variables | {"params": params}, *args)
            return jnp.mean(jnp.sin(out)), out

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return variables, step, step(small, variables)


@pytest.mark.parametrize(
    ("size", "channels", "millions"),
    [
        ("XS", 4, 125),
        ("S", 3, 280),
        ("M", 4, 498),
        ("L", 4, 778),
        ("XL", 3, 1119),
        ("XXL", 4, 1523),
    ],
)
def test_presets_have_the_papers_parameter_counts(size, channels, millions):
    shapes = jax.eval_shape(
        edm2_imagenet(size).init,
        jax.random.key(0),
        jnp.zeros((1, 64, 64, channels)),
        jnp.zeros(1),
        jnp.zeros(1, jnp.int32),
    )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
    assert round(count / 1e6) == pytest.approx(millions, abs=1)


def test_parameters_bear_the_published_names(variables):
    params = variables["params"]
    assert params["enc_8x8_conv"]["kernel"].shape == (3, 3, 3, 16)  # with the constant channel
    assert params["dec_4x4_in0"]["attn_qkv"]["kernel"].shape == (1, 1, 32, 96)
    assert params["dec_8x8_block1"]["conv_skip"]["kernel"].shape == (1, 1, 32, 16)
    assert "attn_qkv" not in params["dec_8x8_block0"]
    assert params["emb_label"]["kernel"].shape == (3, 32)
    assert params["logvar_linear"]["kernel"].shape == (128, 1)
    assert params["out_gain"].shape == params["enc_4x4_down"]["emb_gain"].shape == ()
    assert set(variables["buffers"]) == {"emb_fourier", "logvar_fourier"}
    assert set(variables["buffers"]["emb_fourier"]) == {"freqs", "phases"}


@pytest.mark.oracle
def test_outputs_agree_with_the_torch_twin(net, apply):
    torch = pytest.importorskip("torch", reason="run `make oracles` for comparisons with PyTorch")
    from oracles.edm2_twin import EDM2Twin

    torch.manual_seed(0)
    twin = EDM2Twin(
        size=8, channels=2, classes=3, width=16, mults=(1, 2), blocks=1, attends=(4,), head_dim=8
    )
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("gain"):
                parameter.copy_(torch.randn(()))
    state = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    config = ARCHITECTURE | {"model_type": "EDM2", "img_channels": 2}
    config |= {"img_resolution": config.pop("resolution"), "label_dim": config.pop("num_classes")}
    _, variables = from_state_dict(state, config)
    x, c_noise, labels = inputs()
    one_hot = np.eye(3, dtype=np.float32)[np.asarray(labels)]
    with torch.no_grad():
        expected, logvar = twin(
            torch.tensor(np.asarray(x)).permute(0, 3, 1, 2),
            torch.tensor(np.asarray(c_noise)),
            torch.tensor(one_hot),
        )
    out, _ = apply(variables, x, c_noise, labels)
    assert float(jnp.std(out)) > 0.1
    np.testing.assert_allclose(out, expected.permute(0, 2, 3, 1), atol=1e-4)
    ours = net.apply(variables, c_noise, method="logvar")
    np.testing.assert_allclose(ours, logvar, atol=1e-5)


def test_fresh_network_returns_zero(small, quick_jit):
    x, c_noise, _ = inputs(size=4)
    least = small.clone(num_blocks=0, num_classes=0)
    key = jax.random.key(0, impl="rbg")  # compiles faster
    out, variables = quick_jit(least.init_with_output)(key, x, c_noise)
    assert out.shape == x.shape
    np.testing.assert_array_equal(out, 0.0)
    assert variables["params"]["logvar_linear"]["kernel"].shape == (128, 1)
    # Kernels start where the projection leaves them.
    kernel = variables["params"]["enc_4x4_conv"]["kernel"]
    np.testing.assert_allclose(jnp.mean(kernel**2, (0, 1, 2)), 1.0, atol=1e-3)


def test_blocks_keep_unit_magnitude(apply, variables):
    params = jax.tree.map(lambda w: w if w.ndim else 0 * w, variables["params"])
    _, state = apply(variables | {"params": params}, *inputs())
    magnitudes = {
        name: float(jnp.sqrt(jnp.mean(calls["__call__"][0] ** 2)))
        for name, calls in state["intermediates"].items()
        if name.startswith(("emb", "enc", "dec"))
    }
    assert len(magnitudes) == 14
    # Zero padding, which most receptive fields on a 4x4 grid meet, and the averaging of attention
    # lower magnitudes by about a quarter; a block without its scaling would double them.
    assert min(magnitudes.values()) > 0.65, magnitudes
    assert max(magnitudes.values()) < 1.2, magnitudes


def test_labels_change_the_output_and_the_null_label_is_the_zero_vector(net, apply, variables):
    x, c_noise, labels = inputs()
    out, _ = apply(variables, x, c_noise, labels)
    null, _ = apply(variables, x, c_noise, jnp.full(2, 3))
    assert float(jnp.abs(null - out).max()) > 1e-2
    params = dict(variables["params"])
    params["emb_label"] = {"kernel": 5 - params["emb_label"]["kernel"]}
    other, _ = apply(variables | {"params": params}, x, c_noise, jnp.full(2, 3))
    np.testing.assert_array_equal(other, null)


def test_examples_do_not_see_each_other(small, small_step, quick_jit):
    variables, _, ((_, out), _) = small_step
    each = quick_jit(jax.vmap(lambda *one: small.apply(variables, *[a[None] for a in one])[0]))
    np.testing.assert_allclose(each(*inputs(size=4)), out, atol=1e-5)


def test_every_parameter_but_the_uncertainty_head_has_a_gradient(small_step):
    _, _, (_, grads) = small_step
    idle = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if float(jnp.abs(leaf).max()) == 0
    }
    assert idle == {"['logvar_linear']['kernel']"}


def test_remat_changes_neither_output_nor_gradient(small, small_step):
    variables, step, ((_, out), grads) = small_step
    remat = small.clone(remat=True)
    assert "remat" in str(jax.make_jaxpr(remat.apply)(variables, *inputs(size=4)))
    (_, remat_out), remat_grads = step(remat, variables)
    np.testing.assert_allclose(remat_out, out, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), remat_grads, grads)


def test_injected_attention_is_used_on_the_grid(net, variables):
    shapes = []

    def attention(query, key, value):
        shapes.append(query.shape)
        # Cosine attention: every query, key and value has unit magnitude.
        return dense_attention(query, key, value) * 0

    args = inputs()
    injected = net.clone(attention=attention)
    out = jax.eval_shape(injected.apply, variables, *args)
    assert out.shape == args[0].shape
    # One encoder block at 4x4, the decoder's first block, and its two blocks at 4x4.
    assert shapes == [(2, 4, 4, 4, 8)] * 4


def test_projection_after_an_update_does_not_change_the_function(apply, variables, quick_jit):
    args = inputs()
    scaled = jax.tree.map(lambda w: 3 * w if w.ndim else w, variables["params"])
    out, _ = apply(variables | {"params": scaled}, *args)
    projected = quick_jit(normalize_weights)(scaled)
    assert float(jnp.abs(projected["out_conv"]["kernel"]).max()) < 5
    again, _ = apply(variables | {"params": projected}, *args)
    # Each of about a dozen layers in sequence differs by EPSILON at most.
    np.testing.assert_allclose(again, out, atol=2e-3 * float(jnp.abs(out).max()))


def test_bfloat16_computes_coarsely_and_returns_float32(small, small_step, quick_jit):
    variables, _, ((_, out), _) = small_step
    coarse = quick_jit(small.clone(dtype=jnp.bfloat16).apply)(variables, *inputs(size=4))
    assert coarse.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((coarse - out) ** 2) / jnp.mean(out**2)))
    assert 1e-5 < error < 0.05


def test_dropout_needs_training_and_depends_on_its_key(small, small_step, quick_jit):
    variables, _, ((_, out), _) = small_step
    args = inputs(size=4)
    dropping = small.clone(dropout=0.5)
    apply = quick_jit(
        lambda key: dropping.apply(variables, *args, train=True, rngs={"dropout": key})
    )
    first, again, other = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 1e-2
    assert float(jnp.abs(first - out).max()) > 1e-2


def test_dropped_labels_give_the_output_without_class(small, small_step, quick_jit):
    variables, _, ((_, out), _) = small_step
    x, c_noise, labels = inputs(size=4)
    apply = quick_jit(small.clone(label_dropout=1.0).apply, static_argnames="train")
    rngs = {"dropout": jax.random.key(0)}
    dropped = apply(variables, x, c_noise, labels, train=True, rngs=rngs)
    null = apply(variables, x, c_noise, jnp.full(2, 3), train=False)
    np.testing.assert_allclose(dropped, null, atol=1e-5)
    assert float(jnp.abs(dropped - out).max()) > 1e-2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": jnp.zeros((2, 8, 8))}, "x must have"),
        ({"x": jnp.zeros((2, 7, 8, 2))}, "multiples of 2"),
        ({"c_noise": jnp.zeros((2, 1))}, "c_noise"),
        ({"c_noise": jnp.zeros(3)}, "c_noise"),
        ({"labels": jnp.zeros((2, 1), jnp.int32)}, "labels"),
        ({"labels": jnp.zeros((2, 4))}, "label vectors"),
        ({"labels": jnp.zeros(2, bool)}, "labels must be"),
    ],
)
def test_wrong_inputs_are_refused(net, variables, change, match):
    x, c_noise, labels = inputs()
    with pytest.raises(ValueError, match=match):
        net.apply(variables, **({"x": x, "c_noise": c_noise, "labels": labels} | change))


def test_unconditional_network_refuses_labels_and_unknown_sizes_are_named():
    with pytest.raises(ValueError, match="unconditional"):
        jax.eval_shape(EDM2UNet(resolution=8).init, jax.random.key(0), *inputs())
    with pytest.raises(ValueError, match="XXXL"):
        edm2_imagenet("XXXL")
