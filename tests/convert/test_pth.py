"""The checkpoint reader: right on what PyTorch writes, and refusing, unharmed, whatever else it is given."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import pickletools
import random
import re
import signal
import struct
import sys
import tracemalloc
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import mlx.core as mx
import numpy as np
import pytest
from helpers.golden_files import golden_case
from helpers.paths import DATA

from mlx_starflow.convert import pth, pth_pickle
from mlx_starflow.convert.pth import Checkpoint, read_checkpoint
from mlx_starflow.errors import StarflowError

GOLDEN = ("tarflow_vp", "t2i")
MLX_DTYPES = {name: mx.bool_ if name == "bool" else getattr(mx, name) for name in pth.NUMPY_DTYPES}

Records = list[tuple[str, bytes]]


# ---- files made by hand


def make_zip(records: Records, zip64: bool = False, claims: dict[str, int] | None = None, method: int = 0) -> bytes:
    """A zip laid out as PyTorch's writer does it: flag 8, sizes behind the data, storages at multiples of 64 bytes.

    `claims` overrides the sizes in the central directory.
    """
    body, directory = bytearray(), bytearray()
    for name, data in records:
        header, raw_name, crc = len(body), name.encode(), zlib.crc32(data)
        padding = -(header + 30 + len(raw_name) + 4) % 64
        body += struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0x808, method, 0, 0, 0, 0, 0, len(raw_name), padding + 4)
        body += raw_name + struct.pack("<2sH", b"FB", padding) + b"Z" * padding + data
        body += struct.pack("<4s3I", b"PK\7\x08", crc, len(data), len(data))
        size = (claims or {}).get(name, len(data))
        extra = struct.pack("<HH3Q", 1, 24, size, size, header) if zip64 else b""
        fields = (0xFFFFFFFF,) * 3 if zip64 else (size, size, header)
        directory += struct.pack("<4s6H3I", b"PK\1\2", 0, 0, 0x808, method, 0, 0, crc, *fields[:2])
        directory += struct.pack("<5H2I", len(raw_name), len(extra), 0, 0, 0, 0, fields[2]) + raw_name + extra
    start, end = len(body), len(body) + len(directory)
    count = len(records)
    if zip64:
        directory += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count, len(directory), start)
        directory += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    directory += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, end - start, start, 0)
    return bytes(body + directory)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def dict_of(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(key: str = "0", numel: int = 6, kind: str = "FloatStorage") -> bytes:
    return tuple_of(text("storage"), f"ctorch\n{kind}\n".encode(), text(key), text("cpu"), number(numel)) + b"Q"


ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def tensor(
    key: str = "0",
    numel: int = 6,
    kind: str = "FloatStorage",
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    more: bytes = b"",
) -> bytes:
    sizes = tuple_of(*map(number, shape)) + tuple_of(*map(number, strides))
    arguments = storage(key, numel, kind) + number(offset) + sizes + b"\x89" + ORDERED_DICT + more
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + tuple_of(arguments) + b"R"


SIX = np.arange(6, dtype="<f4").tobytes()


def file_of(body: bytes, storages: dict[str, bytes] | None = None, **options) -> bytes:
    """A checkpoint around a pickle's opcodes; six float32 as its storage "0" unless told otherwise."""
    storages = {"0": SIX} if storages is None else storages
    records = [("archive/data.pkl", b"\x80\x02" + body + b"."), ("archive/byteorder", b"little")]
    records += [(f"archive/data/{key}", data) for key, data in storages.items()]
    return make_zip([*records, ("archive/version", b"3\n")], **options)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Checkpoint]:
    def read(data: bytes) -> Checkpoint:
        path = tmp_path / "model.pth"
        path.write_bytes(data)
        return read_checkpoint(path)

    return read


def refusal(path: Path) -> str:
    with pytest.raises(StarflowError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.isprintable(), "one line, nothing for a terminal to obey"
    assert len(message) < 3000
    assert path.name in message
    return message


# ---- what PyTorch writes


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_checkpoints(case):
    expected = json.loads((DATA / "pth" / "golden.json").read_text())[case]
    checkpoint = read_checkpoint(golden_case(case) / "model.pth")
    assert list(checkpoint) == list(expected)
    for name, (dtype, shape, crc) in expected.items():
        values = checkpoint[name]
        assert (checkpoint.dtype(name), checkpoint.shape(name)) == (dtype, tuple(shape))
        assert (values.dtype, values.shape) == (np.float32, tuple(shape))
        assert checkpoint.nbytes(name) == values.nbytes
        assert zlib.crc32(values.tobytes()) == crc
        assert not values.flags.writeable
        array = checkpoint.mx(name)
        assert array.dtype == mx.float32
        np.testing.assert_array_equal(np.array(array), values)


def check_dtypes(checkpoint: Checkpoint) -> None:
    """The contents of tests/data/pth/dtypes.pth, which PyTorch 2.13 wrote from `dtypes_example`."""
    ramp = np.arange(24).reshape(2, 3, 4)
    for name, code in pth.NUMPY_DTYPES.items():
        expected = ramp % 2 == 1 if name == "bool" else ramp
        array = checkpoint.mx(name)
        assert (checkpoint.dtype(name), array.dtype, array.shape) == (name, MLX_DTYPES[name], (2, 3, 4))
        assert checkpoint.nbytes(name) == 24 * code.itemsize
        if name == "bfloat16":
            assert checkpoint[name].dtype == np.uint16
            np.testing.assert_array_equal(checkpoint[name].astype(np.uint32) << 16, expected.astype("<f4").view("<u4"))
            array = array.astype(mx.float32)
        else:
            np.testing.assert_array_equal(checkpoint[name], expected)
        np.testing.assert_array_equal(np.array(array), expected)
    views = {
        "views.0": ramp.transpose(2, 0, 1),
        "views.1": ramp[1, 1:, ::2],
        "views.2": np.broadcast_to(ramp[0, 0, 2:3], (5, 1)),
        "scalar": np.array(23.0),
        "empty": np.zeros((0, 3)),
        "beyond": np.zeros(0),
        "parameter": ramp[0],
    }
    for name, expected in views.items():
        assert checkpoint.shape(name) == checkpoint[name].shape == tuple(checkpoint.mx(name).shape)
        np.testing.assert_array_equal(checkpoint[name], expected)
        np.testing.assert_array_equal(np.array(checkpoint.mx(name)), expected)
    assert set(checkpoint) == {*pth.NUMPY_DTYPES, *views}


def dtypes_example(torch) -> dict[str, object]:
    ramp = torch.arange(24).reshape(2, 3, 4)
    tensors = {
        name: (ramp % 2 if name == "bool" else ramp).to(getattr(torch, name)).clone() for name in pth.NUMPY_DTYPES
    }
    shared = tensors["float32"]
    return {
        **tensors,
        "views": [shared.permute(2, 0, 1), shared[1, 1:, ::2], shared[0, 0, 2:3].expand(5, 1)],
        "scalar": shared[1, 2, 3],
        "empty": torch.zeros(0, 3),
        "beyond": torch.arange(10.0)[::3][4:],
        "parameter": torch.nn.Parameter(ramp[0].half().clone()),
        "step": 7,
        "about": ("text", 2.5, None, True, 1 << 70, torch.Size([2, 3]), torch.float32, {}),
    }


def test_every_dtype_and_kind_of_view():
    check_dtypes(read_checkpoint(DATA / "pth" / "dtypes.pth"))


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("checksums", [True, False])
def test_agrees_with_torch(tmp_path, protocol, checksums):
    torch = pytest.importorskip("torch")
    path = tmp_path / "dtypes.pth"
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(dtypes_example(torch), path, pickle_protocol=protocol)
    finally:
        torch.serialization.set_crc32_options(True)
    check_dtypes(read_checkpoint(path))


def bits(torch, tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.torch
def test_agrees_with_torch_bit_for_bit(tmp_path):
    """Random bits, so NaNs, infinities and subnormals too, under every nesting."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pt"
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, code in pth.NUMPY_DTYPES.items():
        raw = torch.randint(
            0, 2 if name == "bool" else 256, (60 * code.itemsize,), dtype=torch.uint8, generator=generator
        )
        whole = raw.view(getattr(torch, name))
        state |= {
            f"{name}.whole": whole,
            f"{name}.t": whole.view(6, 10).T,
            f"{name}.part": whole.view(3, 4, 5)[1:, ::2, 3],
        }
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    plain = module.state_dict()
    assert plain._metadata
    for saved, expected in [
        (state, state),
        (plain, plain),
        (dict(module.named_parameters()), dict(module.named_parameters())),
        ({"model": plain, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, plain),
        ({"ema": {"state_dict": plain}}, plain),
    ]:
        torch.save(saved, path)
        checkpoint = read_checkpoint(path)
        assert list(checkpoint) == list(expected)
        for name, value in expected.items():
            assert f"torch.{checkpoint.dtype(name)}" == str(value.dtype)
            assert checkpoint.shape(name) == tuple(value.shape)
            assert checkpoint.nbytes(name) == value.nbytes
            assert checkpoint[name].tobytes() == bits(torch, value)
            array = checkpoint.mx(name)
            assert array.dtype == MLX_DTYPES[checkpoint.dtype(name)]
            raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
            assert np.array(raw).tobytes() == bits(torch, value)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_refuses_what_torch_can_write_but_we_do_not_read(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pt"
    ramp = torch.arange(4.0)
    noted = torch.nn.Parameter(ramp.clone())
    noted.note = "a Python attribute"
    for saved, reason in [
        (ramp.to(torch.complex64), "ComplexFloatStorage"),
        (ramp.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (ramp.to(torch.uint16), "torch.uint16"),
        (torch.quantize_per_tensor(ramp, 0.1, 0, torch.qint8), "QInt8Storage|_rebuild_qtensor"),
        (ramp.to_sparse(), "_rebuild_sparse_tensor"),
        (ramp.to("meta"), "_rebuild_meta_tensor_no_storage"),
        (torch.complex(ramp, ramp).conj().imag, "negation"),
        (noted, "_rebuild_parameter_with_state"),
        (torch.nn.Linear(2, 2), "Linear"),
        (ramp.untyped_storage(), "without a tensor"),
        ({1, 2}, "set"),
    ]:
        torch.save({"w": saved}, path)
        assert re.search(reason, refusal(path))
    torch.save({"w": ramp}, path, _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(path)
    torch.save(ramp, path)
    assert "outermost" in refusal(path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    assert "TorchScript" in refusal(path)


def test_layout_of_torch_1_6(read):
    """Keys were addresses, the folder was called archive, no byte order was noted; the checksum may be absent."""
    key = "94517281139904"
    pickled = b"\x80\x02" + dict_of(w=tensor(key)) + b"."
    records = [("archive/data.pkl", pickled), (f"archive/data/{key}", SIX), ("archive/version", b"3\n")]
    np.testing.assert_array_equal(read(make_zip(records))["w"], [[0, 1, 2], [3, 4, 5]])


def test_zip64(read):
    np.testing.assert_array_equal(read(file_of(dict_of(w=tensor()), zip64=True))["w"], [[0, 1, 2], [3, 4, 5]])


def test_device_names_do_not_matter(read):
    assert list(read(file_of(dict_of(w=tensor().replace(text("cpu"), text("cuda:0")))))) == ["w"]


# ---- which names the tensors get


def test_names(read):
    w = tensor()

    def names(body: bytes) -> list[str]:
        return list(read(file_of(body)))

    model, other = dict_of(a=w), dict_of(b=w)
    assert names(dict_of(a=w, b=b"K\x01", c=b"N")) == ["a"]
    assert names(dict_of(epoch=b"K\x01", model=model, ema=other)) == ["a"]
    assert names(dict_of(model=model, state_dict=other)) == ["b"]
    assert names(dict_of(module=model, model_state_dict=other)) == ["b"]
    assert names(dict_of(a=w, model=other)) == ["a", "model.b"], "tensors beside it: no wrapper"
    assert names(dict_of(model=dict_of(kind=text("flow")), weights=other)) == ["weights.b"]
    assert names(dict_of(x=b"](" + w + b"K\x01" + w + b"e")) == ["x.0", "x.2"]
    assert names(tuple_of(w, model)) == ["0", "1.a"]
    assert names(b"}K\x07" + w + b"s") == ["7"]


def test_mapping(read):
    checkpoint = read(file_of(dict_of(w=tensor(), tied=tensor())))
    assert len(checkpoint) == 2
    assert "w" in checkpoint and "v" not in checkpoint and 3 not in checkpoint
    assert checkpoint.get("v") is None
    for lookup in (checkpoint.__getitem__, checkpoint.mx, checkpoint.dtype, checkpoint.shape, checkpoint.nbytes):
        with pytest.raises(KeyError):
            lookup("v")
    assert np.shares_memory(checkpoint["w"], checkpoint["w"])


# ---- memory


def test_reads_nothing_before_it_is_asked(tmp_path):
    path = tmp_path / "model.pth"
    numel = 1 << 24
    body = dict_of(w=tensor("0", numel, shape=(numel,), strides=(1,)))
    path.write_bytes(file_of(body, {"0": bytes(4 * numel)}))
    read_checkpoint(DATA / "pth" / "dtypes.pth").mx("float32")
    tracemalloc.start()
    try:
        checkpoint = read_checkpoint(path)
        assert checkpoint.nbytes("w") == 4 * numel
        assert checkpoint["w"][:: numel - 1].tolist() == [0, 0]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux how much of the map is resident")
def test_mx_lets_the_pages_go(tmp_path):
    path = tmp_path / "model.pth"
    numel = 1 << 22
    body = dict_of(w=tensor("0", numel, shape=(numel,), strides=(1,)))
    path.write_bytes(file_of(body, {"0": np.arange(numel, dtype="<f4").tobytes()}))
    checkpoint = read_checkpoint(path)

    def resident() -> int:
        entry = Path("/proc/self/smaps").read_text().split(str(path), 1)[1]
        return int(re.search(r"Rss:\s*(\d+) kB", entry)[1])

    values = checkpoint["w"]
    assert values[:100].sum() == 4950
    array = checkpoint.mx("w")
    assert resident() < 1024
    assert array[numel - 1].item() == numel - 1
    assert values[numel - 1] == numel - 1, "a view made before goes on reading the file"


def test_arrays_outlive_the_checkpoint(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(file_of(dict_of(w=tensor())))
    values = read_checkpoint(path)["w"]
    path.unlink()
    assert values.sum() == 15


# ---- files that are refused


def test_not_a_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    assert "No such file" in refusal(path)
    assert "directory" in refusal(tmp_path)
    good = file_of(dict_of(w=tensor()))
    for data, reason in [
        (b"", "empty"),
        (b"P", "no zip"),
        (b"<!DOCTYPE html><html>", "no zip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (struct.pack("<Q", 2) + b"{}", "safetensors"),
        (pickle.dumps({"a": 1}), "before 1.6"),
        (bytes(257) + b"ustar", "before 1.6"),
        (good[:-1], "truncated"),
        (good[: len(good) // 2], "truncated"),
        (b"PK\3\4", "truncated"),
        (b"junk" + good, "no zip"),
        (good[:64] + good, "truncated"),
        (make_zip([("archive/version", b"3")]), "data.pkl, this zip has 0"),
        (make_zip([("a/data.pkl", b"N."), ("b/data.pkl", b"N.")]), "data.pkl, this zip has 2"),
        (make_zip([("a/data.pkl", b"N."), ("a/constants.pkl", b"N.")]), "TorchScript"),
        (make_zip([("a/data.pkl", b"N."), ("a/byteorder", b"big")]), "'big'"),
        (make_zip([("a/data.pkl", b"N."), ("a/byteorder", b"middle\n\x1b")]), re.escape(r"middle\n\x1b")),
        (make_zip([("a/data.pkl", b"N."), ("a/data.pkl", b"N.")]), "directory is damaged"),
        (file_of(dict_of(w=tensor()), method=8), "compressed"),
        (file_of(dict_of(w=tensor()), claims={"archive/data/0": 24 + 64}), "overlap"),
        (file_of(dict_of(w=tensor()), claims={"archive/data/0": 1 << 20}), "not where"),
        (make_zip([("a/data.pkl", bytes(pth._MAX_PICKLE + 1))]), "more than"),
        (good.replace(b"_rebuild_tensor", b"_rebuilt_tensor"), "checksum"),
    ]:
        path.write_bytes(data)
        assert re.search(reason, refusal(path)), reason
    path.write_bytes(good)
    assert list(read_checkpoint(str(path))) == ["w"]
    with pytest.raises(StarflowError, match="no file name"):
        read_checkpoint("model\0.pth")

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pth, "open", forbidden, raising=False)
    assert "Permission denied" in refusal(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in refusal(tmp_path / "pipe")


def test_a_file_name_with_a_newline_stays_in_one_line(tmp_path):
    with pytest.raises(StarflowError) as caught:
        read_checkpoint(tmp_path / "a\nb")
    assert str(caught.value).isprintable()


HUGE = 1 << 40
NO_TENSOR = tuple_of(storage(), number(0), tuple_of(number(2)), tuple_of(number(1)), b"\x89", ORDERED_DICT)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        # storages
        (dict_of(w=tensor("1")), "storage '1' is missing"),
        (dict_of(w=tensor("../version")), "missing"),
        (dict_of(w=tensor(numel=7)), "should hold 7"),
        (dict_of(w=tensor(numel=5)), "should hold 5"),
        (dict_of(w=tensor(numel=-1)), "malformed"),
        (dict_of(w=tensor(numel=1 << 100)), "malformed"),
        (dict_of(w=tensor(), v=tensor(kind="IntStorage")), "two dtypes"),
        (dict_of(w=tensor(kind="ComplexFloatStorage")), "torch.ComplexFloatStorage.*supported are float64"),
        (dict_of(w=tensor(kind="QInt8Storage")), "torch.QInt8Storage"),
        (dict_of(w=storage()), "without a tensor"),
        (dict_of(w=text("storage") + b"Q"), "malformed"),
        (dict_of(w=b"ctorch\nFloatStorage\n)R"), "malformed"),
        # shapes
        (dict_of(w=tensor(shape=(2, 4), strides=(3, 1))), "too few"),
        (dict_of(w=tensor(offset=1)), "too few"),
        (dict_of(w=tensor(shape=(HUGE, HUGE), strides=(1, 1))), "too few"),
        (dict_of(w=tensor(shape=(-1, 3))), "impossible"),
        (dict_of(w=tensor(strides=(-3, 1))), "impossible"),
        (dict_of(w=tensor(offset=-1)), "impossible"),
        (dict_of(w=tensor(shape=(2,))), "impossible"),
        (dict_of(w=tensor(shape=(1,) * 33, strides=(1,) * 33)), "impossible"),
        (dict_of(w=tensor(shape=(1 << 100,), strides=(0,))), "impossible"),
        (dict_of(w=tensor(shape=(HUGE,), strides=(0,))), "expands 24 bytes"),
        (dict_of(w=tensor(shape=(0, HUGE, HUGE), strides=(1, 1, 1))), "impossible shape"),
        (dict_of(w=tensor(more=dict_of(neg=b"\x88"))), "negation"),
        (dict_of(w=b"ctorch._utils\n_rebuild_tensor_v2\n)R"), "malformed"),
        (dict_of(w=b"ctorch._utils\n_rebuild_tensor_v2\n" + NO_TENSOR.replace(b"Q", b"0") + b"R"), "opcode 0x30"),
        (dict_of(w=b"ctorch._utils\n_rebuild_parameter\n(K\x01\x88" + ORDERED_DICT + b"tR"), "no tensor"),
        (dict_of(w=b"ctorch\nSize\nK\x01\x85R"), "something else than a tuple"),
        # containers and names
        (b"K\x01", "outermost"),
        (tensor(), "outermost"),
        (b"}", "no tensors"),
        (dict_of(a=b"]", b=b"N"), "no tensors"),
        (b"}(" + text("a.b") + tensor() + text("a") + dict_of(b=tensor()) + b"u", "two tensors of one name"),
        (b"}(" + text("a\nb") + tensor() + b"u", "impossible name"),
        (b"}(" + text("a" * 2000) + tensor() + b"u", "impossible name"),
        (b"})" + tensor() + b"s", "key of type tuple"),
        (b"}" + number(1 << 70) + tensor() + b"s", "key of type int"),
        (b"]" * 100 + tensor() + b"a" * 100, "nested"),
        (b"]\x94h\x00a", "nested"),
        (b"}\x94" + text("model") + b"h\x00s", "nested"),
        # the machine
        (b"", "malformed"),
        (b"NN", "malformed"),
        (b"(N", "malformed"),
        (b"t", "malformed"),
        (b"R", "malformed"),
        (b"N(R", "malformed"),
        (b"h\x05", "malformed"),
        (b"q\x05", "malformed"),
        (b"Ns", "malformed"),
        (b"NNNs", "malformed"),
        (b"](Nu", "malformed"),
        (b"}(Nu", "malformed"),
        (b"}(Ne", "malformed"),
        (b"]}b", "malformed"),
        (b"}]b", "malformed"),
        (b"NN\x93", "malformed"),
        (b"N.N", "malformed"),
        (b"X\xff\xff\xff\xff", "too early"),
        (b"B\xff\xff\xff\xff", "too early"),
        (b"X\1\0\0\0\xff", "malformed"),
        (b"cos", "malformed"),
        (b"c" + b"a" * 1000 + b"\nb\n", "malformed"),
        (b"\x80\x06N", "protocol"),
        (b"2", "opcode 0x32"),
        (b"\x82\x01", "opcode 0x82"),
        (b"\x8b\xff\xff\xff\x7f", "opcode 0x8b"),
        (b"\x8d" + b"\xff" * 8, "opcode 0x8d"),
        (b"\x97", "opcode 0x97"),
        (b"I1\n", "opcode 0x49"),
    ],
)
def test_refused_pickles(tmp_path, body, reason):
    path = tmp_path / "model.pth"
    path.write_bytes(file_of(body))
    assert re.search(reason, refusal(path))


def bomb_dag() -> bytes:
    """30 dicts, each holding the next one twice: 2^30 paths to one tensor."""
    body = tensor() + b"\x94"
    for level in range(30):
        recall = b"h" + bytes([level])
        body += b"}(" + text("a") + recall + text("b") + recall + b"u\x94"
    return b"](" + body + b"e"


def bomb_hash() -> bytes:
    """Tuples of tuples: hashing the last one takes 2^200 steps."""
    return b")\x94" + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(200)) + b"\x85}\x94"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(bomb_dag(), id="paths"),
        pytest.param(bomb_dag() + b"NR", id="message"),
        pytest.param(bomb_hash() + b"h\xc8Ns", id="hash"),
        pytest.param(
            b"}(" + b"".join(number(k * ((1 << 61) - 1)) + b"N" for k in range(100_000)) + b"u", id="collisions"
        ),
        pytest.param(b"}" * 2_100_000, id="dicts"),
        pytest.param(b"]\x94" * 1_100_000, id="memo"),
        pytest.param(b"(" * 1_100_000 + b"t" * 1_100_000, id="marks"),
        pytest.param(b"]" * 500_000 + b"a" * 499_999, id="depth"),
        pytest.param(b"r\xff\xff\xff\xffN", id="memo index"),
        pytest.param(b"(" + b"N" * 500_000 + b"t\x94ctorch\nSize\n\x94" + b"h\1h\0\x85R" * 200_000, id="sizes"),
        pytest.param(b"(" + b"\x8a\xff" + b"\x55" * 255 + b"t", id="long"),
    ],
)
def test_bombs_go_out(tmp_path, body):
    path = tmp_path / "model.pth"
    path.write_bytes(file_of(body))
    with watched(30):
        refusal(path)


# ---- hostile files: nothing runs


class Alarm(BaseException):
    """Not an Exception, so that nothing under test can swallow it."""


WATCH: dict[str, object] = {"path": None, "seen": []}


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if WATCH["path"] is None or event == "mmap.__new__":
        return
    if event == "open" and str(arguments[0]) == WATCH["path"] and arguments[2] & (os.O_ACCMODE | os.O_CREAT) == 0:
        return
    WATCH["seen"].append((event, *map(repr, arguments)))


@contextmanager
def watched(seconds: float, path: Path | None = None) -> Iterator[None]:
    """Raises Alarm after some seconds; with a path, fails on every audited event but opening that file to read."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Alarm(f"took more than {seconds} s")

    if path is not None and "installed" not in WATCH:
        sys.addaudithook(_watch)  # hooks cannot be removed: this one sleeps when no path is set
        WATCH["installed"] = True
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    WATCH["path"], WATCH["seen"] = path and str(path), []
    try:
        yield
    finally:
        WATCH["path"] = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not WATCH["seen"]


class Malice:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def hostile(command: bytes) -> dict[str, tuple[bytes, str]]:
    """Opcodes that would run a shell command or Python source under `pickle`, and the global they are refused for."""
    argument = b"X" + struct.pack("<I", len(command)) + command
    system = b"cposix\nsystem\n"
    return {
        "GLOBAL": (system + argument + b"\x85R", "posix.system"),
        "STACK_GLOBAL": (text("os") + text("system") + b"\x93" + argument + b"\x85R", "os.system"),
        "STACK_GLOBAL by memo": (text("os") + b"\x94" + text("system") + b"\x94]h\0h\1\x93a", "os.system"),
        "INST": (b"(" + argument + b"iposix\nsystem\n", "posix.system"),
        "OBJ": (b"(" + system + argument + b"o", "posix.system"),
        "NEWOBJ": (b"csubprocess\nPopen\n" + argument + b"\x85\x81", "subprocess.Popen"),
        "NEWOBJ_EX": (b"csubprocess\nPopen\n" + argument + b"\x85}\x92", "subprocess.Popen"),
        "eval": (b"cbuiltins\neval\n" + text("__import__('os').abort()") + b"\x85R", "builtins.eval"),
        "exec": (b"c__builtin__\nexec\n" + text("raise SystemExit") + b"\x85R", "__builtin__.exec"),
        "getattr": (b"cbuiltins\ngetattr\n" + tuple_of(b"ctorch\nSize\n", text("__init__")) + b"R", "builtins.getattr"),
        "dotted": (text("torch") + text("Size.__class__") + b"\x93)R", "torch.Size.__class__"),
        "dotted line": (b"ccollections\nOrderedDict.fromkeys\n)R", "collections.OrderedDict.fromkeys"),
        "prefix": (b"ccollections.OrderedDict\n\n)R", "collections.OrderedDict."),
        "torch.load": (b"ctorch\nload\n" + argument + b"\x85R", "torch.load"),
        "torch storage bytes": (b"ctorch.storage\n_load_from_bytes\n" + argument + b"\x85R", "_load_from_bytes"),
        "torch storage": (b"ctorch\n__import__('os').Storage\n)R", "Storage"),
        "escape": (b"cos\x1b[2J\nsystem\n)R", r"os\\x1b\[2J"),
    }


NESTINGS: dict[str, Callable[[bytes], bytes]] = {
    "alone": lambda bad: bad,
    "as an item": lambda bad: dict_of(w=tensor(), x=bad),
    "before the tensors": lambda bad: dict_of(x=bad, w=tensor()),
    "deep": lambda bad: dict_of(w=tensor(), x=b"](" + tuple_of(bad) + b"e"),
    "as a key": lambda bad: b"}" + bad + tensor() + b"s",
    "as attributes": lambda bad: ORDERED_DICT + b"(" + text("w") + tensor() + b"u" + bad + b"b",
    "as the hooks": lambda bad: dict_of(w=tensor().replace(ORDERED_DICT, bad)),
    "as the metadata": lambda bad: dict_of(w=tensor(more=bad)),
    "as the persistent id": lambda bad: dict_of(w=bad + b"Q"),
    "as the storage type": lambda bad: dict_of(w=tensor().replace(b"ctorch\nFloatStorage\n", bad)),
    "forgotten": lambda bad: tuple_of(bad, dict_of(w=tensor())),
}


@pytest.mark.parametrize("kind", list(hostile(b"")))
def test_hostile_pickles_run_nothing(tmp_path, kind, capfd):
    path, target = tmp_path / "model.pth", tmp_path / "ran"
    bad, reason = hostile(f"mkdir {target}".encode())[kind]
    for nest in NESTINGS.values():
        path.write_bytes(file_of(nest(bad)))
        with watched(5, path):
            assert re.search(reason, refusal(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_object_of_pickle_itself(tmp_path, protocol):
    path, target = tmp_path / "model.pth", tmp_path / "ran"
    payload = pickle.dumps({"w": Malice(target)}, protocol=protocol)
    pickle.loads(payload)
    assert target.exists(), "the payload works"
    target.rmdir()
    for data in (make_zip([("archive/data.pkl", payload)]), payload):
        path.write_bytes(data)
        with watched(5, path):
            refusal(path)
    assert not target.exists()


# ---- mutations


def opcode_positions(data: bytes) -> list[int]:
    return [position for _, _, position in pickletools.genops(data)]


def rebuilt(records: Records, pickled: bytes, zip64: bool) -> bytes:
    """The checkpoint with another pickle, its checksums right, so that the change is not found by the first look."""
    return make_zip([(name, pickled if name.endswith("data.pkl") else data) for name, data in records], zip64)


INTERESTING = [
    0,
    1,
    2,
    8,
    24,
    64,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFE,
    0xFFFFFFFF,
    1 << 40,
    (1 << 64) - 1,
]
ALL_OPCODES = [ord(opcode.code) for opcode in pickletools.opcodes]


def mutate(rng: random.Random, records: Records) -> tuple[str, bytes]:
    """A damaged or forged variant of a checkpoint, and what was done to it."""
    zip64 = rng.random() < 0.3
    pickled = next(data for name, data in records if name.endswith("data.pkl"))
    whole = bytearray(make_zip(records, zip64))
    kind = rng.choice(["flip", "truncate", "splice", "zip", "opcode", "fragment", "argument", "storage"])
    if kind == "flip":
        for _ in range(rng.randint(1, 8)):
            whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del whole[rng.randrange(len(whole)) :]
    elif kind == "splice":
        start, end = sorted(rng.randrange(len(whole)) for _ in range(2))
        at, size = rng.randrange(len(whole)), min(end - start, rng.choice([8, 64, 512]))
        whole[at : at + rng.choice([0, size])] = whole[start : start + size]
    elif kind == "zip":
        for _ in range(rng.randint(1, 3)):
            signature = rng.choice([b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7"])
            places = [match.start() for match in re.finditer(re.escape(signature), bytes(whole))]
            if places:
                at, size = rng.choice(places) + rng.randrange(4, 56, 2), rng.choice([2, 4, 8])
                value = rng.choice([*INTERESTING, len(whole), rng.randrange(len(whole))])
                whole[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    elif kind == "storage":
        shuffled = [*records, *rng.sample(records, rng.randint(0, 1))]
        del shuffled[rng.randrange(len(shuffled))]
        shuffled = [(name, data[: rng.choice([len(data), len(data), 0, 1, 23])]) for name, data in shuffled]
        whole = bytearray(make_zip(shuffled, zip64, {rng.choice(records)[0]: rng.choice(INTERESTING[:8])}))
    else:
        changed, places = bytearray(pickled), opcode_positions(pickled)
        for _ in range(rng.randint(1, 3)):
            at = rng.choice(places)
            if kind == "opcode":
                changed[at] = rng.choice(ALL_OPCODES)
            elif kind == "argument":
                changed[min(at + rng.randint(1, 4), len(changed) - 1)] = rng.randrange(256)
            else:
                start, end = sorted(rng.choice(places) for _ in range(2))
                bad, _ = rng.choice(list(hostile(b"mkdir ran").values()))
                own = bytes(pickled[start : min(end, start + 200)])
                piece = rng.choice(
                    [bad, own, b"(", b"t", b"R", b"Q", b"b", b"N", b"h\0", b"\x94", b"1", b"0", b"2", b"."]
                )
                changed[at : at + rng.choice([0, 1, len(piece)])] = piece
        whole = bytearray(rebuilt(records, bytes(changed), zip64))
    return kind, bytes(whole)


def seeds() -> list[Records]:
    """Small checkpoints to start from: one of every feature, one by PyTorch itself."""
    with zipfile.ZipFile(DATA / "pth" / "dtypes.pth") as archive:
        real = [(name, archive.read(name)) for name in archive.namelist()]
    body = dict_of(
        epoch=b"K\x03",
        model=ORDERED_DICT
        + b"("
        + text("w")
        + tensor()
        + text("t")
        + tensor(shape=(3, 2), strides=(1, 3))
        + text("b")
        + tensor("1", 4, "BFloat16Storage", 1, (3,), (1,))
        + text("e")
        + tensor("2", 0, "LongStorage", 0, (0, 2), (2, 1))
        + b"u"
        + dict_of(_metadata=ORDERED_DICT)
        + b"b",
        optimizer=b"](K\x01G?\xf0\0\0\0\0\0\0e",
    )
    made = [("m/data.pkl", b"\x80\x02" + body + b"."), ("m/byteorder", b"little"), ("m/data/0", SIX)]
    return [real, [*made, ("m/data/1", bytes(range(8))), ("m/data/2", b""), ("m/version", b"3\n")]]


def test_mutated_files(tmp_path, capfd, monkeypatch):
    """Whatever a file holds, the outcome is a StarflowError of one line or tensors that can be read."""
    monkeypatch.chdir(tmp_path)
    rng, path, outcomes = random.Random(0), tmp_path / "model.pth", Counter()
    starts = seeds()
    for number, records in zip(range(3000), itertools.cycle(starts), strict=False):
        kind, data = mutate(rng, records)
        path.write_bytes(data)
        try:
            with watched(5, path):
                outcome = outcome_of(path)
        except BaseException as error:
            raise AssertionError(f"mutation {number} ({kind}): {error!r}") from error
        outcomes[kind, outcome] += 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]
    assert capfd.readouterr() == ("", "")
    for kind in {kind for kind, _ in outcomes}:
        assert outcomes[kind, "refused"] >= 20, "the mutation does something"
    assert sum(count for (_, outcome), count in outcomes.items() if outcome == "read") >= 100


def outcome_of(path: Path) -> str:
    try:
        checkpoint = read_checkpoint(path)
    except StarflowError as error:
        assert str(error).isprintable()
        assert path.name in str(error)
        return "refused"
    assert len(checkpoint) > 0
    for name in checkpoint:
        values = checkpoint[name]
        assert values.shape == checkpoint.shape(name)
        assert values.nbytes == checkpoint.nbytes(name) <= pth_pickle.MAX_EXPANDED
        if values.nbytes < 1 << 20:
            array = checkpoint.mx(name)
            assert (array.shape, array.dtype) == (values.shape, MLX_DTYPES[checkpoint.dtype(name)])
            mx.eval(array)
    return "read"
