"""The diffusion transformer: its sizes, its start at zero, its contract, and diffusers' network."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.attention import dense_attention
from genjax_lab.networks.dit import DiT, dit_imagenet
from genjax_lab.networks.token_grid import sine_cosine_positions

ARCHITECTURE = {
    "num_classes": 3,
    "patch_size": 2,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
}


def inputs(batch=2, height=8, width=8, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((batch, height, width, channels)), jnp.float32)
    return x, jnp.linspace(3.0, 700.0, batch), jnp.arange(batch) % 3


@pytest.fixture(scope="module")
def net():
    return DiT(**ARCHITECTURE)


@pytest.fixture(scope="module")
def variables(net, random_variables):
    return random_variables(net, *inputs())


@pytest.fixture(scope="module")
def step(quick_jit):
    """Compiled `((loss, output), gradients)` of a module."""

    @functools.partial(quick_jit, static_argnums=0)
    def step(module, variables, args):
        def loss(variables):
            out = module.apply(variables, *args)
            return jnp.mean(jnp.sin(out)), out

        return jax.value_and_grad(loss, has_aux=True)(variables)

    return step


@pytest.fixture(scope="module")
def result(step, net, variables):
    (_, out), grads = step(net, variables, inputs())
    return out, grads


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("size", "millions"), [("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675)]
)
def test_presets_have_the_papers_parameter_counts(size, millions, scan):
    shapes = jax.eval_shape(
        dit_imagenet(size, scan=scan, remat=scan).init,
        jax.random.key(0),
        jnp.zeros((1, 32, 32, 4)),
        jnp.zeros(1),
        jnp.zeros(1, jnp.int32),
    )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6) == millions


@pytest.mark.parametrize(("size", "tokens"), [("S/4", 64), ("S/8", 16)])
def test_the_patch_of_a_preset_sets_the_number_of_tokens(size, tokens):
    seen = []

    def attention(query, key, value):
        seen.append(math.prod(query.shape[1:3]))
        return dense_attention(query, key, value)

    net = dit_imagenet(size, attention=attention, depth=1)
    out, _ = jax.eval_shape(
        net.init_with_output, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1)
    )
    assert seen == [tokens]
    assert out.shape == (1, 32, 32, 8)


@pytest.mark.oracle
def test_outputs_agree_with_diffusers(quick_jit):
    torch = pytest.importorskip("torch", reason="run `make oracles` for comparisons with PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="run `make oracles`")

    torch.manual_seed(0)
    original = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_eps=1e-6,
    ).eval()
    first = original.transformer_blocks[0].norm1.emb
    for block in original.transformer_blocks:
        # The paper shares one embedding among the blocks; diffusers keeps a copy in each, and
        # spaces its frequencies by 1/127 of the range where the paper has 1/128.
        block.norm1.emb = first
        first.time_proj.downscale_freq_shift = 0
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    x, timesteps, labels = inputs()
    labels = jnp.array([1, 3])  # the second has no class
    with torch.no_grad():
        expected = original(
            torch.tensor(np.asarray(x)).permute(0, 3, 1, 2),
            timestep=torch.tensor(np.asarray(timesteps)),
            class_labels=torch.tensor(np.asarray(labels)),
        ).sample
    net = DiT(**ARCHITECTURE, out_channels=6)
    variables = {"params": params_from_diffusers(original.state_dict())}
    out = quick_jit(net.apply)(variables, x, timesteps, labels)
    assert float(jnp.std(out)) > 0.1
    np.testing.assert_allclose(out, expected.permute(0, 2, 3, 1), atol=1e-4)


def params_from_diffusers(state):
    """Rename the tensors of diffusers' network; its query, key and value layers become one."""

    def dense(*names):
        kernels = [state[f"{name}.weight"].numpy() for name in names]
        biases = [state[f"{name}.bias"].numpy() for name in names]
        return {"kernel": np.concatenate(kernels).T, "bias": np.concatenate(biases)}

    def block(prefix):
        qkv = [f"{prefix}.attn1.to_{part}" for part in "qkv"]
        return {
            "adaln": dense(f"{prefix}.norm1.linear"),
            "qkv": dense(*qkv),
            "proj": dense(f"{prefix}.attn1.to_out.0"),
            "mlp_in": dense(f"{prefix}.ff.net.0.proj"),
            "mlp_out": dense(f"{prefix}.ff.net.2"),
        }

    embedding = "transformer_blocks.0.norm1.emb"
    patches = state["pos_embed.proj.weight"].numpy()  # [out, in, row, column]
    return {
        "patch_embedding": {
            "kernel": patches.transpose(2, 3, 1, 0).reshape(-1, patches.shape[0]),
            "bias": state["pos_embed.proj.bias"].numpy(),
        },
        "noise_in": dense(f"{embedding}.timestep_embedder.linear_1"),
        "noise_out": dense(f"{embedding}.timestep_embedder.linear_2"),
        "class_embedding": state[f"{embedding}.class_embedder.embedding_table.weight"].numpy(),
        "block_0": block("transformer_blocks.0"),
        "block_1": block("transformer_blocks.1"),
        "final_adaln": dense("proj_out_1"),
        "final_proj": dense("proj_out_2"),
    }


def test_fresh_network_returns_zero_and_its_blocks_are_the_identity(quick_jit):
    x, c_noise, _ = inputs(height=4, width=4)
    net = DiT(**ARCHITECTURE | {"num_classes": 0, "depth": 1})
    key = jax.random.key(0, impl="rbg")  # compiles faster
    run = quick_jit(functools.partial(net.init_with_output, capture_intermediates=True))
    out, variables = run(key, x, c_noise)
    np.testing.assert_array_equal(out, 0.0)
    calls = variables["intermediates"]
    patches, after = (calls[name]["__call__"][0] for name in ("patch_embedding", "block_0"))
    assert float(jnp.std(patches)) > 0.1
    np.testing.assert_allclose(after, patches + sine_cosine_positions((2, 2), 16), atol=1e-6)


def test_positions_are_distinct_and_differ_along_each_axis_alone():
    positions = sine_cosine_positions((3, 5), 12)
    assert positions.shape == (3, 5, 12)
    columns, rows = positions[..., :6], positions[..., 6:]
    np.testing.assert_array_equal(columns, np.broadcast_to(columns[:1], columns.shape))
    np.testing.assert_array_equal(rows, np.broadcast_to(rows[:, :1], rows.shape))
    flat = positions.reshape(15, 12)
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + 10 * np.eye(15)
    assert distances.min() > 0.5
    # By hand: column 2 at frequencies 1, 10000^(-1/3) and 10000^(-2/3).
    angles = 2 * 10000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(columns[0, 2], [*np.sin(angles), *np.cos(angles)], atol=1e-6)


def test_every_parameter_has_a_gradient(result):
    _, grads = result
    idle = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if float(jnp.abs(leaf).max()) == 0
    }
    assert idle == set()


def test_scanned_blocks_equal_the_loop(net, variables, step, result):
    out, grads = result
    (_, scanned_out), scanned_grads = step(net.clone(scan=True), stack_blocks(variables), inputs())
    np.testing.assert_allclose(scanned_out, out, atol=1e-5)
    expected = stack_blocks(grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scanned_grads, expected)


def stack_blocks(variables):
    params = dict(variables["params"])
    blocks = [params.pop(f"block_{i}") for i in range(2)]
    return {"params": params | {"blocks": jax.tree.map(lambda *w: jnp.stack(w), *blocks)}}


def test_remat_is_in_the_program_and_changes_nothing(net, variables, step, result):
    remat = net.clone(remat=True)
    assert "remat" in str(jax.make_jaxpr(remat.apply)(variables, *inputs()))
    (_, out), grads = step(remat, variables, inputs())
    np.testing.assert_allclose(out, result[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, result[1])


@pytest.mark.parametrize("scan", [False, True])
def test_injected_attention_sees_the_grid_of_tokens(net, random_variables, scan):
    shapes = []

    def attention(query, key, value):
        shapes.append((query.shape, key.shape, value.shape))
        return value

    args = inputs(height=8, width=4)
    injected = net.clone(attention=attention, scan=scan)
    out, _ = jax.eval_shape(injected.init_with_output, jax.random.key(0), *args)
    assert out.shape == args[0].shape
    assert set(shapes) == {((2, 4, 2, 2, 8),) * 3}


def test_labels_mean_the_same_in_every_form(net, variables, result, quick_jit):
    x, c_noise, labels = inputs()
    out, _ = result
    apply = quick_jit(net.apply)
    one_hot = jax.nn.one_hot(labels, 3)
    np.testing.assert_allclose(apply(variables, x, c_noise, one_hot), out, atol=1e-5)
    nobody = apply(variables, x, c_noise, jnp.zeros((2, 3)))
    assert float(jnp.abs(nobody - out).max()) > 1e-2
    # Without classes only the last row of the table is read.
    table = np.array(variables["params"]["class_embedding"])
    table[:3] = 7.0
    params = variables["params"] | {"class_embedding": table}
    again = apply({"params": params}, x, c_noise, jnp.zeros((2, 3)))
    np.testing.assert_array_equal(again, nobody)


def test_examples_do_not_see_each_other(net, variables, result, quick_jit):
    each = quick_jit(jax.vmap(lambda *one: net.apply(variables, *[a[None] for a in one])[0]))
    np.testing.assert_allclose(each(*inputs()), result[0], atol=1e-5)


def test_moving_patches_moves_the_output_only_because_of_positions(
    net, variables, monkeypatch, quick_jit
):
    x, c_noise, labels = inputs(height=4, width=4)

    def swap(image):  # the two rows of patches
        return jnp.concatenate([image[:, 2:], image[:, :2]], axis=1)

    def moved_and_its_expectation():
        both = quick_jit(lambda x: [net.apply(variables, i, c_noise, labels) for i in (x, swap(x))])
        out, moved = both(x)
        return moved, swap(out)

    moved, expected = moved_and_its_expectation()
    assert float(jnp.abs(moved - expected).max()) > 1e-2
    monkeypatch.setattr(
        "genjax_lab.networks.dit.sine_cosine_positions", lambda grid, c: np.zeros((*grid, c))
    )
    moved, expected = moved_and_its_expectation()
    np.testing.assert_allclose(moved, expected, atol=1e-5)


def test_bfloat16_computes_coarsely_and_returns_float32(net, variables, result, quick_jit):
    coarse = quick_jit(net.clone(dtype=jnp.bfloat16).apply)(variables, *inputs())
    assert coarse.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((coarse - result[0]) ** 2) / jnp.mean(result[0] ** 2)))
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_acts_in_training_and_depends_on_its_key(net, variables, result, scan, quick_jit):
    args = inputs()
    variables = stack_blocks(variables) if scan else variables
    net = net.clone(dropout=0.5, scan=scan)
    apply = quick_jit(lambda key: net.apply(variables, *args, train=True, rngs={"dropout": key}))
    first, again, other = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 1e-2
    assert float(jnp.abs(first - result[0]).max()) > 1e-2


def test_dropped_labels_give_the_output_without_class(net, variables, quick_jit):
    x, c_noise, labels = inputs()
    dropping = net.clone(label_dropout=1.0)
    apply = quick_jit(dropping.apply, static_argnames="train")
    rngs = {"dropout": jax.random.key(0)}
    dropped = apply(variables, x, c_noise, labels, train=True, rngs=rngs)
    null = apply(variables, x, c_noise, jnp.full(2, 3), train=False)
    np.testing.assert_allclose(dropped, null, atol=1e-5)


def test_noise_scale_multiplies_the_noise_level(net, variables, result, quick_jit):
    x, c_noise, labels = inputs()
    out = quick_jit(net.clone(noise_scale=100.0).apply)(variables, x, c_noise / 100, labels)
    np.testing.assert_allclose(out, result[0], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": jnp.zeros((2, 8, 8))}, "x must be"),
        ({"x": jnp.zeros((2, 8, 7, 3))}, "patch_size=2"),
        ({"x": jnp.zeros((2, 8, 8, 3), jnp.int32)}, "floating point"),
        ({"c_noise": jnp.zeros((2, 1))}, "c_noise"),
        ({"labels": jnp.zeros((2, 1), jnp.int32)}, "labels"),
        ({"labels": jnp.zeros((2, 4))}, "label vectors"),
    ],
)
def test_wrong_inputs_are_refused(net, variables, change, match):
    x, c_noise, labels = inputs()
    with pytest.raises(ValueError, match=match):
        net.apply(variables, **({"x": x, "c_noise": c_noise, "labels": labels} | change))


@pytest.mark.parametrize(
    "attributes", [{"width": 18, "num_heads": 2}, {"width": 16, "num_heads": 3}]
)
def test_widths_that_do_not_divide_are_refused(attributes):
    net = DiT(**ARCHITECTURE | attributes)
    with pytest.raises(ValueError, match="width must be divisible"):
        jax.eval_shape(net.init, jax.random.key(0), *inputs())


def test_unknown_sizes_are_refused():
    with pytest.raises(ValueError, match="XL/3"):
        dit_imagenet("XL/3")
    with pytest.raises(ValueError, match="divisible by 4"):
        sine_cosine_positions((2, 2), 6)
