"""The steps of a block between its linears, each in one launch.

At a batch of one, a token of an 8B model in 4 bits takes a millisecond of memory time, and ten
launches a layer: each that can be left out is worth some microseconds, each pass over the
activations hardly anything. So a linear leaves its product in parts (`marlin_linear.matmul_parts`),
and the kernels here add them on their way.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]
# Channels of a gated product that one program computes; a multiple of every block of inputs.
GATE_BLOCK = 512
FLOAT8 = torch.float8_e4m3fn


class Summed(NamedTuple):
    """A linear's input [rows, channels], and its sums over blocks [channels / block, rows] float32
    (empty where the linear needs none).
    """

    values: Tensor
    sums: Tensor


def _sums(x: Tensor, rows: int, channels: int, block: int) -> Tensor:
    assert block == 0 or channels % block == 0
    return x.new_empty((channels // block if block else 0, rows), dtype=torch.float32)


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))


def add_norm(
    residual: Tensor,
    parts: Tensor | None,
    weight: Tensor | None,
    eps: float,
    *,
    post_weight: Tensor | None = None,
    residual_scale: float = 1.0,
    sum_block: int = 0,
) -> Summed:
    """residual [rows, channels] += residual_scale * post_norm(sum of parts); then its RMS norm.

    parts        [parts, rows, channels]; None: nothing is added
    weight       [channels] any floating type; None: the sum itself is returned
    post_weight  [channels] of a norm of what is added; None: there is none
    sum_block    inputs that the next linear sums; 0: none
    """
    from qtool.kernels.cuda.device import fused

    rows, channels = residual.shape
    assert residual.is_contiguous()
    assert parts is None or (parts.is_contiguous() and parts.shape[1:] == residual.shape)
    out = torch.empty_like(residual)
    sums = _sums(residual, rows, channels, sum_block)
    block = 1 << (channels - 1).bit_length()
    fused.add_norm[(rows,)](
        residual,
        residual if parts is None else parts,
        residual if post_weight is None else post_weight,
        residual if weight is None else weight,
        out,
        sums,
        rows,
        residual.numel(),
        eps,
        residual_scale,
        CHANNELS=channels,
        BLOCK=block,
        SPLIT=0 if parts is None else parts.shape[0],
        HAS_POST=post_weight is not None,
        HAS_NORM=weight is not None,
        SUM_BLOCK=sum_block,
        num_warps=_warps(block),
    )
    return Summed(out, sums)


def gate_mul(
    parts: Tensor, activation: Activation, dtype: torch.dtype, *, sum_block: int = 0
) -> Summed:
    """[parts, rows, 2 * channels], gates first -> [rows, channels]: activation(gate) times up."""
    from qtool.kernels.cuda.device import fused

    num_parts, rows, both = parts.shape
    channels = both // 2
    assert parts.is_contiguous()
    out = parts.new_empty((rows, channels), dtype=dtype)
    sums = _sums(parts, rows, channels, sum_block)
    fused.gate_mul[(rows, -(-channels // GATE_BLOCK))](
        parts,
        out,
        sums,
        rows,
        rows * both,
        CHANNELS=channels,
        BLOCK=GATE_BLOCK,
        SPLIT=num_parts,
        ACTIVATION=activation,
        SUM_BLOCK=sum_block,
        num_warps=2,
    )
    return Summed(out, sums)


class CacheLayer(NamedTuple):
    """One layer of the cache: keys and values [kv_heads, slots, channels]; in int8 with scales
    [kv_heads, slots] float32.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


def rope_and_write(
    parts: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache: CacheLayer,
    dtype: torch.dtype,
    *,
    heads: int,
    rotated: int,
    qk_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The heads of a step, normed and turned; keys and values go to the cache.

    parts     [parts, rows, (heads + 2 * kv_heads) * channels]
    cos, sin  [rows, rotated / 2] float32; the first `rotated` channels turn in pairs half apart
    slots     [rows] int64; negative: the row is not cached
    qk_norm   [heads + kv_heads, channels]
    returns   the queries [rows, heads, channels]
    """
    from qtool.kernels.cuda.device import fused

    num_parts, rows, width = parts.shape
    kv_heads, num_slots, channels = cache.keys.shape
    assert width == (heads + 2 * kv_heads) * channels
    assert parts.is_contiguous()
    assert cache.keys.is_contiguous()
    assert cache.values.is_contiguous()
    assert cache.values.shape == cache.keys.shape
    assert cos.shape == sin.shape == (rows, rotated // 2)
    query = parts.new_empty((rows, heads, channels), dtype=dtype)
    block = 1 << (channels - 1).bit_length()
    fused.rope_and_write[(rows, heads + 2 * kv_heads)](
        parts,
        parts if qk_norm is None else qk_norm,
        cos,
        sin,
        slots,
        query,
        cache.keys,
        cache.values,
        query if cache.key_scales is None else cache.key_scales,
        query if cache.value_scales is None else cache.value_scales,
        rows * width,
        num_slots,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        CHANNELS=channels,
        BLOCK=block,
        ROTATED=rotated,
        SPLIT=num_parts,
        HAS_NORM=qk_norm is not None,
        SCALED=cache.key_scales is not None,
        num_warps=1,
    )
    return query


def write_cache(key: Tensor, value: Tensor, slots: Tensor, cache: CacheLayer) -> None:
    """key [rows, kv_heads, key_dim], value [rows, kv_heads, value_dim], the heads of a row side by
    side, to the cache at `slots` [rows].
    """
    from qtool.kernels.cuda.device import fused

    rows, kv_heads, key_dim = key.shape
    value_dim = value.shape[2]
    for part in (key, value):
        assert part.stride(2) == 1
        assert part.stride(1) == part.shape[2]
    fused.write_cache[(rows, kv_heads)](
        key,
        value,
        slots,
        cache.keys,
        cache.values,
        slots if cache.key_scales is None else cache.key_scales,
        slots if cache.value_scales is None else cache.value_scales,
        cache.keys.shape[1],
        key.stride(0),
        value.stride(0),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK=1 << (max(key_dim, value_dim) - 1).bit_length(),
        SCALED=cache.key_scales is not None,
        num_warps=1,
    )


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [rows, channels] -> codes in int8 or float8_e4m3fn, and scales [rows] float32.

    codes * scale is x, rounded.
    """
    from qtool.kernels.cuda.device import fused

    rows, channels = x.shape
    assert x.stride(1) == 1
    codes = torch.empty((rows, channels), dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    whole = dtype == torch.int8
    fused.quantize_rows[(rows,)](
        x,
        codes,
        scales,
        x.stride(0),
        CHANNELS=channels,
        BLOCK=min(4096, 1 << (channels - 1).bit_length()),
        LARGEST=127.0 if whole else float(torch.finfo(dtype).max),
        WHOLE=whole,
        num_warps=4,
    )
    return codes, scales
