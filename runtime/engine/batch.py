"""A scheduled step as tensors: one row a token, the sequences one after the other.

The model computes hidden states for every row, and logits only for the rows that somebody reads:

    prompt rows   of sequences that ask for prompt_logprobs: row p says what it thought of token p+1
    last row      of each sequence that draws a token
    draft rows    after the last row, one for each guessed token: row i judges the guess after it

A token that the step before has drawn and nobody has read is filled in on the device (`Unread`).
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.kernels.cuda.launch import to_device
from qtool.kernels.reference import Span
from qtool.runtime.engine.scheduler import Scheduled
from qtool.runtime.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Unread:
    """What a step has drawn: tokens [drawn] int64 on the device, and whose is where."""

    tokens: Tensor
    places: Mapping[Sequence, int]


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of one forward pass.

    token_ids, positions  [rows] int64
    spans                 each sequence's rows and blocks, in the order of the rows
    sampled_rows          [sampled] int64, the rows whose logits are wanted, rising
    row_ranges            for each sequence its part of the sampled rows, as indices into the
                          logits [sampled, vocab]: first `Scheduled.num_prompt_rows` of the prompt,
                          then `Scheduled.num_draw_rows` to draw from; empty if it wants none
    """

    token_ids: Tensor
    positions: Tensor
    spans: tuple[Span, ...]
    sampled_rows: Tensor
    row_ranges: tuple[range, ...]


def make_batch(
    scheduled: Series[Scheduled],
    table: Callable[[str], Series[int]],
    device: torch.device,
    unread: Unread | None = None,
) -> Batch:
    """unread: of the step before, where it has not been read"""
    token_ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    sampled_rows: list[int] = []
    row_ranges: list[range] = []
    fed_rows: list[int] = []
    fed_from: list[int] = []
    for work in scheduled:
        sequence = work.sequence
        first_row = len(token_ids)
        start = work.start
        stop = start + work.num_tokens
        token_ids.extend(sequence.token_ids[start:stop])
        if sequence.num_unread_tokens and work.samples:
            assert unread is not None
            fed_rows.append(len(token_ids))
            fed_from.append(unread.places[sequence])
            token_ids.append(0)
        if work.num_draft_tokens:
            token_ids.extend(sequence.draft_token_ids[: work.num_draft_tokens])
        positions.extend(range(start, stop))
        spans.append(Span(work.num_tokens, stop, table(sequence.id)))
        first_sampled = len(sampled_rows)
        sampled_rows.extend(range(first_row, first_row + work.num_prompt_rows))
        sampled_rows.extend(range(len(token_ids) - work.num_draw_rows, len(token_ids)))
        row_ranges.append(range(first_sampled, len(sampled_rows)))
    ids = to_device(token_ids, torch.int64, device)
    if unread is not None and fed_rows:
        rows = to_device(fed_rows, torch.int64, device)
        drawn = unread.tokens.index_select(0, to_device(fed_from, torch.int64, device))
        ids.index_copy_(0, rows, drawn)
    return Batch(
        token_ids=ids,
        positions=to_device(positions, torch.int64, device),
        spans=tuple(spans),
        sampled_rows=to_device(sampled_rows, torch.int64, device),
        row_ranges=tuple(row_ranges),
    )
