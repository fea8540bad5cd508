"""A scheduled step as tensors: one row a token, the sequences one after the other."""

from collections.abc import Callable
from collections.abc import Sequence as Series
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.kernels.reference import Span
from qtool.runtime.engine.scheduler import Scheduled


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of one forward pass.

    token_ids, positions  [rows] int64
    spans                 each sequence's rows and blocks, in the order of the rows
    sampled_rows          [sampled] int64, the last row of each sequence that draws a token
    """

    token_ids: Tensor
    positions: Tensor
    spans: tuple[Span, ...]
    sampled_rows: Tensor


def make_batch(
    scheduled: Series[Scheduled],
    table: Callable[[str], Series[int]],
    device: torch.device,
) -> Batch:
    token_ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    sampled_rows: list[int] = []
    for work in scheduled:
        sequence = work.sequence
        start = sequence.num_computed_tokens
        stop = start + work.num_tokens
        token_ids.extend(sequence.token_ids[start:stop])
        positions.extend(range(start, stop))
        spans.append(Span(work.num_tokens, stop, table(sequence.id)))
        if work.samples:
            sampled_rows.append(len(token_ids) - 1)
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        spans=tuple(spans),
        sampled_rows=torch.tensor(sampled_rows, dtype=torch.int64, device=device),
    )
