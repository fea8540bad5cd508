"""Paged attention on a GPU: one call for decoding, chunks of prompts and prefix hits, in any mix.

What a step needs is planned once and used by every layer: where each sequence's pages are, how many
tokens it has, and which tiles of queries there are. Sequences with a few new tokens take small
tiles, whose keys are cut into parts where there are too few of them to fill the GPU; prompts take
large ones. Everything that changes from step to step is on the device, so that a recorded step
(`runtime.engine.graphs`) can be replayed with other numbers.

The cache is the engine's: [kv_heads, slots, channels], where a page of a head lies in one piece. It
is in the activations' type, in 8-bit floats, or in int8 with a scale for each token and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.kernels.cuda.launch import Launch, num_multiprocessors, to_device
from qtool.kernels.reference import Span

MAX_HEAD_DIM = 256
# Rows (tokens times heads of a group) of a tile: of decoding, and of prompts.
SMALL_ROWS = 16
LARGE_ROWS = 128
# Keys that a part has at the least, and parts that a tile has at the most.
LEAST_KEYS = 256
MAX_PARTS = 32
# Programs that a multiprocessor is given before keys are no longer cut.
PROGRAMS_PER_SM = 2


class AttentionShape(NamedTuple):
    """What a layer's plan depends on; layers of one shape share it."""

    num_heads: int
    num_kv_heads: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def tokens_in(self, rows: int) -> int:
        return rows // self.group


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Tiles of queries that one launch computes.

    sequences, firsts  [tiles] int32: the sequence and its first query; sequence -1: none
    rows               of each, a power of two
    parts              that keys are cut into at the most
    tokens             that a tile has at the most, in this step
    """

    sequences: Tensor
    firsts: Tensor
    rows: int
    parts: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class StepTables:
    """A step's sequences on the device.

    pages       [sequences, width] int32
    first_rows  [sequences + 1] int32, lengths [sequences] int32
    slots       [rows] int64, where each row's key and value go; negative: nowhere
    tiles       by the shape of the layers
    """

    pages: Tensor
    first_rows: Tensor
    lengths: Tensor
    slots: Tensor
    tiles: dict[AttentionShape, tuple[Tiles, ...]]


def choose_parts(num_tiles: int, shape: AttentionShape, longest: int, num_sms: int) -> int:
    """A power of two, so that few forms of the kernel are compiled."""
    programs = max(1, num_tiles * shape.num_kv_heads)
    wanted = min(PROGRAMS_PER_SM * num_sms // programs, -(-longest // LEAST_KEYS), MAX_PARTS)
    return 1 << max(0, wanted.bit_length() - 1)


def small_rows(shape: AttentionShape) -> int:
    """A tile that holds one token's heads of a group, and what tensor cores take at the least."""
    return max(SMALL_ROWS, 1 << (shape.group - 1).bit_length())


def large_rows(shape: AttentionShape) -> int:
    return max(LARGE_ROWS, small_rows(shape))


def plan(
    spans: Sequence[Span],
    shapes: Sequence[AttentionShape],
    *,
    block_size: int,
    device: torch.device,
) -> StepTables:
    """Of a step's spans (`reference.Span`); one copy to the device for each table."""
    slots: list[int] = []
    first_rows = [0]
    width = 1
    for span in spans:
        first = span.length - span.num_queries
        slots.extend(
            span.block_ids[t // block_size] * block_size + t % block_size
            for t in range(first, span.length)
        )
        first_rows.append(first_rows[-1] + span.num_queries)
        width = max(width, -(-span.length // block_size))
    pages = [[*span.block_ids[:width], *[0] * (width - len(span.block_ids))] for span in spans]
    return StepTables(
        pages=to_device(pages, torch.int32, device),
        first_rows=to_device(first_rows, torch.int32, device),
        lengths=to_device([s.length for s in spans], torch.int32, device),
        slots=to_device(slots, torch.int64, device),
        tiles={shape: _tile(spans, shape, device) for shape in dict.fromkeys(shapes)},
    )


def _tile(spans: Sequence[Span], shape: AttentionShape, device: torch.device) -> tuple[Tiles, ...]:
    small, large = small_rows(shape), large_rows(shape)
    few = shape.tokens_in(small)
    groups: dict[int, list[tuple[int, int]]] = {small: [], large: []}
    longest, tokens = {small: 0, large: 0}, {small: 0, large: 0}
    for index, span in enumerate(spans):
        rows = small if span.num_queries <= few else large
        each = shape.tokens_in(rows)
        groups[rows].extend((index, first) for first in range(0, span.num_queries, each))
        longest[rows] = max(longest[rows], span.length)
        tokens[rows] = max(tokens[rows], min(each, span.num_queries))
    num_sms = num_multiprocessors(device)
    found = []
    for rows, tiles in groups.items():
        if not tiles:
            continue
        both = to_device(list(zip(*tiles, strict=True)), torch.int32, device)
        parts = choose_parts(len(tiles), shape, longest[rows], num_sms)
        found.append(Tiles(both[0], both[1], rows, parts, tokens[rows]))
    return tuple(found)


class Form(NamedTuple):
    """How a tile is compiled: keys a step, warps, stages."""

    keys: int
    warps: int
    stages: int


def choose_form(rows: int, channels: int, *, has_wgmma: bool) -> Form:
    """By the registers that a tile's sums take and the shared memory of its keys and values."""
    wide = channels > 128
    if rows <= 64:
        return Form(keys=32 if wide else 64, warps=4, stages=2 if wide else 3)
    # Without wgmma, queries and shares take registers beside the sums.
    return Form(keys=32 if wide or not has_wgmma else 64, warps=8, stages=2 if wide else 3)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: StepTables,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """query [rows, heads, key_dim] over pools [kv_heads, slots, dim] -> [rows, heads, value_dim].

    window   a token sees itself and the window - 1 tokens before it; None: all before it
    softcap  scores become softcap * tanh(score / softcap)
    sinks    [heads] float32, a logit of each head that takes its share and gives nothing
    scales   [kv_heads, slots] float32 each, of pools in int8
    """
    from qtool.kernels.cuda.device import attention

    rows, heads, key_dim = query.shape
    kv_heads, slots, value_dim = values.shape
    assert query.stride(2) == 1
    assert query.stride(1) == key_dim
    assert keys.stride(2) == values.stride(2) == 1
    assert keys.stride(0) == slots * keys.stride(1)
    assert values.stride(0) == slots * values.stride(1)
    assert max(key_dim, value_dim) <= MAX_HEAD_DIM
    shape, launch = AttentionShape(heads, kv_heads), Launch.on(query.device)
    out = query.new_empty(rows, heads, value_dim)
    key_scales, value_scales = (out, out) if scales is None else scales
    key_block, value_block = (max(16, 1 << (dim - 1).bit_length()) for dim in (key_dim, value_dim))
    for tiles in tables.tiles[shape]:
        form = choose_form(tiles.rows, max(key_block, value_block), has_wgmma=launch.has_wgmma)
        parts = weights = out
        if tiles.parts > 1:
            parts = query.new_empty(rows, heads, tiles.parts, value_dim, dtype=torch.float32)
            weights = query.new_empty(rows, heads, tiles.parts, dtype=torch.float32)
        num_tiles = len(tiles.sequences)
        attention.paged_attention[(num_tiles, kv_heads, tiles.parts)](
            query,
            keys,
            values,
            key_scales,
            value_scales,
            out if sinks is None else sinks,
            tables.pages,
            tables.first_rows,
            tables.lengths,
            tiles.sequences,
            tiles.firsts,
            out,
            parts,
            weights,
            float(scale),
            float(softcap or 1.0),
            slots,
            tables.pages.shape[1],
            query.stride(0),
            HEADS=heads,
            KV_HEADS=kv_heads,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            KEY_BLOCK=key_block,
            VALUE_BLOCK=value_block,
            KEY_ROW=keys.stride(1),
            VALUE_ROW=values.stride(1),
            PAGE=block_size,
            TILE=form.keys,
            BM=tiles.rows,
            SPLIT=tiles.parts,
            LEAST=LEAST_KEYS,
            WINDOW=window or 0,
            HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None,
            SCALED=scales is not None,
            STAGES=form.stages,
            num_warps=form.warps,
            num_stages=form.stages,
        )
        if tiles.parts > 1:
            attention.merge_parts[(num_tiles, heads, tiles.tokens)](
                parts,
                weights,
                tables.first_rows,
                tables.lengths,
                tiles.sequences,
                tiles.firsts,
                out,
                HEADS=heads,
                GROUP=shape.group,
                VALUE_DIM=value_dim,
                VALUE_BLOCK=value_block,
                TILE=form.keys,
                BM=tiles.rows,
                SPLIT=tiles.parts,
                LEAST=LEAST_KEYS,
                WINDOW=window or 0,
                num_warps=2,
            )
    return out
