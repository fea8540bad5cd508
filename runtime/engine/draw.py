"""A step's logits, read: new tokens for each sequence, what the model thought of the prompt, and
the first tokens of further answers, which are drawn from the same row as the first answer's.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.logprobs import token_logprobs
from qtool.runtime.engine.sampler import Sampled, sample
from qtool.runtime.engine.scheduler import Scheduled
from qtool.runtime.engine.sequence import Sequence


class Drawn(NamedTuple):
    """What a step gives one sequence.

    sampled   its new tokens; None: it draws nothing yet
    siblings  the first token of each of `Sequence.siblings`, where the step ends the prompt
    """

    sampled: Sampled | None = None
    siblings: tuple[Sampled | Exception, ...] = ()


@torch.inference_mode()
def draw(logits: Tensor, batch: Batch, scheduled: Series[Scheduled]) -> list[Drawn | Exception]:
    """Read the logits [sampled, vocab] of a step; what fails for one sequence is its result."""
    for work, rows in zip(scheduled, batch.row_ranges, strict=True):
        if work.num_prompt_rows:
            _read_prompt(logits[rows.start : rows.start + work.num_prompt_rows], work)
    sequences: list[Sequence] = []
    counts: list[int] = []
    indices: list[int] = []
    for work, rows in zip(scheduled, batch.row_ranges, strict=True):
        if work.samples:
            own = list(rows[-work.num_draw_rows :])
            sequences.append(work.sequence)
            counts.append(len(own))
            indices.extend(own)
            for sibling in work.sequence.siblings:
                sequences.append(sibling)
                counts.append(1)
                indices.append(own[0])
    if not sequences:
        return [Drawn() for _ in scheduled]
    if len(indices) != logits.shape[0] or any(work.sequence.siblings for work in scheduled):
        logits = logits[indices]
    found = iter(sample(logits, sequences, counts))
    results: list[Drawn | Exception] = []
    for work in scheduled:
        if not work.samples:
            results.append(Drawn())
            continue
        first = next(found)
        siblings = tuple(next(found) for _ in work.sequence.siblings)
        results.append(first if isinstance(first, Exception) else Drawn(first, siblings))
    return results


def _read_prompt(rows: Tensor, work: Scheduled) -> None:
    """rows [prompt rows, vocab]: row i belongs to token num_computed_tokens + i, and judges the
    token after it. Read again after a preemption, which changes nothing.
    """
    sequence = work.sequence
    num_top = sequence.request.sampling.prompt_logprobs
    assert num_top is not None
    if not sequence.prompt_logprobs:
        sequence.prompt_logprobs = [None] * sequence.num_prompt_tokens
    first = sequence.num_computed_tokens + 1
    token_ids = sequence.token_ids[first : first + len(rows)]
    found = token_logprobs(rows, token_ids, [num_top] * len(rows))
    sequence.prompt_logprobs[first : first + len(rows)] = found
