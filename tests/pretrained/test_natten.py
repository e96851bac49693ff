"""Import of NATTEN's attention modules: parity with the original, names, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from genjax_lab.attention import NeighborhoodSpec
from genjax_lab.networks.neighborhood import NeighborhoodAttention
from genjax_lab.pretrained import natten

CASES = {
    "1d": ((14,), {"kernel_size": 6, "stride": 4, "is_causal": True}),
    "2d": ((6, 7), {"kernel_size": (4, 3), "stride": (2, 3), "dilation": (1, 2)}),
    "2d, plain": ((5, 6), {"kernel_size": 3, "qkv_bias": False, "qk_scale": 0.5}),
    "3d": ((4, 3, 5), {"kernel_size": (2, 3, 4), "is_causal": (True, False, False)}),
}
SMALL = {"model_type": "NeighborhoodAttention2D", "num_heads": 2, "kernel_size": (3, 2)}
WIDTH = 16


def config_of(name):
    grid, arguments = CASES[name]
    kind = f"NeighborhoodAttention{len(grid)}D"
    return grid, {"model_type": kind, "embed_dim": WIDTH, "num_heads": 2, **arguments}


def random_state(prefix="", rpb=None):
    rng = np.random.default_rng(0)
    shapes = {
        "qkv.weight": (3 * WIDTH, WIDTH),
        "qkv.bias": (3 * WIDTH,),
        "proj.weight": (WIDTH, WIDTH),
        "proj.bias": (WIDTH,),
    }
    shapes |= {"rpb": rpb} if rpb else {}
    return {prefix + n: rng.normal(0, 0.3, shape).astype(np.float32) for n, shape in shapes.items()}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")  # of flex attention, about running without a compiler
def test_outputs_are_those_of_the_original_module(name, tmp_path):
    reason = "run `make oracles` for comparisons with PyTorch"
    torch = pytest.importorskip("torch", reason=reason)
    original = pytest.importorskip("natten", reason=reason)
    grid, config = config_of(name)
    arguments = {key: value for key, value in config.items() if key != "model_type"}
    theirs = getattr(original, config["model_type"])(**arguments).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    path = tmp_path / "model.safetensors"
    save_file({f"block.{n}": x.numpy() for n, x in theirs.state_dict().items()}, path)
    x = np.random.default_rng(1).normal(size=(2, *grid, WIDTH)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x)).numpy()

    layer, variables = natten.from_state_dict(natten.read_state_dict(path), config)
    found = jax.jit(layer.apply)(variables, x)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)


def in_loops(state, x, spec, num_heads):
    """A layer with a position bias by the definition of the older versions, token by token."""
    state = {name: value.astype(float) for name, value in state.items()}
    heads = (num_heads, x.shape[-1] // num_heads)
    qkv = (x @ state["qkv.weight"].T + state["qkv.bias"]).reshape(*x.shape[:-1], 3, *heads)
    query, key, value = np.moveaxis(qkv, -3, 0)
    out = np.zeros(query.shape)
    starts = [axis.bounds()[0] for axis in spec.axes(x.shape[1:-1])]
    for i, j in np.ndindex(x.shape[1:3]):
        rows, columns = (
            start[at] + np.arange(window)
            for start, at, window in zip(starts, (i, j), spec.window, strict=True)
        )
        box = np.ix_(range(len(x)), rows, columns)
        bias = state["rpb"][:, rows - i + spec.window[0] - 1][
            :, :, columns - j + spec.window[1] - 1
        ]
        logits = np.einsum("bhd,brchd->bhrc", query[:, i, j], key[box]) / np.sqrt(heads[1])
        weights = np.exp(logits + bias)
        weights /= weights.sum((2, 3), keepdims=True)
        out[:, i, j] = np.einsum("bhrc,brchd->bhd", weights, value[box])
    return out.reshape(x.shape) @ state["proj.weight"].T + state["proj.bias"]


def test_position_biases_of_older_versions_are_added_to_the_logits():
    state = random_state(rpb=(2, 5, 3))
    state["rpb"] *= 5
    layer, variables = natten.from_state_dict(state, SMALL | {"dim": WIDTH, "attn_drop": 0.1})
    x = np.random.default_rng(1).normal(size=(2, 5, 4, WIDTH)).astype(np.float32)
    expected = in_loops(state, x, layer.spec, 2)
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, atol=1e-5)


@pytest.mark.parametrize("rpb", [None, (2, 5, 3)])
def test_variables_are_the_layers_and_come_back(rpb):
    state = random_state("levels.1.attn.", rpb)
    layer, variables = natten.from_state_dict(state, SMALL)
    fresh = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 4, 4, WIDTH)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, fresh)
    restored = natten.to_state_dict(layer, variables, prefix="levels.1.attn.")
    assert restored.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(restored[name], array)
        assert restored[name].flags["C_CONTIGUOUS"]
    other = layer.clone(qkv_bias=False)
    with pytest.raises(ValueError, match=r"unexpected: qkv\.bias"):
        natten.to_state_dict(other, variables)


def test_one_of_many_modules_is_read_from_the_files_of_a_directory(tmp_path):
    first, second = random_state("a.attn."), random_state("b.attn.")
    second["b.attn.proj.bias"] += 1
    save_file(first | {"norm.weight": np.ones(3, np.float32)}, tmp_path / "model-1.safetensors")
    save_file(second, tmp_path / "model-2.safetensors")
    state = natten.read_state_dict(tmp_path)
    assert natten.find_modules(state) == ("a.attn.", "b.attn.")
    with pytest.raises(ValueError, match=r"prefix must say.*'a\.attn\.', 'b\.attn\.'"):
        natten.from_state_dict(state, SMALL)
    _, variables = natten.from_state_dict(state, SMALL, prefix="b.attn.")
    np.testing.assert_array_equal(variables["params"]["proj"]["bias"], second["b.attn.proj.bias"])
    save_file(first, tmp_path / "model-3.safetensors")
    with pytest.raises(ValueError, match=r"model-3.*a\.attn\."):
        natten.read_state_dict(tmp_path)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \.safetensors files"):
        natten.read_state_dict(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        natten.read_state_dict(tmp_path)
    with pytest.raises(FileNotFoundError):
        natten.read_state_dict(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("m.proj.bias"), r"missing: m\.proj\.bias"),
        (lambda s: s.pop("m.proj.weight"), r"missing: m\.proj\.weight\.$"),
        (lambda s: s.pop("m.qkv.weight"), r"unexpected: .*m\.proj\.weight"),
        (lambda s: s.update({"m.proj.scale": s["m.proj.bias"]}), r"unexpected: m\.proj\.scale"),
        (lambda s: s.update({"head.weight": s["m.proj.bias"]}), r"unexpected: head\.weight"),
        (lambda s: s.update({"m.rpb": np.zeros((2, 5, 5), "f")}), r"m\.rpb.*\(2, 5, 3\)"),
        (lambda s: s.update({"m.qkv.weight": s["m.qkv.weight"].T}), r"m\.qkv\.weight \(16, 48\)"),
        (lambda s: s.update({"m.qkv.bias": np.zeros(48, int)}), r"m\.qkv\.bias \(int64\)"),
        (lambda s: s["m.qkv.bias"].fill(np.nan), r"NaN or infinity in: m\.qkv\.bias"),
    ],
)
def test_arrays_that_do_not_fit_are_named(change, message):
    state = random_state("m.")
    change(state)
    with pytest.raises(ValueError, match=message):
        natten.from_state_dict(state, SMALL)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "NeighborhoodAttention4D"}, r"config\['model_type'\].*4D"),
        ({"num_heads": 0}, "num_heads.*positive"),
        ({"num_heads": 3}, "3, no divisor of the width 16"),
        ({"kernel": 3}, "'kernel', which is no argument"),
        ({"stride": (1, 1, 1)}, r"config\['stride'\] must have 2 values"),
        ({"embed_dim": 32}, r"proj\.bias \(16,\) instead of \(32,\)"),
        ({"qkv_bias": False}, r"unexpected: qkv\.bias"),
        ({"bias": True}, "missing: rpb"),
        ({"bias": True, "rel_pos_bias": False}, "contradicts itself"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        natten.from_state_dict(random_state(), SMALL | config)
    incomplete = {name: value for name, value in SMALL.items() if name != "kernel_size"}
    with pytest.raises(ValueError, match="must have 'kernel_size'"):
        natten.from_state_dict(random_state(), incomplete)


def test_layers_drop_outputs_in_training_alone():
    layer = NeighborhoodAttention(2, NeighborhoodSpec(3), proj_dropout=0.5)
    x = np.random.default_rng(0).normal(size=(2, 9, WIDTH)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x)
    out = layer.apply(variables, x)
    trained = layer.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)})
    dropped = np.asarray(trained) == 0
    # 288 fair coins leave this interval less than once in a million tries.
    assert 100 < dropped.sum() < 188
    np.testing.assert_allclose(trained[~dropped], 2 * out[~dropped], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 9, 15), "num_heads=2"), ((9, 16), "num_heads=2"), ((2, 2, 16), "window")],
)
def test_layers_refuse_what_does_not_fit(shape, message):
    layer = NeighborhoodAttention(2, NeighborhoodSpec(3))
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), jnp.zeros(shape))
