"""Models of Qwen2's kind: parity with transformers, round trips, and what is refused."""

import copy
import json
import os
import shutil

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from genjax_lab.networks import Decoder, stacked
from genjax_lab.parallel import make_mesh
from genjax_lab.pretrained import decoder_weights, model_directory, qwen2
from genjax_lab.pretrained.model_directory import Weights
from genjax_lab.samplers import generate, token_decoder

NETWORK = Decoder(
    vocab_size=48, width=32, depth=2, num_heads=4, num_kv_heads=2, mlp_width=40, rope_theta=1e4
)
TOKENS = np.random.default_rng(0).integers(0, 48, (3, 9)).astype(np.int32)
MASK = np.arange(9) >= np.array([[0], [3], [8]])  # left-padded


def random_variables(network, seed=0, dtype=np.float32):
    shapes = decoder_weights.abstract_variables(network)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32).astype(dtype)  # noqa: E731
    return jax.tree.map(draw, shapes)


def assert_identical(left, right):
    left, right = (flax.traverse_util.flatten_dict(tree) for tree in (left, right))
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(right[path]), str(path))


@pytest.fixture(scope="module")
def variables():
    return random_variables(NETWORK)


@pytest.fixture(scope="module")
def directories(tmp_path_factory, variables):
    path = tmp_path_factory.mktemp("saved")
    qwen2.save(path / "one", NETWORK, variables)
    qwen2.save(path / "shards", NETWORK, variables, max_shard_bytes=20_000)
    return path


@pytest.fixture
def saved(tmp_path, directories):
    """A model in one file, which may be spoilt."""
    return shutil.copytree(directories / "one", tmp_path / "model")


@pytest.fixture
def sharded(tmp_path, directories):
    return shutil.copytree(directories / "shards", tmp_path / "model")


# Comparisons with transformers.

KINDS = ("tied", "untied", "llama", "wide_heads")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return `make(kind)`: a random model of transformers, and a directory where it saved it."""
    reason = "run `make oracles` for comparisons with PyTorch"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    torch.set_num_threads(1)
    made = {}

    def make(kind):
        if kind in made:
            return made[kind]
        fields = {
            "vocab_size": 48,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": kind == "tied",
            "rope_theta": 1e6 if kind == "untied" else 1e4,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if kind == "wide_heads":
            fields |= {"head_dim": 12}
        name = "Qwen2" if kind in ("tied", "untied") else "Llama"
        config = getattr(transformers, f"{name}Config")(**fields)
        torch.manual_seed(len(made))
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)
        path = tmp_path_factory.mktemp(kind)
        model.save_pretrained(path)
        made[kind] = model, path
        return made[kind]

    return make


def logits_of(model):
    """Logits of transformers for TOKENS, where they are not padding."""
    import torch

    positions = np.maximum(np.cumsum(MASK, axis=1) - 1, 0)
    inputs = {"input_ids": TOKENS, "attention_mask": MASK, "position_ids": positions}
    with torch.no_grad():
        out = model(**{k: torch.from_numpy(x.astype(np.int64)) for k, x in inputs.items()})
    return out.logits.float().numpy()[MASK]


def our_logits(network, variables):
    return np.asarray(jax.jit(network.apply)(variables, TOKENS, token_mask=MASK))[MASK]


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_logits_agree_with_transformers(original, kind):
    model, path = original(kind)
    network, variables = qwen2.load(path)
    assert network.tied == (kind == "tied") and network.qkv_bias == (kind in ("tied", "untied"))
    np.testing.assert_allclose(our_logits(network, variables), logits_of(model), atol=2e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_greedy_answers_are_those_of_transformers(original, kind):
    import torch

    model, path = original(kind)
    network, variables = qwen2.load(path)
    ends = [5, 11]
    with torch.no_grad():
        expected = model.generate(
            torch.from_numpy(TOKENS.astype(np.int64)),
            attention_mask=torch.from_numpy(MASK.astype(np.int64)),
            do_sample=False,
            max_new_tokens=16,
            pad_token_id=5,
            eos_token_id=ends,
        ).numpy()[:, TOKENS.shape[1] :]
    decoder = token_decoder(network.apply, variables, network.vocab_size)
    found = generate(
        decoder, jax.random.key(0), TOKENS, MASK, length=16, end_ids=ends, temperature=0.0
    )
    np.testing.assert_array_equal(found.tokens[:, 0, : expected.shape[1]], expected)
    assert len(np.unique(expected)) > 5  # the model does not repeat itself


@pytest.mark.oracle
def test_shards_and_bfloat16_of_transformers_are_read(original, tmp_path):
    import torch

    model, path = original("untied")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_identical(qwen2.load(path)[1], qwen2.load(tmp_path / "shards")[1])

    half = copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    rounded = logits_of(type(model).from_pretrained(tmp_path / "half", dtype=torch.float32))
    network, variables = qwen2.load(tmp_path / "half")
    assert variables["params"]["embedding"].dtype == jnp.float32
    np.testing.assert_allclose(our_logits(network, variables), rounded, atol=2e-4)
    assert np.abs(rounded - logits_of(model)).max() > 2e-3


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_shard_bytes", [5e9, 1e4])
def test_what_is_saved_loads_in_transformers_with_equal_logits(
    original, tmp_path, kind, max_shard_bytes
):
    import transformers

    model, path = original(kind)
    network, variables = qwen2.load(path, scan=True)
    config = {"eos_token_id": 7, "max_position_embeddings": 64}
    qwen2.save(tmp_path, network, variables, config=config, max_shard_bytes=max_shard_bytes)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(again) is type(model) and again.config.eos_token_id == 7
    np.testing.assert_array_equal(logits_of(again), logits_of(model))


@pytest.mark.oracle
def test_configurations_of_transformers_can_be_given_back(original, tmp_path):
    _, path = original("tied")
    network, variables = qwen2.load(path)
    qwen2.save(tmp_path, network, variables, config=qwen2.read_config(path), dtype="bfloat16")
    assert qwen2.load(tmp_path)[0] == network


# Round trips.


@pytest.mark.parametrize(
    ("tied", "qkv_bias", "scan"),
    [(True, True, True), (False, False, True), (False, True, False), (True, False, False)],
)
def test_round_trips_are_bit_exact(tmp_path, tied, qkv_bias, scan):
    network = NETWORK.clone(tied=tied, qkv_bias=qkv_bias, head_dim=12)
    variables = random_variables(network)
    if scan:
        network, variables = stacked(network, variables)
    qwen2.save(tmp_path / "one", network, variables)
    qwen2.save(tmp_path / "shards", network, variables, max_shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("one", "shards"):
        again, found = qwen2.load(tmp_path / name, scan=scan)
        assert again == network
        assert_identical(found, variables)


def test_bfloat16_stays_bit_exact_and_float32_holds_it(tmp_path):
    variables = random_variables(NETWORK, dtype=jnp.bfloat16)
    qwen2.save(tmp_path / "own", NETWORK, variables)
    assert qwen2.read_config(tmp_path / "own")["torch_dtype"] == "bfloat16"
    assert_identical(qwen2.load(tmp_path / "own", param_dtype=jnp.bfloat16)[1], variables)
    wide = qwen2.load(tmp_path / "own")[1]
    assert_identical(wide, jax.tree.map(lambda x: x.astype(np.float32), variables))
    qwen2.save(tmp_path / "again", NETWORK, wide, dtype="bfloat16")
    own, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("own", "again"))
    assert own == again


@pytest.mark.parametrize("scan", [True, False])
def test_on_a_mesh_every_leaf_has_its_sharding(tmp_path, scan):
    network = NETWORK.clone(width=128, mlp_width=256, head_dim=32, scan=scan)
    variables = random_variables(network)
    qwen2.save(tmp_path, network, variables)
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    _, found = qwen2.load(tmp_path, scan=scan, mesh=mesh)
    assert_identical(found, variables)
    blocks = found["params"]["blocks" if scan else "block_1"]
    assert blocks["up"]["kernel"].sharding.spec[-1] == "tensor"
    assert "fsdp" in blocks["up"]["kernel"].sharding.spec
    assert blocks["up"]["kernel"].addressable_shards[0].data.size * 8 == (
        blocks["up"]["kernel"].size
    )
    # What is sharded is saved like anything else.
    qwen2.save(tmp_path / "again", network, found)
    assert_identical(qwen2.load(tmp_path / "again", scan=scan)[1], variables)


@pytest.mark.parametrize("scan", [True, False])
def test_tensors_are_read_once_and_placed_before_the_next(saved, monkeypatch, scan):
    events = []
    read, placed = Weights.read, decoder_weights._placed
    monkeypatch.setattr(Weights, "read", lambda self, n: events.append(n) or read(self, n))
    monkeypatch.setattr(
        decoder_weights, "_placed", lambda *a: events.append("placed") or placed(*a)
    )
    qwen2.load(saved, scan=scan)
    read_names = [name for name in events if name != "placed"]
    assert sorted(read_names) == sorted(Weights(saved).shapes)
    waiting = [len(run.split()) for run in " ".join(events).split("placed")]
    assert max(waiting) == (NETWORK.depth if scan else 1)


def test_rotations_are_read_in_both_styles_and_buffers_are_ignored(saved, variables):
    config = qwen2.read_config(saved)
    old = {k: v for k, v in config.items() if k != "rope_parameters"} | {"rope_scaling": None}
    new = {k: v for k, v in config.items() if k != "rope_theta"}
    for fields in (old, new, old | {"sliding_window": 131072, "max_window_layers": 28}):
        (saved / "config.json").write_text(json.dumps(fields))
        assert qwen2.load(saved)[0] == NETWORK
    arrays = load_file(saved / "model.safetensors")
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(arrays, saved / "model.safetensors")
    assert_identical(qwen2.load(saved)[1], variables)


def test_a_tied_last_layer_may_be_there_if_it_is_equal(saved, variables):
    arrays = load_file(saved / "model.safetensors")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    save_file(arrays, saved / "model.safetensors")
    assert_identical(qwen2.load(saved)[1], variables)
    arrays["lm_head.weight"][3, 4] += 1
    save_file(arrays, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        qwen2.load(saved)


# Sizes.

QWEN25 = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True, 494_032_768),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True, 1_543_714_304),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 7_615_616_512),
}


@pytest.mark.parametrize("size", QWEN25)
def test_published_sizes_have_their_numbers_of_parameters(size):
    width, depth, heads, kv_heads, mlp, vocab, tied, published = QWEN25[size]
    config = {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "use_sliding_window": False,
    }
    _, shapes = qwen2.abstract(config, param_dtype=jnp.bfloat16)
    kv_width = width // heads * kv_heads
    block = 2 * width * (width + kv_width) + width + 2 * kv_width + 3 * width * mlp + 2 * width
    assert vocab * width * (1 if tied else 2) + depth * block + width == published
    leaves = jax.tree.leaves(shapes)
    assert sum(x.size for x in leaves) == published
    assert all(x.dtype == jnp.bfloat16 for x in leaves)


@pytest.mark.parametrize("scan", [True, False])
def test_shapes_are_those_of_the_network(saved, scan):
    network, shapes = qwen2.abstract(saved, scan=scan)
    assert network == NETWORK.clone(scan=scan)
    assert shapes == jax.eval_shape(network.init, jax.random.key(0), TOKENS)


# Mistakes.

FIELDS = [
    ({"model_type": "qwen3"}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ({"rope_parameters": [1e4]}, "rope_parameters"),
    ({"rope_theta": 1e6}, "rope_theta"),
    ({"rope_theta": None, "rope_parameters": None}, "rope_theta"),
    ({"rope_theta": "1e4", "rope_parameters": None}, "rope_theta"),
    ({"rope_theta": float("inf"), "rope_parameters": None}, "rope_theta"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": None}, "rms_norm_eps"),
    ({"vocab_size": 48.0}, "vocab_size"),
    ({"vocab_size": True}, "vocab_size"),
    ({"hidden_size": -32}, "hidden_size"),
    ({"num_hidden_layers": 10**8}, "100000000 blocks"),
    ({"num_hidden_layers": 3}, r"missing: model\.layers\.2"),
    ({"num_hidden_layers": 1}, r"unexpected: model\.layers\.1"),
    ({"intermediate_size": 41}, "wrong shape.*gate_proj"),
    ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_kv_heads"),
    ({"tie_word_embeddings": False}, r"missing: lm_head\.weight"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
    ({"model_type": "llama"}, "unexpected.*k_proj.bias"),
]


@pytest.mark.parametrize(("change", "message"), FIELDS)
def test_fields_that_do_not_fit_are_named(saved, change, message):
    fields = qwen2.read_config(saved) | change
    (saved / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        qwen2.load(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "object"), ("{", "JSON"), ("[" * 100_000, "JSON"), (None, "config.json")],
)
def test_damaged_configurations_are_refused(saved, text, message):
    (saved / "config.json").unlink()
    if text is not None:
        (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        qwen2.load(saved)


def change_tensor(name, change):
    def apply(path):
        arrays = load_file(path / "model.safetensors")
        arrays[name] = change(arrays.get(name))
        save_file({k: x for k, x in arrays.items() if x is not None}, path / "model.safetensors")

    return apply


def with_nan(array):
    array[0] = np.nan
    return array


NORM, OUT = "model.norm.weight", "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_tensor(NORM, with_nan), NORM),
        (change_tensor(OUT, lambda x: x[:-1]), OUT),
        (change_tensor(OUT, lambda x: None), f"missing: {OUT}"),
        (change_tensor("model.extra", lambda x: np.ones(3, np.float32)), "unexpected: model.extra"),
        (change_tensor(NORM, lambda x: x.astype(np.float64)), f"{NORM} \\(float64\\)"),
        (change_tensor(NORM, lambda x: x.astype(np.int64)), f"{NORM} \\(int64\\)"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "no intact"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 64), "no intact"),
        (
            lambda path: (path / "model.safetensors").write_bytes(
                (path / "model.safetensors").read_bytes()[:-4]
            ),
            "no intact",
        ),
        (lambda path: (path / "model.safetensors").unlink(), "neither"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "both"),
    ],
)
def test_damaged_weights_are_refused(saved, change, message):
    change(saved)
    with pytest.raises(ValueError, match=message):
        qwen2.load(saved)


def test_numbers_too_large_for_the_variables_are_refused(saved):
    change_tensor(NORM, lambda x: np.full_like(x, 1e30))(saved)
    qwen2.load(saved, param_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=f"{NORM} .*too large"):
        qwen2.load(saved, param_dtype=jnp.float16)
    with pytest.raises(ValueError, match="param_dtype"):
        qwen2.load(saved, param_dtype=jnp.int8)


def edit_index(edit):
    def apply(path):
        file = path / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        edit(index["weight_map"])
        file.write_text(json.dumps(index))

    return apply


def copy_tensor(path):
    first, second = sorted(path.glob("*.safetensors"))[:2]
    arrays, others = load_file(first), load_file(second)
    name = next(iter(arrays))
    save_file(others | {name: arrays[name]}, second)


def move_outside(path):
    first = min(path.glob("*.safetensors"))
    first.rename(path.parent / "outside.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(first.name, "../outside.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: min(path.glob("*.safetensors")).unlink(), "missing"),
        (copy_tensor, "two files"),
        (move_outside, "no file of the directory"),
        (edit_index(lambda names: names.pop(NORM)), f"disagree about {NORM}"),
        (edit_index(lambda names: names.update({"ghost": names[NORM]})), "disagree about ghost"),
        (edit_index(lambda names: names.update({NORM: names[OUT]})), f"disagree about {NORM}"),
        (edit_index(lambda names: names.update({NORM: "/etc/hostname"})), "no file of"),
        (edit_index(lambda names: names.update({NORM: ".."})), "holds no weights"),
        (edit_index(lambda names: names.update({NORM: "config.json"})), "missing"),
        (edit_index(lambda names: names.update({NORM: 3})), "no file of"),
        (edit_index(lambda names: names.clear()), "weight_map"),
    ],
)
def test_shards_that_disagree_are_refused(sharded, change, message):
    change(sharded)
    with pytest.raises(ValueError, match=message):
        qwen2.load(sharded)


def test_a_model_is_replaced_only_on_demand_and_whole(saved, variables, monkeypatch):
    (saved / "tokenizer.json").write_text("{}")
    other = random_variables(NETWORK, seed=1)
    with pytest.raises(ValueError, match="overwrite"):
        qwen2.save(saved, NETWORK, other)
    assert_identical(qwen2.load(saved)[1], variables)
    broken = jax.tree.map(np.copy, other)
    broken["params"]["norm"]["scale"][0] = np.nan
    with pytest.raises(ValueError, match=NORM):
        qwen2.save(saved, NETWORK, broken, overwrite=True, max_shard_bytes=20_000)
    assert_identical(qwen2.load(saved)[1], variables)
    assert len(list(saved.iterdir())) == 3
    qwen2.save(saved, NETWORK, other, overwrite=True, max_shard_bytes=20_000)
    assert_identical(qwen2.load(saved)[1], other)
    qwen2.save(saved, NETWORK, variables, overwrite=True)
    assert_identical(qwen2.load(saved)[1], variables)
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_what_is_half_replaced_is_not_read(saved, variables, monkeypatch):
    class Killed(BaseException):
        pass

    replaced = []

    def replace(*arguments):
        if len(replaced) == 2:
            raise Killed
        replaced.append(os.rename(*arguments))

    monkeypatch.setattr(model_directory.os, "replace", replace)
    other = random_variables(NETWORK, seed=1)
    with pytest.raises(Killed):
        qwen2.save(saved, NETWORK, other, overwrite=True, max_shard_bytes=20_000)
    with pytest.raises(ValueError, match=r"config\.json"):
        qwen2.load(saved)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"causal": False}, {}, "causal"),
        ({"with_mask": True}, {}, "mask"),
        ({"depth": 3}, {}, "missing: block_2"),
        ({"scan": True}, {}, "missing: blocks"),
        ({}, {"dtype": "int8"}, "dtype"),
        ({}, {"max_shard_bytes": 0}, "max_shard_bytes"),
        ({}, {"config": {"hidden_size": 64}}, "hidden_size"),
        ({}, {"config": {"rope_parameters": {"rope_theta": 1e6}}}, "rope_parameters"),
        ({}, {"config": {"rope_scaling": {"type": "linear"}}}, "rope_scaling"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, variables, change, arguments, message):
    with pytest.raises(ValueError, match=message):
        qwen2.save(tmp_path, NETWORK.clone(**change), variables, **arguments)
    assert not list(tmp_path.iterdir())
