"""Reading Hugging Face models on disk, tensor by tensor.

Every safetensors header is validated here before anything is mapped: a header is untrusted input,
and the errors must name the file and the key. Data is then read through the safetensors library,
one tensor at a time.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtool.errors import FormatError
from qtool.json_files import read_json
from qtool.torch_files import read_torch_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Checkpoints of before safetensors; read where there is nothing newer.
OLD_INDEX_NAME = "pytorch_model.bin.index.json"
OLD_SINGLE_NAME = "pytorch_model.bin"
# safetensors' own limit on a header.
MAX_HEADER_BYTES = 100_000_000
# A tensor that is small beside what opening its file costs.
SMALL_BYTES = 1 << 20

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its file's header describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A Hugging Face model folder, opened lazily: headers now, tensors when asked for.

    mapped   tensors of older `.bin` files, which are views of them
    handles  open safetensors files, for small tensors: opening one parses its header again, which
             takes longer than reading them. A large one's pages are to be gone with it, and with
             a file of its own they are
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    mapped: Mapping[str, Tensor] = field(default_factory=dict)
    handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        config = read_json(folder / "config.json")
        tensors: dict[str, TensorInfo] = {}
        mapped: dict[str, Tensor] = {}
        for file in _weight_files(folder):
            if file.suffix == ".bin":
                held = read_torch_file(file)
                mapped |= held
                infos = {name: _mapped_entry(file, name, held[name]) for name in held}
            else:
                infos = read_safetensors_header(file)
            for name, info in infos.items():
                if name in tensors:
                    raise FormatError(
                        f"tensor {name!r} is in {tensors[name].file.name} and in {file.name}"
                    )
                tensors[name] = info
        return cls(folder, config, tensors, mapped)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, read from its file."""
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(f"{self.folder.name} has no tensor {name!r}")
        if name in self.mapped:
            return self.mapped[name].clone(memory_format=torch.contiguous_format)
        try:
            tensor: Tensor = self._opened(info).get_tensor(name)
        except SafetensorError as error:
            raise FormatError(f"{info.file.name}: tensor {name!r}: {error}") from error
        return tensor

    def part(self, name: str, runs: Sequence[range | None]) -> Tensor:
        """A run along each axis of one tensor, None for all of it; the rest is not read."""
        info = self.tensors.get(name)
        cuts = tuple(slice(None) if run is None else slice(run.start, run.stop) for run in runs)
        if info is None or name in self.mapped or info.dtype.itemsize == 1:
            # Slices of 8-bit types are not in every version of the library.
            return _byte_wise(self.tensor(name), cuts)
        try:
            tensor: Tensor = self._opened(info).get_slice(name)[cuts]
        except SafetensorError as error:
            raise FormatError(f"{info.file.name}: tensor {name!r}: {error}") from error
        return tensor

    def _opened(self, info: TensorInfo) -> Any:
        file = self.handles.get(info.file) if info.nbytes <= SMALL_BYTES else None
        if file is None:
            file = safe_open(str(info.file), framework="pt")
            if info.nbytes <= SMALL_BYTES:
                self.handles[info.file] = file
        return file

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def generation_config(self) -> dict[str, Any]:
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else {}


def _byte_wise(tensor: Tensor, cuts: tuple[slice, ...]) -> Tensor:
    """torch does not copy every 8-bit float type."""
    if tensor.dtype.itemsize > 1:
        return tensor[cuts].clone()
    return tensor.view(torch.uint8)[cuts].clone().view(tensor.dtype)


def _without_twins(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of a header; the format forbids a key twice, and parsers differ in which they
    take."""
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise FormatError(f"{where}: the header has the key {name!r} twice")
        entries[name] = value
    return entries


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, checked: known dtypes, sizes that agree with shapes, no
    gaps, no overlaps, no name twice.

    Layout: u64 little-endian header length, JSON header, data. Raises FormatError with the file
    and the key.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise FormatError(f"{path.name} is {size} bytes long, too short for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise FormatError(
                f"{path.name}: the header claims {length} bytes in a file of {size}",
                "the file is truncated or is not safetensors; fetch it again",
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=partial(_without_twins, path.name))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path.name}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise FormatError(f"{path.name}: the header is not a JSON object")
    infos: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        info, begin, end = _tensor_entry(path, name, entry)
        infos[name] = info
        ranges.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(ranges):
        if begin != expected:
            word = "overlaps the one before" if begin < expected else "leaves a gap before it"
            raise FormatError(f"{path.name}: tensor {name!r} at offset {begin} {word}")
        expected = end
    if 8 + length + expected != size:
        raise FormatError(
            f"{path.name}: tensors need {expected} bytes, the file holds {size - 8 - length}",
            "the file is truncated or has trailing data; fetch it again",
        )
    return infos


def _tensor_entry(path: Path, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    where = f"{path.name}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise FormatError(f"{where} is not described by an object")
    dtype = DTYPES.get(str(entry.get("dtype")))
    shape = entry.get("shape")
    offsets = entry.get("data_offsets")
    if dtype is None:
        raise FormatError(f"{where} has dtype {entry.get('dtype')!r}, which is not read")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise FormatError(f"{where} has shape {shape!r} and offsets {offsets!r}")
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise FormatError(
            f"{where} of shape {shape} and {dtype} takes {nbytes} bytes, its offsets "
            f"{begin} to {end} hold {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), nbytes, path), begin, end


def _mapped_entry(path: Path, name: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes, path)


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def _weight_files(folder: Path) -> list[Path]:
    for index, single in ((INDEX_NAME, SINGLE_NAME), (OLD_INDEX_NAME, OLD_SINGLE_NAME)):
        if (folder / index).is_file():
            return _indexed_files(folder, index, Path(single).suffix)
        if (folder / single).is_file():
            return [folder / single]
    raise FormatError(
        f"{folder} has no {SINGLE_NAME}, no {INDEX_NAME} and no {OLD_SINGLE_NAME}",
        "save the model with save_pretrained first",
    )


def _indexed_files(folder: Path, index: str, suffix: str) -> list[Path]:
    """The files that an index names, each in the folder itself and of the index's kind."""
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise FormatError(f"{index} has no weight_map of tensor names to file names")
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise FormatError(f"{index} names {name!r}, which is outside the model's folder")
        if Path(name).suffix != suffix:
            raise FormatError(f"{index} names {name!r}, which is no {suffix} file")
        if not (folder / name).is_file():
            raise FormatError(
                f"{index} names {name}, which is missing", "fetch the model's files again"
            )
        files.append(folder / name)
    return files
