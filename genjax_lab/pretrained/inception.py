"""The public Inception weights of the Frechet Inception distance, from an export file.

Takes the state dictionary that the common PyTorch ports of the TensorFlow graph of 2015-12-05 share
(names such as `Mixed_5b.branch1x1.conv.weight`). A .pth file is read by the restricted reader of
`genjax_lab.pretrained.load_arrays`; one in PyTorch's older format, which that refuses, is converted
once in an environment with torch:

    state = torch.load("weights-inception-2015-12-05-6726825d.pth", weights_only=True)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(state, "inception.safetensors")

Each batch normalisation (epsilon 1e-3) is folded in float64 into the convolution before it.
"""

import os
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp
import numpy as np

from genjax_lab.networks.inception import InceptionV3
from genjax_lab.pretrained.edm import read_export
from genjax_lab.pretrained.unpickle import load_arrays

_BATCH_NORM_EPSILON = 1e-3
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def from_state_dict(
    state_dict: Mapping[str, np.ndarray],
) -> tuple[InceptionV3, dict[str, dict]]:
    """Return the network and its variables from an exported state dictionary.

    Every tensor is used exactly once, but for the `num_batches_tracked` counters, which have no
    part in inference and may be absent.

    Args:
        state_dict: arrays by their names in the PyTorch port; convolutions are [out, in, height,
            width].

    Returns:
        `(module, {"params": ...})` for `module.apply`.

    Raises:
        ValueError: if tensors are missing, left over or of another shape; all are listed.
    """
    module = InceptionV3()
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))["params"]
    shapes = {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}
    expected = _expected_tensors(shapes)
    _check_tensors(state_dict, expected)

    params = {}
    for *scope, leaf in shapes:
        path = (*scope, leaf)
        if leaf != "kernel":
            continue
        if scope == ["fc"]:
            params[path] = _float64(state_dict["fc.weight"]).T
            params["fc", "bias"] = _float64(state_dict["fc.bias"])
            continue
        prefix = ".".join(scope)
        scale, offset, mean, variance = (
            _float64(state_dict[f"{prefix}.bn.{name}"]) for name in _BATCH_NORM
        )
        gain = scale / np.sqrt(variance + _BATCH_NORM_EPSILON)
        kernel = _float64(state_dict[f"{prefix}.conv.weight"]).transpose(2, 3, 1, 0)
        params[path] = kernel * gain
        params[(*scope, "bias")] = offset - mean * gain
    params = {path: jnp.asarray(value, dtype=jnp.float32) for path, value in params.items()}
    return module, {"params": flax.traverse_util.unflatten_dict(params)}


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the arrays of a .pth, .safetensors or .npz file by name; runs none of its code.

    Raises:
        ValueError: if the file has another suffix, is damaged, or holds anything but arrays.
        FileNotFoundError: if there is no such file.
    """
    suffix = os.path.splitext(path)[1]
    if suffix in (".safetensors", ".npz"):
        return read_export(path).state_dict
    if suffix == ".pth":
        return load_arrays(path)
    raise ValueError(f"path is {str(path)!r}; expected a .pth, .safetensors or .npz file")


def _expected_tensors(
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the export that belong to the module's parameters."""
    expected = {}
    for (*scope, leaf), shape in shapes.items():
        prefix = ".".join(scope)
        if scope == ["fc"]:
            name, shape = ("weight", shape[::-1]) if leaf == "kernel" else ("bias", shape)
            expected[f"{prefix}.{name}"] = shape
        elif leaf == "kernel":
            height, width, channels, features = shape
            expected[f"{prefix}.conv.weight"] = (features, channels, height, width)
            expected.update({f"{prefix}.bn.{name}": (features,) for name in _BATCH_NORM})
    return expected


def _check_tensors(
    state_dict: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise a ValueError that lists every difference between the export and the network."""
    found = {name for name in state_dict if not name.endswith(".num_batches_tracked")}
    differences = [f"missing {name}" for name in sorted(expected.keys() - found)]
    differences += [f"not part of the network {name}" for name in sorted(found - expected.keys())]
    differences += [
        f"{name} has shape {tuple(state_dict[name].shape)}, expected {expected[name]}"
        for name in sorted(found & expected.keys())
        if tuple(state_dict[name].shape) != expected[name]
    ]
    if differences:
        raise ValueError(
            "state_dict is not that of the FID Inception network: " + "; ".join(differences)
        )


def _float64(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
