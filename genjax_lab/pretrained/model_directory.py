"""Directories of models as Hugging Face lays them out: config.json, and safetensors beside it.

Weights are one file, `model.safetensors`, or shards that `model.safetensors.index.json` lists.
Reading looks at the headers of all files first and then gives one tensor at a time; writing holds
one shard at a time, under temporary names until all are complete. While files change their names
there is no config.json, so that a directory is never read half old, half new.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from jax.typing import DTypeLike
from safetensors.numpy import save_file

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$")  # computed, not learned


class Tensor(NamedTuple):
    """A tensor that is to be written, which is made when its turn comes."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    make: Callable[[], np.ndarray]


class Weights:
    """The tensors of a directory.

    Attributes:
        shapes: of all, by name, but for buffers of rotations, which are ignored.
    """

    def __init__(self, directory: str | os.PathLike):
        """Looks at all files; ValueError if they are damaged or do not belong together."""
        directory = Path(directory)
        listed = _listed(directory)
        self._archives = {}
        self._home: dict[str, str] = {}
        for file in sorted(set(listed.values())) or [_SINGLE]:
            archive = _opened(directory / file)
            self._archives[file] = archive
            for name in archive.keys():  # noqa: SIM118
                if name in self._home:
                    raise ValueError(f"{name} is in two files, {self._home[name]} and {file}.")
                self._home[name] = file
        if listed and listed != self._home:
            wrong = sorted(set(listed.items()) ^ set(self._home.items()))
            raise ValueError(
                f"{_INDEX} and the shards disagree about {wrong[0][0]} and {len(wrong) - 1} others."
            )
        self.shapes = {
            name: tuple(self._archives[file].get_slice(name).get_shape())
            for name, file in self._home.items()
            if not _BUFFERS.search(name)
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor; ValueError if it is of a type that NumPy and JAX do not know."""
        try:
            return self._archives[self._home[name]].get_tensor(name)
        except Exception as error:  # whatever a parser says of foreign bytes
            raise ValueError(f"{name} in {self._home[name]} cannot be read: {error}") from error


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The configuration; ValueError if there is none, or it is not a JSON object."""
    return _read_json(Path(directory) / _CONFIG)


def positive_integer(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A field that is a positive integer; ValueError if it is not, or missing without default."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ValueError(f"config[{name!r}] must be a positive integer, got {value!r}.")
    return value


def positive_number(config: Mapping[str, Any], name: str) -> float:
    """A field that is a positive number; ValueError if it is not, or missing."""
    value = config.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < np.finfo(np.float32).max or not math.isfinite(value):
        raise ValueError(f"config[{name!r}] must be a positive number, got {value!r}.")
    return float(value)


def one_of(config: Mapping[str, Any], name: str, values: tuple[Any, ...]) -> Any:
    """A field that has one of some values; ValueError if it has not."""
    value = config.get(name)
    if not any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in values
    ):
        raise ValueError(f"config[{name!r}] must be in {list(values)}, got {value!r}.")
    return value


def write_model(
    directory: str | os.PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Writes config.json and weights.

    Args:
        directory: is made if it is missing; other files in it stay.
        config: of JSON's types.
        tensors: by name.
        max_shard_bytes: if there is more, it is written in shards; a larger tensor has its own.
        overwrite: whether weights and configuration that are there are replaced.

    Raises:
        ValueError: if the directory holds a model and `overwrite` is False, or a number is out of
            range.
    """
    if not max_shard_bytes >= 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1.")
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory is {str(directory)!r}, a file.")
    patterns = (_CONFIG, "*.safetensors", "*.safetensors.index.json", "*.bin")
    old = [path for pattern in patterns for path in directory.glob(pattern)]
    if old and not overwrite:
        raise ValueError(
            f"{str(directory)!r} holds {old[0].name} already; overwrite=True replaces it."
        )
    text = json.dumps(dict(config), indent=2, sort_keys=True)
    directory.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}

    def temporary(file: str) -> Path:
        written[file] = directory / f".{file}.{os.getpid()}.writing"
        return written[file]

    try:
        _write_weights(tensors, max_shard_bytes, temporary)
        temporary(_CONFIG).write_text(text + "\n")
        _replace(directory, written)
    finally:
        for path in written.values():
            path.unlink(missing_ok=True)


def _write_weights(tensors: Mapping[str, Tensor], max_shard_bytes: float, temporary) -> None:
    shards: list[list[str]] = [[]]
    filled, total = 0, 0
    for name, tensor in tensors.items():
        size = int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    home = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else _SINGLE
        # safetensors writes an array's memory as it lies, so a transposed view would be scrambled.
        arrays = {name: np.ascontiguousarray(tensors[name].make()) for name in names}
        save_file(arrays, temporary(file), metadata={"format": "pt"})
        home |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": home}
        temporary(_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _replace(directory: Path, written: Mapping[str, Path]) -> None:
    """Removes the old model and gives the new one its names, config.json first and last."""
    for path in written.values():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for pattern in (_CONFIG, _INDEX, "model*.safetensors"):
        for path in directory.glob(pattern):
            path.unlink()
    for file, path in written.items():
        os.replace(path, directory / file)


def _listed(directory: Path) -> dict[str, str]:
    """File of every tensor according to the index; empty if there is one file and no index."""
    single, index = (directory / _SINGLE).exists(), directory / _INDEX
    if single == index.exists():
        found = "both" if single else "neither"
        raise ValueError(
            f"{str(directory)!r} must hold either {_SINGLE} or {_INDEX}, holds {found}."
        )
    if single:
        return {}
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{str(index)!r} has no 'weight_map' from names to files.")
    for name, file in listed.items():
        # A name with a directory in it could be anywhere; the file itself may be a link.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise ValueError(f"{_INDEX} says that {name} is in {file!r}, no file of the directory.")
        if not file.endswith(".safetensors") or not (directory / file).is_file():
            raise ValueError(
                f"{_INDEX} says that {name} is in {file!r}, which is missing or holds no weights."
            )
    return listed


def _opened(path: Path):
    try:
        return safetensors.safe_open(path, framework="numpy")
    except Exception as error:  # whatever a parser says of foreign bytes, it is the file's fault
        raise ValueError(f"{str(path)!r} is no intact safetensors file: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} must be a JSON object, is a {type(value).__name__}.")
    return value
