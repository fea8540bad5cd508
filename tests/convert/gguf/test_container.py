"""Reading GGUF headers: what a file says, and every way in which it can lie."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.convert.gguf.container import GgufFile, KeyValue
from qtool.convert.gguf.types import TENSOR_TYPES, ValueType
from qtool.convert.gguf.writer import GgufLayout, GgufWriter, TensorInfo
from qtool.errors import FormatError

STRING, U32, ARRAY = ValueType.STRING, ValueType.UINT32, ValueType.ARRAY


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, type: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<i", type) + payload


def tensor(
    name: str | bytes,
    dims: tuple[int, ...],
    type: int = 0,
    offset: int = 0,
    rank: int | None = None,
) -> bytes:
    count = len(dims) if rank is None else rank
    return text(name) + struct.pack(f"<I{len(dims)}qiQ", count, *dims, type, offset)


def header(
    *entries: bytes,
    tensors: tuple[bytes, ...] = (),
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_keys: int | None = None,
) -> bytes:
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(entries) if num_keys is None else num_keys,
    )
    body = b"".join((*entries, *tensors))
    data = magic + struct.pack("<IQQ", version, *counts) + body
    return data + bytes(-len(data) % 32) + bytes(256)


Opened = Callable[[bytes], GgufFile]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    def open_bytes(data: bytes) -> GgufFile:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return GgufFile.open(path)

    return open_bytes


def test_a_header_written_by_hand_is_read(opened: Opened) -> None:
    data = header(
        entry("general.architecture", 8, text("llama")),
        entry("a.count", 4, struct.pack("<I", 7)),
        entry("a.flag", 7, b"\x01"),
        entry("a.words", 9, struct.pack("<iQ", 8, 2) + text("é") + text("")),
        entry("a.numbers", 9, struct.pack("<iQ3h", 3, 3, -1, 0, 1)),
        tensors=(tensor("first", (4, 2)), tensor("second", (8,), type=1, offset=32)),
    )
    file = opened(data)
    assert file.version == 3
    assert file.metadata == {
        "general.architecture": "llama",
        "a.count": 7,
        "a.flag": True,
        "a.words": ["é", ""],
        "a.numbers": [-1, 0, 1],
    }
    assert file.entries[3] == KeyValue("a.words", ["é", ""], ARRAY, STRING)
    first, second = file.tensors["first"], file.tensors["second"]
    assert (first.shape, first.type.name, first.nbytes) == ((2, 4), "F32", 32)
    assert (second.shape, second.offset - first.offset, second.nbytes) == ((8,), 32, 16)
    assert file.data("first").shape == (2, 16)


def test_version_2_is_read_and_the_alignment_is_the_files_own(opened: Opened) -> None:
    alignment = entry("general.alignment", 4, struct.pack("<I", 64))
    tensors = (tensor("a", (1,)), tensor("b", (1,), offset=64))
    file = opened(header(alignment, tensors=tensors, version=2))
    assert file.alignment == 64
    assert file.tensors["b"].offset % 64 == 0


U32_7 = struct.pack("<I", 7)
MALFORMED = {
    "no GGUF file": (header(magic=b"GGML"), "not a GGUF file"),
    "an ELF file": (b"\x7fELF" + bytes(100), "not a GGUF file"),
    "nothing": (b"", "empty"),
    "three bytes": (b"GGU", "truncated"),
    "version 1": (header(version=1), "version 1"),
    "version 4": (header(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "big-endian"),
    "more keys than bytes": (header(num_keys=1 << 60), "keys cannot be"),
    "more tensors than bytes": (header(num_tensors=1 << 60), "tensors cannot be"),
    "fewer keys than promised": (header(num_keys=3), "key 0 is empty"),
    "an empty key": (header(entry("", 4, U32_7)), "key 0 is empty"),
    "a key twice": (header(entry("a", 4, U32_7), entry("a", 4, U32_7)), "'a' is there twice"),
    "a key that is no text": (header(entry("a", 4, U32_7).replace(b"a", b"\xff")), "not UTF-8"),
    "an unknown value type": (header(entry("a", 13, U32_7)), "unknown value type 13"),
    "a negative value type": (header(entry("a", -1, U32_7)), "unknown value type -1"),
    "a string of a gigabyte": (
        header(entry("a", 8, struct.pack("<Q", 1 << 30))),
        "truncated: the value of 'a'",
    ),
    "a string of 2**63 bytes": (header(entry("a", 8, struct.pack("<Q", 1 << 63))), "more than"),
    "an array in an array": (
        header(entry("a", 9, struct.pack("<iQ", 9, 0))),
        "arrays in an array",
    ),
    "an array of a billion": (
        header(entry("a", 9, struct.pack("<iQ", 0, 1 << 30))),
        "truncated: the array 'a'",
    ),
    "an array of 2**62": (header(entry("a", 9, struct.pack("<iQ", 0, 1 << 62))), "more than"),
    "more strings than bytes": (
        header(entry("a", 9, struct.pack("<iQ", 8, 1 << 20))),
        "claims 1,048,576 strings",
    ),
    "a string array that is cut short": (
        header(entry("a", 9, struct.pack("<iQ", 8, 3) + text("b") + struct.pack("<Q", 9999))),
        "string 1 of 'a'",
    ),
    "an alignment of zero": (
        header(entry("general.alignment", 4, struct.pack("<I", 0))),
        "power of two",
    ),
    "an alignment of 24": (
        header(entry("general.alignment", 4, struct.pack("<I", 24))),
        "power of two",
    ),
    "an alignment of another type": (
        header(entry("general.alignment", 10, struct.pack("<Q", 32))),
        "must be a u32",
    ),
    "a tensor twice": (
        header(tensors=(tensor("t", (1,)), tensor("t", (1,), offset=32))),
        "'t' is there twice",
    ),
    "a tensor name of 64 bytes": (header(tensors=(tensor("n" * 64, (1,)),)), "longer than 63"),
    "a tensor name that is no text": (header(tensors=(tensor(b"\xc3", (1,)),)), "not UTF-8"),
    "five dimensions": (header(tensors=(tensor("t", (1,) * 5),)), "5 dimensions"),
    "four billion dimensions": (
        header(tensors=(tensor("t", (1,), rank=2**32 - 1),)),
        "dimensions",
    ),
    "a negative dimension": (header(tensors=(tensor("t", (4, -1)),)), "impossible shape"),
    "a dimension of zero": (header(tensors=(tensor("t", (0,)),)), "impossible shape"),
    "a shape that overflows": (header(tensors=(tensor("t", (1 << 40, 1 << 40)),)), "overflows"),
    "an unknown tensor type": (header(tensors=(tensor("t", (32,), type=200),)), "unknown type 200"),
    "a tensor type that was removed": (header(tensors=(tensor("t", (32,), type=4),)), "type 4"),
    "rows that are no whole blocks": (
        header(tensors=(tensor("t", (33, 2), type=2),)),
        "not a multiple of Q4_0's block of 32",
    ),
    "an offset that is not aligned": (
        header(tensors=(tensor("t", (1,)), tensor("u", (1,), offset=4))),
        "not aligned",
    ),
    "tensors that overlap": (
        header(tensors=(tensor("t", (16,)), tensor("u", (1,), offset=32))),
        "overlaps",
    ),
    "a hole between tensors": (
        header(tensors=(tensor("t", (1,)), tensor("u", (1,), offset=64))),
        "leaves a hole",
    ),
    "a tensor beyond the end": (
        header(tensors=(tensor("t", (1 << 20,)),)),
        "truncated: tensor 't'",
    ),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_file_is_refused_by_file_and_place(what: str, opened: Opened) -> None:
    data, message = MALFORMED[what]
    with pytest.raises(FormatError, match=message) as caught:
        opened(data)
    assert "model.gguf" in caught.value.message
    assert "at byte" in caught.value.message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        GgufFile.open(tmp_path / "none.gguf")


def _sample(folder: Path) -> bytes:
    """A small whole file with every kind of value."""
    entries = [KeyValue("general.architecture", "llama", STRING)]
    values = {
        **dict.fromkeys((ValueType.UINT8, ValueType.UINT16, ValueType.UINT64), 3),
        **dict.fromkeys((ValueType.INT8, ValueType.INT16, ValueType.INT32, ValueType.INT64), -3),
        **dict.fromkeys((ValueType.FLOAT32, ValueType.FLOAT64), 0.5),
        ValueType.BOOL: True,
        U32: 3,
    }
    for type, value in values.items():
        entries.append(KeyValue(f"one.{type.name}", value, type))
        entries.append(KeyValue(f"many.{type.name}", [value] * 3, ARRAY, type))
    entries.append(KeyValue("many.strings", ["a", "", "ü"], ARRAY, STRING))
    infos = [
        TensorInfo("a.weight", (2, 64), TENSOR_TYPES["Q4_0"]),
        TensorInfo("b.weight", (5,), TENSOR_TYPES["F32"]),
    ]
    path = folder / "sample.gguf"
    with GgufWriter(path, GgufLayout.of(entries, infos), force=True) as writer:
        for info in infos:
            writer.write(info, torch.zeros(info.nbytes, dtype=torch.uint8))
    return path.read_bytes()


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, int, bytes]]:
    """Edits of a file: overwrite bytes (often with extreme numbers), cut, insert."""
    edits = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["overwrite", "overwrite", "overwrite", "cut", "insert"]))
        numbers = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
        payload = draw(
            st.binary(min_size=1, max_size=8) | numbers.map(lambda n: struct.pack("<Q", n))
        )
        edits.append((kind, draw(st.integers(0, 2**16)), payload))
    return edits


def mutate(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, position, payload in edits:
        at = position % (len(data) + 1)
        if kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + payload + data[at:]
        else:
            data = data[:at] + payload + data[at + len(payload) :]
    return data


def _survives(folder: Path, data: bytes) -> None:
    """A file is read or refused; what is read lies within the file."""
    path = folder / "mutated.gguf"
    path.unlink(missing_ok=True)  # to cut a file waits for the disk
    path.write_bytes(data)
    try:
        file = GgufFile.open(path)
    except FormatError:
        return
    for name, found in file.tensors.items():
        assert found.offset + found.nbytes <= len(data)
        assert file.data(name).numel() == found.nbytes


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return _sample(tmp_path_factory.mktemp("sample"))


ALLOWED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=400, deadline=None, suppress_health_check=ALLOWED)
@given(edits=mutations())
def test_mutated_files_are_read_or_refused(
    edits: list[tuple[str, int, bytes]], sample: bytes, tmp_path: Path
) -> None:
    _survives(tmp_path, mutate(sample, edits))


def test_every_prefix_of_a_file_is_refused(sample: bytes, opened: Opened) -> None:
    whole = opened(sample)
    last = list(whole.tensors.values())[-1]
    for length in range(0, last.offset + last.nbytes, 7):
        with pytest.raises(FormatError):
            opened(sample[:length])


def test_a_vocabulary_of_128_thousand_tokens_is_read_as_the_gguf_package_reads_it(
    shared_data: Path,
) -> None:
    """Against the package's own reader, on a smaller file too large to read with it in full."""
    import gguf

    path = shared_data / "tokenizers" / "gguf-vocab" / "ggml-vocab-llama-spm.gguf"
    ours, theirs = GgufFile.open(path), gguf.GGUFReader(path)
    for found in ours.entries:
        assert theirs.fields[found.key].contents() == found.value, found.key
    large = GgufFile.open(path.with_name("ggml-vocab-llama-bpe.gguf"))
    assert len(large.metadata["tokenizer.ggml.tokens"]) == 128_256  # type: ignore[arg-type]
    assert len(large.metadata["tokenizer.ggml.merges"]) == 280_147  # type: ignore[arg-type]
