"""Writing GGUF in two passes: first every name, shape, type and offset, then the data, streamed.

The header of a GGUF file needs no tensor data: a tensor's bytes follow from its shape and type. So
`GgufLayout` fixes the whole file beforehand (and its size, to check against the disk), and
`LayoutFile` then takes the tensors' bytes one slab after another, in the layout's order. Memory is
one slab. Nothing appears under the final name before the file is complete and on disk:
`GgufWriter`, for small files, writes ".NAME.partial" beside it, which is renamed on success and
removed on failure; staging.py does for models.

Bytes are those of ggml's C writer: trailing dimensions of 1 are dropped from a shape (at least one
stays), every tensor is padded with zeros, the last one too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor

from qtool.convert.gguf.container import (
    MAGIC,
    MAX_RANK,
    MAX_TENSOR_NAME_BYTES,
    KeyValue,
    Value,
    pad_to,
)
from qtool.convert.gguf.types import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    SCALAR_FORMATS,
    TensorType,
    ValueType,
)
from qtool.errors import OutputExists, QtoolError, UsageError
from qtool.output import flush_to_disk, require_disk_space

VERSION = 3


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor to be written: its shape in torch's order; `nbytes` follows from shape and type."""

    name: str
    shape: tuple[int, ...]
    type: TensorType

    def __post_init__(self) -> None:
        assert len(self.name.encode()) <= MAX_TENSOR_NAME_BYTES, self.name
        assert 1 <= len(self.shape) <= MAX_RANK, (self.name, self.shape)
        assert self.shape[-1] % self.type.block_size == 0, (self.name, self.shape, self.type.name)

    @property
    def rows(self) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    @property
    def nbytes(self) -> int:
        return self.rows * self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """A whole file but for its data: the header's bytes, where each tensor lies, the total size."""

    header: bytes
    tensors: tuple[TensorInfo, ...]
    offsets: tuple[int, ...]
    nbytes: int
    alignment: int

    @classmethod
    def of(cls, entries: Sequence[KeyValue], tensors: Sequence[TensorInfo]) -> GgufLayout:
        alignment = next(
            (entry.value for entry in entries if entry.key == ALIGNMENT_KEY), DEFAULT_ALIGNMENT
        )
        assert isinstance(alignment, int)
        parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(entries))]
        parts += [encode_entry(entry) for entry in entries]
        offsets, end = [], 0
        for info in tensors:
            offsets.append(end)
            parts.append(encode_info(info, end))
            end = pad_to(end + info.nbytes, alignment)
        header = b"".join(parts)
        header += bytes(pad_to(len(header), alignment) - len(header))
        begin = len(header)
        return cls(
            header,
            tuple(tensors),
            tuple(begin + offset for offset in offsets),
            begin + end,
            alignment,
        )

    def end_of(self, count: int) -> int:
        """Where the first `count` tensors end, with their padding."""
        return self.offsets[count] if count < len(self.offsets) else self.nbytes


def encode_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def encode_scalar(value: Value, type: ValueType) -> bytes:
    if type is ValueType.STRING:
        assert isinstance(value, str), value
        return encode_string(value)
    return struct.pack("<" + SCALAR_FORMATS[type], value)


def encode_entry(entry: KeyValue) -> bytes:
    head = encode_string(entry.key) + struct.pack("<i", entry.type)
    if entry.type is not ValueType.ARRAY:
        return head + encode_scalar(entry.value, entry.type)
    assert entry.element is not None, entry.key
    assert isinstance(entry.value, list), entry.key
    head += struct.pack("<iQ", entry.element, len(entry.value))
    if entry.element is ValueType.STRING:
        return head + b"".join([encode_string(text) for text in entry.value])
    layout = f"<{len(entry.value)}{SCALAR_FORMATS[entry.element]}"
    return head + struct.pack(layout, *entry.value)


def encode_info(info: TensorInfo, offset: int) -> bytes:
    dims = list(reversed(info.shape))
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    return encode_string(info.name) + struct.pack(
        f"<I{len(dims)}qiQ", len(dims), *dims, info.type.id, offset
    )


class LayoutFile:
    """A layout's file on its way, slab after slab in the layout's order.

    shown     the name that errors speak of
    finished  tensors at its beginning that are there already; what follows them is cut off
    """

    def __init__(self, path: Path, layout: GgufLayout, *, shown: Path, finished: int = 0) -> None:
        self.layout = layout
        self._shown = shown
        self._next = finished  # the tensor that is being written
        self._written = 0  # bytes of it so far
        try:
            self._file = path.open("r+b" if finished else "wb")
        except OSError as error:
            raise QtoolError(f"{shown} cannot be made: {error.strerror or error}") from error
        if finished:
            self._file.truncate(layout.end_of(finished))
            self._file.seek(0, 2)
        else:
            self._append(layout.header)

    @property
    def is_complete(self) -> bool:
        return self._next == len(self.layout.tensors)

    def write(self, info: TensorInfo, slab: Tensor) -> bool:
        """Append bytes (uint8, contiguous, CPU) of `info`, the next tensor that is not complete;
        returns whether it is now.
        """
        expected = self.layout.tensors[self._next]
        assert info == expected, f"{info.name} written where {expected.name} belongs"
        self._written += slab.numel()
        assert self._written <= info.nbytes, f"{info.name} has more bytes than {info.nbytes}"
        self._append(slab.contiguous().numpy().data)
        if self._written < info.nbytes:
            return False
        self._append(bytes(pad_to(info.nbytes, self.layout.alignment) - info.nbytes))
        self._next, self._written = self._next + 1, 0
        return True

    def flush(self) -> None:
        """Hand everything to the operating system, where it outlives this process."""
        with self._disk_errors():
            self._file.flush()

    def close(self) -> None:
        with self._disk_errors():
            self._file.close()

    def _append(self, data: bytes | memoryview) -> None:
        with self._disk_errors():
            self._file.write(data)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(
                f"{self._shown} cannot be written: {error.strerror or error}", "is the disk full?"
            ) from error


class DiskError(QtoolError):
    """The disk took no more: the work so far is good."""


class GgufWriter:
    """Streams a layout's data into a file that appears under its name only when whole.

    with GgufWriter(Path("model.gguf"), layout) as writer:
        for info in layout.tensors:
            for slab in ...:
                writer.write(info, slab)
    """

    def __init__(self, path: Path, layout: GgufLayout, *, force: bool = False) -> None:
        if path.exists() and not force:
            raise OutputExists(path)
        if path.is_dir():
            raise UsageError(
                f"{path} is a folder, and a GGUF model is one file", "name a .gguf file"
            )
        self.path = path
        self.layout = layout
        self.partial = path.with_name(f".{path.name}.partial")

    def __enter__(self) -> GgufWriter:
        make_folder(self.path)
        require_disk_space(self.path.parent, self.layout.nbytes)
        self._file = LayoutFile(self.partial, self.layout, shown=self.path)
        return self

    def write(self, info: TensorInfo, slab: Tensor) -> None:
        self._file.write(info, slab)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            with suppress(DiskError):
                self._file.close()
            self.partial.unlink(missing_ok=True)
            return
        assert self._file.is_complete, "not every tensor was written"
        self._file.close()
        flush_to_disk(self.partial)
        self.partial.replace(self.path)
        flush_to_disk(self.path.parent)  # the rename itself, not only the data


def make_folder(path: Path) -> None:
    """The folder that a file is to be in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QtoolError(f"{path} cannot be made: {error.strerror or error}") from error
