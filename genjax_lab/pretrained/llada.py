"""LLaDA (arXiv 2502.09992): a decoder that is not causal and predicts masked tokens.

    network, variables, mask_token_id = llada.load("LLaDA-8B-Base")
    denoiser = samplers.token_denoiser(network.apply, variables, network.vocab_size)
    denoiser = samplers.suppress_tokens(denoiser, [mask_token_id])

In the published vocabulary the mask is a token among the others. Here the mask is token V behind V
tokens, so the embedding gets a row V, a copy of the published mask's; tokens keep their numbers.
The published mask stays a token whose logits mean nothing: suppress it, as above, before anything
is drawn.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from genjax_lab.networks.decoder import Decoder
from genjax_lab.pretrained import decoder_weights
from genjax_lab.pretrained.decoder_weights import Names
from genjax_lab.pretrained.model_directory import (
    Weights,
    one_of,
    positive_integer,
    positive_number,
    read_config,
)

__all__ = ["from_config", "load", "read_config"]

_NAMES = Names(
    embedding="model.transformer.wte.weight",
    norm="model.transformer.ln_f.weight",
    head="model.transformer.ff_out.weight",
    block="model.transformer.blocks.{}",
    layers={
        "norm_attention": "attn_norm",
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "out": "attn_out",
        "norm_mlp": "ff_norm",
        "gate": "ff_proj",
        "up": "up_proj",
        "down": "ff_out",
    },
)
_REQUIRED = {
    "model_type": "llada",
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
}
# What may be asked for and our network has not: the only values that fit, where they are given.
_FIXED = {
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "clip_qkv": None,
    "include_bias": False,
    "input_emb_norm": False,
    "layer_norm_with_affine": True,
    "quantization_config": None,
    "rope_scaling": None,
    "scale_logits": False,
}


def from_config(
    config: Mapping[str, Any], *, scan: bool = False, dtype: DTypeLike = jnp.float32
) -> tuple[Decoder, int]:
    """The network that a config.json describes, and the number of the published mask.

    Raises:
        ValueError: if a field is missing, out of range, or asks for what the network has not; the
            message names it.
    """
    for name, value in _REQUIRED.items():
        one_of(config, name, (value,))
    for name, value in _FIXED.items():
        if config.get(name) is not None:
            one_of(config, name, (value,))
    num_heads = positive_integer(config, "n_heads")
    width = positive_integer(config, "d_model")
    if width % (2 * num_heads):
        raise ValueError(
            f"config['n_heads'] is {num_heads}; twice that must divide d_model {width}."
        )
    shared = bool(config.get("multi_query_attention"))
    # Rows of the embedding, where there are more than tokens.
    rows = positive_integer(config, "embedding_size", positive_integer(config, "vocab_size"))
    mask_token_id = config.get("mask_token_id")
    if type(mask_token_id) is not int or not 0 <= mask_token_id < rows:
        raise ValueError(f"config['mask_token_id'] must be in [0, {rows}), got {mask_token_id!r}.")
    mlp_width = config.get("mlp_hidden_size")
    if mlp_width is None:
        mlp_width = positive_integer(config, "mlp_ratio") * width
    else:
        mlp_width = positive_integer(config, "mlp_hidden_size")
    network = Decoder(
        vocab_size=rows,
        width=width,
        depth=positive_integer(config, "n_layers"),
        num_heads=num_heads,
        num_kv_heads=positive_integer(config, "n_kv_heads", 1 if shared else num_heads),
        mlp_width=mlp_width,
        rope_theta=positive_number(config, "rope_theta"),
        norm_eps=positive_number(config, "rms_norm_eps"),
        qkv_bias=one_of({"include_qkv_bias": False, **config}, "include_qkv_bias", (True, False)),
        tied=one_of(config, "weight_tying", (True, False)),
        causal=False,
        with_mask=True,
        scan=scan,
        dtype=dtype,
    )
    return network, mask_token_id


def load(
    directory: str | os.PathLike,
    *,
    scan: bool = False,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> tuple[Decoder, dict[str, Any], int]:
    """The network of a directory, its variables, and the number of the published mask.

    Args:
        directory: with config.json and model.safetensors, or shards and their index.
        scan, dtype, param_dtype, mesh: as of `qwen2.load`.

    Returns:
        (network, variables, mask_token_id). The mask is token `network.vocab_size`; never draw
        `mask_token_id`, see `samplers.suppress_tokens`.

    Raises:
        ValueError: as `qwen2.load`.
    """
    network, mask_token_id = from_config(read_config(directory), scan=scan, dtype=dtype)
    variables = decoder_weights.load_variables(
        network,
        _NAMES,
        Weights(directory),
        param_dtype=param_dtype,
        mesh=mesh,
        mask_token_id=mask_token_id,
    )
    return network, variables, mask_token_id
