"""Import of VAR and its tokenizer: parity with a PyTorch twin, names, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from genjax_lab.networks import VAR
from genjax_lab.networks.image_tokenizer import ImageTokenizer, digits_tokenizer
from genjax_lab.pretrained import var

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SIDES = (1, 2, 3, 4)
CONFIG = {
    "model_type": "VAR",
    "num_classes": 3,
    "V": 7,
    "Cvae": 4,
    "patch_nums": list(SIDES),
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "drop_path_rate": 0.1,
}
QUANTIZER = {
    "model_type": "VectorQuantizer2",
    "vocab_size": 7,
    "Cvae": 4,
    "v_patch_nums": list(SIDES),
}
VQVAE = {
    "model_type": "VQVAE",
    "vocab_size": 7,
    "z_channels": 4,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "v_patch_nums": [1, 2, 4],
}
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((2, 29, 4)).astype(np.float32)
LABELS = np.array([1, 3])  # the second has no class
TOKENS = RNG.integers(0, 7, (2, 30))


def random_state_dict(config, seed=0):
    """A checkpoint for a configuration, from the names that the converter itself expects."""
    rng = np.random.default_rng(seed)
    module = var._make_module(config)
    variables = {}
    for path, shape in var._template(module).values():
        draw = rng.standard_normal(shape).astype(np.float32)
        inner = variables
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = draw
    return var.to_state_dict(module, variables)


@pytest.fixture(scope="module")
def state():
    return random_state_dict(CONFIG)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="run `make oracles` for comparisons with PyTorch")


def randomise(torch, net):
    """Give every parameter of a PyTorch network random values of a layer's usual size."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter.numel() / parameter.shape[0]
            scale = 1.0 if parameter.ndim < 2 or parameter.shape[0] == 1 else fan_in**-0.5
            parameter.copy_(torch.randn_like(parameter) * scale)
    return net.eval()


def arrays_of(net):
    return {name: tensor.numpy() for name, tensor in net.state_dict().items()}


@pytest.mark.oracle
@pytest.mark.parametrize("normalize", [True, False])
def test_outputs_agree_with_the_torch_twin(normalize, torch):
    from oracles.var_twin import VARTwin

    twin = VARTwin(
        classes=3,
        codes=7,
        channels=4,
        sides=SIDES,
        width=16,
        depth=2,
        heads=2,
        normalize=normalize,
    )
    randomise(torch, twin)
    if normalize:  # one learned scale lies beyond the limit
        with torch.no_grad():
            twin.blocks[0].attn.scale_mul_1H11[0, 0] = 6.0
    with torch.no_grad():
        expected = twin(torch.tensor(INPUTS), torch.tensor(LABELS)).numpy()
    assert np.std(expected) > 0.5

    state = arrays_of(twin)
    module, variables = var.from_state_dict(state, CONFIG | {"attn_l2_norm": normalize})
    logits = jax.jit(module.apply, compiler_options=QUICK)(variables, INPUTS, LABELS)
    np.testing.assert_allclose(logits, expected, atol=1e-4)

    restored = var.to_state_dict(module, variables)
    assert restored.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(restored[name], array)


@pytest.mark.oracle
@pytest.mark.parametrize("phis", [2, 4])
def test_quantiser_agrees_with_the_torch_twin(phis, torch):
    from oracles.var_twin import Quantizer

    twin = randomise(torch, Quantizer(7, 4, SIDES, phis))
    twin.embedding.weight.data *= 2.0  # so that every scale matters
    state = {f"quantize.{name}": array for name, array in arrays_of(twin).items()}
    module, variables = var.from_state_dict(state, QUANTIZER | {"share_quant_resi": phis})

    features = np.random.default_rng(1).standard_normal((2, 4, 4, 4)).astype(np.float32)
    leaf = torch.tensor(features).permute(0, 3, 1, 2).requires_grad_()
    quantized, tokens, loss = twin(leaf)
    (loss + quantized.square().mean()).backward()
    expected_tokens = torch.cat(tokens, dim=1)
    assert len(np.unique(expected_tokens)) > 3

    @jax.jit
    def evaluate(params, features):
        out = module.apply({"params": params}, features)
        return out.loss + jnp.mean(out.quantized**2), out

    grad = jax.value_and_grad(evaluate, (0, 1), has_aux=True)
    (_, out), (params_grad, features_grad) = grad(variables["params"], features)
    np.testing.assert_array_equal(out.tokens, expected_tokens)
    to_last = lambda tensor: tensor.detach().permute(0, 2, 3, 1)  # noqa: E731
    np.testing.assert_allclose(out.quantized, to_last(quantized), atol=1e-5)
    np.testing.assert_allclose(out.loss, loss.item(), atol=1e-5)
    np.testing.assert_allclose(features_grad, to_last(leaf.grad), atol=1e-6)
    np.testing.assert_allclose(params_grad["codebook"], twin.embedding.weight.grad, atol=1e-5)

    tokens = np.split(TOKENS, np.cumsum([s * s for s in SIDES])[:-1], axis=1)
    with torch.no_grad():
        expected = twin.inputs([torch.tensor(part) for part in tokens])
    seen = module.apply(variables, TOKENS, method="tokens_to_inputs")
    np.testing.assert_allclose(seen, expected, atol=1e-5)


@pytest.mark.oracle
def test_tokenizer_agrees_with_the_torch_twin(torch):
    from oracles.var_twin import VQVAETwin

    twin = VQVAETwin(
        channels=3, width=32, mults=(1, 2), blocks=1, codes=7, features=4, sides=(1, 2, 4)
    )
    randomise(torch, twin)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        expected, tokens, loss = twin(torch.tensor(images).permute(0, 3, 1, 2))
    state = arrays_of(twin)
    module, variables = var.from_state_dict(state, VQVAE)
    out = jax.jit(module.apply, compiler_options=QUICK)(variables, images)
    np.testing.assert_array_equal(out.tokens, torch.cat(tokens, dim=1))
    np.testing.assert_allclose(out.reconstruction, expected.permute(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(out.quantizer_loss, loss.item(), atol=1e-4)
    restored = var.to_state_dict(module, variables)
    assert restored.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(restored[name], array)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            CONFIG,
            {
                "word_embed.weight": (16, 4),
                "class_emb.weight": (4, 16),
                "pos_start": (1, 1, 16),
                "pos_1LC": (1, 30, 16),
                "lvl_embed.weight": (4, 16),
                "lvl_1L": (1, 30),
                "attn_bias_for_masking": (1, 1, 30, 30),
                "blocks.1.attn.mat_qkv.weight": (48, 16),
                "blocks.1.attn.q_bias": (16,),
                "blocks.1.attn.zero_k_bias": (16,),
                "blocks.1.attn.v_bias": (16,),
                "blocks.1.attn.scale_mul_1H11": (1, 2, 1, 1),
                "blocks.1.attn.proj.bias": (16,),
                "blocks.1.ffn.fc1.weight": (64, 16),
                "blocks.1.ffn.fc2.weight": (16, 64),
                "blocks.1.ada_lin.1.weight": (96, 16),
                "head_nm.ada_lin.1.weight": (32, 16),
                "head.weight": (7, 16),
            },
        ),
        (
            QUANTIZER,
            {
                "embedding.weight": (7, 4),
                "quant_resi.qresi_ls.3.weight": (4, 4, 3, 3),
                "ema_vocab_hit_SV": (4, 7),
            },
        ),
        (QUANTIZER | {"share_quant_resi": 1}, {"quant_resi.qresi.weight": (4, 4, 3, 3)}),
        (QUANTIZER | {"share_quant_resi": 0}, {"quant_resi.3.bias": (4,)}),
        (
            VQVAE,
            {
                "quantize.embedding.weight": (7, 4),
                "quant_conv.weight": (4, 4, 3, 3),
                "post_quant_conv.bias": (4,),
                "encoder.conv_in.weight": (32, 3, 3, 3),
                "encoder.down.0.downsample.conv.weight": (32, 32, 3, 3),
                "encoder.down.1.attn.0.qkv.weight": (192, 64, 1, 1),
                "encoder.mid.block_1.norm1.weight": (64,),
                "decoder.up.1.block.1.conv2.bias": (64,),
                "decoder.up.0.block.0.nin_shortcut.weight": (32, 64, 1, 1),
                "decoder.up.1.upsample.conv.weight": (64, 64, 3, 3),
                "decoder.norm_out.bias": (32,),
            },
        ),
    ],
    ids=["var", "quantizer", "shared", "unshared", "vqvae"],
)
def test_names_and_layouts_are_the_published_ones_and_come_back(config, names):
    state = random_state_dict(config)
    assert names == {name: state[name].shape for name in names}
    module, variables = var.from_state_dict(state, config)
    restored = var.to_state_dict(module, variables)
    assert restored.keys() == state.keys()
    assert all(np.array_equal(restored[name], state[name]) for name in state)


def test_published_configurations_need_their_depth_alone():
    module = var._make_module({"model_type": "VAR", "depth": 16})
    assert (module.width, module.num_heads, module.num_tokens) == (1024, 16, 680)
    assert (module.vocab_size, module.normalize) == (4096, True)
    names = var._template(var._make_module({"model_type": "VQVAE"}))
    assert names["quantize.embedding.weight"][1] == (4096, 32)
    assert names["encoder.conv_in.weight"][1] == (3, 3, 3, 160)
    assert sum(name.startswith("quantize.quant_resi.qresi_ls.") for name in names) == 8


def test_stacked_blocks_give_the_same_network(state):
    module, _ = var.from_state_dict(state, CONFIG)
    scanned, stacked = var.from_state_dict(state, CONFIG, scan=True)
    assert scanned.scan and not module.scan
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), INPUTS)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)
    restored = var.to_state_dict(scanned, stacked)
    assert all(np.array_equal(restored[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="scan=True is for VAR"):
        var.from_state_dict(random_state_dict(QUANTIZER), QUANTIZER, scan=True)


def test_buffers_may_be_absent_and_are_compared_if_not(state):
    buffers = [n for n in state if n in ("lvl_1L", "attn_bias_for_masking") or "zero_k" in n]
    assert len(buffers) == 4
    bare = {name: array for name, array in state.items() if name not in buffers}
    _, variables = var.from_state_dict(bare, CONFIG)
    _, expected = var.from_state_dict(state, CONFIG)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, expected))
    for name in buffers:
        with pytest.raises(ValueError, match=f"{name} differs"):
            var.from_state_dict(state | {name: state[name] + 1}, CONFIG)


def test_all_differences_are_listed(state):
    state = dict(state)
    del state["blocks.0.attn.q_bias"], state["pos_start"]
    state["blocks.2.ffn.fc1.bias"] = np.zeros(64, np.float32)
    state["head.bias"] = np.zeros(8, np.float32)
    with pytest.raises(ValueError) as error:
        var.from_state_dict(state, CONFIG)
    assert "missing: blocks.0.attn.q_bias, pos_start" in str(error.value)
    assert "unexpected: blocks.2.ffn.fc1.bias" in str(error.value)
    assert "wrong shape: head.bias (8,) instead of (7,)" in str(error.value)


def test_values_that_are_no_weights_are_refused(state):
    with pytest.raises(ValueError, match=r"NaN or infinity in: head\.bias"):
        var.from_state_dict(state | {"head.bias": np.full(7, np.nan, np.float32)}, CONFIG)
    with pytest.raises(ValueError, match=r"head.bias \(int64\)"):
        var.from_state_dict(state | {"head.bias": np.zeros(7, np.int64)}, CONFIG)


def test_a_name_with_and_without_prefix_is_refused():
    state = random_state_dict(QUANTIZER)
    twice = state | {"quantize.embedding.weight": state["embedding.weight"]}
    with pytest.raises(ValueError, match="both with and without"):
        var.from_state_dict(twice, QUANTIZER)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "GPT"}, r"config\['model_type'\]"),
        ({"model_type": "VAR"}, "must have 'depth'"),
        (CONFIG | {"depths": 2}, "'depths', which is no argument of VAR"),
        (CONFIG | {"shared_aln": True}, r"config\['shared_aln'\] must be False"),
        (QUANTIZER | {"ch": 32}, "'ch', which is no argument of VectorQuantizer2"),
        (VQVAE | {"using_sa": False}, r"config\['using_sa'\] must be True"),
    ],
)
def test_configurations_that_fit_no_network_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        var.from_state_dict({}, config)


def test_variables_of_another_network_are_refused(state):
    module, variables = var.from_state_dict(state, CONFIG)
    with pytest.raises(ValueError, match=r"variables are not the module's in: .*head"):
        var.to_state_dict(module.clone(vocab_size=9), variables)
    with pytest.raises(ValueError, match="block_2"):
        var.to_state_dict(module.clone(depth=3), variables)
    with pytest.raises(ValueError, match="VQVAEEncoder"):
        var.to_state_dict(digits_tokenizer(), variables)
    with pytest.raises(ValueError, match="module must be a VAR"):
        var.to_state_dict(pytest, variables)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_are_read_back(suffix, state, tmp_path):
    path = tmp_path / f"var{suffix}"
    if suffix == ".npz":
        np.savez(path, **state)
    else:
        save_file(state, path)
    read = var.read_state_dict(path)
    module, variables = var.from_state_dict(read, CONFIG)
    assert isinstance(module, VAR)
    _, expected = var.from_state_dict(state, CONFIG)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, expected))


@pytest.mark.oracle
def test_files_of_pytorch_are_read_without_it(torch, tmp_path):
    state = random_state_dict(VQVAE)
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    torch.save(tensors, tmp_path / "vae.pth")
    module, variables = var.from_state_dict(var.read_state_dict(tmp_path / "vae.pth"), VQVAE)
    assert isinstance(module, ImageTokenizer)
    restored = var.to_state_dict(module, variables)
    assert all(np.array_equal(restored[name], state[name]) for name in state)
