"""The compiled kernels of `csrc/`, loaded and typed: operations with the meaning of `reference.py`.

`load` builds the library if it has to and loads it after PyTorch, so that both share one OpenMP
runtime and its threads. It never raises: where the kernels cannot be had, it returns a `Missing`
with the reason, and the torch operations serve. The linears are in `native_linear.py`.

All of them compute in float32 whatever the type in memory, and give a row the same bits whatever
other rows come with it, and however many threads there are.
"""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_bool, c_char_p, c_float, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.kernels.cpu.build import FLAGS, INSTRUCTION_SETS, SOURCES
from qtool.kernels.reference import Span
from qtool.native_build import Missing, NativeLibrary, open_library
from qtool.settings import settings

# Numbers of ElementType in csrc/interface.h.
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_COMPUTED = {torch.float32: 0, torch.bfloat16: 1}
MAX_HEAD_DIM = 512

# name -> (result, arguments), as in csrc/interface.h.
_PROTOTYPES = {
    "qtool_isa": (c_char_p, ()),
    "qtool_read": (c_uint32, (c_void_p, c_int64, c_int32)),
    "qtool_pack_codes": (
        None,
        (c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int64, c_int32),
    ),
    "qtool_linear": (
        None,
        (c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_void_p, c_int32),
    ),
    "qtool_quantize_row": (
        None,
        (c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
    ),
    "qtool_rms_norm": (
        None,
        (*(c_void_p,) * 4, c_int64, c_int64, c_float, c_int32, c_int32),
    ),
    "qtool_silu_mul": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32)),
    "qtool_rope": (
        None,
        (c_void_p, c_int64, *(c_void_p,) * 3, *(c_int64,) * 3, c_int32, c_int32),
    ),
    "qtool_rope_and_write": (
        None,
        (c_void_p, c_void_p, c_float, *(c_void_p,) * 6, *(c_int64,) * 5, c_int32, c_int32),
    ),
    "qtool_paged_attention": (
        c_bool,
        (*(c_void_p,) * 5, *(c_int64,) * 4, c_float, c_int32, c_int32),
    ),
    "qtool_blocks_scratch": (c_int64, (c_void_p, c_int64)),
    "qtool_blocks": (c_bool, (*(c_void_p,) * 6, c_int64, c_void_p, c_int32)),
}
KERNELS = NativeLibrary("kernels", "the CPU kernels", SOURCES, FLAGS, INSTRUCTION_SETS, _PROTOTYPES)


class _Spans(ctypes.Structure):
    """QtoolSpans of csrc/interface.h."""

    _fields_ = (
        ("num_queries", c_void_p),
        ("lengths", c_void_p),
        ("first_blocks", c_void_p),
        ("block_ids", c_void_p),
        ("spans", c_int64),
        ("block_size", c_int64),
        ("window", c_int64),
    )


@dataclass(frozen=True, slots=True, eq=False)
class SpanTable:
    """The spans of a step as the attention kernel reads them; good for every layer of the step.

    tensors  num_queries, lengths, first_blocks [spans] and block_ids, int64, kept alive for
             `record`, which points into them
    """

    tensors: tuple[Tensor, ...]
    record: _Spans
    tokens: int
    highest_slot: int


def plan_spans(spans: Sequence[Span], *, block_size: int, window: int | None) -> SpanTable:
    """Once a step; see `reference.Span`."""
    first_blocks: list[int] = []
    block_ids: list[int] = []
    for span in spans:
        held = -(-span.length // block_size)
        assert 0 < span.num_queries <= span.length
        assert held <= len(span.block_ids)
        first_blocks.append(len(block_ids))
        block_ids.extend(span.block_ids[:held])
    tensors = (
        torch.tensor([span.num_queries for span in spans], dtype=torch.int64),
        torch.tensor([span.length for span in spans], dtype=torch.int64),
        torch.tensor(first_blocks, dtype=torch.int64),
        torch.tensor(block_ids, dtype=torch.int64),
    )
    record = _Spans(*(part.data_ptr() for part in tensors), len(spans), block_size, window or 0)
    tokens = sum(span.num_queries for span in spans)
    return SpanTable(tensors, record, tokens, (max(block_ids) + 1) * block_size - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Native:
    """One loaded library. Tensors are contiguous, on the CPU, float32 or bfloat16."""

    library: ctypes.CDLL
    isa: str

    def read(self, data: Tensor) -> int:
        """Read every byte: what memory gives at most is its size over the time this takes."""
        threads = torch.get_num_threads()
        return int(self.library.qtool_read(data.data_ptr(), data.nbytes, threads))

    def rms_norm(
        self, x: Tensor, weight: Tensor | None, eps: float, *, residual: Tensor | None = None
    ) -> Tensor:
        """x [..., channels] over its root mean square, times weight [channels] or 1.

        A residual like x is added first, in place: x keeps the sum.
        """
        kind = _kind(x, residual, weight)
        y = torch.empty_like(x)
        channels = x.shape[-1]
        assert residual is None or residual.shape == x.shape
        assert weight is None or weight.shape == (channels,)
        self.library.qtool_rms_norm(
            x.data_ptr(),
            _address(residual),
            _address(weight),
            y.data_ptr(),
            x.numel() // channels,
            channels,
            eps,
            kind,
            torch.get_num_threads(),
        )
        return y

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[tokens, 2 * channels], gates first -> [tokens, channels]: silu(gate) times up."""
        kind = _kind(gate_up)
        rows, both = gate_up.shape
        y = gate_up.new_empty(rows, both // 2)
        self.library.qtool_silu_mul(
            gate_up.data_ptr(), y.data_ptr(), rows, both // 2, kind, torch.get_num_threads()
        )
        return y

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the pairs (x[i], x[i + head_dim / 2]) of x [tokens, heads, head_dim].

        cos, sin  [tokens, head_dim / 2] float32; the heads of a token are contiguous, the tokens
                  may lie apart
        """
        tokens, heads, head_dim = x.shape
        assert x.stride(2) == 1
        assert x.stride(1) == head_dim
        _check_angles(cos, sin, tokens, head_dim)
        y = x.new_empty(x.shape)
        self.library.qtool_rope(
            x.data_ptr(),
            x.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            y.data_ptr(),
            tokens,
            heads,
            head_dim,
            _COMPUTED[x.dtype],
            torch.get_num_threads(),
        )
        return y

    def rope_and_write(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        *,
        qk_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """The heads of a step, normalised and rotated; keys and values go to the pools.

        qkv           [tokens, heads + 2 * kv_heads, head_dim]
        cos, sin      [tokens, head_dim / 2] float32
        keys, values  [kv_heads, pool slots, head_dim]
        slots         [tokens] int64
        qk_norm       [heads + kv_heads, head_dim] or None
        returns       the queries [tokens, heads, head_dim]
        """
        kind = _kind(qkv, keys, values, qk_norm)
        tokens, all_heads, head_dim = qkv.shape
        kv_heads, pool_slots, _ = keys.shape
        heads = all_heads - 2 * kv_heads
        assert keys.shape == values.shape
        assert keys.shape[2] == head_dim
        assert heads > 0
        assert head_dim <= MAX_HEAD_DIM
        assert slots.shape == (tokens,)
        assert slots.is_contiguous()
        assert slots.dtype == torch.int64
        assert qk_norm is None or qk_norm.shape == (heads + kv_heads, head_dim)
        _check_angles(cos, sin, tokens, head_dim)
        query = qkv.new_empty(tokens, heads, head_dim)
        self.library.qtool_rope_and_write(
            qkv.data_ptr(),
            _address(qk_norm),
            eps,
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            tokens,
            heads,
            kv_heads,
            head_dim,
            pool_slots,
            kind,
            torch.get_num_threads(),
        )
        return query

    def paged_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        spans: Sequence[Span] | SpanTable,
        *,
        block_size: int,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """`reference.paged_attention`; the spans may come planned, for use by many layers."""
        table = spans
        if not isinstance(table, SpanTable):
            table = plan_spans(table, block_size=block_size, window=window)
        kind = _kind(query, keys, values)
        tokens, heads, head_dim = query.shape
        kv_heads, pool_slots, _ = keys.shape
        assert keys.shape == values.shape
        assert keys.shape[2] == head_dim <= MAX_HEAD_DIM
        assert heads % kv_heads == 0
        assert table.tokens == tokens
        assert table.highest_slot < pool_slots
        assert table.record.block_size == block_size
        y = torch.empty_like(query)
        done = self.library.qtool_paged_attention(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            ctypes.addressof(table.record),
            y.data_ptr(),
            heads,
            kv_heads,
            head_dim,
            pool_slots,
            scale,
            kind,
            torch.get_num_threads(),
        )
        if not done:
            raise MemoryError("no memory for the partial results of attention")
        return y


def supports_head_dim(head_dim: int) -> bool:
    return head_dim % 2 == 0 and head_dim <= MAX_HEAD_DIM


@functools.cache
def load(isa: str | None = None) -> Native | Missing:
    """The library for an instruction set, or for the best this CPU has; built on first use."""
    opened = open_library(KERNELS, settings(), isa)
    return opened if isinstance(opened, Missing) else Native(opened.functions, opened.isa)


def _kind(first: Tensor, *others: Tensor | None) -> int:
    """The number of the element type that all of them have; they must be contiguous."""
    kind = _COMPUTED[first.dtype]
    assert first.is_contiguous()
    for other in others:
        if other is not None:
            assert other.dtype == first.dtype
            assert other.is_contiguous()
    return kind


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check_angles(cos: Tensor, sin: Tensor, tokens: int, head_dim: int) -> None:
    for part in (cos, sin):
        assert part.shape == (tokens, head_dim // 2)
        assert part.dtype == torch.float32
        assert part.is_contiguous()
