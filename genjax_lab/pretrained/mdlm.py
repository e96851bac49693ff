"""Weights of MDLM (arXiv 2406.07524), BD3-LM and SEDD, under their original names.

    state = mdlm.read_state_dict("model.safetensors")
    network, variables = mdlm.from_state_dict(state, {"num_heads": 12})

Names may begin with "backbone.". The embedding has a row for each of V tokens and a last one for
the mask; so has the last layer, whose mask is dropped, since the mask is never predicted. Linear
layers turn from [out, in] to [in, out], nothing else changes. Models that were trained without time
are told sigma = 0, as `MaskedTransformer` is told without `t`.

SEDD's absorbing models (arXiv 2310.16834) have the same network under the same names and are told
the time. They are trained to give the logarithms of scores, s_v = p_v / (e^sigma - 1) for token v,
after taking log(e^sigma - 1) + log V off the last layer: so that layer is log p up to a constant,
and is read as the logits that it is here. The published noise is log-linear with eps = 1e-3.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from genjax_lab.networks.masked_transformer import MaskedTransformer
from genjax_lab.pretrained.edm import check_arrays
from genjax_lab.pretrained.natten import read_state_dict

__all__ = ["from_state_dict", "read_state_dict"]

# Original names, and where the arrays are in our tree; {i} is the number of a block.
_PATHS = {
    "vocab_embed.embedding": ("embedding",),
    "sigma_map.mlp.0": ("noise_0",),
    "sigma_map.mlp.2": ("noise_1",),
    "output_layer.norm_final.weight": ("norm", "scale"),
    "output_layer.linear": ("head",),
    "output_layer.adaLN_modulation": ("adaln",),
}
_OF_BLOCKS = {
    "norm1.weight": ("norm_attention", "scale"),
    "attn_qkv.weight": ("qkv", "kernel"),
    "attn_out.weight": ("out", "kernel"),
    "norm2.weight": ("norm_mlp", "scale"),
    "mlp.0": ("mlp_in",),
    "mlp.2": ("mlp_out",),
    "adaLN_modulation": ("adaln",),
}
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$")  # computed, not learned


def from_state_dict(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[MaskedTransformer, dict[str, Any]]:
    """The network of published weights and its variables.

    Args:
        state_dict: float32, float16 or bfloat16 arrays under their original names.
        config: "num_heads"; the rest is read off the arrays.

    Returns:
        A float32 `MaskedTransformer` of V tokens and its variables, float32 in "params".

    Raises:
        ValueError: if names or shapes are not those of such a network, with a list of differences;
            if an array is not finite or of another type; if the heads do not divide the width.
    """
    arrays = {
        name.removeprefix("backbone."): array
        for name, array in state_dict.items()
        if not _BUFFERS.search(name)
    }
    for name in ("vocab_embed.embedding", "sigma_map.mlp.0.weight"):
        if np.ndim(arrays.get(name)) != 2:
            raise ValueError(
                f"state_dict must have {name!r} of two axes, has {sorted(arrays)[:5]}."
            )
    numbers = [int(m[1]) for name in arrays if (m := re.match(r"blocks\.(\d+)\.", name))]
    (rows, width), depth = arrays["vocab_embed.embedding"].shape, max(numbers, default=-1) + 1
    num_heads = config.get("num_heads")
    if not isinstance(num_heads, int) or num_heads < 1 or width % (2 * num_heads):
        raise ValueError(
            f"config['num_heads'] must be an integer, of which twice divides the width {width}, "
            f"got {num_heads!r}."
        )
    paths = _paths(depth)
    condition_width = len(arrays["sigma_map.mlp.0.weight"])
    check_arrays(arrays, _shapes(rows, width, condition_width, depth))
    params: dict[str, Any] = {}
    for name, array in arrays.items():
        array = np.asarray(array, np.float32)
        if name.startswith("output_layer.linear."):
            array = array[:-1]
        path = paths[name]
        branch = params
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = jnp.asarray(array.T if path[-1] == "kernel" else array)
    network = MaskedTransformer(rows - 1, width, depth, num_heads, condition_width)
    return network, {"params": params}


def _paths(depth: int) -> dict[str, tuple[str, ...]]:
    """The place of every array in our tree, by its original name."""
    named = dict(_PATHS)
    for number in range(depth):
        for name, path in _OF_BLOCKS.items():
            named[f"blocks.{number}.{name}"] = (f"block_{number}", *path)
    result = {}
    for name, path in named.items():
        if path[-1] in ("scale", "kernel", "embedding"):
            result[name] = path
        else:  # a linear layer
            result[f"{name}.weight"], result[f"{name}.bias"] = (*path, "kernel"), (*path, "bias")
    return result


def _shapes(rows: int, width: int, condition: int, depth: int) -> dict[str, tuple[int, ...]]:
    """The shape of every array, by its original name."""
    linear = {
        "sigma_map.mlp.0": (condition, 256),
        "sigma_map.mlp.2": (condition, condition),
        "output_layer.linear": (rows, width),
        "output_layer.adaLN_modulation": (2 * width, condition),
    }
    shapes = {"vocab_embed.embedding": (rows, width), "output_layer.norm_final.weight": (width,)}
    for number in range(depth):
        block = f"blocks.{number}."
        shapes |= {block + "norm1.weight": (width,), block + "norm2.weight": (width,)}
        shapes |= {block + "attn_qkv.weight": (3 * width, width)}
        shapes |= {block + "attn_out.weight": (width, width)}
        linear |= {
            block + "mlp.0": (4 * width, width),
            block + "mlp.2": (width, 4 * width),
            block + "adaLN_modulation": (6 * width, condition),
        }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
