"""Older checkpoints, `pytorch_model.bin`: what `torch.save` wrote, read without running any of it.

Such a file is a zip archive of raw tensors and one pickle, `data.pkl`, that names and shapes them.
A pickle is a program, so three gates stand before it. Its opcodes are looked through first, and one
that names anything but the few functions that rebuild a tensor is refused by that name. What passes
goes to torch's restricted unpickler (`weights_only=True`), never to Python's. What comes out must
be tensors that lie within the file: the restricted unpickler alone would still let a file ask for
any amount of memory.

Tensors are views of the mapped file until they are read. Files of before torch 1.6 are one long
pickle, which cannot be mapped, and are refused.

Format: pytorch torch/serialization.py, torch/_weights_only_unpickler.py.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qtool.errors import FormatError

MAX_PICKLE_BYTES = 100_000_000
# What a state dict's pickle names, and nothing else of the same modules.
REBUILDERS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
}
STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
ALLOWED = (
    REBUILDERS
    | {f"torch {name}Storage" for name in STORAGES}
    | {f"torch {str(dtype).removeprefix('torch.')}" for dtype in DTYPES}
)
# Opcodes that make objects in other ways than by calling one of ALLOWED.
FORBIDDEN = {
    *("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "PERSID"),
    *("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"),
}


def read_torch_file(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a `.bin` file, as views of it; raises FormatError that names file and key."""
    size = path.stat().st_size
    _check_pickle(path, _pickle_of(path, size))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated storage classes, which files name
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises whatever the contents provoke
        raise FormatError(f"{path.name} cannot be read: {_first_line(error)}") from None
    if not isinstance(state, dict):
        raise FormatError(f"{path.name} holds a {type(state).__name__}, not a table of tensors")
    for name, tensor in state.items():
        _check_tensor(path, name, tensor, size)
    return {name: tensor.detach() for name, tensor in state.items()}


def _pickle_of(path: Path, size: int) -> bytes:
    """The archive's data.pkl. Torch stores and never compresses, so no small file grows large."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise FormatError(f"{path.name} is a zip archive, and not one that torch.save made")
            for entry in entries:
                stored = entry.compress_type == zipfile.ZIP_STORED
                if not stored or entry.file_size != entry.compress_size or entry.file_size > size:
                    raise FormatError(f"{path.name}: {entry.filename} is compressed or damaged")
            if pickles[0].file_size > MAX_PICKLE_BYTES:
                raise FormatError(f"{path.name}: data.pkl is larger than {MAX_PICKLE_BYTES} bytes")
            return archive.read(pickles[0])
    except FormatError:
        raise
    except Exception as error:  # zipfile raises whatever the contents provoke
        raise FormatError(
            f"{path.name} is no archive of torch.save: {_first_line(error)}",
            "a file of before torch 1.6, or a truncated one: load it with the torch of its time "
            "and save it with safetensors, or fetch the model's safetensors version",
        ) from None


def _check_pickle(path: Path, program: bytes) -> None:
    """Raise where a pickle names, or could name, anything that no table of tensors needs."""
    try:
        for opcode, argument, position in pickletools.genops(program):
            if opcode.name in FORBIDDEN:
                raise FormatError(
                    f"{path.name}: data.pkl has the opcode {opcode.name} at byte {position}, "
                    "which no table of tensors needs"
                )
            if opcode.name == "GLOBAL" and argument not in ALLOWED:
                raise FormatError(
                    f"{path.name}: data.pkl calls {str(argument).replace(' ', '.')} at byte "
                    f"{position}; it was not run",
                    "the file would run code when loaded: do not trust it",
                )
    except FormatError:
        raise
    except Exception as error:  # pickletools raises whatever the contents provoke
        raise FormatError(f"{path.name}: data.pkl is damaged: {_first_line(error)}") from None


def _check_tensor(path: Path, name: object, tensor: object, size: int) -> None:
    where = f"{path.name}: {name!r}"
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise FormatError(f"{where} is a {type(tensor).__name__}, not a tensor under a name")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise FormatError(f"{where} is {tensor.layout} on {tensor.device}")
    if tensor.dtype not in DTYPES:
        raise FormatError(f"{where} has dtype {tensor.dtype}, which is not read")
    # Strides of zero or past each other let a small storage pose as a huge tensor.
    if tensor.nbytes > tensor.untyped_storage().nbytes() or tensor.nbytes > size:
        raise FormatError(f"{where} of shape {list(tensor.shape)} is larger than its data")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
