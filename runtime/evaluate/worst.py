"""The tokens where a model is furthest from its original, each in its context.

A mean hides where the damage is. Ten passages show it: what came before, what came, and what the
two models would have said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.runtime.evaluate.divergence import TokenDivergence
from qtool.runtime.evaluate.perplexity import Protocol, cut

NUM_WORST = 10
CONTEXT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class WorstToken:
    """kld in nats; p and original_p are the probabilities of `token`, which came after `before`."""

    kld: float
    before: str
    token: str
    p: float
    original_p: float
    top: str
    original_top: str


def worst_tokens(
    divergence: TokenDivergence,
    tokens: Tensor,
    protocol: Protocol,
    decode: Callable[[Sequence[int]], str],
    count: int = NUM_WORST,
) -> tuple[WorstToken, ...]:
    """The `count` scored tokens of the largest divergence, the worst first.

    divergence   of the tokens that `protocol` scores in `tokens` [tokens] int64, in their order
    """
    windows = cut(tokens, protocol)
    per_window = protocol.scored_per_window
    order = torch.argsort(divergence.kld, descending=True, stable=True)[:count]
    found = []
    for index in order.tolist():
        window = windows[index // per_window].tolist()
        # The prediction at a position is of the token after it.
        place = protocol.first_scored + index % per_window + 1
        found.append(
            WorstToken(
                kld=float(divergence.kld[index]),
                before=decode(window[max(0, place - CONTEXT_TOKENS) : place]),
                token=decode([window[place]]),
                p=float((-divergence.nll[index]).exp()),
                original_p=float((-divergence.reference_nll[index]).exp()),
                top=decode([int(divergence.top[index])]),
                original_top=decode([int(divergence.reference_top[index])]),
            )
        )
    return tuple(found)
