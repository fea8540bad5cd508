"""The compiled block quantizers of `convert/gguf/csrc`: the bytes of the torch ones, sooner.

`search.h` says how: where torch makes each step of a search one pass over memory, compiled code
keeps 4, 8 or 16 blocks side by side in vector registers. The library is built on first use
(qtool/native_build.py); where that cannot be, the functions here return None and torch serves.
Million weights a second on one thread of Zen 4, torch / llama.cpp's C / this with AVX-512
(benchmarks/gguf_blocks.py): Q4_K 9 / 15 / 176, Q6_K 16 / 35 / 355, Q4_K with importance 5 / 9 / 98.
"""

from __future__ import annotations

import functools
import threading
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from qtool.convert.gguf.types import TensorType
from qtool.native_build import InstructionSet, Loaded, Missing, NativeLibrary, open_library
from qtool.progress import console
from qtool.settings import settings

_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
QUANTIZERS = NativeLibrary(
    "blocks",
    "the GGUF block quantizers",
    Path(__file__).parent.parent / "csrc",
    # -O3 unrolls the searches whole: four times the time to compile, for a tenth in speed.
    ("-O2", "-ftree-vectorize", "-fno-trapping-math"),
    (
        InstructionSet(
            "avx512",
            frozenset((*_AVX512, "f16c")),
            (*(f"-m{flag}" for flag in _AVX512), "-mf16c", "-mprefer-vector-width=512"),
        ),
        InstructionSet("avx2", frozenset(("avx2", "f16c")), ("-mavx2", "-mf16c")),
        InstructionSet("portable", frozenset(), ()),
    ),
    {
        "qtool_blocks_isa": (c_char_p, ()),
        "qtool_quantize_blocks": (
            c_int32,
            (c_int32, *(c_void_p,) * 4, c_int64, c_int64, c_int32),
        ),
        "qtool_dequantize_blocks": (c_int32, (c_int32, c_void_p, c_void_p, c_int64, c_int32)),
    },
)

TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"),
)
# Bits of Fault in csrc/interface.h; 1 is for a type that is not one of these.
INPUT_NOT_FINITE, SCALE_NOT_FINITE = 2, 4

_OPENING = threading.Lock()


def load(isa: str | None = None) -> Loaded | Missing:
    """The library for an instruction set, or for the best this CPU has; built on first use."""
    with _OPENING:  # threads that need it at once wait for one build
        return _load(isa)


@functools.cache
def _load(isa: str | None) -> Loaded | Missing:
    return open_library(QUANTIZERS, settings(), isa)


def backend() -> str:
    """Which code quantizes blocks, and why not the compiled one, for a plan or a log."""
    found = load()
    if isinstance(found, Missing):
        return f"torch (compiled code {found.reason})"
    return f"compiled code ({found.isa})"


@functools.cache
def _say_once(reason: str) -> None:
    console.print(
        f"compiled GGUF quantizers: {reason}; torch quantizes, to the same bytes, more slowly",
        highlight=False,
        soft_wrap=True,
    )


def quantize(
    type: TensorType, rows: Tensor, importance: Tensor | None, isa: str | None = None
) -> tuple[Tensor, int] | None:
    """Blocks and faults, or None where the library cannot be had or lacks the type.

    rows        [rows, columns] float32, columns a multiple of the type's block
    importance  [columns] float32 or None
    returns     [rows, row_bytes] uint8, and bits of the faults above
    """
    if type.name not in TYPES or rows.device.type != "cpu":
        return None
    found = load(isa)
    if isinstance(found, Missing):
        _say_once(found.reason)
        return None
    height, columns = rows.shape
    rows = rows.contiguous()
    row_sums = None
    if importance is not None:
        assert importance.shape == (columns,)
        assert importance.dtype == torch.float32
        importance = importance.contiguous()
        row_sums = torch.empty(height)
    data = torch.empty(height, columns // type.block_size * type.block_bytes, dtype=torch.uint8)
    faults: int = found.functions.qtool_quantize_blocks(
        type.id,
        rows.data_ptr(),
        None if importance is None else importance.data_ptr(),
        None if row_sums is None else row_sums.data_ptr(),
        data.data_ptr(),
        height,
        columns,
        torch.get_num_threads(),
    )
    return data, faults


def dequantize(type: TensorType, data: Tensor, isa: str | None = None) -> Tensor | None:
    """[rows, row_bytes] uint8 -> [rows, columns] float32, or None likewise."""
    if type.name not in TYPES or data.device.type != "cpu":
        return None
    found = load(isa)
    if isinstance(found, Missing):
        return None
    height, row_bytes = data.shape
    blocks = row_bytes // type.block_bytes
    data = data.contiguous()
    values = torch.empty(height, blocks * type.block_size)
    found.functions.qtool_dequantize_blocks(
        type.id, data.data_ptr(), values.data_ptr(), height * blocks, torch.get_num_threads()
    )
    return values
