"""Published weights of EDM and EDM2, read from arrays under their original names.

The checkpoints of EDM (arXiv 2206.00364), EDM2 (arXiv 2312.02696) and of models fine-tuned from
them are pickles that execute the source code they carry, so they are never opened here. The script
in `export_edm.md` beside this file runs in the original repository and writes the tensors and the
constructor's arguments as .npz or .safetensors; this module turns such an export into a network
and its variables, and back. Names map by rule: the dot after "enc" and "dec" becomes an
underscore, "weight" is our "kernel" (OIHW to HWIO, [out, in] to [in, out]) or a norm's "scale".
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from genjax_lab.networks.dhariwal_unet import DhariwalUNet
from genjax_lab.networks.edm2_unet import EDM2UNet
from genjax_lab.networks.song_unet import SongUNet

# Class in the original repository: our class, the attribute of the preconditioner that holds it.
_MODELS = {
    "SongUNet": (SongUNet, "model."),
    "DhariwalUNet": (DhariwalUNet, "model."),
    "EDM2": (EDM2UNet, "unet."),
}
# These live in EDM2's preconditioner itself, beside the network.
_OUTSIDE = ("logvar_fourier", "logvar_linear")
_RENAMED = {"img_resolution": "resolution", "label_dim": "num_classes"}
# Arguments of the original preconditioners, which `genjax_lab.processes` replaces.
_PRECONDITIONING = frozenset(
    {"model_type", "img_channels", "in_channels", "use_fp16", "sigma_min", "sigma_max"}
    | {"sigma_data", "beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2"}
)
# Attributes of our modules that no configuration of a checkpoint sets.
_OURS = frozenset({"attention", "dtype", "remat", "parent", "name", *_RENAMED.values()})
_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, jnp.bfloat16))


class Export(NamedTuple):
    """What an export file holds: `from_state_dict(*read_export(path))` makes the network.

    Attributes:
        state_dict: arrays under their original names.
        config: arguments of the original constructors; empty if the file has none.
    """

    state_dict: dict[str, np.ndarray]
    config: dict[str, Any]


def read_export(path: str | os.PathLike) -> Export:
    """Read the arrays and the configuration that `export_edm.md`'s script wrote.

    Args:
        path: a .npz file, whose entry "config" is a JSON string, or a .safetensors file with the
            same string in its metadata.

    Raises:
        ValueError: if the file is of another kind, truncated or corrupted.
        FileNotFoundError: if there is no such file.
    """
    path = os.fspath(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    suffix = os.path.splitext(path)[1]
    if suffix not in readers:
        raise ValueError(
            f"path must end in .npz or .safetensors, got {path!r}; a pickle of EDM or EDM2 is "
            "exported with the script in genjax_lab/pretrained/export_edm.md."
        )
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    try:
        arrays, text = readers[suffix](path)
        config = json.loads(text)
    except Exception as error:  # whatever a parser says of foreign bytes, it is the file's fault
        raise ValueError(f"{path!r} is no intact {suffix} export: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path!r} holds a config that is no JSON object: {text!r}.")
    return Export(arrays, config)


def _read_npz(path: str) -> tuple[dict[str, np.ndarray], str]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return arrays, str(arrays.pop("config", "{}"))


def _read_safetensors(path: str) -> tuple[dict[str, np.ndarray], str]:
    with safetensors.safe_open(path, framework="numpy") as archive:
        arrays = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        return arrays, (archive.metadata() or {}).get("config", "{}")


def from_state_dict(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Make the network of a published checkpoint and its variables.

    Args:
        state_dict: arrays under their original names, with or without the prefix of the
            preconditioner ("model." for EDM, "unet." for EDM2); float32, float16 or bfloat16.
            Every array is used exactly once; filters of resampling layers are compared with the
            configuration.
        config: arguments of the original constructors, with "model_type" one of "SongUNet",
            "DhariwalUNet" and "EDM2". Those of the preconditioning are not needed and ignored.

    Returns:
        The module (float32, dense attention; `module.clone(dtype=..., attention=...)` changes
        that) and its variables: float32 arrays in the collections "params" and, if the network has
        fixed frequencies, "buffers".

    Raises:
        ValueError: if names or shapes differ from the configuration's, with a list of the
            differences; if an array is not finite or of another dtype; if the configuration is
            incomplete or has unknown arguments.
    """
    module, in_channels = _make_network(config)
    template = flax.traverse_util.flatten_dict(_template(module, in_channels))
    paths = {_original_name(path): path for path in template}
    filters = dict(_resample_filters(module))
    arrays = _strip_prefix(state_dict, _prefix(module))

    expected = {name: _original_shape(path, template[path].shape) for name, path in paths.items()}
    expected |= {name: taps.shape for name, taps in filters.items()}
    check_arrays(arrays, expected)
    for name, taps in filters.items():
        if not np.allclose(arrays[name].astype(np.float32), taps, rtol=1e-3):  # float16's spacing
            raise ValueError(
                f"{name} differs from the filter of the config: got {arrays[name].squeeze()}, "
                f"expected {taps.squeeze()}; set config['resample_filter']."
            )
    variables = {path: jnp.asarray(_to_ours(path, arrays[n])) for n, path in paths.items()}
    return module, flax.traverse_util.unflatten_dict(variables)


def to_state_dict(module: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Give variables their original names and layouts; the inverse of `from_state_dict`.

    Args:
        module: a `SongUNet`, `DhariwalUNet` or `EDM2UNet`.
        variables: its variables, as `module.init` or `from_state_dict` return them.

    Returns:
        Float32 arrays under the names that the original preconditioner's `load_state_dict`
        expects, prefix and resampling filters included.

    Raises:
        ValueError: if the module is of another kind, or the variables are not its.
    """
    prefix = _prefix(module)
    flat = flax.traverse_util.flatten_dict(dict(variables))
    first = ("params", f"enc_{module.resolution}x{module.resolution}_conv", "kernel")
    if first not in flat:
        raise ValueError(f"variables have no {'/'.join(first)}; pass those of the module.")
    constant = isinstance(module, EDM2UNet)  # its first layer also sees a channel of ones
    template = flax.traverse_util.flatten_dict(_template(module, flat[first].shape[2] - constant))
    expected = {"/".join(path): leaf.shape for path, leaf in template.items()}
    check_names({"/".join(path): leaf.shape for path, leaf in flat.items()}, expected)

    arrays = dict(_resample_filters(module))
    for path, leaf in flat.items():
        arrays[_original_name(path)] = _to_original(path, np.asarray(leaf, np.float32))
    return {(name if name.startswith(_OUTSIDE) else prefix + name): a for name, a in arrays.items()}


def _make_network(config: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """Make our module from the original arguments; returns it and its input channels."""
    model_type = config.get("model_type")
    if model_type not in _MODELS:
        raise ValueError(f"config['model_type'] must be in {list(_MODELS)}, got {model_type!r}.")
    model_class = _MODELS[model_type][0]
    in_channels = config.get("in_channels", config.get("img_channels"))
    if in_channels is None or "img_resolution" not in config:
        raise ValueError(
            "config must have 'img_resolution' and 'img_channels' (or 'in_channels'), got "
            f"{sorted(config)}."
        )
    arguments = {"out_channels": config.get("img_channels", in_channels)}
    known = set(model_class.__dataclass_fields__) - _OURS
    for key, value in config.items():
        if key == "resample_filter" and model_class is not SongUNet:
            if list(value) != [1, 1]:
                raise ValueError(f"{model_type} knows resample_filter [1, 1] only, got {value}.")
        elif key in _RENAMED or key in known:
            value = tuple(value) if isinstance(value, list) else value
            arguments[_RENAMED.get(key, key)] = value
        elif key not in _PRECONDITIONING:
            raise ValueError(f"config has {key!r}, which is no argument of {model_type}.")
    return model_class(**arguments), in_channels


def _template(module: nn.Module, in_channels: int) -> dict[str, Any]:
    """Shapes of all variables of a module."""
    x = jax.ShapeDtypeStruct((1, module.resolution, module.resolution, in_channels), jnp.float32)
    c_noise = jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), x, c_noise)


def _prefix(module: nn.Module) -> str:
    for model_class, prefix in _MODELS.values():
        if isinstance(module, model_class):
            return prefix
    raise ValueError(f"module must be one of {list(_MODELS)}, got {type(module).__name__}.")


def _strip_prefix(state_dict: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    arrays = {}
    for name, array in state_dict.items():
        short = name.removeprefix(prefix)
        if short in arrays:
            raise ValueError(f"state_dict has {short!r} both with and without {prefix!r}.")
        arrays[short] = array
    return arrays


def _original_name(path: tuple[str, ...]) -> str:
    """Name of the tensor at a path (collection, module, ..., leaf)."""
    *modules, leaf = path[1:]
    for side in ("enc", "dec"):
        if modules and modules[0].startswith(f"{side}_"):
            modules[0] = modules[0].replace("_", ".", 1)
    return ".".join([*modules, "weight" if leaf in ("kernel", "scale") else leaf])


def _original_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[-1] != "kernel":
        return shape
    return (shape[-1], shape[-2], *shape[:-2])


def _to_ours(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    return np.moveaxis(array, (1, 0), (-2, -1)) if path[-1] == "kernel" else array


def _to_original(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return array
    # safetensors writes an array's memory as it lies, so a transposed view would be scrambled.
    return np.moveaxis(array, (-1, -2), (0, 1)).copy(order="C")


def _resample_filters(module: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the filters that EDM's resampling layers keep as buffers."""
    if isinstance(module, EDM2UNet):
        return
    is_song = isinstance(module, SongUNet)
    taps = np.asarray(module.resample_filter if is_song else (1, 1), np.float32)
    value = (np.outer(taps, taps) / taps.sum() ** 2)[None, None]
    for level in range(1, len(module.channel_mult)):
        low, high = (
            f"{r}x{r}" for r in (module.resolution >> level, module.resolution >> level - 1)
        )
        layers = [f"enc.{low}_down.conv0", f"enc.{low}_down.skip"]
        layers += [f"dec.{high}_up.conv0", f"dec.{high}_up.skip"]
        if is_song and module.encoder_type == "residual":
            layers.append(f"enc.{low}_aux_residual")
        if is_song and module.encoder_type == "skip":
            layers.append(f"enc.{low}_aux_down")
        if is_song and module.decoder_type == "skip":
            layers.append(f"dec.{high}_aux_up")
        yield from ((f"{layer}.resample_filter", value) for layer in layers)


def check_arrays(arrays: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a ValueError unless these are finite floats of the expected names and shapes."""
    wrong = [
        f"{name} ({getattr(array, 'dtype', type(array).__name__)})"
        for name, array in arrays.items()
        if not (isinstance(array, np.ndarray | jax.Array) and array.dtype in _DTYPES)
    ]
    if wrong:
        raise ValueError(
            "state_dict must hold numpy arrays of float32, float16 or bfloat16; these are not: "
            f"{_enumerate(wrong)}."
        )
    check_names({name: array.shape for name, array in arrays.items()}, expected)
    broken = [n for n, a in arrays.items() if not np.isfinite(a.astype(np.float32)).all()]
    if broken:
        raise ValueError(f"state_dict holds NaN or infinity in: {_enumerate(broken)}.")


def check_names(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise a ValueError that lists all differences between two sets of names and shapes."""
    shared = shapes.keys() & expected.keys()
    differences = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "wrong shape": [
            f"{name} {shapes[name]} instead of {expected[name]}"
            for name in sorted(shared)
            if tuple(shapes[name]) != tuple(expected[name])
        ],
    }
    found = [f"{kind}: {_enumerate(names)}" for kind, names in differences.items() if names]
    if found:
        raise ValueError("the arrays do not fit the network; " + "; ".join(found) + ".")


def _enumerate(names: list[str], limit: int = 20) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
