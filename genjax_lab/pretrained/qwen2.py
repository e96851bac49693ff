"""Models of Qwen2's kind (arXiv 2407.10671, 2412.15115), read and written as Hugging Face does.

    network, variables = qwen2.load("Qwen2.5-Math-1.5B")          # a directory
    qwen2.save("trained", network, variables, dtype="bfloat16", config=qwen2.read_config(...))

Qwen2, Qwen2.5 and their mathematical and distilled relatives have biases in queries, keys and
values; models of Llama's kind, the same without them, are read and written, too. Every number comes
from config.json. Rotations that are scaled for long contexts, sliding windows and quantised weights
are refused. `abstract` tells the shapes of any size without making it.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from genjax_lab.networks.decoder import Decoder
from genjax_lab.pretrained import decoder_weights
from genjax_lab.pretrained.decoder_weights import Names
from genjax_lab.pretrained.model_directory import (
    Weights,
    one_of,
    positive_integer,
    positive_number,
    read_config,
    write_model,
)

__all__ = ["abstract", "from_config", "load", "read_config", "save"]

_NAMES = Names(
    embedding="model.embed_tokens.weight",
    norm="model.norm.weight",
    head="lm_head.weight",
    block="model.layers.{}",
    layers={
        "norm_attention": "input_layernorm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "norm_mlp": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
)
# What may be asked for and our network has not: the only values that fit, where they are given.
_FIXED = {
    "use_sliding_window": (False,),
    "rope_scaling": (None, {"type": "default"}, {"rope_type": "default"}),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
}
_FIXED_OF_LLAMA = {"attention_bias": (False,), "mlp_bias": (False,)}


def from_config(
    config: Mapping[str, Any], *, scan: bool = False, dtype: DTypeLike = jnp.float32
) -> Decoder:
    """The network that a config.json describes.

    Raises:
        ValueError: if a field is missing, out of range, or asks for what the network has not; the
            message names it.
    """
    kind = one_of(config, "model_type", ("qwen2", "llama"))
    one_of(config, "hidden_act", ("silu",))
    for name, values in (_FIXED | (_FIXED_OF_LLAMA if kind == "llama" else {})).items():
        if name in config:
            one_of(config, name, values)
    layers = config.get("layer_types") or []
    if any(layer != "full_attention" for layer in layers):
        raise ValueError(f"config['layer_types'] must all be 'full_attention', got {layers!r}.")
    num_heads = positive_integer(config, "num_attention_heads")
    width = positive_integer(config, "hidden_size")
    if config.get("head_dim") is None and width % num_heads:
        raise ValueError(
            f"config['num_attention_heads'] is {num_heads}; it must divide hidden_size {width} "
            "where there is no head_dim."
        )
    head_dim = positive_integer(config, "head_dim", width // num_heads)
    return Decoder(
        vocab_size=positive_integer(config, "vocab_size"),
        width=width,
        depth=positive_integer(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=positive_integer(config, "num_key_value_heads", num_heads),
        mlp_width=positive_integer(config, "intermediate_size"),
        head_dim=None if head_dim * num_heads == width else head_dim,
        rope_theta=_rope_theta(config),
        norm_eps=positive_number(config, "rms_norm_eps"),
        qkv_bias=kind == "qwen2",
        tied=one_of({"tie_word_embeddings": False, **config}, "tie_word_embeddings", (True, False)),
        scan=scan,
        dtype=dtype,
    )


def abstract(
    config: Mapping[str, Any] | str | os.PathLike,
    *,
    scan: bool = False,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> tuple[Decoder, PyTree]:
    """The network and the shapes of its variables, which are not made.

    Args:
        config: what config.json holds, or a directory with one.
        scan, dtype, param_dtype: as of `load`.

    Raises:
        ValueError: as `from_config`.
    """
    if isinstance(config, str | os.PathLike):
        config = read_config(config)
    network = from_config(config, scan=scan, dtype=dtype)
    return network, decoder_weights.abstract_variables(network, param_dtype)


def load(
    directory: str | os.PathLike,
    *,
    scan: bool = False,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    """The network of a directory and its variables.

    Args:
        directory: with config.json and model.safetensors, or shards and their index.
        scan: whether the blocks are stacked, see `networks.Decoder`.
        dtype: of the computation.
        param_dtype: of the variables, which are read from float32, float16 or bfloat16.
        mesh: where the variables are put, sharded as `parallel.parameter_shardings` says, each
            tensor before the next is read.

    Raises:
        ValueError: if a field of the configuration does not fit, see `from_config`; if files are
            damaged, missing or disagree; if tensors are missing, too many, of wrong shape or type,
            or not finite.
    """
    network = from_config(read_config(directory), scan=scan, dtype=dtype)
    weights = Weights(directory)
    return network, decoder_weights.load_variables(
        network, _NAMES, weights, param_dtype=param_dtype, mesh=mesh
    )


def save(
    directory: str | os.PathLike,
    network: Decoder,
    variables: Mapping[str, Any],
    *,
    dtype: str | None = None,
    max_shard_bytes: float = 5e9,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a directory that `load` and transformers' AutoModelForCausalLM read.

    Args:
        directory: is made if it is missing; other files in it stay.
        network: causal, without a mask.
        variables: its variables.
        dtype: "float32", "bfloat16" or "float16"; that of the variables if None.
        max_shard_bytes: of a file.
        config: further fields of config.json, such as "eos_token_id", "max_position_embeddings" or
            all of the model's that this one was trained from.
        overwrite: whether a model that is in the directory is replaced.

    Raises:
        ValueError: if the network is of another kind or the variables are not its; if `config` says
            otherwise than the network; if numbers are not finite; if there is a model already.
    """
    if not network.causal or network.with_mask:
        raise ValueError("network must be causal and without a mask to be of Qwen2's kind.")
    if dtype is not None and dtype not in decoder_weights.DTYPES:
        raise ValueError(f"dtype must be None or in {decoder_weights.DTYPES}, got {dtype!r}.")
    tensors = decoder_weights.original_tensors(network, _NAMES, variables, dtype)
    written = str(jnp.result_type(*(tensor.dtype for tensor in tensors.values())))
    fields = _to_config(network, written)
    extra = dict(config or {})
    extra.pop("dtype", None)  # the newer name of torch_dtype
    for name in fields.keys() & extra.keys() - {"torch_dtype", "max_position_embeddings"}:
        if not _agree(extra[name], fields[name]):
            raise ValueError(
                f"config[{name!r}] is {extra[name]!r}, but the network's is {fields[name]!r}."
            )
    fields |= {k: v for k, v in extra.items() if k not in fields or k == "max_position_embeddings"}
    from_config(fields)  # whatever else the configuration says must not change the network
    write_model(directory, fields, tensors, max_shard_bytes=max_shard_bytes, overwrite=overwrite)


def _to_config(network: Decoder, dtype: str) -> dict[str, Any]:
    kind = "qwen2" if network.qkv_bias else "llama"
    config = {
        "architectures": ["Qwen2ForCausalLM" if network.qkv_bias else "LlamaForCausalLM"],
        "model_type": kind,
        "vocab_size": network.vocab_size,
        "hidden_size": network.width,
        "num_hidden_layers": network.depth,
        "num_attention_heads": network.num_heads,
        "num_key_value_heads": network.num_kv_heads,
        "head_dim": network.head_dim or network.width // network.num_heads,
        "intermediate_size": network.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": network.norm_eps,
        # The first is read by versions of transformers before 5, the second by later ones.
        "rope_theta": network.rope_theta,
        "rope_parameters": {"rope_theta": network.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": network.tied,
        "torch_dtype": dtype,
        "max_position_embeddings": 32768,
    }
    if kind == "llama":
        return config | {"attention_bias": False, "mlp_bias": False}
    return config | {"use_sliding_window": False}


def _agree(given: Any, own: Any) -> bool:
    """Whether a field says the same; one that is None says nothing."""
    if isinstance(given, dict) and isinstance(own, dict):
        return all(_agree(given[name], own.get(name)) for name in given)
    return given is None or given == own


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotations, from either style."""
    parameters = config.get("rope_parameters")
    if parameters is None:
        return positive_number(config, "rope_theta")
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config['rope_parameters'] must be an object, got {parameters!r}.")
    one_of({"rope_type": "default", **parameters}, "rope_type", ("default",))
    allowed = {"rope_type": None, "rope_theta": None, "type": ("default",)}
    allowed["partial_rotary_factor"] = (None, 1.0)
    for name in parameters:
        if name not in allowed:
            raise ValueError(f"config['rope_parameters'] has {name!r}, which is not understood.")
        if allowed[name] is not None:
            one_of(parameters, name, allowed[name])
    if "rope_theta" not in parameters:
        return positive_number(config, "rope_theta")
    theta = positive_number(parameters, "rope_theta")
    if config.get("rope_theta", theta) != theta:
        raise ValueError(
            f"config['rope_theta'] is {config['rope_theta']!r}, and {theta!r} in rope_parameters."
        )
    return theta
