"""Importance matrices: mean squared inputs of each linear, in both of llama.cpp's file formats.

A quantizer that knows how large each input usually is spends its bits there: the cost of a wrong
weight w is (its error)² E[x²]. llama-imatrix writes these sums, llama-quantize reads them.

    GGUF   general.type "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size, and
           for each weight two F32 tensors: NAME.in_sum2 [matrices, in], NAME.counts [matrices, 1]
    .dat   i32 entries { i32 length, name, i32 calls, i32 values, f32[values] }
           i32 chunks, i32 length, dataset             (the last three are missing in old files)

A value of a .dat file is the mean times `calls`. The mean here is float32 sum / float32 count, as
llama-quantize takes it, so that it quantizes alike; an expert that saw nothing counts as all ones.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor

from qtool.convert.gguf.container import MAGIC, GgufFile, KeyValue, Value
from qtool.convert.gguf.types import TENSOR_TYPES, ValueType
from qtool.convert.gguf.writer import GgufLayout, GgufWriter, TensorInfo
from qtool.errors import FormatError, OutputExists, QtoolError, UsageError
from qtool.output import flush_to_disk

ImatrixFormat = Literal["gguf", "dat"]

SUMS, COUNTS = ".in_sum2", ".counts"
_DATASETS = "imatrix.datasets"
_CHUNK_COUNT = "imatrix.chunk_count"
_CHUNK_SIZE = "imatrix.chunk_size"
_MAX_NAME = 1 << 12


@dataclass(frozen=True, slots=True)
class Importance:
    """What one weight's inputs were.

    sums    [matrices, in] float32, sum of x²; one matrix, or one an expert
    counts  [matrices] float32, vectors seen
    """

    sums: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        assert self.sums.ndim == 2, self.sums.shape
        assert self.counts.shape == self.sums.shape[:1], (self.counts.shape, self.sums.shape)
        assert self.sums.dtype == self.counts.dtype == torch.float32

    @property
    def mean(self) -> Tensor:
        """[matrices, in] float32."""
        empty = self.counts == 0
        means = self.sums / torch.where(empty, 1.0, self.counts)[:, None]
        return torch.where(empty[:, None], 1.0, means)


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """Entries by GGUF weight name ("blk.0.attn_q.weight"); the rest says where they come from.

    file  what llama-quantize would note as quantize.imatrix.file; None for one that is in memory
    """

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    file: str | None = None

    def vector(self, name: str, columns: int) -> Tensor | None:
        """Mean squares [columns] of a matrix's inputs; None where there is no entry."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.sums.numel() != columns:
            raise QtoolError(
                f"the importance matrix has {entry.sums.numel()} values for {name}, "
                f"whose rows are {columns}",
                "it was made from another model",
            )
        return entry.mean.reshape(-1)


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read either format."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    matrix = _read_gguf(path) if magic == MAGIC else _Dat(path).read()
    for name, entry in matrix.entries.items():
        for values in (entry.sums, entry.counts):
            if not bool(values.isfinite().all()) or bool((values < 0).any()):
                raise FormatError(f"{path}: {name} has values that no sum of squares can have")
    return matrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = GgufFile.open(path)
    metadata = file.metadata
    if metadata.get("general.type") != "imatrix":
        raise FormatError(
            f"{path}: a GGUF file of type {metadata.get('general.type')!r}, no imatrix"
        )
    datasets = metadata.get(_DATASETS)
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        raise FormatError(f"{path}: {_DATASETS} is {datasets!r}, not a list of names")
    chunk_count, chunk_size = (_number(path, metadata, key) for key in (_CHUNK_COUNT, _CHUNK_SIZE))
    entries: dict[str, Importance] = {}
    for name, tensor in file.tensors.items():
        stem = next((name.removesuffix(end) for end in (SUMS, COUNTS) if name.endswith(end)), None)
        if stem is None:
            raise FormatError(f"{path}: tensor {name!r} is neither sums nor counts")
        other = stem + (COUNTS if name.endswith(SUMS) else SUMS)
        if other not in file.tensors:
            raise FormatError(f"{path}: {name} is there, {other} is not")
        if name.endswith(COUNTS):
            continue
        counts = _floats(file, other)
        if tensor.shape[:-1] not in ((), (counts.numel(),)) or (
            len(tensor.shape) == 1 and counts.numel() != 1
        ):
            raise FormatError(
                f"{path}: {name} has shape {list(tensor.shape)} with {counts.numel()} counts"
            )
        entries[stem] = Importance(_floats(file, name).view(counts.numel(), -1), counts)
    if not entries:
        raise FormatError(f"{path}: an importance matrix without entries")
    return ImportanceMatrix(entries, tuple(datasets), chunk_count, chunk_size, str(path))


def _number(path: Path, metadata: Mapping[str, Value], key: str) -> int:
    value = metadata.get(key)
    if not isinstance(value, int):
        raise FormatError(f"{path}: {key} is {value!r}, not a number")
    return value


def _floats(file: GgufFile, name: str) -> Tensor:
    type = file.tensors[name].type.name
    if type != "F32":
        raise FormatError(f"{file.path}: tensor {name!r} is {type}, not F32")
    return file.data(name).clone().view(torch.float32).view(-1)


class _Dat:
    """One pass over a .dat file; every length is compared with what is left of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = memoryview(path.read_bytes())
        self.position = 0

    def fail(self, problem: str, at: int) -> NoReturn:
        raise FormatError(
            f"{self.path}: {problem} (at byte {at})",
            "it is neither a GGUF nor a .dat importance matrix, or is damaged",
        )

    def take(self, count: int, what: str) -> memoryview:
        left = len(self.data) - self.position
        if not 0 <= count <= left:
            self.fail(f"{what} takes {count:,} bytes and {left:,} are left", self.position)
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])

    def text(self, what: str) -> str:
        at = self.position
        length = self.number(f"the length of {what}")
        if not 0 <= length <= _MAX_NAME:
            self.fail(f"{what} claims {length:,} bytes", at)
        try:
            return bytes(self.take(length, what)).decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8", at)

    def read(self) -> ImportanceMatrix:
        count = self.number("the number of entries")
        if count < 1:
            self.fail(f"{count} entries", 0)
        entries: dict[str, Importance] = {}
        for index in range(count):
            at = self.position
            name = self.text(f"the name of entry {index}")
            if name in entries:
                self.fail(f"the entry {name!r} is there twice", at)
            calls = self.number(f"the calls of {name!r}")
            size = self.number(f"the size of {name!r}")
            if size < 1 or calls < 0:
                self.fail(f"the entry {name!r} has {size} values of {calls} calls", at)
            values = bytearray(self.take(4 * size, f"the values of {name!r}"))
            # no calls: the values are means already
            sums = torch.frombuffer(values, dtype=torch.float32).view(1, -1)
            entries[name] = Importance(sums, torch.tensor([float(max(calls, 1))]))
        chunk_count, datasets = 0, tuple[str, ...]()
        if self.position < len(self.data):
            chunk_count = self.number("the number of chunks")
            datasets = (self.text("the dataset's name"),)
        if self.position < len(self.data):
            self.fail(f"{len(self.data) - self.position:,} bytes too many", self.position)
        return ImportanceMatrix(entries, datasets, chunk_count, 0, str(self.path))


def default_format(path: Path) -> ImatrixFormat:
    return "dat" if path.suffix == ".dat" else "gguf"


def write_imatrix(
    matrix: ImportanceMatrix, path: Path, format: ImatrixFormat, *, force: bool = False
) -> None:
    """Write either format; nothing appears under the name before it is whole."""
    if format == "gguf":
        _write_gguf(matrix, path, force)
        return
    if path.exists() and not force:
        raise OutputExists(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder", "name another --out")
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(_dat_bytes(matrix))
        flush_to_disk(partial)
        partial.replace(path)
    except OSError as error:
        raise QtoolError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _write_gguf(matrix: ImportanceMatrix, path: Path, force: bool) -> None:
    head = [
        KeyValue("general.type", "imatrix", ValueType.STRING),
        KeyValue(_DATASETS, list(matrix.datasets), ValueType.ARRAY, ValueType.STRING),
        KeyValue(_CHUNK_COUNT, matrix.chunk_count, ValueType.UINT32),
        KeyValue(_CHUNK_SIZE, matrix.chunk_size, ValueType.UINT32),
    ]
    tensors: list[tuple[TensorInfo, Tensor]] = []
    for name, entry in sorted(matrix.entries.items()):
        for suffix, values in ((SUMS, entry.sums), (COUNTS, entry.counts[:, None])):
            info = TensorInfo(name + suffix, tuple(values.shape), TENSOR_TYPES["F32"])
            tensors.append((info, values.contiguous()))
    with GgufWriter(path, GgufLayout.of(head, [info for info, _ in tensors]), force=force) as file:
        for info, values in tensors:
            file.write(info, values.view(torch.uint8))


def _dat_bytes(matrix: ImportanceMatrix) -> bytes:
    """One count an entry: that of the matrix that saw most, in chunks rounded up."""
    parts = [struct.pack("<i", len(matrix.entries))]
    size = max(1, matrix.chunk_size)
    for name, entry in sorted(matrix.entries.items()):
        calls = max(1, -(-int(entry.counts.max()) // size))
        values = (entry.mean * float(calls)).reshape(-1)
        raw = name.encode()
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, values.numel())]
        parts.append(values.contiguous().numpy().astype("<f4").tobytes())
    dataset = (matrix.datasets[0] if matrix.datasets else "").encode()
    parts += [struct.pack("<ii", matrix.chunk_count, len(dataset)), dataset]
    return b"".join(parts)
