"""Weights of NATTEN's attention modules (arXiv 2204.07143, 2504.16922), under their original names.

    state = natten.read_state_dict("model.safetensors")
    natten.find_modules(state)     # ("levels.0.blocks.0.attn.", ...)
    config = {"model_type": "NeighborhoodAttention2D", "num_heads": 4, "kernel_size": 7}
    layer, variables = natten.from_state_dict(state, config, prefix="levels.0.blocks.0.attn.")

A module has `qkv.weight [3C, C]`, whose outputs are (query, key, value) by heads by features,
`qkv.bias`, `proj.weight`, `proj.bias` and, in older versions, maybe `rpb`, a bias for each relative
position. Linear layers turn from [out, in] to [in, out], nothing else changes.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from genjax_lab.attention import NeighborhoodSpec
from genjax_lab.networks.neighborhood import NeighborhoodAttention
from genjax_lab.pretrained import inception
from genjax_lab.pretrained.edm import check_arrays, check_names

_KINDS = {f"NeighborhoodAttention{axes}D": axes for axes in (1, 2, 3)}
# What every axis of the grid has one of, and our name for it.
_OF_AXES = {
    "kernel_size": "window",
    "stride": "stride",
    "dilation": "dilation",
    "is_causal": "is_causal",
}
_ARGUMENTS = {"embed_dim", "num_heads", "qkv_bias", "qk_scale", "proj_drop"} | _OF_AXES.keys()
# Older versions' names: the width, whether there is `rpb`, and what inference does not do.
_OLDER = {"dim", "bias", "rel_pos_bias", "attn_drop"}
# Original names, and where the arrays are in our tree.
_PATHS = {
    "qkv.weight": ("qkv", "kernel"),
    "qkv.bias": ("qkv", "bias"),
    "proj.weight": ("proj", "kernel"),
    "proj.bias": ("proj", "bias"),
    "rpb": ("position_bias",),
}


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the arrays of a .safetensors, .npz or .pth file, or of a directory, by name.

    Args:
        path: a file, or a directory whose .safetensors files are all parts of one checkpoint.

    Raises:
        ValueError: if a file has another suffix, is damaged, or holds anything but arrays; if a
            directory has no .safetensors files, or one name in two of them.
        FileNotFoundError: if there is no such file.
    """
    if not os.path.isdir(path):
        return inception.read_state_dict(path)
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise ValueError(f"path is the directory {str(path)!r}, which has no .safetensors files.")
    arrays = {}
    for file in files:
        part = inception.read_state_dict(file)
        if twice := sorted(arrays.keys() & part.keys()):
            raise ValueError(f"{str(file)!r} holds {twice[0]}, which an earlier file holds too.")
        arrays |= part
    return arrays


def find_modules(state_dict: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Prefixes of the names of all modules that may be attention; "" for names without."""
    return tuple(
        name.removesuffix("qkv.weight")
        for name in state_dict
        if name == "qkv.weight" or name.endswith(".qkv.weight")
    )


def from_state_dict(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any], *, prefix: str | None = None
) -> tuple[NeighborhoodAttention, dict[str, Any]]:
    """Make the layer of one of NATTEN's modules and its variables.

    Args:
        state_dict: float32, float16 or bfloat16 arrays under their original names.
        config: "model_type", the original class (NeighborhoodAttention1D, 2D or 3D), and arguments
            of its constructor: "num_heads" and "kernel_size" at least. Those of older versions
            ("dim", "bias" or "rel_pos_bias", "attn_drop") are understood too; whether there is a
            position bias need not be said.
        prefix: what the names of the module's arrays begin with, such as
            "levels.0.blocks.0.attn."; other modules' arrays are left alone. None: of the only
            module that there is, and then every array must be its.

    Returns:
        A float32 `NeighborhoodAttention` and its variables, float32 in "params".

    Raises:
        ValueError: if names or shapes differ from the configuration's, with a list of the
            differences; if an array is not finite or of another dtype; if the configuration is
            incomplete, contradicts itself or has unknown arguments; if `prefix` is None and there
            are several modules.
    """
    if prefix is None:
        found = find_modules(state_dict)
        if len(found) > 1:
            raise ValueError(f"prefix must say which module is meant, one of {list(found)}.")
        prefix = found[0] if found else ""
        others = {name: x.shape for name, x in state_dict.items() if not name.startswith(prefix)}
        check_names(others, {})
    arrays = {
        name.removeprefix(prefix): array
        for name, array in state_dict.items()
        if name.startswith(prefix)
    }
    has_bias = _has_position_bias(config)
    module = _make_module(config, "rpb" in arrays if has_bias is None else has_bias)
    width = config.get("embed_dim", config.get("dim"))
    if width is None:  # errors about arrays that are no matrices come below
        shapes = [np.shape(arrays.get(name)) for name in ("proj.weight", "qkv.weight")]
        width = next((shape[-1] for shape in shapes if len(shape) == 2), module.num_heads)
    if width % module.num_heads:
        raise ValueError(
            f"config['num_heads'] is {module.num_heads}, no divisor of the width {width}."
        )
    shapes = _shapes(module, width, _KINDS[config["model_type"]])
    check_arrays(
        {prefix + name: array for name, array in arrays.items()},
        {prefix + name: shape for name, shape in shapes.items()},
    )
    params = {}
    for name, array in arrays.items():
        *scope, leaf = _PATHS[name]
        array = array.astype(np.float32)
        home = params.setdefault(scope[0], {}) if scope else params
        home[leaf] = jnp.asarray(array.T if leaf == "kernel" else array)
    return module, {"params": params}


def to_state_dict(
    module: NeighborhoodAttention, variables: Mapping[str, Any], *, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Give variables their original names and layouts; the inverse of `from_state_dict`.

    Args:
        module: the layer.
        variables: its variables.
        prefix: what to put before every name.

    Returns:
        Float32 arrays under the names that the original module's `load_state_dict` expects.

    Raises:
        ValueError: if the variables are not the module's.
    """
    arrays = {}
    for name, path in _PATHS.items():
        leaf = variables["params"]
        for part in path:
            leaf = leaf.get(part) if isinstance(leaf, Mapping) else None
        if leaf is not None:
            array = np.asarray(leaf, np.float32)
            # safetensors writes memory as it lies, so a transposed view would be scrambled.
            arrays[prefix + name] = array.T.copy(order="C") if path[-1] == "kernel" else array
    shapes = {name.removeprefix(prefix): array.shape for name, array in arrays.items()}
    width = shapes.get("proj.weight", (module.num_heads,))[0]
    check_names(shapes, _shapes(module, width, len(shapes.get("rpb", (0, 0))) - 1))
    return arrays


def _make_module(config: Mapping[str, Any], has_position_bias: bool) -> NeighborhoodAttention:
    """Make our layer from the original arguments."""
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise ValueError(f"config['model_type'] must be in {list(_KINDS)}, got {kind!r}.")
    for name in ("num_heads", "kernel_size"):
        if name not in config:
            raise ValueError(f"config must have {name!r}, got {sorted(config)}.")
    num_heads = config["num_heads"]
    if not isinstance(num_heads, int | np.integer) or num_heads < 1:
        raise ValueError(f"config['num_heads'] must be a positive integer, got {num_heads!r}.")
    unknown = sorted(config.keys() - _ARGUMENTS - _OLDER - {"model_type"})
    if unknown:
        raise ValueError(f"config has {unknown[0]!r}, which is no argument of {kind}.")
    fields = {}
    for name, ours in _OF_AXES.items():
        value = config.get(name, False if name == "is_causal" else 1)
        values = (value,) * _KINDS[kind] if np.ndim(value) == 0 else tuple(value)
        kinds = (bool, np.bool_) if name == "is_causal" else (int, np.integer)
        if not all(isinstance(item, kinds) for item in values):
            raise ValueError(
                f"config[{name!r}] must hold {kinds[0].__name__} values, got {value!r}."
            )
        if len(values) != _KINDS[kind]:
            raise ValueError(
                f"config[{name!r}] must have {_KINDS[kind]} values for {kind}, got {value}."
            )
        fields[ours] = values
    return NeighborhoodAttention(
        num_heads=int(num_heads),
        spec=NeighborhoodSpec(**fields),
        qkv_bias=config.get("qkv_bias", True),
        scale=config.get("qk_scale") or None,  # the original takes 0 for its default too
        proj_dropout=config.get("proj_drop", 0.0),
        use_position_bias=has_position_bias,
    )


def _has_position_bias(config: Mapping[str, Any]) -> bool | None:
    """Whether the configuration says that there is `rpb`; None if it says nothing."""
    said = {name: bool(config[name]) for name in ("bias", "rel_pos_bias") if name in config}
    if len(set(said.values())) > 1:
        raise ValueError(f"config contradicts itself: {said}.")
    return next(iter(said.values()), None)


def _shapes(module: NeighborhoodAttention, width: int, num_axes: int) -> dict[str, tuple[int, ...]]:
    """Original names and shapes of a layer's arrays, for a grid of so many axes."""
    shapes = {"qkv.weight": (3 * width, width), "qkv.bias": (3 * width,)}
    shapes |= {"proj.weight": (width, width), "proj.bias": (width,)}
    if not module.qkv_bias:
        del shapes["qkv.bias"]
    if module.use_position_bias:
        window = module.spec.window
        windows = window if isinstance(window, tuple) else (window,) * num_axes
        shapes["rpb"] = (module.num_heads, *(2 * w - 1 for w in windows))
    return shapes
