"""Import of EDM and EDM2 weights: parity with the originals, and every way an export can be wrong.

The originals of SongUNet and DhariwalUNet are NVIDIA's own, in the package nvidia-modulus 0.5.0
under the parameter names of the published checkpoints.
"""

import io
import json
import pickle
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from genjax_lab.networks import SongUNet
from genjax_lab.pretrained import edm

SMALL = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 3,
    "augment_dim": 2,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.1,
}
NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
SKIP = {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": [1, 3, 3, 1]}
CONFIGS = {
    "ddpmpp": SMALL | {"model_type": "SongUNet"},
    "ncsnpp": SMALL | {"model_type": "SongUNet"} | NCSNPP,
    "skip": SMALL | {"model_type": "SongUNet"} | SKIP,
    # The bottom has two heads, the upper level one.
    "adm": SMALL | {"model_type": "DhariwalUNet", "model_channels": 64},
}
EDM2 = {
    "model_type": "EDM2",
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 3,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "channels_per_head": 16,
}
PRECONDITIONING = {"use_fp16": True, "sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5}

# Each program runs once, so that optimising it takes longer than running it.
QUICK = {"xla_backend_optimization_level": 0}

X = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
C_NOISE = np.array([-1.0, 0.5], np.float32)
ONE_HOT = np.eye(3, dtype=np.float32)[[2, 0]]
AUGMENT = np.array([[0.5, -1.0], [0.0, 2.0]], np.float32)


def random_state_dict(config, seed=0):
    """An export for a configuration, from the names that the converter itself expects."""
    module, in_channels = edm._make_network(config)
    rng = np.random.default_rng(seed)
    shapes = edm._template(module, in_channels)
    draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32)  # noqa: E731
    return edm.to_state_dict(module, jax.tree.map(draw, shapes))


@pytest.fixture(scope="module")
def exported():
    """A tiny DDPM++ export and its configuration."""
    return random_state_dict(CONFIGS["ddpmpp"]), CONFIGS["ddpmpp"]


@pytest.fixture(scope="module")
def originals():
    """The module that holds the original SongUNet and DhariwalUNet."""
    torch = pytest.importorskip("torch", reason="run `make oracles` for comparisons with PyTorch")
    with pytest.MonkeyPatch.context() as patch:
        # Imported for downloads, which nothing here makes, and for marks on a GPU's time line.
        patch.setitem(sys.modules, "s3fs", types.ModuleType("s3fs"))
        patch.setattr(torch.cuda.nvtx, "range_push", lambda message: 0)
        patch.setattr(torch.cuda.nvtx, "range_pop", lambda: 0)
        yield pytest.importorskip(
            "modulus.models.diffusion",
            reason="run `make oracles` for comparisons with the original EDM networks",
            exc_type=ImportError,
        )


def randomise(torch, net):
    """Give every parameter of a PyTorch network random values: its own are nearly zero at ends."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter.numel() / (parameter.shape or [1])[0]
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    return net.eval()


def to_channels_first(x):
    return np.moveaxis(x, -1, 1)


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_agree_with_the_original(name, originals):
    import torch

    config = CONFIGS[name]
    arguments = {k: v for k, v in config.items() if k not in ("model_type", "img_channels")}
    original = getattr(originals, config["model_type"])(in_channels=3, out_channels=3, **arguments)
    randomise(torch, original)
    state = {
        f"model.{key}": tensor.numpy()
        for key, tensor in original.state_dict().items()
        if key != "device_buffer"  # the package's own, in no published checkpoint
    }
    inputs = [torch.tensor(a) for a in (to_channels_first(X), C_NOISE, ONE_HOT, AUGMENT)]
    with torch.no_grad():
        expected = original(*inputs).numpy()
    assert np.abs(expected).max() > 0.1

    module, variables = edm.from_state_dict(state, config | PRECONDITIONING)
    out = jax.jit(module.apply, compiler_options=QUICK)(
        variables, X, C_NOISE, ONE_HOT, augment_labels=AUGMENT
    )
    np.testing.assert_allclose(to_channels_first(out), expected, atol=1e-4)

    restored = edm.to_state_dict(module, variables)
    assert restored.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(restored[key], array)


@pytest.mark.oracle
def test_edm2_outputs_agree_with_the_torch_twin():
    torch = pytest.importorskip("torch", reason="run `make oracles` for comparisons with PyTorch")
    from oracles.edm2_twin import EDM2Twin

    twin = EDM2Twin(
        size=8, channels=3, classes=3, width=16, mults=(1, 2), blocks=1, attends=(8,), head_dim=16
    )
    randomise(torch, twin)
    inputs = [torch.tensor(a) for a in (to_channels_first(X), C_NOISE, ONE_HOT)]
    with torch.no_grad():
        expected, logvar = (out.numpy() for out in twin(*inputs))
    assert np.abs(expected).max() > 0.1

    state = {key: tensor.numpy() for key, tensor in twin.state_dict().items()}
    module, variables = edm.from_state_dict(state, EDM2 | PRECONDITIONING)
    out = jax.jit(module.apply, compiler_options=QUICK)(variables, X, C_NOISE, ONE_HOT)
    np.testing.assert_allclose(to_channels_first(out), expected, atol=1e-4)
    np.testing.assert_allclose(module.apply(variables, C_NOISE, method="logvar"), logvar, atol=1e-5)
    assert edm.to_state_dict(module, variables).keys() == state.keys()


class Preconditioner:
    """Stands for the object in a published pickle: what the export script asks of it."""

    def __init__(self, model, **init_kwargs):
        self.model, self.init_kwargs = model, init_kwargs

    def state_dict(self):
        return {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}


@pytest.mark.oracle
def test_the_documented_export_script_writes_what_is_read(
    originals, tmp_path, monkeypatch, exported
):
    import torch

    state, config = exported
    inner = {k: v for k, v in config.items() if k not in ("model_type", "img_channels")}
    inner |= {"in_channels": 3, "out_channels": 3}
    model = originals.SongUNet(**inner)
    del model._buffers["device_buffer"]
    model.load_state_dict(
        {name.removeprefix("model."): torch.tensor(array) for name, array in state.items()}
    )
    model.init_kwargs = inner
    net = Preconditioner(model, img_resolution=8, img_channels=3, **PRECONDITIONING)

    document = Path(edm.__file__).with_name("export_edm.md").read_text()
    script = re.search(r"```python\n(.*?)```", document, re.DOTALL).group(1)
    dnnlib = types.SimpleNamespace(util=types.SimpleNamespace(open_url=lambda url: io.BytesIO()))
    target = str(tmp_path / "export.npz")
    monkeypatch.setitem(sys.modules, "dnnlib", dnnlib)
    monkeypatch.setattr(pickle, "load", lambda file: {"ema": net})
    monkeypatch.setattr(sys, "argv", ["export.py", "source.pkl", target])
    exec(compile(script, "export.py", "exec"), {})

    module, variables = edm.from_state_dict(*edm.read_export(target))
    assert module == edm.from_state_dict(state, config)[0]
    restored = edm.to_state_dict(module, variables)
    assert restored.keys() == state.keys()
    assert all(np.array_equal(restored[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            CONFIGS["ncsnpp"],
            {
                "model.map_noise.freqs": (8,),
                "model.map_augment.weight": (16, 2),
                "model.enc.8x8_conv.weight": (8, 3, 3, 3),
                "model.enc.4x4_down.skip.resample_filter": (1, 1, 4, 4),
                "model.enc.4x4_aux_residual.weight": (8, 3, 3, 3),
                "model.dec.8x8_block1.qkv.weight": (24, 8, 1, 1),
                "model.dec.8x8_aux_norm.bias": (8,),
            },
        ),
        (
            CONFIGS["skip"],
            {
                "model.enc.4x4_aux_down.resample_filter": (1, 1, 4, 4),
                "model.enc.4x4_aux_skip.weight": (8, 3, 1, 1),
                "model.dec.4x4_aux_conv.weight": (3, 16, 3, 3),
                "model.dec.8x8_aux_up.resample_filter": (1, 1, 4, 4),
            },
        ),
        (
            CONFIGS["adm"],
            {
                "model.map_label.weight": (256, 3),
                "model.enc.8x8_block0.affine.weight": (128, 256),
                "model.dec.8x8_up.conv0.resample_filter": (1, 1, 2, 2),
                "model.out_norm.weight": (64,),
            },
        ),
        (
            EDM2,
            {
                "unet.emb_fourier.phases": (16,),
                "unet.enc.8x8_conv.weight": (16, 4, 3, 3),
                "unet.dec.4x4_in0.attn_qkv.weight": (96, 32, 1, 1),
                "unet.dec.8x8_up.emb_gain": (),
                "unet.out_gain": (),
                "logvar_linear.weight": (1, 128),
            },
        ),
    ],
    ids=["ncsnpp", "skip", "adm", "edm2"],
)
def test_names_and_layouts_are_the_published_ones_and_come_back(config, names):
    state = random_state_dict(config)
    assert names == {name: state[name].shape for name in names}
    module, variables = edm.from_state_dict(state, config)
    restored = edm.to_state_dict(module, variables)
    assert restored.keys() == state.keys()
    assert all(np.array_equal(restored[name], state[name]) for name in state)


def test_names_without_prefix_are_read_too(exported):
    state, config = exported
    bare = {name.removeprefix("model."): array for name, array in state.items()}
    _, expected = edm.from_state_dict(state, config)
    _, variables = edm.from_state_dict(bare, config)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, expected))
    with pytest.raises(ValueError, match="both with and without"):
        edm.from_state_dict(bare | state, config)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_widened_exactly(dtype, exported):
    state, config = exported
    narrow = {name: array.astype(dtype) for name, array in state.items()}
    module, variables = edm.from_state_dict(narrow, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    restored = edm.to_state_dict(module, variables)
    assert all(np.array_equal(restored[n], narrow[n].astype(np.float32)) for n in narrow)


def test_all_differences_are_listed(exported):
    state, config = exported
    state = dict(state)
    del state["model.map_layer0.bias"], state["model.enc.4x4_down.conv0.resample_filter"]
    state["model.map_layer9.bias"] = np.zeros(3, np.float32)
    state["model.map_layer1.bias"] = np.zeros((32, 1), np.float32)
    with pytest.raises(ValueError) as error:
        edm.from_state_dict(state, config)
    assert "missing: enc.4x4_down.conv0.resample_filter, map_layer0.bias" in str(error.value)
    assert "unexpected: map_layer9.bias" in str(error.value)
    assert "wrong shape: map_layer1.bias (32, 1) instead of (32,)" in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full(32, np.nan, np.float32), "NaN or infinity in: map_layer0.bias"),
        (np.full(32, np.inf, np.float32), "NaN or infinity in: map_layer0.bias"),
        (np.zeros(32, np.int32), r"map_layer0.bias \(int32\)"),
        (np.zeros(32, np.float64), r"map_layer0.bias \(float64\)"),
        ([0.0] * 32, r"map_layer0.bias \(list\)"),
    ],
    ids=["nan", "inf", "int", "double", "list"],
)
def test_values_that_are_no_weights_are_refused(value, message, exported):
    state, config = exported
    with pytest.raises(ValueError, match=message):
        edm.from_state_dict(state | {"model.map_layer0.bias": value}, config)


def test_a_filter_that_differs_from_the_config_is_refused(exported):
    state, config = exported
    name = "model.dec.8x8_up.skip.resample_filter"
    with pytest.raises(ValueError, match=r"dec\.8x8_up\.skip\.resample_filter differs"):
        edm.from_state_dict(state | {name: state[name] * 2}, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "UNet"}, r"config\['model_type'\]"),
        ({"img_channels": None}, "'img_channels'"),
        ({"channels_mult": [1, 2]}, "'channels_mult', which is no argument of SongUNet"),
        ({"attention": None}, "'attention', which is no argument"),
        ({"resample_filter": [1, 3, 3, 1], "model_type": "DhariwalUNet"}, "knows resample_filter"),
    ],
)
def test_configurations_that_fit_no_network_are_refused(change, message, exported):
    state, config = exported
    with pytest.raises(ValueError, match=message):
        edm.from_state_dict(state, config | change)


def test_variables_of_another_network_are_refused(exported):
    state, config = exported
    _, variables = edm.from_state_dict(state, config)
    wider = SongUNet(resolution=8, model_channels=16, channel_mult=(1, 2), num_blocks=1)
    with pytest.raises(ValueError, match="do not fit the network"):
        edm.to_state_dict(wider, variables)
    with pytest.raises(ValueError, match="enc_8x8_conv"):
        edm.to_state_dict(wider, {"params": {}})
    with pytest.raises(ValueError, match="module must be one of"):
        edm.to_state_dict(pytest, variables)


def write(path, state, config):
    if path.suffix == ".npz":
        np.savez(path, config=json.dumps(config), **state)
    else:
        save_file(dict(state), path, metadata={"config": json.dumps(config)})


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_exports_are_read_back(suffix, tmp_path, exported):
    state, config = exported
    path = tmp_path / f"export{suffix}"
    write(path, state, config)
    export = edm.read_export(path)
    assert export.config == config
    assert export.state_dict.keys() == state.keys()
    assert all(np.array_equal(export.state_dict[name], state[name]) for name in state)


def test_bfloat16_survives_safetensors_and_a_config_is_optional(tmp_path):
    path = tmp_path / "export.safetensors"
    save_file({"weight": np.asarray([1.5, -2.0], jnp.bfloat16)}, path)
    export = edm.read_export(path)
    assert export.config == {}
    assert export.state_dict["weight"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(export.state_dict["weight"].astype(np.float32), [1.5, -2.0])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_files_are_named(suffix, damage, tmp_path, exported):
    state, config = exported
    path = tmp_path / f"export{suffix}"
    write(path, state, config)
    intact = path.read_bytes()
    damaged = {
        "truncated": intact[: len(intact) // 2],
        "foreign": pickle.dumps(config),
        "empty": b"",
    }[damage]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"export{suffix}' is no intact {suffix} export"):
        edm.read_export(path)


def test_a_flipped_bit_in_an_npz_is_noticed(tmp_path, exported):
    state, config = exported
    path = tmp_path / "export.npz"
    write(path, state, config)
    content = bytearray(path.read_bytes())
    position = content.index(state["model.map_layer1.weight"].tobytes()[:64])
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"no intact \.npz export"):
        edm.read_export(path)


def test_objects_in_an_npz_are_not_unpickled(tmp_path):
    path = tmp_path / "export.npz"
    np.savez(path, weight=np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match=r"no intact \.npz export"):
        edm.read_export(path)


@pytest.mark.parametrize("config", ["not json", "[1]"])
def test_a_config_that_is_no_json_object_is_refused(config, tmp_path):
    path = tmp_path / "export.npz"
    np.savez(path, config=config)
    with pytest.raises(ValueError, match=r"export\.npz"):
        edm.read_export(path)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"export_edm\.md"):
        edm.read_export(tmp_path / "edm-cifar10.pkl")
    with pytest.raises(FileNotFoundError):
        edm.read_export(tmp_path / "missing.npz")
