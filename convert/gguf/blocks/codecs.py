"""The table of block types: what reads each one, and what writes those that can be written.

Compiled code (native.py) does the work where a compiler was there to make it, torch elsewhere, to
the same bytes. In torch a matrix is cut into slabs of rows that fit the processor's caches: rows
are independent, so the result does not depend on it. Types that only import needs (the IQ1 to IQ3
codebooks, the ternary and the FP4 ones) are decoded by the `gguf` package, whose tables are long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.convert.gguf.blocks import iq4, kquants, legacy, native, ternary
from qtool.convert.gguf.types import TENSOR_TYPES, TensorType
from qtool.errors import FormatError, QtoolError, UnknownName
from qtool.weights import BlockCodec

Quantizer = Callable[[Tensor, Tensor | None], Tensor]
Dequantizer = Callable[[Tensor], Tensor]

# Weights a slab: small enough for the caches, large enough that a vector operation outweighs its
# call from Python (Q4_K on one thread of Zen 5, million weights a second: 5 with 2**15 of them,
# 11 with 2**18, 9 with 2**19).
SLAB_WEIGHTS = 1 << 18

QUANTIZERS: dict[str, Quantizer] = {
    "Q4_0": legacy.quantize_q4_0,
    "Q4_1": legacy.quantize_q4_1,
    "Q5_0": legacy.quantize_q5_0,
    "Q5_1": legacy.quantize_q5_1,
    "Q8_0": legacy.quantize_q8_0,
    "Q2_K": kquants.quantize_q2_k,
    "Q3_K": kquants.quantize_q3_k,
    "Q4_K": kquants.quantize_q4_k,
    "Q5_K": kquants.quantize_q5_k,
    "Q6_K": kquants.quantize_q6_k,
    "IQ4_NL": iq4.quantize_iq4_nl,
    "IQ4_XS": iq4.quantize_iq4_xs,
    "TQ1_0": ternary.quantize_tq1_0,
    "TQ2_0": ternary.quantize_tq2_0,
    "MXFP4": ternary.quantize_mxfp4,
}
# Where in a block its half-precision scales and minima lie.
_HALVES: dict[str, tuple[int, ...]] = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **{"IQ4_NL": (0,), "IQ4_XS": (0,)},
    **{"TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": ()},
}


def _cast(dtype: torch.dtype) -> tuple[Quantizer, Dequantizer]:
    def write(rows: Tensor, importance: Tensor | None = None) -> Tensor:
        return rows.to(dtype).contiguous().view(torch.uint8)

    def read(data: Tensor) -> Tensor:
        # bytes of a file need not lie on an element's boundary: alignment is the map's, not ours
        return data.clone().view(dtype).float()

    return write, read


_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CASTS = {name: _cast(dtype) for name, dtype in _FLOATS.items()}
_WRITERS: dict[str, Quantizer] = QUANTIZERS | {name: cast[0] for name, cast in _CASTS.items()}
_READERS: dict[str, Dequantizer] = {
    "Q4_0": legacy.dequantize_q4_0,
    "Q4_1": legacy.dequantize_q4_1,
    "Q5_0": legacy.dequantize_q5_0,
    "Q5_1": legacy.dequantize_q5_1,
    "Q8_0": legacy.dequantize_q8_0,
    "Q2_K": kquants.dequantize_q2_k,
    "Q3_K": kquants.dequantize_q3_k,
    "Q4_K": kquants.dequantize_q4_k,
    "Q5_K": kquants.dequantize_q5_k,
    "Q6_K": kquants.dequantize_q6_k,
    "IQ4_NL": iq4.dequantize_iq4_nl,
    "IQ4_XS": iq4.dequantize_iq4_xs,
} | {name: cast[1] for name, cast in _CASTS.items()}
_BY_GGUF_PACKAGE = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)


@dataclass(frozen=True, slots=True)
class Codec:
    """A tensor type that can be read (see BlockCodec in qtool/weights.py)."""

    type: TensorType
    read: Dequantizer

    @property
    def name(self) -> str:
        return self.type.name

    @property
    def block_size(self) -> int:
        return self.type.block_size

    @property
    def block_bytes(self) -> int:
        return self.type.block_bytes

    def dequantize(self, data: Tensor) -> Tensor:
        """[rows, row_bytes] uint8 -> [rows, columns] float32."""
        values = native.dequantize(self.type, data)
        return self.dequantize_by_torch(data) if values is None else values

    def dequantize_by_torch(self, data: Tensor) -> Tensor:
        """The same, in slabs as `quantize_by_torch`."""
        columns = data.shape[1] // self.block_bytes * self.block_size
        height = slab_rows(columns)
        if data.shape[0] <= height:
            return self.read(data)
        values = torch.empty(data.shape[0], columns, device=data.device)
        for begin in range(0, data.shape[0], height):
            values[begin : begin + height] = self.read(data[begin : begin + height])
        return values


def _by_gguf_package(type: TensorType) -> Dequantizer:
    def read(data: Tensor) -> Tensor:
        import gguf

        number = gguf.GGMLQuantizationType(type.id)
        values = gguf.quants.dequantize(data.cpu().numpy(), number)
        return torch.from_numpy(values).to(data.device)

    return read


BLOCK_CODECS: dict[str, BlockCodec] = {
    **{name: Codec(TENSOR_TYPES[name], read) for name, read in _READERS.items()},
    **{
        name: Codec(TENSOR_TYPES[name], _by_gguf_package(TENSOR_TYPES[name]))
        for name in _BY_GGUF_PACKAGE
    },
}


def find_codec(type: TensorType) -> BlockCodec:
    codec = BLOCK_CODECS.get(type.name)
    if codec is None:
        raise FormatError(
            f"GGUF type {type.name} cannot be read", f"readable: {', '.join(BLOCK_CODECS)}"
        )
    return codec


def can_write(name: str) -> bool:
    return name in _WRITERS


def slab_rows(columns: int) -> int:
    """Rows that make a slab."""
    return max(1, SLAB_WEIGHTS // columns)


def quantize(name: str, rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """Bytes of `rows` as the type `name`: bit for bit those of llama.cpp's x86-64 reference.

    rows        [rows, columns] float32, columns a multiple of the type's block
    importance  [columns] float32, mean squared input of each column, or None
    returns     [rows, row_bytes] uint8

    Raises QtoolError where weights or importance are NaN or infinite, or a scale is too large.
    """
    type = _writable(name, rows)
    if name not in QUANTIZERS:
        return _WRITERS[name](rows, None)
    if importance is not None and not bool(importance.isfinite().all()):
        raise QtoolError("the importance has NaN or infinite values")
    done = native.quantize(type, rows, importance)
    data, faults = done if done is not None else quantize_by_torch(name, rows, importance)
    if faults & native.INPUT_NOT_FINITE:
        raise QtoolError("the weights have NaN or infinite values")
    if faults & native.SCALE_NOT_FINITE:
        largest = float(rows.abs().max())
        raise QtoolError(
            f"weights of up to {largest:g} are too large for the half-precision scales of {name}",
            "choose the type BF16 or F32",
        )
    return data


def quantize_by_torch(
    name: str, rows: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, int]:
    """What native.quantize does, in torch, of which it is the measure: blocks and faults."""
    type = _writable(name, rows)
    if not bool(rows.isfinite().all()):
        return torch.zeros(rows.shape[0], 0, dtype=torch.uint8), native.INPUT_NOT_FINITE
    height = slab_rows(rows.shape[1])
    slabs = [
        QUANTIZERS[name](rows[begin : begin + height], importance)
        for begin in range(0, rows.shape[0], height)
    ]
    data = slabs[0] if len(slabs) == 1 else torch.cat(slabs)
    blocks = data.view(-1, type.block_bytes)
    # the high byte of a half; all bits of its exponent are set where it is infinite or NaN
    finite = all(bool(((blocks[:, place + 1] & 0x7C) != 0x7C).all()) for place in _HALVES[name])
    return data, 0 if finite else native.SCALE_NOT_FINITE


def _writable(name: str, rows: Tensor) -> TensorType:
    if name not in _WRITERS:
        raise UnknownName("writable GGUF type", name, _WRITERS)
    type = TENSOR_TYPES[name]
    assert rows.dtype == torch.float32, rows.dtype
    assert rows.shape[1] % type.block_size == 0, (name, rows.shape)
    return type
