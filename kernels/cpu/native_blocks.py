"""All blocks of a decoder in one call of the compiled library.

The same operations in the same order as calling them one by one, and so the same bits; what is
saved is the way into the library and back for each of them, and most of the waits of threads for
each other. `csrc/blocks.cpp` says what a block computes.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_uint8, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.kernels.cpu.native import (
    ACTIVATIONS,
    ELEMENT_TYPES,
    Cache,
    CacheRecord,
    Native,
    Rule,
    RuleRecord,
    SpanTable,
)
from qtool.kernels.cpu.native_linear import NativePacked

MAX_PARTS = 3


class _Linears(ctypes.Structure):
    """QtoolLinears of csrc/interface.h."""

    _fields_ = (
        ("parts", c_void_p * MAX_PARTS),
        ("bias", c_void_p),
        ("count", c_int64),
        ("out_features", c_int64),
    )


class _Block(ctypes.Structure):
    """QtoolBlock of csrc/interface.h."""

    _fields_ = (
        ("attn_norm", c_void_p),
        ("qkv", _Linears),
        ("qk_norm", c_void_p),
        ("o", _Linears),
        ("post_attn_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("gate_up", _Linears),
        ("down", _Linears),
        ("post_mlp_norm", c_void_p),
        ("cache", CacheRecord),
        ("rule", RuleRecord),
        ("rotation", c_int64),
        ("rotated", c_int64),
        ("residual_scale", c_float),
    )


_SUM = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int64)


class _Decoder(ctypes.Structure):
    """QtoolDecoder of csrc/interface.h."""

    _fields_ = (
        ("blocks", c_void_p),
        ("num_blocks", c_int64),
        ("hidden", c_int64),
        ("ffn", c_int64),
        ("half", c_int64),
        ("eps", c_float),
        ("type", c_int32),
        ("activation", c_int32),
        ("sum", _SUM),
    )


@dataclass(frozen=True, slots=True, eq=False)
class NativeLinears:
    """Packed linears of one input, side by side; bias [out of all of them] or None."""

    parts: tuple[NativePacked, ...]
    bias: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)


@dataclass(frozen=True, slots=True, eq=False)
class BlockParts:
    """One block. Norms [hidden] float32, None where the model has none; qk_norm [heads + kv_heads,
    head_dim] float32 or None; qkv's rows are the heads of q, of k and of v, gate_up's the gates and
    then the ups.

    rotation  which table of angles its heads are turned by
    rotated   channels of a head that are turned, from its first
    """

    qkv: NativeLinears
    o: NativeLinears
    gate_up: NativeLinears
    down: NativeLinears
    cache: Cache
    rule: Rule
    attn_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
    post_attn_norm: Tensor | None = None
    post_mlp_norm: Tensor | None = None
    qk_norm: Tensor | None = None
    rotation: int = 0
    rotated: int = 0
    residual_scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class NativeBlocks:
    """Made by `bind`; `parts` are kept alive for the records, which point into them.

    failures  what ended the sum over ranks that the last call waited for
    """

    native: Native
    parts: tuple[BlockParts, ...]
    records: ctypes.Array[_Block]
    decoder: _Decoder
    dtype: torch.dtype
    slots: int
    rotations: int
    failures: list[BaseException]

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, spans: SpanTable
    ) -> Tensor:
        """x [tokens, hidden] through all blocks, in place; writes the tokens' keys and values.

        cos, sin  [rotations, tokens, half of the most rotated channels] float32
        slots     [tokens] int64
        """
        tokens, hidden = x.shape
        assert x.dtype == self.dtype
        assert x.is_contiguous()
        assert hidden == self.decoder.hidden
        assert spans.tokens == tokens
        assert spans.highest_slot < self.slots
        for part in (cos, sin):
            assert part.shape == (self.rotations, tokens, self.decoder.half)
            assert part.dtype == torch.float32
            assert part.is_contiguous()
        assert slots.shape == (tokens,)
        assert slots.dtype == torch.int64
        assert slots.is_contiguous()
        library, address = self.native.library, ctypes.addressof(self.decoder)
        scratch = torch.empty(library.qtool_blocks_scratch(address, tokens), dtype=torch.uint8)
        done = library.qtool_blocks(
            address,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            ctypes.addressof(spans.record),
            tokens,
            scratch.data_ptr(),
            torch.get_num_threads(),
        )
        if self.failures:
            raise self.failures.pop()
        if not done:
            raise MemoryError("no memory for the partial results of attention")
        return x


def bind(
    blocks: Sequence[BlockParts],
    *,
    hidden: int,
    eps: float,
    dtype: torch.dtype,
    activation: str = "silu",
    sum_over_ranks: Callable[[Tensor], object] | None = None,
) -> NativeBlocks:
    """The blocks of a decoder, checked once; their tensors must not be moved afterwards.

    sum_over_ranks  of a rank's part of a decoder: adds up, in place, what o and down give [tokens *
                    hidden]; what it raises ends the call
    """
    assert dtype in (torch.float32, torch.bfloat16)
    first = blocks[0]
    native, ffn = first.qkv.parts[0].native, first.down.in_features
    slots = first.cache.record.slots
    for block in blocks:
        _check(block, native, hidden, ffn, slots, dtype)
    records = (_Block * len(blocks))(*(_record(block) for block in blocks))
    decoder = _Decoder(
        ctypes.addressof(records),
        len(blocks),
        hidden,
        ffn,
        max(block.rotated for block in blocks) // 2,
        eps,
        ELEMENT_TYPES[dtype],
        ACTIVATIONS[activation],
    )
    failures: list[BaseException] = []
    if sum_over_ranks is not None:
        decoder.sum = _summer(sum_over_ranks, dtype, failures)
    rotations = 1 + max(block.rotation for block in blocks)
    return NativeBlocks(native, tuple(blocks), records, decoder, dtype, slots, rotations, failures)


def _summer(
    sum_over_ranks: Callable[[Tensor], object], dtype: torch.dtype, failures: list[BaseException]
) -> Any:
    """As the library calls it, which no exception may go through."""

    def add_up(values: int, count: int) -> int:
        try:
            memory = (c_uint8 * (count * dtype.itemsize)).from_address(values)
            sum_over_ranks(torch.frombuffer(memory, dtype=dtype))
        except BaseException as error:
            failures.append(error)
            return 0
        return 1

    return _SUM(add_up)


def _check(
    block: BlockParts,
    native: Native,
    hidden: int,
    ffn: int,
    slots: int,
    dtype: torch.dtype,
) -> None:
    cache, heads = block.cache.record, block.rule.record.heads
    head_dim = cache.key_dim
    assert head_dim == cache.value_dim
    assert block.rotated % 2 == 0
    assert 0 <= block.rotated <= head_dim
    assert cache.slots == slots
    assert block.cache.dtype in (dtype, torch.int8)
    assert heads % cache.kv_heads == 0
    assert block.rotation >= 0
    shapes = {
        "qkv": ((heads + 2 * cache.kv_heads) * head_dim, hidden),
        "o": (hidden, heads * head_dim),
        "gate_up": (2 * ffn, hidden),
        "down": (hidden, ffn),
    }
    for name, shape in shapes.items():
        linears: NativeLinears = getattr(block, name)
        assert 1 <= len(linears.parts) <= MAX_PARTS
        assert (linears.out_features, linears.in_features) == shape, name
        assert all(part.native is native for part in linears.parts)
        assert all(part.in_features == shape[1] for part in linears.parts)
        _check_tensor(linears.bias, (shape[0],), dtype)
    for name in ("attn_norm", "mlp_norm", "post_attn_norm", "post_mlp_norm"):
        _check_tensor(getattr(block, name), (hidden,), torch.float32)
    _check_tensor(block.qk_norm, (heads + cache.kv_heads, head_dim), torch.float32)


def _check_tensor(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor is not None:
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()


def _record(block: BlockParts) -> _Block:
    return _Block(
        _address(block.attn_norm),
        _linears(block.qkv),
        _address(block.qk_norm),
        _linears(block.o),
        _address(block.post_attn_norm),
        _address(block.mlp_norm),
        _linears(block.gate_up),
        _linears(block.down),
        _address(block.post_mlp_norm),
        block.cache.record,
        block.rule.record,
        block.rotation,
        block.rotated,
        block.residual_scale,
    )


def _linears(linears: NativeLinears) -> _Linears:
    parts = (c_void_p * MAX_PARTS)(*(ctypes.addressof(part.record) for part in linears.parts))
    return _Linears(parts, _address(linears.bias), len(linears.parts), linears.out_features)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
