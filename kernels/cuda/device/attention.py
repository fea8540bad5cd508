"""Causal attention over a paged cache: one kernel for decoding, chunks of prompts and prefix hits.

A program has a tile of queries: some tokens of one sequence times the heads that share a KV head,
so that keys and values are read once for all of them. Decoding is a tile of one token; a prompt
whose beginning is in the cache is a tile that starts late. The keys that a tile sees are cut into
parts where a batch has too few tiles to fill the GPU; every part leaves its sums with the logarithm
of their weight, and `merge_parts` adds them in the order of the keys.

Scores are kept in powers of two: exp2 is one instruction, and scale times log2(e) one constant.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _part_bounds(
    tile_first,
    num_queries,
    length,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Keys [low, high) that a tile sees, the parts they are cut into and the length of one."""
    position = length - num_queries + tile_first
    high = tl.minimum(position + TOKENS, length)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(position - WINDOW + 1, 0) // TILE * TILE
    seen = tl.maximum(high - low, 0)
    parts = tl.minimum(tl.maximum(tl.cdiv(seen, LEAST), 1), SPLIT)
    each = tl.cdiv(tl.cdiv(seen, parts), TILE) * TILE
    # Rounding a part up may have left none for the last.
    parts = tl.maximum(tl.cdiv(seen, tl.maximum(each, 1)), 1)
    return position, low, high, parts, each


@triton.jit
def _scores(
    query,
    keys,
    key_scale,
    key_position,
    query_position,
    scale,
    softcap,
    high,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Scores [rows, keys] float32 times log2(e), -inf where a key is not seen."""
    scores = tl.dot(query, keys, input_precision="ieee")
    if SCALED:
        scores *= key_scale[None, :]
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        capped = 1.0 - 2.0 / (tl.exp2(scores * (scale / softcap * 2.0 * LOG2_E)) + 1.0)
        scores = capped * (softcap * LOG2_E)
    else:
        scores *= scale * LOG2_E
    distance = query_position[:, None] - key_position[None, :]
    if MASKED:
        scores = tl.where((distance >= 0) & (key_position < high)[None, :], scores, float("-inf"))
    if WINDOW > 0:
        scores = tl.where(distance < WINDOW, scores, float("-inf"))
    return scores


@triton.jit
def _over_keys(
    accumulated,
    weight,
    largest,
    query,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    table_ptr,
    query_position,
    start,
    stop,
    high,
    scale,
    softcap,
    slots,
    head,
    key_row,
    value_row,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Keys start .. stop - 1 in steps of TILE; MASKED: some of them may not be seen, or not be."""
    key_channel = tl.arange(0, KEY_BLOCK)
    value_channel = tl.arange(0, VALUE_BLOCK)
    key_in = key_channel < KEY_DIM
    value_in = value_channel < VALUE_DIM
    for first in tl.range(start, stop, TILE, num_stages=STAGES):
        position = first + tl.arange(0, TILE)
        there = position < high
        if MASKED:
            page = tl.load(table_ptr + position // PAGE, mask=there, other=0)
        else:
            page = tl.load(table_ptr + position // PAGE)
        slot = page.to(tl.int64) * PAGE + position % PAGE
        slot += head * slots
        key_at = keys_ptr + slot[None, :] * key_row + key_channel[:, None]
        value_at = values_ptr + slot[:, None] * value_row + value_channel[None, :]
        if MASKED:
            keys = tl.load(key_at, mask=there[None, :] & key_in[:, None], other=0.0)
            values = tl.load(value_at, mask=there[:, None] & value_in[None, :], other=0.0)
        elif KEY_DIM != KEY_BLOCK or VALUE_DIM != VALUE_BLOCK:
            keys = tl.load(key_at, mask=key_in[:, None], other=0.0)
            values = tl.load(value_at, mask=value_in[None, :], other=0.0)
        else:
            keys = tl.load(key_at)
            values = tl.load(value_at)
        if SCALED:
            key_scale = tl.load(key_scales_ptr + slot, mask=there, other=0.0)
            value_scale = tl.load(value_scales_ptr + slot, mask=there, other=0.0)
        else:
            key_scale = 1.0
            value_scale = 1.0
        scores = _scores(
            query,
            keys.to(query.dtype),
            key_scale,
            position,
            query_position,
            scale,
            softcap,
            high,
            MASKED,
            WINDOW,
            HAS_SOFTCAP,
            SCALED,
        )
        # Finite, so that a row that sees nothing yet takes no -inf from itself.
        larger = tl.maximum(largest, tl.maximum(tl.max(scores, 1), -1e30))
        shares = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        weight = weight * shrink + tl.sum(shares, 1)
        if SCALED:
            shares *= value_scale[None, :]
        accumulated *= shrink[:, None]
        accumulated = tl.dot(
            shares.to(query.dtype), values.to(query.dtype), accumulated, input_precision="ieee"
        )
        largest = larger
    return accumulated, weight, largest


@triton.jit
def paged_attention(
    query_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    sinks_ptr,
    tables_ptr,
    first_rows_ptr,
    lengths_ptr,
    tile_sequences_ptr,
    tile_firsts_ptr,
    out_ptr,
    parts_ptr,
    weights_ptr,
    scale,
    softcap,
    slots,
    table_width,
    query_row,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    KEY_ROW: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of queries, one KV head, one part of the keys.

    query      [rows, HEADS, KEY_DIM], rows query_row apart
    keys       [KV_HEADS, slots, KEY_DIM] with KEY_ROW numbers a slot, values likewise
    scales     SCALED: [KV_HEADS, slots] float32, what keys and values are multiplied by
    tables     [sequences, table_width] int32, the pages of each sequence
    first_rows [sequences + 1] int32, lengths [sequences] int32 with the step's own tokens
    tiles      sequence and first query of each, int32; a negative sequence: the tile is not used
    out        [rows, HEADS, VALUE_DIM]; where there are several parts
    parts      [rows, HEADS, SPLIT, VALUE_DIM] float32 and weights [rows, HEADS, SPLIT], log2
    WINDOW     0: all before it
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKENS: tl.constexpr = BM // GROUP
    sequence = tl.load(tile_sequences_ptr + tile)
    if sequence < 0:
        return
    tile_first = tl.load(tile_firsts_ptr + tile)
    first_row = tl.load(first_rows_ptr + sequence)
    num_queries = tl.load(first_rows_ptr + sequence + 1) - first_row
    length = tl.load(lengths_ptr + sequence)
    position, low, high, parts, each = _part_bounds(
        tile_first, num_queries, length, TOKENS, WINDOW, TILE, SPLIT, LEAST
    )
    if part >= parts:
        return

    row = tl.arange(0, BM)
    token = tile_first + row // GROUP
    own = (row < TOKENS * GROUP) & (token < num_queries)
    at_row = (first_row + token).to(tl.int64)
    at_head = head * GROUP + row % GROUP
    channel = tl.arange(0, KEY_BLOCK)
    query = tl.load(
        query_ptr + (at_row * query_row + at_head * KEY_DIM)[:, None] + channel[None, :],
        mask=own[:, None] & (channel < KEY_DIM)[None, :],
        other=0.0,
    )
    query_position = position + row // GROUP

    accumulated = tl.zeros((BM, VALUE_BLOCK), tl.float32)
    if HAS_SINKS:
        # A key without a value, which the first part counts.
        sink = tl.load(sinks_ptr + at_head) * LOG2_E
        largest = tl.where(part == 0, sink, -1e30)
        weight = tl.where(part == 0, 1.0, 0.0) + tl.zeros((BM,), tl.float32)
    else:
        largest = tl.full((BM,), -1e30, tl.float32)
        weight = tl.zeros((BM,), tl.float32)

    start = low + part * each
    stop = tl.minimum(start + each, high)
    # Up to the tile's first query every row sees every key.
    whole = tl.maximum(tl.minimum((position + 1) // TILE * TILE, stop), start)
    whole = start + (whole - start) // TILE * TILE
    table = tables_ptr + sequence.to(tl.int64) * table_width
    accumulated, weight, largest = _over_keys(
        accumulated, weight, largest, query, keys_ptr, values_ptr, key_scales_ptr,
        value_scales_ptr, table, query_position, start, whole, high, scale, softcap, slots, head,
        KEY_ROW, VALUE_ROW, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, PAGE, TILE, False, WINDOW,
        HAS_SOFTCAP, SCALED, STAGES,
    )  # fmt: skip
    accumulated, weight, largest = _over_keys(
        accumulated, weight, largest, query, keys_ptr, values_ptr, key_scales_ptr,
        value_scales_ptr, table, query_position, whole, stop, high, scale, softcap, slots, head,
        KEY_ROW, VALUE_ROW, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, PAGE, TILE, True, WINDOW,
        HAS_SOFTCAP, SCALED, 1,
    )  # fmt: skip

    # A row that saw nothing (of a sequence without tokens) is zero.
    result = accumulated / tl.where(weight > 0, weight, 1.0)[:, None]
    value_channel = tl.arange(0, VALUE_BLOCK)
    mask = own[:, None] & (value_channel < VALUE_DIM)[None, :]
    at = at_row * HEADS + at_head
    if parts == 1:
        out_at = out_ptr + at[:, None] * VALUE_DIM + value_channel[None, :]
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        part_at = at * SPLIT + part
        tl.store(parts_ptr + part_at[:, None] * VALUE_DIM + value_channel[None, :], result, mask)
        known = tl.where(weight > 0, largest + tl.log2(tl.where(weight > 0, weight, 1.0)), -1e30)
        tl.store(weights_ptr + part_at, known, mask=own)


@triton.jit
def merge_parts(
    parts_ptr,
    weights_ptr,
    first_rows_ptr,
    lengths_ptr,
    tile_sequences_ptr,
    tile_firsts_ptr,
    out_ptr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One head of one token of a tile, whose parts `paged_attention` has left."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    TOKENS: tl.constexpr = BM // GROUP
    sequence = tl.load(tile_sequences_ptr + tile)
    if sequence < 0:
        return
    tile_first = tl.load(tile_firsts_ptr + tile)
    first_row = tl.load(first_rows_ptr + sequence)
    num_queries = tl.load(first_rows_ptr + sequence + 1) - first_row
    length = tl.load(lengths_ptr + sequence)
    _, _, _, parts, _ = _part_bounds(
        tile_first, num_queries, length, TOKENS, WINDOW, TILE, SPLIT, LEAST
    )
    if parts == 1:
        return
    token = tile_first + tl.program_id(2)
    if token >= num_queries:
        return
    at = (first_row + token).to(tl.int64) * HEADS + head
    channel = tl.arange(0, VALUE_BLOCK)
    channel_in = channel < VALUE_DIM
    largest = -1e30
    for part in range(parts):
        largest = tl.maximum(largest, tl.load(weights_ptr + at * SPLIT + part))
    total = 0.0
    merged = tl.zeros((VALUE_BLOCK,), tl.float32)
    for part in range(parts):
        share = tl.exp2(tl.load(weights_ptr + at * SPLIT + part) - largest)
        values_at = parts_ptr + (at * SPLIT + part) * VALUE_DIM + channel
        merged += share * tl.load(values_at, mask=channel_in, other=0.0)
        total += share
    out_at = out_ptr + at * VALUE_DIM + channel
    tl.store(out_at, (merged / total).to(out_ptr.dtype.element_ty), mask=channel_in)
