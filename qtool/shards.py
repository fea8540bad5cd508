"""Writing a model's tensors into safetensors files, one after the other."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qtool.checkpoint import DTYPES, INDEX_NAME, SINGLE_NAME, TensorInfo
from qtool.errors import QtoolError
from qtool.json_files import write_json

DEFAULT_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Streams tensors into safetensors shards of at most ``max_shard_bytes``; memory is one tensor.

    A safetensors file begins with a header that knows every tensor, and its data has no gaps. So
    data goes to part files first, one for each width of element (8, 4, 2, 1 bytes), which are then
    joined behind the header, widest first: every tensor lies aligned. ``finish`` gives the shards
    their final names (the count is in each name) and writes the index.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._shard = _Shard(folder, 0)
        self._finished: list[_Shard] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self._names:
            raise ValueError(f"tensor {name} was already written")
        self._names.add(name)
        full = self._shard.nbytes + tensor.nbytes > self._max_shard_bytes
        if self._shard.infos and full:
            self._close_shard()
        with _disk_errors(self._shard.path):
            self._shard.append(name, tensor)

    def add_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            self.add(name, tensor)

    def _close_shard(self) -> None:
        with _disk_errors(self._shard.path):
            self._shard.join()
        self._finished.append(self._shard)
        self._shard = _Shard(self._folder, len(self._finished))

    def finish(self) -> None:
        if self._shard.infos or not self._finished:
            self._close_shard()
        count = len(self._finished)
        weight_map = {}
        for number, shard in enumerate(self._finished, start=1):
            final = SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            shard.path.rename(self._folder / final)
            weight_map.update(dict.fromkeys((info.name for info in shard.infos), final))
        if count > 1:
            total = sum(shard.nbytes for shard in self._finished)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self._folder / INDEX_NAME, index)


class _Shard:
    """One safetensors file in the making."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"shard-{number:05d}.partial"
        self.infos: list[TensorInfo] = []
        self.nbytes = 0

    def _part(self, itemsize: int) -> Path:
        return self.path.with_suffix(f".part{itemsize}")

    def append(self, name: str, tensor: Tensor) -> None:
        info = TensorInfo(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes, self.path)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with self._part(tensor.dtype.itemsize).open("ab") as file:
            data.numpy().tofile(file)
        self.infos.append(info)
        self.nbytes += info.nbytes

    def join(self) -> None:
        """Header, then the parts from the widest elements to the narrowest."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for info in sorted(self.infos, key=lambda info: -info.dtype.itemsize):
            offsets = [offset, offset + info.nbytes]
            offset = offsets[1]
            dtype = _DTYPE_NAMES[info.dtype]
            header[info.name] = {"dtype": dtype, "shape": info.shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for part in sorted((self._part(size) for size in (8, 4, 2, 1)), reverse=True):
                if part.exists():
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, file, length=1 << 22)
                    part.unlink()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise QtoolError(
            f"{path.name} could not be written: {error}", "is the disk full?"
        ) from error
