"""Import of MDLM's weights: parity with its equations in PyTorch, names, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from genjax_lab.pretrained import mdlm

ROWS, WIDTH, CONDITION = 12, 32, 16
TOKENS = np.random.default_rng(0).integers(0, ROWS, (2, 7))


def random_state(depth=2, prefix="backbone."):
    shapes = mdlm._shapes(ROWS, WIDTH, CONDITION, depth)
    rng = np.random.default_rng(1)
    return {prefix + n: rng.normal(0, 0.3, shape).astype(np.float32) for n, shape in shapes.items()}


@pytest.mark.oracle
@pytest.mark.parametrize("t", [None, 0.6])
def test_outputs_agree_with_the_equations(t):
    torch = pytest.importorskip("torch", reason="run `make oracles` for comparisons with PyTorch")
    from oracles.mdlm_twin import Network

    state = random_state()
    twin = Network(ROWS, WIDTH, condition=CONDITION)
    named = {name.removeprefix("backbone."): torch.from_numpy(x) for name, x in state.items()}
    twin.load_state_dict(named)
    network, variables = mdlm.from_state_dict(state, {"num_heads": 4})
    sigma = 0.0 if t is None else -np.log1p(-(1 - 1e-3) * t)
    with torch.no_grad():
        expected = twin(torch.from_numpy(TOKENS), torch.full((2,), float(sigma))).numpy()
    times = None if t is None else jnp.full(2, t)
    found = network.apply(variables, jnp.asarray(TOKENS, jnp.int32), times)
    np.testing.assert_allclose(found, expected[..., :-1], atol=2e-4, rtol=1e-4)


@pytest.mark.oracle
def test_scores_of_sedd_are_ratios_of_predicted_probabilities():
    torch = pytest.importorskip("torch", reason="run `make oracles` for comparisons with PyTorch")
    from oracles.mdlm_twin import Network

    state = random_state(prefix="")
    twin = Network(ROWS, WIDTH, condition=CONDITION)
    twin.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})
    t = 0.6
    sigma = torch.full((2,), -np.log1p(-(1 - 1e-3) * t))
    with torch.no_grad():
        raw = twin(torch.from_numpy(TOKENS), sigma)
    log_score = raw - torch.log(torch.expm1(sigma))[:, None, None] - np.log(ROWS - 1)
    network, variables = mdlm.from_state_dict(state, {"num_heads": 4})
    logits = network.apply(variables, jnp.asarray(TOKENS, jnp.int32), jnp.full(2, t))
    log_p = np.asarray(logits) - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    ratio = log_score.numpy()[..., :-1] - log_p
    np.testing.assert_allclose(ratio - ratio[..., :1], 0, atol=1e-4)


def test_files_are_read_with_or_without_prefix(tmp_path):
    state = random_state(depth=1, prefix="")
    save_file(state, tmp_path / "model.safetensors")
    buffers = {"rotary_emb.inv_freq": np.zeros(4, np.float32)}
    left = mdlm.from_state_dict(mdlm.read_state_dict(tmp_path), {"num_heads": 4})
    right = mdlm.from_state_dict(random_state(depth=1) | buffers, {"num_heads": 4})
    assert left[0] == right[0] and left[0].vocab_size == ROWS - 1 and left[0].depth == 1
    out = [network.apply(v, jnp.asarray(TOKENS, jnp.int32)) for network, v in (left, right)]
    np.testing.assert_array_equal(*out)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"backbone.output_layer.linear.bias": None}, {}, "output_layer.linear.bias"),
        ({"backbone.blocks.1.norm1.weight": np.ones(5, np.float32)}, {}, "norm1"),
        ({"backbone.extra": np.ones(5, np.float32)}, {}, "extra"),
        ({"backbone.vocab_embed.embedding": None}, {}, "vocab_embed"),
        ({"backbone.norm": np.full(5, np.nan, np.float32)}, {}, "norm"),
        ({}, {"num_heads": 5}, "num_heads"),
        ({}, {"num_heads": None}, "num_heads"),
    ],
)
def test_mistakes_are_named(change, config, message):
    state = {name: x for name, x in (random_state() | change).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        mdlm.from_state_dict(state, {"num_heads": 4} | config)
