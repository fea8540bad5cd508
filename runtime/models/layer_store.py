"""Where a decoder's packed layers come from: packed now, or from a file where they lie packed.

    "QTPACKED" | tensors, each at a multiple of 64 bytes | index | CRC-32, length of it | "QTPACKED"

The index is JSON: what the file was made from and for (`identity`), and of each layer the kernels,
numbers and places of its tensors. It stands at the end because layers are written as they are
packed, so a file whose writing was broken off has none. Reading maps the file; a page of weights
comes into memory when a kernel reads it, and is shared by all processes that map it.

Layers of kernels that keep a form of their own (codes for the compiled kernels) are in the file;
others are made again from the model.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qtool.errors import FormatError
from qtool.kernels.cpu.native import Native
from qtool.kernels.cpu.native_linear import NativePacked
from qtool.kernels.cpu.packed_form import freeze, thaw
from qtool.kernels.dispatch import KERNELS
from qtool.runtime.layers import Linear, Linears
from qtool.runtime.models.kernel_use import Use

MAGIC = b"QTPACKED"
ALIGNMENT = 64
_TAIL = struct.Struct("<IQ8s")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
}


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayer:
    """A layer and the choice made for each of the weights in it."""

    layer: Linear | Linears
    uses: tuple[Use, ...]


class LayerStore(Protocol):
    def layer(self, name: str, make: Callable[[], PackedLayer]) -> PackedLayer:
        """The layer of that name, made if it is not there."""
        ...


class Unstored:
    """No file: every layer is made."""

    def layer(self, name: str, make: Callable[[], PackedLayer]) -> PackedLayer:
        return make()


UNSTORED = Unstored()


class LayerWriter:
    """Makes every layer and writes it down. The file has its name when `finish` returns, and not
    before; `discard` leaves nothing. Where it cannot be made or ended, that raises OSError; a layer
    that cannot be written is given all the same, no further one is written, and `finish` raises.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        self._part = Path(name)
        self._file = os.fdopen(handle, "wb")
        self._file.write(MAGIC)
        self._layers: dict[str, Any] = {}
        self._failure: OSError | None = None

    def layer(self, name: str, make: Callable[[], PackedLayer]) -> PackedLayer:
        made = make()
        if self._failure is None:
            try:
                self._write(name, made)
            except OSError as error:
                self._failure = error
        return made

    def _write(self, name: str, made: PackedLayer) -> None:
        parts = made.layer.parts if isinstance(made.layer, Linears) else (made.layer,)
        if all(isinstance(part.packed, NativePacked) for part in parts):
            self._layers[name] = {
                "parts": [self._part_entry(part) for part in parts],
                "joined": not isinstance(made.layer, Linears),
                "uses": [list(use) for use in made.uses],
            }

    def _part_entry(self, part: Linear) -> dict[str, Any]:
        tensors, numbers = freeze(part.packed)
        if part.bias is not None:
            tensors["bias"] = part.bias
        places = {name: self._append(tensor) for name, tensor in tensors.items()}
        return {"kernel": part.kernel.name, "numbers": numbers, "tensors": places}

    def _append(self, tensor: Tensor) -> dict[str, Any]:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        data = tensor.contiguous().flatten().view(torch.uint8).numpy()
        self._file.write(data.data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"offset": offset, "dtype": dtype, "shape": list(tensor.shape)}

    def finish(self, identity: Mapping[str, Any]) -> int:
        """Bytes written."""
        if self._failure is not None:
            raise self._failure
        index = json.dumps({"identity": identity, "layers": self._layers}).encode()
        with self._file as file:
            file.write(index + _TAIL.pack(zlib.crc32(index), len(index), MAGIC))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.chmod(self._part, 0o644)
        os.replace(self._part, self._path)
        return size

    def discard(self) -> None:
        with suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)


class LayerReader:
    """Layers from a mapped file; those that are not in it are made."""

    def __init__(self, path: Path, native: Native) -> None:
        """Raises FormatError for a file that is incomplete or not of this format, OSError where
        there is none.
        """
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < len(MAGIC) + _TAIL.size:
                raise FormatError(f"{path.name} is incomplete")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._path = path
        self._native = native
        checksum, length, magic = _TAIL.unpack_from(self._map, size - _TAIL.size)
        start = size - _TAIL.size - length
        if magic != MAGIC or start < len(MAGIC) or self._map[: len(MAGIC)] != MAGIC:
            raise FormatError(f"{path.name} is incomplete")
        index = self._map[start : start + length]
        if zlib.crc32(index) != checksum:
            raise FormatError(f"{path.name} is damaged")
        content = json.loads(index)
        self.identity: dict[str, Any] = content["identity"]
        self._layers: dict[str, Any] = content["layers"]
        self._end = start

    def layer(self, name: str, make: Callable[[], PackedLayer]) -> PackedLayer:
        entry = self._layers.get(name)
        if entry is None:
            return make()
        parts = tuple(self._part(part) for part in entry["parts"])
        uses = tuple(Use(*use) for use in entry["uses"])
        return PackedLayer(parts[0] if entry["joined"] else Linears(parts), uses)

    def _part(self, entry: Mapping[str, Any]) -> Linear:
        tensors = {name: self._tensor(place) for name, place in entry["tensors"].items()}
        bias = tensors.pop("bias", None)
        packed = thaw(self._native, tensors, entry["numbers"])
        if bias is not None and bias.shape != (packed.out_features,):
            raise FormatError(f"{self._path.name}: a bias has shape {list(bias.shape)}")
        kernel = next(row for row in KERNELS if row.name == entry["kernel"])
        return Linear(kernel, packed, bias)

    def _tensor(self, place: Mapping[str, Any]) -> Tensor:
        dtype, offset, shape = _DTYPES[place["dtype"]], int(place["offset"]), place["shape"]
        count = torch.Size(shape).numel()
        if offset % ALIGNMENT or offset + count * dtype.itemsize > self._end:
            raise FormatError(f"{self._path.name}: a tensor lies outside of the file")
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)
        return flat.view(shape)
