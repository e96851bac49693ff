"""Inception weights: parity with the original PyTorch port; files that are something else."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from genjax_lab.evaluation import inception_features
from genjax_lab.networks.inception import InceptionV3, preprocess
from genjax_lab.pretrained.inception import from_state_dict, read_state_dict

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
# One shape and batch size for all evaluations, so that the network is compiled once.
_IMAGE = (12, 9, 3)


@pytest.fixture(scope="module")
def state_dict():
    """Random weights under the names of the export, as the network's own shapes tell them."""
    rng = np.random.default_rng(0)
    module = InceptionV3()
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))["params"]
    state = {}

    def add(scope, tree):
        if "kernel" not in tree:
            for name, subtree in tree.items():
                add(f"{scope}.{name}" if scope else name, subtree)
        elif scope == "fc":
            state["fc.weight"] = rng.normal(size=tree["kernel"].shape[::-1]).astype(np.float32)
            state["fc.bias"] = rng.normal(size=tree["bias"].shape).astype(np.float32)
        else:
            *kernel, inputs, outputs = tree["kernel"].shape
            weight = rng.normal(size=(outputs, inputs, *kernel)) * np.sqrt(
                2 / (inputs * np.prod(kernel))
            )
            state[f"{scope}.conv.weight"] = weight.astype(np.float32)
            for name in _BATCH_NORM:
                state[f"{scope}.bn.{name}"] = rng.uniform(0.7, 1.3, outputs).astype(np.float32)
            state[f"{scope}.bn.num_batches_tracked"] = np.zeros((), np.int64)

    add("", shapes)
    return state


@pytest.fixture(scope="module")
def original():
    """The original port with random weights; skips where it is not installed."""
    reason = "run `make oracles` for comparisons with PyTorch"
    pytest.importorskip("torch", reason=reason)
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip(reason)
    from oracles.fid_inception import make_extractor

    return make_extractor(seed=0, features=("2048", "logits_unbiased"))


def _nchw(pixels):
    import torch

    return torch.tensor(pixels).permute(0, 3, 1, 2)


@pytest.mark.oracle
def test_features_and_probabilities_agree_with_the_original_port(original, tmp_path):
    import torch

    path = tmp_path / "inception.pth"
    torch.save(original.state_dict(), path)
    pixels = np.random.default_rng(1).integers(0, 256, size=(2, *_IMAGE), dtype=np.uint8)
    features, logits = (output.numpy() for output in original(_nchw(pixels)))
    extractor = inception_features(path, batch_size=2)
    actual = extractor.apply(pixels.astype(np.float32) / 127.5 - 1)
    # Relative to how much images differ from each other, which is all that a distance sees.
    spread = np.abs(features - features.mean(axis=0)).max()
    assert spread > 1e-2
    np.testing.assert_allclose(actual, features, atol=1e-4 * spread)
    np.testing.assert_allclose(extractor.probabilities(actual), jax.nn.softmax(logits), atol=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("shape", [(32, 32), (64, 50), (512, 300)])
def test_preprocessing_agrees_with_the_original_port(original, shape):
    seen = []

    class Stop(Exception):
        pass

    def record(_, inputs):
        seen.append(inputs[0])
        raise Stop

    pixels = np.random.default_rng(2).integers(0, 256, size=(1, *shape, 3), dtype=np.uint8)
    hook = original.Conv2d_1a_3x3.register_forward_pre_hook(record)
    with pytest.raises(Stop):
        original(_nchw(pixels))
    hook.remove()
    expected = seen[0].permute(0, 2, 3, 1).numpy()
    images = pixels.astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(preprocess(images), expected, atol=2e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_arrays_come_back_from_files(state_dict, tmp_path, suffix):
    small = {name: state_dict[name] for name in ("fc.bias", "Conv2d_1a_3x3.conv.weight")}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, **small)
    else:
        save_file(small, path)
    read = read_state_dict(path)
    assert read.keys() == small.keys()
    for name, array in small.items():
        np.testing.assert_array_equal(read[name], array)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"weights{suffix}"):
        read_state_dict(path)


def test_files_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a \.pth, \.safetensors or \.npz"):
        read_state_dict(tmp_path / "weights.pkl")
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path / "weights.safetensors")


def test_every_difference_is_listed(state_dict):
    changed = dict(state_dict)
    del changed["Mixed_7c.branch_pool.bn.running_var"]
    changed["AuxLogits.conv0.conv.weight"] = np.zeros(3)
    changed["fc.bias"] = np.zeros(1000)
    with pytest.raises(ValueError) as raised:
        from_state_dict(changed)
    assert "missing Mixed_7c.branch_pool.bn.running_var" in str(raised.value)
    assert "not part of the network AuxLogits.conv0.conv.weight" in str(raised.value)
    assert "fc.bias has shape (1000,), expected (1008,)" in str(raised.value)


def test_batch_normalisation_is_folded_exactly(state_dict):
    _, variables = from_state_dict(state_dict)
    unit = variables["params"]["Mixed_6b"]["branch7x7_2"]
    scope = "Mixed_6b.branch7x7_2"
    x = np.random.default_rng(2).normal(size=(1, 7, 128))
    weight = state_dict[f"{scope}.conv.weight"].astype(np.float64)[:, :, 0]  # [out, in, 7]
    convolved = np.einsum("bki,oik->bo", x, weight)
    scale, offset, mean, variance = (state_dict[f"{scope}.bn.{name}"] for name in _BATCH_NORM)
    expected = (convolved - mean) / np.sqrt(variance + 1e-3) * scale + offset
    assert unit["kernel"].shape == (1, 7, 128, 128)
    actual = np.einsum("bki,kio->bo", x, unit["kernel"][0]) + unit["bias"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_extractor_reads_a_file_and_gives_features_of_any_images(state_dict, tmp_path):
    path = tmp_path / "inception.safetensors"
    save_file(state_dict, path)
    extractor = inception_features(path, batch_size=2)
    images = np.random.default_rng(3).integers(0, 256, size=(3, *_IMAGE)) / 127.5 - 1
    features = extractor.apply(images)
    assert features.shape == (3, extractor.dim) == (3, 2048)
    np.testing.assert_allclose(features[2:], extractor.apply(images[2:]), rtol=1e-5)
    expected = jax.nn.softmax(features @ state_dict["fc.weight"].T.astype(np.float64))
    np.testing.assert_allclose(extractor.probabilities(features), expected, atol=1e-4)
    state_dict = dict(state_dict) | {"fc.bias": state_dict["fc.bias"] + 1}
    save_file(state_dict, path)
    assert inception_features(path).version != extractor.version
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        extractor.apply(images * 127.5)
