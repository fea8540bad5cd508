"""Writing GGUF files: the bytes, and that no half of one is left behind."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest
import torch

from qtool.convert.gguf.container import GgufFile, KeyValue
from qtool.convert.gguf.types import (
    FILE_TYPES,
    TENSOR_TYPES,
    ValueType,
)
from qtool.convert.gguf.writer import GgufLayout, GgufWriter, TensorInfo
from qtool.errors import OutputExists, QtoolError, UsageError

F32 = TENSOR_TYPES["F32"]
ENTRIES = [
    KeyValue("a", "x", ValueType.STRING),
    KeyValue("b", [1, -1], ValueType.ARRAY, ValueType.INT32),
]
INFOS = [TensorInfo("t", (2, 3), F32), TensorInfo("u", (1, 2), F32)]


def write(path: Path, *, force: bool = False) -> None:
    with GgufWriter(path, GgufLayout.of(ENTRIES, INFOS), force=force) as writer:
        writer.write(INFOS[0], torch.arange(12, dtype=torch.uint8))  # in two slabs
        writer.write(INFOS[0], torch.arange(12, 24, dtype=torch.uint8))
        writer.write(INFOS[1], torch.full((8,), 9, dtype=torch.uint8))


def test_the_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.gguf"
    write(path)
    header = (
        b"GGUF"
        + struct.pack("<IQQ", 3, 2, 2)
        + (struct.pack("<Q", 1) + b"a" + struct.pack("<iQ", 8, 1) + b"x")
        + (struct.pack("<Q", 1) + b"b" + struct.pack("<iiQii", 9, 5, 2, 1, -1))
        + (struct.pack("<Q", 1) + b"t" + struct.pack("<IqqiQ", 2, 3, 2, 0, 0))
        + (struct.pack("<Q", 1) + b"u" + struct.pack("<IqiQ", 1, 2, 0, 32))  # trailing 1 dropped
    )
    header += bytes(-len(header) % 32)
    data = bytes(range(24)) + bytes(8) + bytes([9] * 8) + bytes(24)
    assert path.read_bytes() == header + data
    assert GgufLayout.of(ENTRIES, INFOS).nbytes == len(header + data)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    write(path)
    file = GgufFile.open(path)
    assert file.entries == tuple(ENTRIES)
    assert file.data("t").flatten().tolist() == list(range(24))
    assert file.tensors["t"].shape == (2, 3)


def test_an_error_leaves_no_file_under_any_name(tmp_path: Path) -> None:
    def fail(writer: GgufWriter) -> None:
        writer.write(INFOS[0], torch.zeros(24, dtype=torch.uint8))
        raise ZeroDivisionError

    writer = GgufWriter(tmp_path / "file.gguf", GgufLayout.of(ENTRIES, INFOS))
    with pytest.raises(ZeroDivisionError), writer:
        fail(writer)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    path.write_text("mine")
    with pytest.raises(OutputExists):
        write(path)
    assert path.read_text() == "mine"
    write(path, force=True)
    assert path.read_bytes()[:4] == b"GGUF"


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        write(tmp_path, force=True)


def test_a_path_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QtoolError, match="cannot be made"):
        write(tmp_path / "file" / "model.gguf")


def test_a_file_larger_than_the_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    layout = GgufLayout.of([], [TensorInfo("t", (1 << 40, 1 << 10), F32)])
    with pytest.raises(QtoolError, match="free"), GgufWriter(tmp_path / "f.gguf", layout):
        pass
    assert list(tmp_path.iterdir()) == []


def test_type_tables_agree_with_the_gguf_package() -> None:
    for kind in gguf.GGMLQuantizationType:
        ours = TENSOR_TYPES[kind.name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if kind.name == "Q8_1":  # for activations; its two numbers were float32 once, now halves
            size -= 4
        assert (ours.id, ours.block_size, ours.block_bytes) == (kind.value, block, size)
    for file_type in gguf.LlamaFileType:
        name = file_type.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        if name in FILE_TYPES:
            assert FILE_TYPES[name] == file_type.value, name
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M"} <= FILE_TYPES.keys()
    assert [kind.value for kind in gguf.GGUFValueType] == [kind.value for kind in ValueType]
