"""What a block does between its linears, one kernel for each gap.

Each reads a linear's product as it was left, in parts [SPLIT, rows, channels], and adds the parts
in order; and where the next linear has codes of 4 bits, it leaves the sums of what it writes over
each block of inputs (`linear.marlin_matmul` says what for). Arithmetic is in float32.
"""

import triton
import triton.language as tl


@triton.jit
def _sum_of_parts(parts_ptr, at, stride, mask, SPLIT: tl.constexpr):
    total = tl.load(parts_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts_ptr + part * stride + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _store_with_sums(
    out_ptr,
    sums_ptr,
    at,
    values,
    row,
    num_rows,
    first_block,
    mask,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """values [BLOCK] of one row; channels beyond CHANNELS are masked out, and zero."""
    rounded = values.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, rounded, mask=mask)
    if SUM_BLOCK > 0:
        NUM: tl.constexpr = BLOCK // SUM_BLOCK
        kept = tl.where(mask, rounded.to(tl.float32), 0.0)
        sums = tl.sum(tl.reshape(kept, (NUM, SUM_BLOCK)), axis=1)
        block = first_block + tl.arange(0, NUM)
        tl.store(sums_ptr + block * num_rows + row, sums, mask=block * SUM_BLOCK < CHANNELS)


@triton.jit
def add_norm(
    residual_ptr,
    parts_ptr,
    post_weight_ptr,
    weight_ptr,
    out_ptr,
    sums_ptr,
    num_rows,
    parts_stride,
    eps,
    residual_scale,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_POST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """residual += scale * [post norm of] the parts' sum, in place; out = its RMS norm.

    SPLIT 0: nothing is added. HAS_NORM False: out is the residual itself.
    """
    row = tl.program_id(0)
    channel = tl.arange(0, BLOCK)
    mask = channel < CHANNELS
    at = row.to(tl.int64) * CHANNELS + channel
    x = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if SPLIT > 0:
        y = _sum_of_parts(parts_ptr, at, parts_stride, mask, SPLIT)
        if HAS_POST:
            weight = tl.load(post_weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
            y = y * tl.rsqrt(tl.sum(y * y) / CHANNELS + eps) * weight
        added = (x + residual_scale * y).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + at, added, mask=mask)
        x = added.to(tl.float32)
    if HAS_NORM:
        weight = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x) / CHANNELS + eps) * weight
    _store_with_sums(out_ptr, sums_ptr, at, x, row, num_rows, 0, mask, CHANNELS, BLOCK, SUM_BLOCK)


@triton.jit
def gate_mul(
    parts_ptr,
    out_ptr,
    sums_ptr,
    num_rows,
    parts_stride,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """[rows, 2 * CHANNELS], gates first -> [rows, CHANNELS]: activation(gate) times up."""
    row = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < CHANNELS
    start = row.to(tl.int64) * 2 * CHANNELS
    gate = _sum_of_parts(parts_ptr, start + channel, parts_stride, mask, SPLIT)
    up = _sum_of_parts(parts_ptr, start + CHANNELS + channel, parts_stride, mask, SPLIT)
    if ACTIVATION == "silu":
        active = gate / (1.0 + tl.exp(-gate))
    else:
        # gelu by tanh: z (1 + tanh(u)) / 2 = z sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1.0 + tl.exp(-inner))
    first_block = tl.program_id(1) * (BLOCK // SUM_BLOCK if SUM_BLOCK > 0 else 0)
    at = row.to(tl.int64) * CHANNELS + channel
    _store_with_sums(
        out_ptr,
        sums_ptr,
        at,
        active * up,
        row,
        num_rows,
        first_block,
        mask,
        CHANNELS,
        BLOCK,
        SUM_BLOCK,
    )


@triton.jit
def _whole_numbers(x):
    """To the nearest, ties to even, within int8."""
    # 1.5 * 2**23: adding it leaves no bits for fractions.
    magic = 12582912.0
    return ((x + magic) - magic).to(tl.int8)


@triton.jit
def rope_and_write(
    parts_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    parts_stride,
    slots_per_head,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATED: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One head of one row: queries and keys normed and turned, keys and values into the cache.

    parts     [SPLIT, rows, HEADS + 2 * KV_HEADS, CHANNELS]
    norm      [HEADS + KV_HEADS, CHANNELS]
    cos, sin  [rows, ROTATED / 2] float32, for the pairs (i, i + ROTATED / 2)
    slots     [rows] int64; negative: the row is not cached
    query     [rows, HEADS, CHANNELS]
    keys, values [KV_HEADS, slots, CHANNELS], in int8 with scales [KV_HEADS, slots] where SCALED
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    mask = channel < CHANNELS
    start = (row.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * CHANNELS
    x = _sum_of_parts(parts_ptr, start + channel, parts_stride, mask, SPLIT)
    is_value = head >= HEADS + KV_HEADS
    HALF: tl.constexpr = ROTATED // 2
    if not is_value:
        partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
        partner = tl.where(channel < ROTATED, partner, channel)
        y = _sum_of_parts(parts_ptr, start + partner, parts_stride, mask, SPLIT)
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(x * x) / CHANNELS + eps)
            norm_at = norm_ptr + head * CHANNELS
            x = x * scale * tl.load(norm_at + channel, mask=mask, other=0.0).to(tl.float32)
            y = y * scale * tl.load(norm_at + partner, mask=mask, other=0.0).to(tl.float32)
        if ROTATED > 0:
            turned = channel < ROTATED
            at = row * HALF + channel % HALF
            cos = tl.load(cos_ptr + at, mask=turned, other=1.0)
            sin = tl.load(sin_ptr + at, mask=turned, other=0.0)
            x = x * cos + tl.where(channel < HALF, -y, y) * sin
    if head < HEADS:
        out_at = query_ptr + (row.to(tl.int64) * HEADS + head) * CHANNELS + channel
        tl.store(out_at, x.to(query_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + row)
        if slot >= 0:
            # What is cached is what an unfused model would cache: rounded first.
            x = x.to(query_ptr.dtype.element_ty).to(tl.float32)
            kv_head = (head - HEADS) % KV_HEADS
            at = kv_head.to(tl.int64) * slots_per_head + slot
            if SCALED:
                top = tl.max(tl.where(mask, tl.abs(x), 0.0))
                tiny = top < 1e-30
                step = tl.where(tiny, 0.0, top / 127.0)
                x = x * tl.where(tiny, 0.0, 127.0 / tl.where(tiny, 1.0, top))
                if is_value:
                    tl.store(value_scales_ptr + at, step)
                    tl.store(values_ptr + at * CHANNELS + channel, _whole_numbers(x), mask=mask)
                else:
                    tl.store(key_scales_ptr + at, step)
                    tl.store(keys_ptr + at * CHANNELS + channel, _whole_numbers(x), mask=mask)
            else:
                if is_value:
                    value_at = values_ptr + at * CHANNELS + channel
                    tl.store(value_at, x.to(values_ptr.dtype.element_ty), mask=mask)
                else:
                    key_at = keys_ptr + at * CHANNELS + channel
                    tl.store(key_at, x.to(keys_ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_cache(
    key_ptr,
    value_ptr,
    slots_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slots_per_head,
    key_row,
    value_row,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One KV head of one row: key [rows, kv_heads, KEY_DIM] and value, to the cache."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    channel = tl.arange(0, BLOCK)
    at = head.to(tl.int64) * slots_per_head + slot
    key_in, value_in = channel < KEY_DIM, channel < VALUE_DIM
    key = tl.load(
        key_ptr + row.to(tl.int64) * key_row + head * KEY_DIM + channel, mask=key_in, other=0.0
    )
    value = tl.load(
        value_ptr + row.to(tl.int64) * value_row + head * VALUE_DIM + channel,
        mask=value_in,
        other=0.0,
    )
    if SCALED:
        key, value = key.to(tl.float32), value.to(tl.float32)
        key_top, value_top = tl.max(tl.abs(key)), tl.max(tl.abs(value))
        key_tiny, value_tiny = key_top < 1e-30, value_top < 1e-30
        key *= tl.where(key_tiny, 0.0, 127.0 / tl.where(key_tiny, 1.0, key_top))
        value *= tl.where(value_tiny, 0.0, 127.0 / tl.where(value_tiny, 1.0, value_top))
        tl.store(key_scales_ptr + at, tl.where(key_tiny, 0.0, key_top / 127.0))
        tl.store(value_scales_ptr + at, tl.where(value_tiny, 0.0, value_top / 127.0))
        tl.store(keys_ptr + at * KEY_DIM + channel, _whole_numbers(key), mask=key_in)
        tl.store(values_ptr + at * VALUE_DIM + channel, _whole_numbers(value), mask=value_in)
    else:
        tl.store(keys_ptr + at * KEY_DIM + channel, key.to(keys_ptr.dtype.element_ty), mask=key_in)
        value_at = values_ptr + at * VALUE_DIM + channel
        tl.store(value_at, value.to(values_ptr.dtype.element_ty), mask=value_in)


@triton.jit
def quantize_rows(
    x_ptr,
    codes_ptr,
    scales_ptr,
    x_stride,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """x [rows, CHANNELS] -> codes with a scale a row: its largest is LARGEST.

    WHOLE  whole numbers in int8, else 8-bit floats
    """
    row = tl.program_id(0)
    top = 0.0
    for first in range(0, CHANNELS, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        at = x_ptr + row.to(tl.int64) * x_stride + channel
        x = tl.load(at, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.abs(x)))
    tiny = top < 1e-30
    tl.store(scales_ptr + row, tl.where(tiny, 0.0, top / LARGEST))
    inverse = tl.where(tiny, 0.0, LARGEST / tl.where(tiny, 1.0, top))
    for first in range(0, CHANNELS, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        mask = channel < CHANNELS
        at = x_ptr + row.to(tl.int64) * x_stride + channel
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32) * inverse
        out_at = codes_ptr + row.to(tl.int64) * CHANNELS + channel
        if WHOLE:
            tl.store(out_at, _whole_numbers(x), mask=mask)
        else:
            tl.store(out_at, x.to(codes_ptr.dtype.element_ty), mask=mask)
