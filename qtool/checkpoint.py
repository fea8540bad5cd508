"""Hugging Face models on disk: find one by name, read it tensor by tensor, write one without ever
leaving a half.

Reading validates every safetensors header by itself before anything is mapped: a header is
untrusted input, and the errors must name the file and the key. Data is then read through the
safetensors library, one tensor at a time. Writing goes to a hidden sibling of the output
(``.NAME.partial``) that takes the final name by one rename.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtool.builtin import PREFIX, builtin_model
from qtool.errors import FormatError, OutputExists, QtoolError, UsageError
from qtool.settings import settings
from qtool.torch_files import read_torch_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Checkpoints of before safetensors; read where there is nothing newer.
OLD_INDEX_NAME = "pytorch_model.bin.index.json"
OLD_SINGLE_NAME = "pytorch_model.bin"
# safetensors' own limit on a header.
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 200_000_000
DEFAULT_SHARD_BYTES = 5_000_000_000

_DTYPES: dict[str, torch.dtype] = {
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
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# What is copied beside the weights: tokenizer, templates, generation defaults, licence and card.
SIDE_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "*.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True, slots=True)
class Source:
    """A model as the user named it, and where it is on this machine."""

    name: str
    path: Path
    revision: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()

    @property
    def short_name(self) -> str:
        """For naming outputs: ``Qwen/Qwen3-0.6B`` and ``./Qwen3-0.6B/`` are both Qwen3-0.6B."""
        if self.is_gguf:
            return self.path.stem
        name = self.name.removeprefix(PREFIX).rstrip("/")
        return Path(name).name or self.path.name


def resolve(model: str, revision: str | None = None) -> Source:
    """Find a model: a folder, a .gguf file, ``builtin:NAME``, or a Hub id (the local cache alone
    when offline).
    """
    if model.startswith(PREFIX):
        return Source(model, builtin_model(model.removeprefix(PREFIX)))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"{path} has no config.json, so it is not a Hugging Face model folder",
                "name the folder that holds config.json and the .safetensors files",
            )
        return Source(model, path.resolve())
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(
                f"{path} is a file, and the only model files read are .gguf",
                "name the model's folder instead",
            )
        return Source(model, path.resolve())
    return _resolve_hub(model, revision)


def _resolve_hub(model: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UsageError(
            f"no model at {model!r}",
            "name a folder, a .gguf file, a Hub id such as Qwen/Qwen3-0.6B, or builtin:books-7m",
        )

    def download(*patterns: str) -> Path:
        offline = settings().hub_offline
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=[*patterns], local_files_only=offline
            )
        )

    try:
        path = download("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*")
        if not any(path.glob("*.safetensors")):
            path = download("*.json", "pytorch_model*.bin")
    except HFValidationError as error:
        raise UsageError(f"{model!r} is neither a path nor a Hub id", str(error)) from error
    except GatedRepoError as error:
        raise QtoolError(
            f"{model} is gated: its owner wants you to accept a licence first",
            f"accept it at https://huggingface.co/{model}, then run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{model} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"no model {model!r} on the Hub, nor a folder of that name here",
            "check the spelling; for a private model run `hf auth login` first",
        ) from error
    except LocalEntryNotFoundError as error:
        offline = settings().hub_offline
        raise QtoolError(
            f"{model} is not in the local Hub cache"
            + (" and HF_HUB_OFFLINE is set" if offline else ", and the Hub cannot be reached"),
            "unset HF_HUB_OFFLINE to download it"
            if offline
            else "check the network, or name a local folder",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise QtoolError(
            f"{model} could not be taken from the Hub: {error}",
            "check the network, or name a local folder",
        ) from error
    if not (path / "config.json").is_file():
        raise UsageError(f"{model} has no config.json, so it is not a transformers model")
    # In the Hub cache a snapshot's folder is named after its commit.
    return Source(model, path, revision=path.name)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its file's header describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises FormatError that names the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FormatError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    # ValueError: no JSON, no UTF-8, or a number of more digits than Python converts.
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, checked: known dtypes, sizes that agree with shapes, no
    gaps, no overlaps.

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
        header = json.loads(raw)
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
    dtype = _DTYPES.get(str(entry.get("dtype")))
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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A Hugging Face model folder, opened lazily: headers now, tensors when asked for.

    mapped  tensors of older `.bin` files, which are views of them
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    mapped: Mapping[str, Tensor] = field(default_factory=dict)

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
            with safe_open(str(info.file), framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise FormatError(f"{info.file.name}: tensor {name!r}: {error}") from error
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def generation_config(self) -> dict[str, Any]:
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else {}


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


class OutputFolder:
    """A folder that appears under its name only when complete.

    ``with OutputFolder(out) as stage:`` gives ``stage.path``, a hidden sibling ``.NAME.partial``.
    A clean exit flushes it to disk and renames it to ``out``; an exception removes it, unless
    ``resumable``, where it stays for the next try.
    """

    def __init__(
        self,
        out: Path,
        *,
        force: bool = False,
        resumable: bool = False,
        needed_bytes: int | None = None,
    ) -> None:
        self.out = out.absolute()
        self.path = self.out.parent / f".{self.out.name}.partial"
        self._force = force
        self._resumable = resumable
        if self.out.exists() and not force:
            raise OutputExists(out)
        if force and self.out.exists() and not _is_model_folder(self.out):
            raise UsageError(
                f"{out} exists and is not a model folder, so --force does not replace it",
                "name another --out, or remove it by hand",
            )
        parent = _existing_parent(self.out)
        if not os.access(parent, os.W_OK):
            raise UsageError(f"{parent} is not writable, so {out} cannot be made")
        require_disk_space(parent, needed_bytes)

    def __enter__(self) -> OutputFolder:
        if self.path.exists() and not self._resumable:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            if not self._resumable:
                shutil.rmtree(self.path, ignore_errors=True)
            return
        for file in self.path.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        if self.out.exists():
            if not self._force:
                raise OutputExists(self.out)
            retired = self.out.parent / f".{self.out.name}.replaced"
            shutil.rmtree(retired, ignore_errors=True)
            self.out.rename(retired)
            self.path.rename(self.out)
            shutil.rmtree(retired)
        else:
            self.path.rename(self.out)
        flush_to_disk(self.out.parent)


def _is_model_folder(path: Path) -> bool:
    """Whether --force may replace it: an empty folder, or one that holds a model or a report of
    ours.
    """
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    return not names or bool(names & {"config.json", "qtool.json", "report.json"})


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())


def require_disk_space(folder: Path, needed_bytes: int | None) -> None:
    """Refuse work whose output does not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if needed_bytes is not None and needed_bytes > free:
        raise QtoolError(
            f"the output needs {needed_bytes / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free",
            "free some space, or name another --out",
        )


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer, templates, generation defaults and licence; returns the names copied."""
    names = sorted({path.name for pattern in SIDE_FILES for path in source.glob(pattern)})
    files = [source / name for name in names if (source / name).is_file()]
    for file in files:
        # copyfile, not copy: a Hub cache holds links to read-only blobs.
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]
