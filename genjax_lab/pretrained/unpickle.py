"""Arrays out of pickles, and nothing else: no code of a file is ever called.

A pickle is a program that may call any importable function. `load_arrays` interprets the few calls
with which numpy arrays, PyTorch tensors and plain containers are written as descriptions of
arrays, checks them, and refuses every other name. It reads PyTorch's .pth files (zip format, since
PyTorch 1.6) and plain pickles of numpy arrays without PyTorch. The numpy calls are reinterpreted
too, because numpy's own trust the sizes that a pickle states.

Not read: PyTorch's older formats, tensors of quantised, sparse or float8 kinds, and checkpoints
that carry objects (EDM's and EDM2's are such: see `export_edm.md`).
"""

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

_STORAGE_DTYPES = {
    "BFloat16Storage": jnp.bfloat16,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ComplexDoubleStorage": np.complex128,
    "ComplexFloatStorage": np.complex64,
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "ShortStorage": np.int16,
}
_MAX_DEPTH = 64
_MAX_ITEMS = 1_000_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def load_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read all arrays of a PyTorch .pth file or a pickle of numpy arrays.

    Args:
        path: the file; its kind is told by its content.

    Returns:
        Arrays by name. Keys of nested dictionaries and positions in lists are joined by dots, such
        as "model.blocks.0.weight"; an array that stands alone has the name "". Numbers and strings
        become arrays without dimensions; None is left out, as an empty container is.

    Raises:
        ValueError: naming the file, if it asks for anything but arrays, is truncated or corrupted,
            or is neither of the two kinds. Nothing in the file has been executed then.
        FileNotFoundError: if there is no such file.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        content = _load_zip(path) if is_zip else _load_pickle(path)
        arrays: dict[str, np.ndarray] = {}
        for name, array in _named_arrays(content):
            if name in arrays:
                raise ValueError(f"two arrays have the name {name!r}")
            arrays[name] = array
    except Exception as error:  # a hostile file may make the parser raise anything
        raise ValueError(f"no arrays could be read from {path!r}: {error}") from error
    return arrays


def _load_zip(path: str) -> Any:
    """Interpret PyTorch's zip format: a pickle beside one raw file for each storage."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file without PyTorch's data.pkl; .npz is read by numpy.load")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("a compressed zip file, which PyTorch does not write")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        storages: dict[str, np.ndarray] = {}

        def load_storage(reference: Any) -> np.ndarray:
            kind, storage, key, _, count = reference
            if kind != "storage" or not isinstance(storage, _Name):
                raise ValueError(f"a persistent reference of unknown kind {kind!r}")
            if storage.name not in _STORAGE_DTYPES:
                raise ValueError(f"{storage} is no storage of numbers")
            if key not in storages:
                dtype = np.dtype(_STORAGE_DTYPES[storage.name])
                storages[key] = _from_bytes(archive.read(f"{root}data/{key}"), dtype, count)
            return storages[key]

        return _Unpickler(io.BytesIO(archive.read(pickles[0])), load_storage).load()


def _load_pickle(path: str) -> Any:
    """Interpret a plain pickle, which must end where the file ends."""

    def refuse(reference: Any) -> None:
        raise ValueError(f"a persistent reference {reference!r} outside a PyTorch file")

    with open(path, "rb") as file:
        content = _Unpickler(file, refuse).load()
        if isinstance(content, int) and content == _LEGACY_MAGIC:
            raise ValueError("PyTorch's format before 1.6; load and save it with a newer PyTorch")
        if file.read(1):
            raise ValueError("there are bytes after the pickle's end")
    return content


class _Name:
    """An admitted name that may be mentioned but not called, such as a storage type."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def __setstate__(self, state: Any) -> None:
        raise ValueError(f"the file tries to change {self}")


class _Call(_Name):
    """An admitted name whose call is interpreted by a function of ours."""

    __slots__ = ("function",)

    def __init__(self, module: str, name: str, function: Callable[..., Any]):
        super().__init__(module, name)
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class _Dict(dict):
    """What an OrderedDict becomes; its attributes (PyTorch's `_metadata`) are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype:
    """A numpy dtype in the making: numbers only."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *_: Any):
        if not isinstance(code, str) or np.dtype(code).kind not in "biufc":
            raise ValueError(f"a numpy dtype {code!r} that is not a number's")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        byteorder = state[1]
        if byteorder not in ("<", ">", "|", "="):
            raise ValueError(f"a numpy byte order {byteorder!r}")
        self.dtype = self.dtype.newbyteorder(byteorder)


class _Array:
    """A numpy array in the making: numpy pickles an empty one and then its state."""

    __slots__ = ("array",)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _Dtype):
            raise ValueError("a numpy array whose dtype is not a number's")
        self.array = _frombuffer(data, dtype, shape, "F" if is_fortran else "C")


class _Unpickler(pickle.Unpickler):
    """Interprets a pickle's names by `_admitted` and refuses all others."""

    def __init__(self, file: Any, load_storage: Callable[[Any], Any]):
        super().__init__(file)
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        return _admitted(module, name)

    def persistent_load(self, reference: Any) -> Any:
        return self._load_storage(reference)


def _admitted(module: str, name: str) -> _Name:
    """Stand-in for a name that a pickle mentions. Made anew each time: nothing is shared."""
    if (module, name) in _CALLS:
        return _Call(module, name, _CALLS[module, name])
    if (module, name) == ("numpy", "ndarray") or (
        module in ("torch", "torch.storage") and name.endswith("Storage")
    ):
        return _Name(module, name)
    raise ValueError(
        f"it asks for {module}.{name}, which is neither an array nor a container; it may contain "
        "code, and none of it was run"
    )


def _from_bytes(data: Any, dtype: np.dtype, count: Any) -> np.ndarray:
    if not isinstance(count, int) or count < 0 or len(data) != count * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes where {count} numbers of {dtype} were announced")
    return np.frombuffer(data, dtype)


def _frombuffer(data: Any, dtype: _Dtype, shape: Any, order: str) -> np.ndarray:
    """numpy's `_frombuffer`, with sizes checked."""
    if not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise ValueError("a numpy array whose content is not plain bytes")
    numbers = _from_bytes(data, dtype.dtype, math.prod(_sizes(shape)))
    return numbers.reshape(shape, order=order).astype(dtype.dtype.newbyteorder("="))


def _sizes(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"a shape {shape!r}")
    return shape


def _reconstruct(*_: Any) -> _Array:
    """numpy's call before an array's state, which alone decides what the array is."""
    return _Array()


def _scalar(dtype: _Dtype, data: bytes) -> np.ndarray:
    return _frombuffer(data, dtype, (), "C")


def _encode(text: str, encoding: str) -> bytes:
    """How old pickle protocols write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *_gradient: Any
) -> np.ndarray:
    """PyTorch's view of a storage, refused if it reaches beyond it."""
    if not isinstance(storage, np.ndarray):
        raise ValueError("a tensor without a storage")
    size, stride, (offset,) = _sizes(size), _sizes(stride), _sizes((offset,))
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= storage.size or count > storage.size):
        raise ValueError(f"a tensor {size} that reaches beyond its storage of {storage.size}")
    if not count:
        return np.zeros(size, storage.dtype)
    steps = tuple(step * storage.itemsize for step in stride)
    view = np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
    return view.copy()


def _empty_bytes() -> bytes:
    """How old pickle protocols write the content of an array without elements."""
    return b""


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("__builtin__", "bytes"): _empty_bytes,
    ("builtins", "bytes"): _empty_bytes,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _Dict,
    ("numpy", "dtype"): _Dtype,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
}
for _module in ("numpy.core", "numpy._core"):  # the name before and since numpy 2
    _CALLS[f"{_module}.multiarray", "_reconstruct"] = _reconstruct
    _CALLS[f"{_module}.multiarray", "scalar"] = _scalar
    _CALLS[f"{_module}.numeric", "_frombuffer"] = _frombuffer


def _named_arrays(content: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Walk through containers, in order, and yield every leaf with its name."""
    waiting = [((), content)]
    for _ in range(_MAX_ITEMS):
        if not waiting:
            return
        path, item = waiting.pop()
        if len(path) > _MAX_DEPTH:
            raise ValueError(f"containers are nested more than {_MAX_DEPTH} deep")
        if isinstance(item, dict):
            children = list(item.items())
        elif isinstance(item, list | tuple):
            children = list(enumerate(item))
        else:
            if item is not None:
                yield ".".join(path), _as_array(item)
            continue
        for key, _ in children:
            if not isinstance(key, str | int):
                raise ValueError(f"a dictionary key {key!r} that is neither string nor integer")
        waiting += [((*path, str(key)), child) for key, child in reversed(children)]
    raise ValueError(f"it has more than {_MAX_ITEMS} items")


def _as_array(leaf: Any) -> np.ndarray:
    if isinstance(leaf, _Array):
        leaf = leaf.array
    if isinstance(leaf, np.ndarray | bool | int | float | complex | str):
        array = np.asarray(leaf)
        if array.dtype != object:  # integers beyond 64 bits
            return array
    raise ValueError(f"it holds {leaf if isinstance(leaf, _Name) else type(leaf).__name__}")
