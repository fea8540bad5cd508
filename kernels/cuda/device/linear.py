"""A product with Marlin words, and the words unpacked."""

import triton
import triton.language as tl

from qtool.kernels.cuda.device.words import input_order, output_columns, weight_tile


@triton.jit
def marlin_matmul(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    sums_ptr,
    bias_ptr,
    rows_ptr,
    experts_ptr,
    out_ptr,
    num_rows,
    out_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    x_stride,
    BITS: tl.constexpr,
    BK: tl.constexpr,
    STRIPS: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUTED: tl.constexpr,
    ASM: tl.constexpr,
    K_BY_THREAD: tl.constexpr,
):
    """One tile [64 * STRIPS outputs, BM rows] over one of SPLIT runs of K.

    x       [num_rows, K], rows x_stride apart
    words   [K / 16, N * BITS / 2] int32 (ROUTED: one such matrix an expert)
    scales  [K / BK, N], or [1, N] for WHOLE_ROW
    zeros   like scales, uint8
    sums    [K / BK, num_rows] float32: x summed over each block of BK; read with 4 bits only
    bias    [N]
    rows    ROUTED: [tiles * BM] int32, the row of x that each output row is of; negative: none
    experts ROUTED: [tiles] int32, whose words; negative: the tile is not used
    out     [SPLIT, out_rows, N]

    Every block of K is a product of its own, then scaled: the sums stay in registers while tensor
    cores run, which a running accumulator with scaled weights would not let them.
    """
    tile_n = tl.program_id(0)
    part = tl.program_id(1)
    tile_m = tl.program_id(2)
    BN: tl.constexpr = 64 * STRIPS
    BLOCKS: tl.constexpr = K // BK
    PER_PART: tl.constexpr = (BLOCKS + SPLIT - 1) // SPLIT
    ROW_WORDS: tl.constexpr = N * BITS // 2
    TILE_WORDS: tl.constexpr = STRIPS * 32 * BITS
    GROUPS: tl.constexpr = 1 if WHOLE_ROW else BLOCKS
    first = part * PER_PART
    last = tl.minimum(first + PER_PART, BLOCKS)

    out_row = tile_m * BM + tl.arange(0, BM)
    in_range = out_row < out_rows
    if ROUTED:
        expert = tl.load(experts_ptr + tile_m).to(tl.int64)
        if expert < 0:
            return
        row = tl.load(rows_ptr + out_row, mask=in_range, other=-1)
        in_range = row >= 0
        row = tl.where(in_range, row, 0)
        words_ptr += expert * (K // 16) * ROW_WORDS
        scales_ptr += expert * GROUPS * N
        zeros_ptr += expert * GROUPS * N
    else:
        row = out_row

    column = tile_n * BN + output_columns(STRIPS)
    x_at = x_ptr + row[None, :].to(tl.int64) * x_stride
    x_at += first * BK + input_order(BK, K_BY_THREAD)[:, None]
    strip_at = first * (BK // 16) + tl.arange(0, BK // 16)
    word_at = tile_n * TILE_WORDS + tl.arange(0, TILE_WORDS)
    words_at = words_ptr + strip_at[:, None] * ROW_WORDS + word_at[None, :]
    group_at = column
    if not WHOLE_ROW:
        group_at += first * N
    sums_at = sums_ptr + first * num_rows + row

    total = tl.zeros((BN, BM), tl.float32)
    for _ in tl.range(first, last, num_stages=STAGES):
        words = tl.load(words_at, eviction_policy="evict_first")
        x = tl.load(x_at, mask=in_range[None, :], other=0.0)
        scale = tl.load(scales_ptr + group_at).to(tl.float32)
        codes = weight_tile(words, BITS, STRIPS, BK, BIAS, x.dtype, ASM, K_BY_THREAD)
        product = tl.dot(codes, x, input_precision="ieee")
        if BITS == 4:
            sums = tl.load(sums_at, mask=in_range, other=0.0)
            if HAS_ZEROS:
                zero = tl.load(zeros_ptr + group_at).to(tl.float32) + BIAS
            else:
                zero = tl.full((BN,), BIAS + 8.0, tl.float32)
            product -= zero[:, None] * sums[None, :]
            sums_at += num_rows
        total += product * scale[:, None]
        x_at += BK
        words_at += (BK // 16) * ROW_WORDS
        if not WHOLE_ROW:
            group_at += N

    if HAS_BIAS:
        # Once, whatever the split.
        bias = tl.load(bias_ptr + column).to(tl.float32)
        total += tl.where(part == 0, bias, 0.0)[:, None]
    out_at = out_ptr + (part * out_rows + out_row[None, :]).to(tl.int64) * N + column[:, None]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=in_range[None, :])


@triton.jit
def unpack_words(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BK: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    """A tile [64 outputs, BK inputs] of the weight [N, K], scaled."""
    tile_n = tl.program_id(0)
    block = tl.program_id(1)
    ROW_WORDS: tl.constexpr = N * BITS // 2
    strip_at = block * (BK // 16) + tl.arange(0, BK // 16)
    word_at = tile_n * 32 * BITS + tl.arange(0, 32 * BITS)
    words = tl.load(words_ptr + strip_at[:, None] * ROW_WORDS + word_at[None, :])
    codes = weight_tile(words, BITS, 1, BK, 0, tl.float32, False, False)
    column = tile_n * 64 + output_columns(1)
    group_at = column
    if not WHOLE_ROW:
        group_at += block * N
    if BITS == 4:
        if HAS_ZEROS:
            codes -= tl.load(zeros_ptr + group_at).to(tl.float32)[:, None]
        else:
            codes -= 8.0
    values = codes * tl.load(scales_ptr + group_at).to(tl.float32)[:, None]
    at = column[:, None].to(tl.int64) * K + block * BK + tl.arange(0, BK)[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty))


@triton.jit
def block_sums(
    x_ptr, sums_ptr, num_rows, x_stride, K: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr
):
    """sums [K / BK, num_rows] float32 of x [num_rows, K]."""
    block = tl.program_id(0)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    in_range = row < num_rows
    at = row[:, None].to(tl.int64) * x_stride + block * BK + tl.arange(0, BK)[None, :]
    x = tl.load(x_ptr + at, mask=in_range[:, None], other=0.0).to(tl.float32)
    tl.store(sums_ptr + block * num_rows + row, tl.sum(x, axis=1), mask=in_range)


@triton.jit
def add_parts(parts_ptr, out_ptr, num_elements, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """parts [SPLIT, elements] float32 -> their sum, in the order of the parts."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = at < num_elements
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + part * num_elements + at, mask=in_range, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=in_range)
