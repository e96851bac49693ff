"""Arrays come out of pickles, and nothing that a pickle asks for is executed."""

import collections
import io
import os
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.pretrained import load_arrays, unpickle

ARRAYS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "big endian": np.arange(3, dtype=">i4"),
    "flags": np.array([True, False]),
    "nothing": np.zeros((0, 2), np.float16),
    "scalar": np.float64(2.5),
}


def write_zip(path, program, storages=(), **records):
    """A file of PyTorch's zip format around a pickle program and raw storages."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for key, data in enumerate(storages):
            archive.writestr(f"archive/data/{key}", data)
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return path


def tensor_program(size, stride, offset=0, count=6, storage="FloatStorage", key="0"):
    """The pickle that PyTorch writes for one tensor."""

    def value(item):
        if isinstance(item, tuple):
            return b"(" + b"".join(map(value, item)) + b"t"
        if isinstance(item, str):
            return b"X" + len(item).to_bytes(4, "little") + item.encode()
        return f"I{item}\n".encode()

    kind = f"ctorch\n{storage}\n".encode()
    reference = b"(" + value("storage") + kind + value(key) + value("cpu") + value(count) + b"tQ"
    arguments = reference + value(offset) + value(size) + value(stride)
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + hooks + b"tR."


STORAGE = np.arange(6, dtype=np.float32).tobytes()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_arrays_come_back_under_every_protocol(protocol, tmp_path):
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps(ARRAYS, protocol))
    loaded = load_arrays(path)
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == np.asarray(array).dtype.newbyteorder("=")
        assert loaded[name].flags.writeable


def test_containers_give_names(tmp_path):
    content = collections.OrderedDict(
        model={"blocks": [{"w": np.ones(2)}, (np.zeros(1),)]}, epoch=3, note="text", extra=None
    )
    path = tmp_path / "nested.pkl"
    path.write_bytes(pickle.dumps(content))
    loaded = load_arrays(path)
    assert list(loaded) == ["model.blocks.0.w", "model.blocks.1.0", "epoch", "note"]
    assert loaded["epoch"] == 3
    assert loaded["note"] == "text"


def test_a_strided_view_of_a_storage_is_rebuilt(tmp_path):
    path = write_zip(tmp_path / "a.pth", tensor_program((2, 2), (1, 3), offset=1), [STORAGE])
    np.testing.assert_array_equal(load_arrays(path)[""], [[1, 4], [2, 5]])


@pytest.mark.oracle
def test_files_that_pytorch_writes_are_read(tmp_path):
    torch = pytest.importorskip("torch", reason="run `make oracles` for comparisons with PyTorch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    tensors = {
        "half": torch.randn(3).half(),
        "double": torch.randn(2, 2).double(),
        "byte": torch.arange(5, dtype=torch.uint8),
        "flag": torch.tensor([True]),
        "complex": torch.randn(2, dtype=torch.complex64),
        "view": torch.arange(12.0).reshape(3, 4)[1:, ::2].T,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    shared = torch.arange(4.0)
    content = {"net": net.state_dict(), "all": tensors, "pair": [shared[:2], shared[2:]]}
    content["size"] = torch.Size([2, 3])
    content["narrow"] = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)

    loaded = load_arrays(path)
    expected = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    expected |= {f"all.{name}": tensor.detach() for name, tensor in tensors.items()}
    expected |= {"pair.0": shared[:2], "pair.1": shared[2:]}
    for name, tensor in expected.items():
        np.testing.assert_array_equal(loaded.pop(name), tensor.numpy(), strict=True)
    assert loaded.pop("narrow").dtype == jnp.bfloat16
    assert {name: int(value) for name, value in loaded.items()} == {"size.0": 2, "size.1": 3}


@pytest.mark.oracle
def test_formats_and_tensors_that_are_not_read_are_named(tmp_path):
    torch = pytest.importorskip("torch", reason="run `make oracles` for comparisons with PyTorch")
    path = tmp_path / "old.pth"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old\.pth.*before 1\.6"):
        load_arrays(path)
    torch.save({"w": torch.ones(2).to_sparse()}, path)
    with pytest.raises(ValueError, match="_rebuild_sparse_tensor"):
        load_arrays(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="Linear"):
        load_arrays(path)


class Run:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("wrap", ["plain", "zip", "inside an array's place"])
@pytest.mark.parametrize("function", [os.system, eval, getattr, io.open, np.load, exec])
def test_a_hostile_pickle_is_refused_and_not_run(function, wrap, tmp_path):
    marker = tmp_path / "executed"
    arguments = {
        os.system: (f"touch {marker}",),
        io.open: (str(marker), "w"),
        getattr: ("text", "format"),
        np.load: (str(marker),),
    }.get(function, (f"open({str(marker)!r}, 'w')",))
    path = tmp_path / "hostile.pth"
    program = pickle.dumps({"weight": np.ones(2), "bad": Run(function, *arguments)}, protocol=2)
    if wrap == "plain":
        path.write_bytes(program)
    elif wrap == "zip":
        write_zip(path, program)
    else:
        path.write_bytes(pickle.dumps(Run(np.dtype, Run(function, *arguments)), protocol=2))
    with pytest.raises(ValueError, match=r"hostile\.pth.*neither an array nor a container"):
        load_arrays(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02ccollections\nOrderedDict\n(N}X\x08\x00\x00\x00functionNstb.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n}X\x08\x00\x00\x00functionNsb.",
        b"\x80\x02ctorch\nFloatStorage\n}X\x04\x00\x00\x00nameX\x01\x00\x00\x00asb.",
    ],
)
def test_a_pickle_cannot_set_attributes_of_what_it_names(program, tmp_path):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(program)
    with pytest.raises(ValueError, match="the file tries to change"):
        load_arrays(path)


@pytest.mark.parametrize(
    "program",
    [
        # Instantiates an admitted name as if it were a class.
        b"\x80\x02cnumpy\nndarray\n)\x81.",
        b"\x80\x02cnumpy\nndarray\n)R.",
        # A module's attribute reached through a dotted name.
        b"\x80\x04\x8c\x0bcollections\x8c\x0fOrderedDict.get\x93.",
        # A list that contains itself.
        b"\x80\x02]q\x00h\x00a.",
        # An array whose state never came.
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.",
        # Bytes, and the mere name of a storage.
        b"\x80\x04C\x01a.",
        b"\x80\x02ctorch\nFloatStorage\n.",
    ],
)
def test_other_tricks_are_refused(program, tmp_path):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(program)
    with pytest.raises(ValueError, match=r"hostile\.pkl"):
        load_arrays(path)


def test_a_rebuilt_tensor_does_not_take_numpys_state(tmp_path):
    state = b"(K\x01(K\x7ftcnumpy\ndtype\n(X\x02\x00\x00\x00f8\x89\x88tR\x89C\x01atb."
    program = tensor_program((6,), (1,))[:-1] + state
    path = write_zip(tmp_path / "a.pth", program, [STORAGE])
    with pytest.raises(ValueError, match=r"a\.pth"):
        load_arrays(path)


def test_containers_that_multiply_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickle, "_MAX_ITEMS", 10_000)  # saves seconds
    content = [np.ones(1)]
    for _ in range(40):
        content = [content, content]
    path = tmp_path / "bomb.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="more than 10000 items"):
        load_arrays(path)


@pytest.mark.parametrize("content", [{"a": {"b": 1}, "a.b": 2}, {1.5: 2}, {"a": {1}}, {"a": 2**70}])
def test_content_without_unique_names_or_numbers_is_refused(content, tmp_path):
    path = tmp_path / "odd.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"odd\.pkl"):
        load_arrays(path)


@pytest.mark.parametrize("array", [np.array([{}], object), np.zeros(2, "f4,f4"), np.array(["a"])])
def test_numpy_arrays_of_anything_but_numbers_are_refused(array, tmp_path):
    path = tmp_path / "objects.pkl"
    path.write_bytes(pickle.dumps(array))
    with pytest.raises(ValueError, match=r"objects\.pkl.*number"):
        load_arrays(path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": (2, 4), "stride": (4, 1)},
        {"size": (6,), "stride": (1,), "offset": 1},
        {"size": (2,), "stride": (-1,), "offset": 1},
        {"size": (2,), "stride": (1,), "offset": -1},
        {"size": (10**9,), "stride": (0,)},
        {"size": (2, 2), "stride": (1,)},
        {"size": (6,), "stride": (1,), "count": 7},
        {"size": (6,), "stride": (1,), "storage": "QuantStorage"},
        {"size": (6,), "stride": (1,), "key": "../data.pkl"},
    ],
)
def test_tensors_that_leave_their_storage_are_refused(arguments, tmp_path):
    path = write_zip(tmp_path / "a.pth", tensor_program(**arguments), [STORAGE])
    with pytest.raises(ValueError, match=r"a\.pth"):
        load_arrays(path)


def test_a_numpy_array_may_not_claim_more_than_its_bytes(tmp_path):
    path = tmp_path / "a.pkl"
    program = pickle.dumps(np.arange(6, dtype=np.uint8).reshape(2, 3), protocol=2)
    assert program.count(b"K\x02K\x03\x86") == 1
    path.write_bytes(program.replace(b"K\x02K\x03\x86", b"K\x7fK\x7f\x86"))
    with pytest.raises(ValueError, match="6 bytes where 16129 numbers"):
        load_arrays(path)


def test_big_endian_and_compressed_zip_files_are_refused(tmp_path):
    program = tensor_program((6,), (1,))
    path = write_zip(tmp_path / "a.pth", program, [STORAGE], byteorder=b"big")
    with pytest.raises(ValueError, match="big-endian"):
        load_arrays(path)
    np.savez(tmp_path / "b.npz", a=np.ones(2))
    with pytest.raises(ValueError, match=r"numpy\.load"):
        load_arrays(tmp_path / "b.npz")
    with zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(ValueError, match="compressed"):
        load_arrays(tmp_path / "c.pth")


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "short.pth"
    contents = [
        pickle.dumps(ARRAYS),
        write_zip(path, tensor_program((6,), (1,)), [STORAGE]).read_bytes(),
    ]
    for content in contents:
        for length in range(len(content)):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match=r"short\.pth"):
                load_arrays(path)
    path.write_bytes(contents[0] + b"\x00")
    with pytest.raises(ValueError, match="after the pickle's end"):
        load_arrays(path)


def test_a_flipped_bit_in_a_storage_is_noticed(tmp_path):
    path = write_zip(tmp_path / "a.pth", tensor_program((6,), (1,)), [STORAGE])
    content = bytearray(path.read_bytes())
    content[content.index(STORAGE) + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="CRC"):
        load_arrays(path)


def test_a_missing_file_is_reported_as_such(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "missing.pth")
