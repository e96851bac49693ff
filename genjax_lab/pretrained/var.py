"""Published weights of VAR and its tokenizer (arXiv 2404.02905), under their original names.

The checkpoints are plain .pth files of tensors, which `read_state_dict` reads without PyTorch:

    state = var.read_state_dict("var_d16.pth")
    network, variables = var.from_state_dict(state, {"model_type": "VAR", "depth": 16})
    state = var.read_state_dict("vae_ch160v4096z32.pth")
    tokenizer, tokenizer_variables = var.from_state_dict(state, {"model_type": "VQVAE"})

Linear layers turn from [out, in] to [in, out], convolutions from OIHW to HWIO; learned scales and
positions lose their axes of size one.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from genjax_lab.networks.image_tokenizer import ImageTokenizer
from genjax_lab.networks.multi_scale_quantizer import MultiScaleQuantizer, scale_bounds
from genjax_lab.networks.var import VAR, block_causal_mask
from genjax_lab.networks.vqvae import VQVAEDecoder, VQVAEEncoder
from genjax_lab.pretrained.edm import check_arrays
from genjax_lab.pretrained.inception import read_state_dict as read_state_dict

# Names of the original constructors' arguments, and ours.
_VAR_ARGUMENTS = {
    "num_classes": "num_classes",
    "V": "vocab_size",
    "Cvae": "codebook_channels",
    "patch_nums": "patch_nums",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "attn_l2_norm": "normalize",
    "cond_drop_rate": "label_dropout",
}
_QUANTIZER_ARGUMENTS = {
    "vocab_size": "vocab_size",
    "Cvae": "channels",
    "v_patch_nums": "patch_nums",
    "quant_resi": "residual_ratio",
    "share_quant_resi": "num_phi",
    "beta": "beta",
    "using_znorm": "cosine",
}
_VQVAE_ARGUMENTS = {"ch": "width", "ch_mult": "width_multipliers", "num_res_blocks": "num_blocks"}
# What the original can be asked for and ours has not: the only value that fits.
_FIXED = {"shared_aln": False, "norm_eps": 1e-6, "using_sa": True, "using_mid_sa": True}
_FIXED |= {"quant_conv_ks": 3, "default_qresi_counts": 0, "double_z": False}
# What does not change the function that the network is.
_IGNORED = frozenset(
    {"drop_rate", "attn_drop_rate", "drop_path_rate", "dropout", "test_mode"}
    | {"flash_if_available", "fused_if_available"}
)

_VAR_NAMES = {
    "class_embedding": "class_emb.weight",
    "start_positions": "pos_start",
    "positions": "pos_1LC",
    "level_embedding": "lvl_embed.weight",
    "q_bias": "attn.q_bias",
    "v_bias": "attn.v_bias",
    "log_scale": "attn.scale_mul_1H11",
    "word_embedding": "word_embed",
    "final_adaln": "head_nm.ada_lin.1",
    "head": "head",
    "adaln": "ada_lin.1",
    "qkv": "attn.mat_qkv",
    "proj": "attn.proj",
    "mlp_in": "ffn.fc1",
    "mlp_out": "ffn.fc2",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_USAGE = "ema_vocab_hit_SV"


def from_state_dict(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any], *, scan: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Make the network of a published checkpoint and its variables.

    Args:
        state_dict: float32, float16 or bfloat16 arrays under their original names. Every array is
            used exactly once, but for the buffers of VAR that its configuration determines
            ("lvl_1L", "attn_bias_for_masking", "zero_k_bias"): they may be absent and are compared
            if not.
        config: "model_type", the original class ("VAR", "VQVAE", or "VectorQuantizer2" for the
            tokenizer's quantiser alone, whose names may have the prefix "quantize."), and arguments
            of its constructor that differ from the published models'. VAR needs its "depth", and
            takes "V" and "Cvae" instead of the tokenizer; its width is 64 depth, in heads of 64.
        scan: whether VAR's blocks are stacked for `VAR(scan=True)`.

    Returns:
        A float32 `VAR`, `ImageTokenizer` or `MultiScaleQuantizer`, and its variables: float32 in
        "params" and, for the latter two, the usage of codes [K, V] in "buffers".

    Raises:
        ValueError: if names or shapes differ from the configuration's, with a list of the
            differences; if an array is not finite or of another dtype; if the configuration is
            incomplete or has unknown arguments.
    """
    module = _make_module(config)
    arrays = dict(state_dict)
    if isinstance(module, VAR):
        arrays = _without_buffers(arrays, module)
    elif isinstance(module, MultiScaleQuantizer):
        arrays = _without_prefix(arrays, "quantize.")
    template = _template(module)
    check_arrays(arrays, {n: _original_shape(path, s) for n, (path, s) in template.items()})
    variables = {
        path: jnp.asarray(_to_ours(path, arrays[name]).reshape(shape))
        for name, (path, shape) in template.items()
    }
    variables = flax.traverse_util.unflatten_dict(variables)
    if scan:
        if not isinstance(module, VAR):
            raise ValueError(f"scan=True is for VAR, got {config['model_type']!r}.")
        module, variables = module.clone(scan=True), {"params": _stacked(variables["params"])}
    return module, variables


def to_state_dict(module: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Give variables their original names and layouts; the inverse of `from_state_dict`.

    Args:
        module: a `VAR`, a `MultiScaleQuantizer`, or an `ImageTokenizer` with the original's encoder
            and decoder.
        variables: its variables; a usage of codes that is missing becomes zeros.

    Returns:
        Float32 arrays, and the integer "lvl_1L", under the names that the original module's
        `load_state_dict` expects.

    Raises:
        ValueError: if the module is of another kind, or the variables are not its.
    """
    if not isinstance(module, VAR | MultiScaleQuantizer | ImageTokenizer):
        raise ValueError(
            "module must be a VAR, ImageTokenizer or MultiScaleQuantizer, got "
            f"{type(module).__name__}."
        )
    params = dict(variables["params"])
    if isinstance(module, VAR) and module.scan:
        stacked = params.pop("blocks")
        for i in range(module.depth):
            params[f"block_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    flat = flax.traverse_util.flatten_dict({**variables, "params": params})
    arrays, absent = {}, []
    template = _template(module)
    for name, (path, shape) in template.items():
        if name.endswith(_USAGE) and path not in flat:
            arrays[name] = np.zeros(shape, np.float32)
        elif path not in flat or flat[path].shape != shape:
            absent.append("/".join(path))
        else:
            original = _to_original(path, np.asarray(flat[path], np.float32))
            arrays[name] = original.reshape(_original_shape(path, shape))
    absent += ["/".join(path) for path in flat.keys() - {path for path, _ in template.values()}]
    if absent:
        raise ValueError(f"variables are not the module's in: {', '.join(sorted(absent)[:20])}.")
    return arrays | (_buffers(module) if isinstance(module, VAR) else {})


def _make_module(config: Mapping[str, Any]) -> nn.Module:
    """Make our module from the original arguments."""
    tables = {
        "VAR": (_VAR_ARGUMENTS,),
        "VQVAE": (_QUANTIZER_ARGUMENTS | {"z_channels": "channels"}, _VQVAE_ARGUMENTS),
        "VectorQuantizer2": (_QUANTIZER_ARGUMENTS,),
    }
    kind = config.get("model_type")
    if kind not in tables:
        raise ValueError(f"config['model_type'] must be in {list(tables)}, got {kind!r}.")
    chosen = [{} for _ in tables[kind]]
    for key, value in config.items():
        value = tuple(value) if isinstance(value, list) else value
        homes = [i for i, table in enumerate(tables[kind]) if key in table]
        if homes:
            chosen[homes[0]][tables[kind][homes[0]][key]] = value
        elif key in _FIXED:
            if value != _FIXED[key]:
                raise ValueError(f"config[{key!r}] must be {_FIXED[key]}, got {value!r}.")
        elif key not in _IGNORED | {"model_type"}:
            raise ValueError(f"config has {key!r}, which is no argument of {kind}.")
    if kind == "VAR":
        if "depth" not in config:
            raise ValueError(f"config must have 'depth', got {sorted(config)}.")
        depth = config["depth"]
        return VAR(**({"width": 64 * depth, "num_heads": depth} | chosen[0]))
    quantizer = MultiScaleQuantizer(**chosen[0])
    if kind == "VectorQuantizer2":
        return quantizer
    encoder = VQVAEEncoder(features=quantizer.channels, **chosen[1])
    return ImageTokenizer(encoder, quantizer, VQVAEDecoder(**chosen[1]))


def _template(module: nn.Module) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Original name of every variable: its path and shape in our tree."""
    key = jax.random.key(0)
    buffers = {}
    if isinstance(module, VAR):
        rest = module.num_tokens - module.patch_nums[0] ** 2
        inputs = jax.ShapeDtypeStruct((1, rest, module.codebook_channels), jnp.float32)
        tree, name = jax.eval_shape(module.clone(scan=False).init, key, inputs), _var_name
    elif isinstance(module, MultiScaleQuantizer):
        side = module.patch_nums[-1]
        inputs = jax.ShapeDtypeStruct((1, side, side, module.channels), jnp.float32)
        tree = jax.eval_shape(module.init, key, inputs)
        buffers[_USAGE] = ("buffers", "usage"), (len(module.patch_nums), module.vocab_size)
        name = lambda path: _quantizer_name(path[1:], module)  # noqa: E731
    else:
        if not isinstance(module.encoder, VQVAEEncoder):
            raise ValueError(
                f"module must have a VQVAEEncoder, got {type(module.encoder).__name__}."
            )
        side = module.quantizer.patch_nums[-1] << (len(module.encoder.width_multipliers) - 1)
        images = jax.ShapeDtypeStruct((1, side, side, module.decoder.channels), jnp.float32)
        tree = jax.eval_shape(module.init, key, images)
        quantizer = module.quantizer
        shape = len(quantizer.patch_nums), quantizer.vocab_size
        buffers[f"quantize.{_USAGE}"] = ("buffers", "quantizer", "usage"), shape
        name = lambda path: _tokenizer_name(path[1:], quantizer)  # noqa: E731
    flat = flax.traverse_util.flatten_dict(tree)
    return {name(path): (path, leaf.shape) for path, leaf in flat.items()} | buffers


def _var_name(path: tuple[str, ...]) -> str:
    """Name of the tensor at a path (collection, [block,] module, leaf) of VAR."""
    modules = list(path[1:])
    prefix = ""
    if modules[0].startswith("block_"):
        prefix = modules.pop(0).replace("block_", "blocks.") + "."
    name = prefix + _VAR_NAMES[modules[0]]
    return name if len(modules) == 1 else f"{name}.{_LEAVES[modules[1]]}"


def _quantizer_name(modules: tuple[str, ...], quantizer: MultiScaleQuantizer) -> str:
    if modules[0] == "codebook":
        return "embedding.weight"
    index = modules[0].removeprefix("phi_")
    layer = {0: f"quant_resi.{index}", 1: "quant_resi.qresi"}.get(
        quantizer.num_phi, f"quant_resi.qresi_ls.{index}"
    )
    return f"{layer}.{_LEAVES[modules[1]]}"


def _tokenizer_name(modules: tuple[str, ...], quantizer: MultiScaleQuantizer) -> str:
    side, *inner = modules
    if side == "quantizer":
        return f"quantize.{_quantizer_name(tuple(inner), quantizer)}"
    leaf = _LEAVES[inner[-1]]
    if inner[0] in ("quant_conv", "post_quant_conv"):
        return f"{inner[0]}.{leaf}"
    inner[0] = re.sub(r"^mid_", "mid.", inner[0])
    inner[0] = re.sub(r"^(down|up)_(\d+)_(block|attn)_(\d+)$", r"\1.\2.\3.\4", inner[0])
    inner[0] = re.sub(r"^(down|up)_(\d+)_(\w+sample)$", r"\1.\2.\3.conv", inner[0])
    return ".".join([side, *inner[:-1], leaf])


def _original_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[-1] == "kernel":
        return (shape[-1], shape[-2], *shape[:-2])
    if path[-1] == "log_scale":
        return (1, *shape, 1, 1)
    return (1, *shape) if path[-1] in ("positions", "start_positions") else shape


def _to_ours(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    return np.moveaxis(array, (1, 0), (-2, -1)) if path[-1] == "kernel" else array


def _to_original(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return array
    # safetensors writes an array's memory as it lies, so a transposed view would be scrambled.
    return np.moveaxis(array, (-1, -2), (0, 1)).copy(order="C")


def _buffers(module: VAR) -> dict[str, np.ndarray]:
    """Tensors of the original that its configuration determines."""
    counts = [end - start for start, end in scale_bounds(module.patch_nums)]
    mask = block_causal_mask(module.patch_nums)
    buffers = {
        "lvl_1L": np.repeat(np.arange(len(counts)), counts)[None],
        "attn_bias_for_masking": np.where(mask, 0, -np.inf).astype(np.float32)[None, None],
    }
    zeros = np.zeros(module.width, np.float32)
    return buffers | {f"blocks.{i}.attn.zero_k_bias": zeros for i in range(module.depth)}


def _without_buffers(arrays: dict[str, np.ndarray], module: VAR) -> dict[str, np.ndarray]:
    """Compare and remove the tensors that the configuration determines."""
    buffers = _buffers(module)
    for name in buffers.keys() & arrays.keys():
        if not np.array_equal(arrays[name], buffers[name]):
            raise ValueError(f"{name} differs from what the config's patch_nums and width give.")
    return {name: array for name, array in arrays.items() if name not in buffers}


def _without_prefix(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    short = {name.removeprefix(prefix): array for name, array in arrays.items()}
    if len(short) < len(arrays):
        raise ValueError(f"state_dict has names both with and without {prefix!r}.")
    return short


def _stacked(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with the blocks stacked, as `VAR(scan=True)` has them."""
    blocks = [params[f"block_{i}"] for i in range(sum(n.startswith("block_") for n in params))]
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
    return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
