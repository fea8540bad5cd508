"""All blocks of a decoder in one call of the compiled library.

The same operations in the same order as calling them one by one, and so the same bits; what is
saved is nine ways into the library and back for every block. `runtime.models.decoder` says what a
block computes.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.kernels.cpu.native import ELEMENT_TYPES, MAX_HEAD_DIM, Native, SpanTable
from qtool.kernels.cpu.native_linear import NativePacked


class _Block(ctypes.Structure):
    """QtoolBlock of csrc/interface.h."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            *("attn_norm", "qkv", "qkv_bias", "qk_norm", "o", "o_bias"),
            *("mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias", "keys", "values"),
        )
    )


class _Decoder(ctypes.Structure):
    """QtoolDecoder of csrc/interface.h."""

    _fields_ = (
        ("blocks", c_void_p),
        ("num_blocks", c_int64),
        ("hidden", c_int64),
        ("ffn", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("pool_slots", c_int64),
        ("eps", c_float),
        ("scale", c_float),
        ("type", c_int32),
    )


@dataclass(frozen=True, slots=True, eq=False)
class BlockParts:
    """One block: norms [hidden], packed linears with their biases [out] or None, qk_norm
    [heads + kv_heads, head_dim] or None, and its layer of the pools [kv_heads, slots, head_dim].
    """

    attn_norm: Tensor
    qkv: NativePacked
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    o: NativePacked
    o_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: NativePacked
    gate_up_bias: Tensor | None
    down: NativePacked
    down_bias: Tensor | None
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class NativeBlocks:
    """Made by `bind`; `parts` are kept alive for the records, which point into them."""

    native: Native
    parts: tuple[BlockParts, ...]
    records: ctypes.Array[_Block]
    decoder: _Decoder
    dtype: torch.dtype

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, spans: SpanTable
    ) -> Tensor:
        """x [tokens, hidden] through all blocks, in place; writes the tokens' keys and values.

        cos, sin  [tokens, head_dim / 2] float32; slots [tokens] int64
        """
        tokens, hidden = x.shape
        decoder = self.decoder
        assert x.dtype == self.dtype
        assert x.is_contiguous()
        assert hidden == decoder.hidden
        assert spans.tokens == tokens
        assert spans.highest_slot < decoder.pool_slots
        for part in (cos, sin):
            assert part.shape == (tokens, decoder.head_dim // 2)
            assert part.dtype == torch.float32
            assert part.is_contiguous()
        assert slots.shape == (tokens,)
        assert slots.dtype == torch.int64
        library, address = self.native.library, ctypes.addressof(decoder)
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
        if not done:
            raise MemoryError("no memory for the partial results of attention")
        return x


def bind(blocks: Sequence[BlockParts], *, heads: int, eps: float, scale: float) -> NativeBlocks:
    """The blocks of a decoder, checked once; their tensors must not be moved afterwards."""
    first = blocks[0]
    native, dtype = first.qkv.native, first.attn_norm.dtype
    kv_heads, pool_slots, head_dim = first.keys.shape
    hidden, ffn = first.attn_norm.shape[0], first.down.in_features
    rows = {"qkv": (heads + 2 * kv_heads) * head_dim, "o": hidden}
    rows |= {"gate_up": 2 * ffn, "down": hidden}
    columns = {"qkv": hidden, "o": heads * head_dim, "gate_up": hidden, "down": ffn}
    assert head_dim <= MAX_HEAD_DIM
    assert heads % kv_heads == 0
    assert dtype in (torch.float32, torch.bfloat16)
    for block in blocks:
        _check(block, dtype)
        assert block.attn_norm.shape == block.mlp_norm.shape == (hidden,)
        assert block.keys.shape == block.values.shape == first.keys.shape
        assert block.qk_norm is None or block.qk_norm.shape == (heads + kv_heads, head_dim)
        for name in rows:
            packed: NativePacked = getattr(block, name)
            bias: Tensor | None = getattr(block, f"{name}_bias")
            assert (packed.out_features, packed.in_features) == (rows[name], columns[name])
            assert packed.native is native
            assert bias is None or bias.shape == (rows[name],)
    records = (_Block * len(blocks))(*(_record(block) for block in blocks))
    decoder = _Decoder(
        ctypes.addressof(records),
        len(blocks),
        hidden,
        ffn,
        heads,
        kv_heads,
        head_dim,
        pool_slots,
        eps,
        scale,
        ELEMENT_TYPES[dtype],
    )
    return NativeBlocks(native, tuple(blocks), records, decoder, dtype)


def _check(block: BlockParts, dtype: torch.dtype) -> None:
    for name in BlockParts.__slots__:
        part = getattr(block, name)
        if isinstance(part, Tensor):
            assert part.dtype == dtype, name
            assert part.is_contiguous(), name


def _record(block: BlockParts) -> _Block:
    def address(name: str) -> int | None:
        part: Tensor | NativePacked | None = getattr(block, name)
        if part is None:
            return None
        return part.data_ptr() if isinstance(part, Tensor) else ctypes.addressof(part.record)

    return _Block(*(address(name) for name in BlockParts.__slots__))
