"""The compiled kernels of `csrc/`, loaded and typed: operations with the meaning of `reference.py`.

`load` builds the library if it has to. It never raises: where the kernels cannot be had, it returns
a `Missing` with the reason, and the torch operations serve. The linears are in `native_linear.py`.

All of them compute in float32 whatever the type in memory, and give a row the same bits whatever
other rows come with it, and however many threads there are.
"""

import ctypes
import functools
import time
from collections.abc import Sequence
from ctypes import c_bool, c_char_p, c_float, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtool.kernels.cpu.build import FLAGS, INSTRUCTION_SETS, SOURCES
from qtool.kernels.cpu.huge_pages import HugePages
from qtool.kernels.reference import Span
from qtool.native_build import Missing, NativeLibrary, open_library
from qtool.settings import settings

# Numbers of ElementType in csrc/interface.h.
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_COMPUTED = {torch.float32: 0, torch.bfloat16: 1}
# Of Activation in csrc/interface.h.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
MAX_HEAD_DIM = 576

# name -> (result, arguments), as in csrc/interface.h.
_PROTOTYPES = {
    "qtool_isa": (c_char_p, ()),
    "qtool_read": (c_uint32, (c_void_p, c_int64, c_int32)),
    "qtool_pack_codes": (
        None,
        (c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int32),
    ),
    "qtool_pack_blocks": (
        None,
        (c_int32, c_void_p, *(c_int64,) * 2, *(c_void_p,) * 4, c_int32),
    ),
    "qtool_pack_matrix": (
        None,
        (c_void_p, c_int32, *(c_int64,) * 2, *(c_void_p,) * 2, c_int32),
    ),
    "qtool_linear_scratch": (c_int64, (c_void_p, c_int64)),
    "qtool_linear": (
        None,
        (*(c_void_p,) * 2, c_int32, c_int64, *(c_void_p,) * 2, c_int32, c_void_p, c_int32),
    ),
    "qtool_round_row": (None, (c_void_p, c_void_p, c_int32, c_void_p)),
    "qtool_rms_norm": (
        None,
        (*(c_void_p,) * 4, c_int64, c_int64, c_float, c_int32, c_int32),
    ),
    "qtool_gate_mul": (None, (c_void_p, c_void_p, c_int64, c_int64, *(c_int32,) * 3)),
    "qtool_rope": (
        None,
        (c_void_p, c_int64, *(c_void_p,) * 3, *(c_int64,) * 3, c_int32, c_int32),
    ),
    "qtool_rope_and_write": (
        None,
        (c_void_p, c_void_p, c_float, *(c_void_p,) * 5, *(c_int64,) * 2, c_int32, c_int32),
    ),
    "qtool_write_cache": (None, (*(c_void_p,) * 4, c_int64, c_int32, c_int32)),
    "qtool_paged_attention": (c_bool, (*(c_void_p,) * 5, c_int32, c_int32)),
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
    )


class CacheRecord(ctypes.Structure):
    """QtoolCache of csrc/interface.h."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("kv_heads", c_int64),
        ("key_dim", c_int64),
        ("value_dim", c_int64),
        ("slots", c_int64),
    )


class RuleRecord(ctypes.Structure):
    """QtoolAttention of csrc/interface.h."""

    _fields_ = (
        ("heads", c_int64),
        ("window", c_int64),
        ("sinks", c_void_p),
        ("scale", c_float),
        ("softcap", c_float),
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


def plan_spans(spans: Sequence[Span], *, block_size: int) -> SpanTable:
    """Once a step; see `reference.Span`."""
    first_blocks: list[int] = []
    block_ids: list[int] = []
    for span in spans:
        held = -(-span.length // block_size)
        assert 0 < span.num_queries <= span.length
        assert held <= len(span.block_ids)
        first_blocks.append(len(block_ids))
        block_ids.extend(span.block_ids[:held])
    assert min(block_ids) >= 0
    tensors = (
        torch.tensor([span.num_queries for span in spans], dtype=torch.int64),
        torch.tensor([span.length for span in spans], dtype=torch.int64),
        torch.tensor(first_blocks, dtype=torch.int64),
        torch.tensor(block_ids, dtype=torch.int64),
    )
    record = _Spans(*(part.data_ptr() for part in tensors), len(spans), block_size)
    tokens = sum(span.num_queries for span in spans)
    return SpanTable(tensors, record, tokens, (max(block_ids) + 1) * block_size - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Cache:
    """One layer of the KV cache as the kernels read it; made by `make_cache`.

    tensors  kept alive for `record`, which points into them; they must not be moved
    dtype    of the cache's numbers; int8 has scales
    """

    tensors: tuple[Tensor, ...]
    record: CacheRecord
    dtype: torch.dtype


def make_cache(
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Cache:
    """keys [kv_heads, slots, key_dim], values [kv_heads, slots, value_dim], of the activations'
    type; or int8 with scales [kv_heads, slots] float32. Values may be a view of the keys' first
    channels.
    """
    kv_heads, slots, key_dim = keys.shape
    value_dim = values.shape[2]
    inside = values.data_ptr() == keys.data_ptr()
    assert values.shape[:2] == keys.shape[:2]
    assert values.dtype == keys.dtype
    assert keys.is_contiguous()
    assert values.stride(1) == (key_dim if inside else value_dim)
    assert values.stride(2) == 1
    assert max(key_dim, value_dim) <= MAX_HEAD_DIM
    assert (key_scales is None) == (value_scales is None) == (keys.dtype != torch.int8)
    for scales in (key_scales, value_scales):
        if scales is not None:
            assert scales.shape == (kv_heads, slots)
            assert scales.dtype == torch.float32
            assert scales.is_contiguous()
    record = CacheRecord(
        keys.data_ptr(),
        values.data_ptr(),
        _address(key_scales),
        _address(value_scales),
        kv_heads,
        key_dim,
        value_dim,
        slots,
    )
    tensors = tuple(t for t in (keys, values, key_scales, value_scales) if t is not None)
    return Cache(tensors, record, keys.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """How one layer attends, as the kernels read it; made by `make_rule`."""

    sinks: Tensor | None
    record: RuleRecord


def make_rule(
    *,
    heads: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Rule:
    """`reference.paged_attention` says what they mean; sinks [heads]."""
    assert sinks is None or sinks.shape == (heads,)
    sinks = None if sinks is None else sinks.float().contiguous()
    record = RuleRecord(heads, window or 0, _address(sinks), scale, softcap or 0.0)
    return Rule(sinks, record)


@dataclass(frozen=True, slots=True, eq=False)
class Native:
    """One loaded library. Tensors are contiguous, on the CPU, float32 or bfloat16.

    memory  where packed weights go
    """

    library: ctypes.CDLL
    isa: str
    memory: HugePages = field(default_factory=HugePages)

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
        kind = _kind(x, residual)
        y = torch.empty_like(x)
        channels = x.shape[-1]
        assert residual is None or residual.shape == x.shape
        assert weight is None or weight.shape == (channels,)
        weight = None if weight is None else weight.float()
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

    def gate_mul(self, gate_up: Tensor, activation: str = "silu") -> Tensor:
        """[tokens, 2 * channels], gates first -> [tokens, channels]: activation(gate) times up."""
        kind = _kind(gate_up)
        rows, both = gate_up.shape
        y = gate_up.new_empty(rows, both // 2)
        self.library.qtool_gate_mul(
            gate_up.data_ptr(),
            y.data_ptr(),
            rows,
            both // 2,
            ACTIVATIONS[activation],
            kind,
            torch.get_num_threads(),
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
        cache: Cache,
        slots: Tensor,
        *,
        qk_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """The heads of a step, normalised and rotated; keys and values go to the cache.

        qkv       [tokens, heads + 2 * kv_heads, head_dim]
        cos, sin  [tokens, head_dim / 2] float32
        slots     [tokens] int64
        qk_norm   [heads + kv_heads, head_dim] or None
        returns   the queries [tokens, heads, head_dim]
        """
        kind = _kind(qkv)
        tokens, all_heads, head_dim = qkv.shape
        kv_heads = cache.record.kv_heads
        heads = all_heads - 2 * kv_heads
        assert cache.dtype in (qkv.dtype, torch.int8)
        assert cache.record.key_dim == cache.record.value_dim == head_dim
        assert heads > 0
        assert qk_norm is None or qk_norm.shape == (heads + kv_heads, head_dim)
        _check_slots(slots, tokens)
        _check_angles(cos, sin, tokens, head_dim)
        qk_norm = None if qk_norm is None else qk_norm.float().contiguous()
        query = qkv.new_empty(tokens, heads, head_dim)
        self.library.qtool_rope_and_write(
            qkv.data_ptr(),
            _address(qk_norm),
            eps,
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            query.data_ptr(),
            ctypes.addressof(cache.record),
            tokens,
            heads,
            kind,
            torch.get_num_threads(),
        )
        return query

    def write_cache(self, key: Tensor, value: Tensor, cache: Cache, slots: Tensor) -> None:
        """key [tokens, kv_heads, key_dim], value [tokens, kv_heads, value_dim] -> the cache.

        Where the cache's values are its keys' first channels, the value is not looked at.
        """
        record = cache.record
        key = key.contiguous()
        inside = record.values == record.keys
        value = key if inside else value.contiguous()
        assert key.shape == (len(slots), record.kv_heads, record.key_dim)
        assert inside or value.shape == (len(slots), record.kv_heads, record.value_dim)
        assert cache.dtype in (key.dtype, torch.int8)
        _check_slots(slots, len(key))
        self.library.qtool_write_cache(
            key.data_ptr(),
            None if inside else value.data_ptr(),
            slots.data_ptr(),
            ctypes.addressof(record),
            len(slots),
            _kind(key, value),
            torch.get_num_threads(),
        )

    def paged_attention(self, query: Tensor, cache: Cache, spans: SpanTable, rule: Rule) -> Tensor:
        """`reference.paged_attention`: query [tokens, heads, key_dim] -> [.., value_dim]."""
        query = query.contiguous()
        kind = _kind(query)
        tokens, heads, key_dim = query.shape
        record = cache.record
        assert cache.dtype in (query.dtype, torch.int8)
        assert heads == rule.record.heads
        assert key_dim == record.key_dim
        assert heads % record.kv_heads == 0
        assert spans.tokens == tokens
        assert spans.highest_slot < record.slots
        y = query.new_empty(tokens, heads, record.value_dim)
        done = self.library.qtool_paged_attention(
            query.data_ptr(),
            ctypes.addressof(record),
            ctypes.addressof(spans.record),
            ctypes.addressof(rule.record),
            y.data_ptr(),
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


def measure_bandwidth(megabytes: int = 96, seconds: float = 0.1) -> float | None:
    """Bytes a second that memory gives when read straight through; None without the library.

    The best of a few passes over more than caches hold: other work on the machine only adds time.
    """
    native = load()
    if isinstance(native, Missing):
        return None
    data = HugePages().zeros((megabytes << 20,), torch.uint8).fill_(1)
    best, stop = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < stop:
        started = time.perf_counter()
        native.read(data)
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


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


def _check_slots(slots: Tensor, tokens: int) -> None:
    assert slots.shape == (tokens,)
    assert slots.is_contiguous()
    assert slots.dtype == torch.int64


def _check_angles(cos: Tensor, sin: Tensor, tokens: int, head_dim: int) -> None:
    for part in (cos, sin):
        assert part.shape == (tokens, head_dim // 2)
        assert part.dtype == torch.float32
        assert part.is_contiguous()
