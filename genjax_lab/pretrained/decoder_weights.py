"""Tensors of published decoders and the variables of `networks.Decoder`, one tensor at a time.

Linear layers turn from [out, in] to [in, out], and blocks are stacked where the network has them in
a scan; nothing else changes. Every array is read, checked and put into its place, also on a mesh,
before the next is read: beside the model itself there is room for one tensor of it, or for one kind
of tensor of all blocks where they are stacked.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from genjax_lab.networks.decoder import Decoder
from genjax_lab.parallel import parameter_shardings
from genjax_lab.pretrained.edm import check_arrays, check_names
from genjax_lab.pretrained.model_directory import Tensor, Weights

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
DTYPES = ("float32", "bfloat16", "float16")


class Names(NamedTuple):
    """What a published format calls the layers.

    Attributes:
        embedding, norm, head: names of these tensors.
        block: what the names in a block begin with; {} is its number.
        layers: names in a block, by ours.
    """

    embedding: str
    norm: str
    head: str
    block: str
    layers: Mapping[str, str]


class _Leaf(NamedTuple):
    path: tuple[str, ...]  # in our tree, without "params"
    shape: tuple[int, ...]  # there
    names: tuple[str, ...]  # one, or one for each block
    stacked: bool
    original_shape: tuple[int, ...]  # of a tensor


def abstract_variables(network: Decoder, param_dtype: DTypeLike = jnp.float32) -> PyTree:
    """Shapes of the variables; the time that this takes does not grow with the depth."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(network.clone(scan=True).init, jax.random.key(0), tokens)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, param_dtype), shapes["params"])
    if not network.scan:
        block = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], param_dtype), params.pop("blocks")
        )
        params |= {f"block_{i}": jax.tree.map(lambda x: x, block) for i in range(network.depth)}
    return {"params": params}


def load_variables(
    network: Decoder,
    names: Names,
    weights: Weights,
    *,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    mask_token_id: int | None = None,
) -> dict[str, Any]:
    """Variables of the network.

    Args:
        network: the network, with the embedding's row of the mask if `mask_token_id` is given.
        names: of the format.
        weights: the tensors.
        param_dtype: of the variables.
        mesh: shards them as `parallel.parameter_shardings` says.
        mask_token_id: the row of the published embedding that is also our row of the mask.

    Raises:
        ValueError: if names or shapes are not those of the network, with a list of differences; if
            a number is not finite or a type none of `DTYPES`; if there is a last layer although it
            is the embedding, and differs from it.
    """
    if str(jnp.dtype(param_dtype)) not in DTYPES:
        raise ValueError(f"param_dtype must be in {DTYPES}, got {jnp.dtype(param_dtype)}.")
    if network.depth > len(weights.shapes):
        raise ValueError(f"{network.depth} blocks cannot be in {len(weights.shapes)} tensors.")
    abstract = abstract_variables(network, param_dtype)["params"]
    leaves = list(_leaves(network, names, abstract))
    expected = {name: leaf.original_shape for leaf in leaves for name in leaf.names}
    if network.tied and names.head in weights.shapes:
        expected[names.head] = expected[names.embedding]
    check_names(weights.shapes, expected)

    def read(name: str) -> np.ndarray:
        array = weights.read(name)
        check_arrays({name: array}, {name: expected[name]})
        with np.errstate(over="ignore"):
            result = array.astype(param_dtype, copy=False)
        if result.dtype != array.dtype and not np.isfinite(result).all():
            raise ValueError(f"{name} has numbers that are too large for {result.dtype}.")
        return result

    shardings = {} if mesh is None else _flat(parameter_shardings(abstract, mesh))
    params = {}
    for leaf in leaves:
        if leaf.stacked:
            array = np.empty(leaf.shape, param_dtype)
            for layer, name in enumerate(leaf.names):
                array[layer] = _turned(leaf.path, read(name))
        else:
            array = _turned(leaf.path, read(leaf.names[0]))
        if leaf.path == ("embedding",):
            if network.tied and names.head in weights.shapes:
                _check_tied(names, array, read(names.head))
            if mask_token_id is not None:
                array = np.concatenate([array, array[mask_token_id][None]])
        params[leaf.path] = _placed(array, shardings.get(leaf.path))
        del array
    return {"params": flax.traverse_util.unflatten_dict(params)}


def original_tensors(
    network: Decoder, names: Names, variables: Mapping[str, Any], dtype: str | None
) -> dict[str, Tensor]:
    """The tensors of variables under the names of the format, in `dtype` or their own.

    Raises:
        ValueError: if the variables are not the network's, a type is none of `DTYPES`, or, when it
            is made, a tensor is not finite.
    """
    leaves = list(_leaves(network, names, abstract_variables(network)["params"]))
    params = _flat(variables["params"])
    check_names(
        {"/".join(path): leaf.shape for path, leaf in params.items()},
        {"/".join(leaf.path): leaf.shape for leaf in leaves},
    )
    tensors = {}
    for leaf in leaves:
        value = params[leaf.path]
        kind = str(value.dtype) if dtype is None else dtype
        if kind not in DTYPES:
            raise ValueError(f"{'/'.join(leaf.path)} cannot be written in {kind}, but in {DTYPES}.")
        for layer, name in enumerate(leaf.names):
            index = layer if leaf.stacked else ...
            make = lambda leaf=leaf, value=value, index=index, kind=kind, name=name: _made(  # noqa: E731
                name, _turned(leaf.path, np.asarray(value[index])), kind
            )
            tensors[name] = Tensor(leaf.original_shape, jnp.dtype(kind), make)
    return tensors


def _leaves(network: Decoder, names: Names, abstract: PyTree) -> Iterator[_Leaf]:
    whole = {"embedding": names.embedding, "norm": names.norm, "head": names.head}
    for path, leaf in _flat(abstract).items():
        first, *rest = path
        if first in whole:
            shape = leaf.shape
            if first == "embedding":
                shape = (network.vocab_size, network.width)
            yield _Leaf(path, leaf.shape, (whole[first],), False, _turned_shape(path, shape))
            continue
        name = f"{names.block}.{names.layers[rest[0]]}.{_LEAVES[rest[1]]}"
        stacked = first == "blocks"
        numbers = range(network.depth) if stacked else [first.removeprefix("block_")]
        shape = _turned_shape(path, leaf.shape[1:] if stacked else leaf.shape)
        yield _Leaf(path, leaf.shape, tuple(name.format(i) for i in numbers), stacked, shape)


def _flat(tree: PyTree) -> dict[tuple[str, ...], Any]:
    return flax.traverse_util.flatten_dict(tree)


def _is_linear(path: tuple[str, ...]) -> bool:
    return path[-1] in ("kernel", "head")


def _turned(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    return array.T if _is_linear(path) else array


def _turned_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[::-1]) if _is_linear(path) else tuple(shape)


def _made(name: str, array: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = array.astype(jnp.dtype(kind), copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"variables hold NaN or infinity in {name} as {kind}.")
    return array


def _check_tied(names: Names, embedding: np.ndarray, head: np.ndarray) -> None:
    if not np.array_equal(embedding, head):
        raise ValueError(
            f"{names.head} differs from {names.embedding}, but the configuration ties them."
        )


def _placed(array: np.ndarray, sharding) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
