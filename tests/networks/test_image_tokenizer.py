"""The quantiser over scales and the tokenizer around it; parity is in test_var_weights.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.networks.image_tokenizer import ImageTokenizer, digits_tokenizer, quantizer_of
from genjax_lab.networks.multi_scale_quantizer import (
    MultiScaleQuantizer,
    phi_of_scale,
    scale_bounds,
    token_counts,
    update_usage,
    used_fraction,
)

SIDES = (1, 2, 3, 5)
QUANTIZER = MultiScaleQuantizer(vocab_size=16, channels=4, patch_nums=SIDES)
FEATURES = np.random.default_rng(5).standard_normal((3, 5, 5, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def variables(random_variables):
    return random_variables(QUANTIZER, FEATURES, scale=0.5)


@pytest.fixture(scope="module")
def encoded(variables, quick_jit):
    return quick_jit(QUANTIZER.apply)(variables, FEATURES)


def test_tokens_lead_back_to_the_features_of_the_encoder(variables, encoded, quick_jit):
    assert encoded.tokens.shape == (3, 39)
    assert len(np.unique(encoded.tokens)) > 8

    @quick_jit
    def decode(tokens):
        features = QUANTIZER.apply(variables, tokens, method="tokens_to_features")
        return features, QUANTIZER.apply(variables, tokens, method="tokens_to_inputs")

    f_hat, inputs = decode(encoded.tokens)
    np.testing.assert_allclose(f_hat, encoded.quantized, atol=1e-5)
    tokens = QUANTIZER.apply(variables, FEATURES, method="features_to_tokens")
    np.testing.assert_array_equal(tokens, encoded.tokens)

    # The inputs are what the encoder had when it came to each scale.
    partial, start = jnp.zeros_like(FEATURES), 0
    for scale, (first, last) in enumerate(scale_bounds(SIDES)):
        if scale:
            seen = QUANTIZER.apply(variables, partial, scale, method="scale_inputs")
            np.testing.assert_allclose(inputs[:, start : start + last - first], seen, atol=1e-5)
            start += last - first
        partial = QUANTIZER.apply(
            variables, partial, encoded.tokens[:, first:last], scale, method="add_scale"
        )
    assert start == inputs.shape[1]
    np.testing.assert_allclose(partial, f_hat, atol=1e-5)


def test_every_token_is_the_nearest_code_of_its_residual(variables, encoded):
    codes = variables["params"]["codebook"].astype(np.float64)
    partial = jnp.zeros_like(FEATURES)
    for scale, (first, last) in enumerate(scale_bounds(SIDES)):
        tokens = np.asarray(encoded.tokens[:, first:last])
        rest = QUANTIZER.apply(variables, FEATURES - partial, scale, method="scale_inputs")
        distances = np.linalg.norm(np.asarray(rest)[:, :, None] - codes, axis=-1)
        chosen = np.take_along_axis(distances, tokens[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(chosen, distances.min(axis=-1), atol=1e-5)
        partial = QUANTIZER.apply(variables, partial, tokens, scale, method="add_scale")


def test_cosine_codes_are_the_nearest_in_angle(variables):
    net = QUANTIZER.clone(cosine=True, patch_nums=(1,), residual_ratio=0.0)
    features = FEATURES[:, :1, :1]
    codes = variables["params"]["codebook"]
    tokens = net.apply({"params": {"codebook": codes}}, features, method="features_to_tokens")
    unit = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    np.testing.assert_array_equal(tokens[:, 0], np.argmax(features[:, 0, 0] @ unit.T, axis=1))


def test_gradients_pass_the_quantiser_straight_and_the_losses_pull_both_sides(
    variables, encoded, quick_jit
):
    weights = np.random.default_rng(1).standard_normal(FEATURES.shape).astype(np.float32)

    def value(params, features, beta, of):
        out = QUANTIZER.clone(beta=beta).apply({"params": params}, features)
        return out.loss if of == "loss" else jnp.sum(weights * out.quantized)

    grad = quick_jit(jax.grad(value, (0, 1)), static_argnums=(2, 3))
    params = variables["params"]
    params_grad, features_grad = grad(params, FEATURES, 0.25, "sum")
    np.testing.assert_array_equal(features_grad, weights)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(params_grad)) == 0
    # beta weighs the pull upon the features alone.
    params_grad, features_grad = grad(params, FEATURES, 0.25, "loss")
    other_params_grad, other_features_grad = grad(params, FEATURES, 0.5, "loss")
    np.testing.assert_allclose(other_params_grad["codebook"], params_grad["codebook"], atol=1e-6)
    np.testing.assert_allclose(other_features_grad, 2 * features_grad, atol=1e-6)
    assert np.abs(params_grad["codebook"]).max() > 1e-3
    assert np.abs(features_grad).max() > 1e-4


def test_scales_use_the_nearest_of_the_shared_convolutions():
    # Scales 2 and 7 of the published model lie halfway between two; both take the later one.
    assert phi_of_scale(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_of_scale(4, 4) == (0, 1, 2, 3)
    assert phi_of_scale(10, 1) == (0,) * 10
    assert phi_of_scale(3, 2) == (0, 0, 1)
    assert phi_of_scale(1, 4) == (3,)


def test_without_convolutions_the_features_are_the_upsampled_codes(random_variables):
    net = MultiScaleQuantizer(vocab_size=5, channels=2, patch_nums=(1, 2), residual_ratio=0.0)
    variables = random_variables(net, jnp.zeros((1, 2, 2, 2)))
    assert set(variables["params"]) == {"codebook"}
    codes = variables["params"]["codebook"]
    f_hat = net.apply(variables, np.array([[4, 0, 1, 2, 3]]), method="tokens_to_features")
    np.testing.assert_allclose(f_hat[0], codes[4] + codes[:4].reshape(2, 2, 2), atol=1e-6)


def test_a_foreign_token_becomes_nan_instead_of_another_code(variables):
    tokens = np.zeros((3, 39), np.int32)
    tokens[1:, 7] = 16, -1
    features = QUANTIZER.apply(variables, tokens, method="tokens_to_features")
    assert np.isfinite(features[0]).all()
    assert np.isnan(features[1]).any() and np.isnan(features[2]).any()


def test_usage_is_a_moving_average_of_counts():
    tokens = jnp.array([[0, 1, 1, 1, 3], [2, 1, 1, 1, 1]])
    counts = token_counts(tokens, (1, 2), 4)
    np.testing.assert_array_equal(counts, [[1, 0, 1, 0], [0, 7, 0, 1]])
    usage = update_usage(jnp.full((2, 4), jnp.float32(9)), counts, 0)
    np.testing.assert_array_equal(usage, counts)
    np.testing.assert_allclose(update_usage(usage, 0 * counts, 99), 0.9 * counts, rtol=1e-6)
    np.testing.assert_allclose(update_usage(usage, 0 * counts, 100), 0.99 * counts, rtol=1e-6)
    # An even spread of the last scale's 8 tokens is 2 for each of 4 codes, of which 8 % is 0.16.
    fractions = used_fraction(
        jnp.array([[0.15, 0.17, 0, 9], [1, 1, 1, 1]]), batch=2, patch_nums=(1, 2)
    )
    np.testing.assert_allclose(fractions, [0.5, 1.0])


@pytest.fixture(scope="module")
def tokenizer():
    return digits_tokenizer(vocab_size=16, channels=4)


def test_tokenizer_encodes_and_decodes(tokenizer, random_variables, quick_jit):
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 1)).astype(np.float32)
    variables = random_variables(tokenizer, images)

    @quick_jit
    def run(images):
        out = tokenizer.apply(variables, images)
        tokens = tokenizer.apply(variables, images, method="images_to_tokens")
        return out, tokens, tokenizer.apply(variables, tokens, method="tokens_to_images")

    out, tokens, decoded = run(images)
    assert tokens.shape == (3, 21)
    np.testing.assert_array_equal(tokens, out.tokens)
    np.testing.assert_allclose(decoded, np.clip(out.reconstruction, -1, 1), atol=1e-5)
    quantizer, quantizer_variables = quantizer_of(tokenizer, variables)
    np.testing.assert_array_equal(
        quantizer.apply(quantizer_variables, tokens, method="tokens_to_inputs"),
        tokenizer.apply(variables, tokens, method="tokens_to_inputs"),
    )


def test_patches_and_neighbours_keep_their_places(tokenizer, random_variables, quick_jit):
    """A pixel moves the features of its patch and the patches around it, and nothing else."""
    encoder = tokenizer.encoder
    images = np.zeros((1, 8, 8, 1), np.float32)
    variables = random_variables(encoder, images)
    apply = quick_jit(encoder.apply)
    changed = images.copy()
    changed[0, 5, 0] = 1.0
    moved = np.abs(apply(variables, changed) - apply(variables, images)).max(axis=-1)[0] > 0
    expected = np.zeros((4, 4), bool)
    expected[1:4, 0:2] = True
    np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize(
    ("method", "argument", "match"),
    [
        (None, np.zeros((2, 5, 4, 4), np.float32), r"features must be \[batch, 5, 5, 4\]"),
        (None, np.zeros((2, 5, 5, 4), np.int32), "floating point"),
        ("features_to_tokens", np.zeros((5, 5, 4), np.float32), "features must be"),
        ("tokens_to_features", np.zeros((2, 38), np.int32), r"tokens must be \[batch, 39\]"),
        ("tokens_to_inputs", np.zeros((2, 39), np.float32), "integers"),
    ],
)
def test_wrong_inputs_are_refused(variables, method, argument, match):
    with pytest.raises(ValueError, match=match):
        QUANTIZER.apply(variables, argument, method=method)


def test_other_bad_arguments_are_refused(tokenizer):
    for patch_nums in ((), (0, 1), (2, 2), (3, 1)):
        with pytest.raises(ValueError, match="patch_nums must be positive and increase"):
            scale_bounds(patch_nums)
    with pytest.raises(ValueError, match="vocab_size"):
        jax.eval_shape(QUANTIZER.clone(vocab_size=0).init, jax.random.key(0), FEATURES)
    with pytest.raises(ValueError, match="images must be"):
        jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1), jnp.int32))
    with pytest.raises(ValueError, match="sides divisible by 2"):
        jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 7, 8, 1)))
    with pytest.raises(ValueError, match="tokens must be"):
        token_counts(jnp.zeros((2, 3), jnp.int32), (1, 2), 4)
    with pytest.raises(ValueError, match="params of an ImageTokenizer"):
        quantizer_of(tokenizer, {"params": {}})
    assert isinstance(tokenizer, ImageTokenizer)
