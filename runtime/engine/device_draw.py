"""Which steps draw their tokens on the device, and how the engine reads what was drawn.

Sequences whose logits nobody else has to read (no grammar, no penalties or other rules, no
log-probabilities, no drafts to judge) are drawn where the logits are: a step then copies a few
numbers and not a vocabulary. One sequence in the batch that needs more takes all of it to the host.
"""

from __future__ import annotations

from collections.abc import Sequence as Series

from torch import Tensor

from qtool.kernels.cuda.sampling import Draw
from qtool.runtime.engine.draw import Drawn
from qtool.runtime.engine.sampler import NotFinite, Sampled, uniform
from qtool.runtime.engine.scheduler import Scheduled
from qtool.runtime.engine.sequence import Sequence


def device_draws(scheduled: Series[Scheduled]) -> list[Draw] | None:
    """One for each sequence that draws, in order; None: some of them need the logits, or none
    draws.
    """
    draws = []
    for work in scheduled:
        if work.num_prompt_rows or work.num_draft_tokens or work.sequence.siblings:
            return None
        if work.samples:
            draw = _draw(work.sequence)
            if draw is None:
                return None
            draws.append(draw)
    return draws or None


def _draw(sequence: Sequence) -> Draw | None:
    sampling = sequence.request.sampling
    if sequence.rules is not None or sampling.num_logprobs is not None or sampling.typical_p < 1:
        return None
    if sampling.greedy:
        return Draw()
    return Draw(
        temperature=sampling.temperature,
        top_k=max(0, sampling.top_k),
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        number=uniform(sequence.seed, len(sequence.token_ids)),
    )


def read_drawn(
    scheduled: Series[Scheduled], tokens: Tensor, finite: Tensor
) -> list[Drawn | Exception]:
    """What `draw` would have given; waits for the device."""
    found = iter(zip(tokens.tolist(), finite.tolist(), strict=True))
    results: list[Drawn | Exception] = []
    for work in scheduled:
        if not work.samples:
            results.append(Drawn())
            continue
        token, is_finite = next(found)
        if is_finite:
            results.append(Drawn(Sampled((token,))))
        else:
            results.append(NotFinite("the model's output is not finite"))
    return results
