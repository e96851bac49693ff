"""LLaDA's weights: parity with its equations in PyTorch, the mask's row, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from genjax_lab.pretrained import llada
from genjax_lab.samplers import first_hitting, sample, suppress_tokens, token_denoiser

ROWS, MASK_ID = 24, 20
CONFIG = {
    "model_type": "llada",
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "block_group_size": 1,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 40,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "embedding_size": ROWS,
    "vocab_size": ROWS,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "mask_token_id": MASK_ID,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "weight_tying": False,
}
TOKENS = np.random.default_rng(0).integers(0, ROWS, (2, 7)).astype(np.int32)
TOKENS[:, ::3] = MASK_ID


def random_state(config):
    width, head_dim = config["d_model"], config["d_model"] // config["n_heads"]
    kv_width, mlp = config["n_kv_heads"] * head_dim, config["mlp_hidden_size"]
    shapes = {"wte.weight": (ROWS, width), "ln_f.weight": (width,)}
    if not config["weight_tying"]:
        shapes["ff_out.weight"] = (ROWS, width)
    for i in range(config["n_layers"]):
        of_block = {
            "attn_norm.weight": (width,),
            "ff_norm.weight": (width,),
            "q_proj.weight": (width, width),
            "k_proj.weight": (kv_width, width),
            "v_proj.weight": (kv_width, width),
            "attn_out.weight": (width, width),
            "ff_proj.weight": (mlp, width),
            "up_proj.weight": (mlp, width),
            "ff_out.weight": (width, mlp),
        }
        if config["include_qkv_bias"]:
            of_block |= {"q_proj.bias": (width,)}
            of_block |= {"k_proj.bias": (kv_width,), "v_proj.bias": (kv_width,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in of_block.items()}
    rng = np.random.default_rng(1)
    return {
        f"model.transformer.{name}": rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(path, config, state=None):
    state = random_state(config) if state is None else state
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return state


def twin(state, config, tokens):
    """Logits by the published equations: pre-norm blocks in which every token sees all others."""
    import torch
    from torch.nn import functional as F

    weights = {
        name.removeprefix("model.transformer."): torch.from_numpy(x) for name, x in state.items()
    }
    heads, kv_heads = config["n_heads"], config["n_kv_heads"]
    head_dim = config["d_model"] // heads

    def norm(x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])
        return x * scale * weights[name]

    def split(x, number):  # [batch, heads, length, head_dim]
        return x.unflatten(-1, (number, head_dim)).transpose(1, 2)

    frequencies = config["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(tokens.shape[1])[:, None] * frequencies

    def turn(x):
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    x = weights["wte.weight"][torch.from_numpy(tokens.astype(np.int64))]
    for i in range(config["n_layers"]):
        of = lambda name, i=i: f"blocks.{i}.{name}"  # noqa: E731
        linear = lambda x, name, of=of: F.linear(  # noqa: E731
            x, weights[of(f"{name}.weight")], weights.get(of(f"{name}.bias"))
        )
        y = norm(x, of("attn_norm.weight"))
        query = turn(split(linear(y, "q_proj"), heads))
        key, value = (
            turn(split(linear(y, "k_proj"), kv_heads)),
            split(linear(y, "v_proj"), kv_heads),
        )
        key, value = (z.repeat_interleave(heads // kv_heads, dim=1) for z in (key, value))
        attention = torch.softmax(query @ key.transpose(-1, -2) / head_dim**0.5, dim=-1)
        x = x + linear((attention @ value).transpose(1, 2).flatten(2), "attn_out")
        y = norm(x, of("ff_norm.weight"))
        x = x + linear(F.silu(linear(y, "ff_proj")) * linear(y, "up_proj"), "ff_out")
    last = weights["wte.weight" if config["weight_tying"] else "ff_out.weight"]
    return F.linear(norm(x, "ln_f.weight"), last).numpy()


@pytest.mark.oracle
@pytest.mark.parametrize(
    "change", [{}, {"weight_tying": True, "include_qkv_bias": True, "n_kv_heads": 1}]
)
def test_logits_agree_with_the_equations_wherever_the_mask_is(tmp_path, change):
    pytest.importorskip("torch", reason="run `make oracles` for comparisons with PyTorch")
    config = CONFIG | change
    state = write(tmp_path, config)
    network, variables, mask_token_id = llada.load(tmp_path)
    assert mask_token_id == MASK_ID and network.vocab_size == ROWS
    expected = twin(state, config, TOKENS)
    ours = np.where(TOKENS == MASK_ID, ROWS, TOKENS)
    for tokens in (TOKENS, ours):
        found = jax.jit(network.apply)(variables, tokens)
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_mask_has_a_row_of_its_own_behind_all_tokens(tmp_path, scan, tied):
    state = write(tmp_path, CONFIG | {"weight_tying": tied})
    network, variables, _ = llada.load(tmp_path, scan=scan)
    embedding = np.asarray(variables["params"]["embedding"])
    original = state["model.transformer.wte.weight"]
    np.testing.assert_array_equal(embedding[:-1], original)
    np.testing.assert_array_equal(embedding[-1], original[MASK_ID])
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda x: x.shape, shapes)
    logits = jax.eval_shape(network.apply, variables, jnp.zeros((2, 5), jnp.int32))
    assert logits.shape == (2, 5, ROWS)


def test_first_hitting_draws_tokens_but_never_the_published_mask(tmp_path):
    state = random_state(CONFIG)
    # Without suppression this network would draw nothing but its mask.
    state["model.transformer.ff_out.weight"] *= 0.01
    state["model.transformer.ln_f.weight"][:] = 0
    state["model.transformer.ln_f.weight"][0] = 1
    write(tmp_path, CONFIG, state)
    network, variables, mask_token_id = llada.load(tmp_path)
    denoiser = token_denoiser(network.apply, variables, network.vocab_size)
    sampler = first_hitting(suppress_tokens(denoiser, [mask_token_id]), 6)
    tokens, info = sample(sampler, jax.random.key(0), shape=(64, 6))
    assert info.num_evaluations == 6 and int(jnp.max(info.report.masks_left)) == 0
    found = np.bincount(np.asarray(tokens).ravel(), minlength=ROWS)
    assert found[MASK_ID] == 0 and len(found) == ROWS
    assert np.count_nonzero(found) == ROWS - 1  # nearly uniform: one is missing with p < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"block_type": "sequential"}, "block_type"),
        ({"activation_type": "swiglu"}, "activation_type"),
        ({"layer_norm_type": "default"}, "layer_norm_type"),
        ({"rope": False}, "rope"),
        ({"alibi": True}, "alibi"),
        ({"attention_layer_norm": True}, "attention_layer_norm"),
        ({"block_group_size": 4}, "block_group_size"),
        ({"include_bias": True}, "include_bias"),
        ({"input_emb_norm": True}, "input_emb_norm"),
        ({"scale_logits": True}, "scale_logits"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"mask_token_id": ROWS}, "mask_token_id"),
        ({"mask_token_id": None}, "mask_token_id"),
        ({"n_heads": 5}, "n_heads"),
        ({"mlp_hidden_size": 41}, "wrong shape.*ff_proj"),
        ({"mlp_hidden_size": None}, "wrong shape.*ff_proj.*128"),
        ({"n_kv_heads": None}, "wrong shape.*k_proj"),
        ({"n_layers": 3}, r"missing: model\.transformer\.blocks\.2"),
        ({"rope_theta": None}, "rope_theta"),
        ({"weight_tying": True}, r"ff_out\.weight differs"),
        ({"include_qkv_bias": True}, "missing.*k_proj.bias"),
    ],
)
def test_fields_that_do_not_fit_are_named(tmp_path, change, message):
    write(tmp_path, CONFIG | change, random_state(CONFIG))
    with pytest.raises(ValueError, match=message):
        llada.load(tmp_path)


def test_the_published_model_has_eight_billion_parameters():
    published = CONFIG | {
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "embedding_size": 126464,
        "vocab_size": 126464,
        "mask_token_id": 126336,
    }
    network, _ = llada.from_config(published, scan=True)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    block = 4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096
    expected = 2 * 126464 * 4096 + 32 * block + 4096
    assert sum(x.size for x in jax.tree.leaves(shapes)) == expected + 4096  # the mask's row
    assert expected == 8_015_581_184
