"""Do two models write the same text: greedy continuations, and where they first differ.

What people notice of a quantized model is not a divergence in nats but another word. Prompts are
passages of the evaluation text; both models continue each greedily, as `qtool serve` runs them. One
differing token makes all that follows another text, so only the first difference counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.llm import LLM

NUM_PROMPTS = 8
PROMPT_TOKENS = 64
NEW_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of continuations of num_tokens tokens with the original's.

    num_identical          of num_prompts, to the last token
    median_common_tokens   how many tokens are alike before the first difference
    first_differences      of each prompt, None where there is none
    """

    num_prompts: int
    num_tokens: int
    num_identical: int
    median_common_tokens: float
    first_differences: tuple[int | None, ...]


def passages(tokens: Tensor, context: int) -> list[list[int]]:
    """NUM_PROMPTS pieces of the text [tokens], spread evenly over it; fewer of a short text."""
    length = min(PROMPT_TOKENS, context // 2, tokens.numel())
    count = min(NUM_PROMPTS, max(1, tokens.numel() // length))
    starts = torch.linspace(0, tokens.numel() - length, count).long().tolist()
    return [tokens[start : start + length].tolist() for start in starts]


def continuations(llm: LLM, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Greedy, past end-of-text tokens, each prompt alone: bfloat16 text can depend on the batch."""
    room = llm.info.max_model_len - max(map(len, prompts))
    sampling = SamplingParams(temperature=0.0, max_tokens=min(NEW_TOKENS, room), ignore_eos=True)
    return [
        llm.generate([list(prompt)], sampling, use_tqdm=False)[0].outputs[0].token_ids
        for prompt in prompts
    ]


def agreement(model: Sequence[Sequence[int]], original: Sequence[Sequence[int]]) -> Agreement:
    """Continuations of the same prompts, in the same order.

    >>> agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 6]]).first_differences
    (None, 1)
    """
    pairs = list(zip(model, original, strict=True))
    first = tuple(first_difference(own, other) for own, other in pairs)
    common = [
        len(own) if place is None else place for (own, _), place in zip(pairs, first, strict=True)
    ]
    return Agreement(
        num_prompts=len(pairs),
        num_tokens=max(len(own) for own, _ in pairs),
        num_identical=sum(place is None for place in first),
        median_common_tokens=median(common),
        first_differences=first,
    )


def first_difference(own: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two texts part, counted from 0; None if they are alike."""
    for place, (a, b) in enumerate(zip(own, other, strict=False)):
        if a != b:
            return place
    return None if len(own) == len(other) else min(len(own), len(other))
