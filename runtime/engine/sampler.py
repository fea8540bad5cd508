"""Drawing the next token from its logits.

    logits -> (min_tokens) -> temperature -> min_p -> top_k -> top_p -> one uniform number -> token

The number comes from a counter, not a stream: it is a hash of the request's seed and of the
position drawn for. So a seeded text does not depend on what else is in the batch, on the order of
requests, or on having been preempted. The token is where the number falls in the cumulated
probabilities, in the order of token ids: one pass, no noise a token, no sorting.

top_p needs the smallest set of likeliest tokens that holds its share. Sorting 150,000 tokens for it
takes 10 ms; instead the set's lower bound is found by bisection on the bits of the probability
(positive floats compare as their bits do), after leaving out all tokens so unlikely that together
they cannot matter. Tokens exactly as likely as the last one of the set belong to it, too.
"""

import math
from collections.abc import Sequence as Series

import torch
from torch import Tensor

from qtool.runtime.engine.sequence import Sequence

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one position of one text: splitmix64's output, its top 48 bits.

    48, so that the number times a float64 total stays below that total.
    """
    state = _mix((seed & _MASK) ^ _mix(position))
    return (state >> 16) / float(1 << 48)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class NotFinite(ArithmeticError):
    """The model computed no numbers for this row."""


@torch.inference_mode()
def sample(logits: Tensor, sequences: Series[Sequence]) -> list[int | NotFinite]:
    """The next token of each sequence; logits [sequences, vocab] float32, changed in place.

    A row without finite logits gets the error in place of a token, and no other row does.
    """
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        if sequence.num_generated_tokens < sampling.min_tokens and sequence.stop_token_ids:
            logits[row, list(sequence.stop_token_ids)] = -torch.inf
    best, likeliest = logits.max(dim=-1)
    finite = torch.isfinite(best).tolist()
    tokens: list[int | NotFinite] = list(likeliest.tolist())
    for row, sequence in enumerate(sequences):
        if not finite[row]:
            tokens[row] = NotFinite("the model's output is not finite")
        elif not sequence.request.sampling.greedy:
            tokens[row] = _draw(logits[row], sequence)
    return tokens


def _draw(logits: Tensor, sequence: Sequence) -> int:
    """logits [vocab] float32 -> a token id."""
    sampling = sequence.request.sampling
    scaled = logits / sampling.temperature
    token_ids: Tensor | None = None
    if 0 < sampling.top_k < scaled.numel():
        scaled, token_ids = torch.topk(scaled, sampling.top_k, sorted=False)
        token_ids, order = token_ids.sort()
        scaled = scaled[order]
    # min_p before top_k or after it is the same: both keep the likeliest, and the first is in both.
    if sampling.min_p > 0:
        scaled = scaled.masked_fill(scaled < scaled.max() + math.log(sampling.min_p), -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    if sampling.top_p < 1:
        bound = nucleus_bound(probabilities, sampling.top_p)
        probabilities = probabilities.masked_fill(probabilities < bound, 0.0)
    cumulated = probabilities.cumsum(dim=-1, dtype=torch.float64)
    target = uniform(sequence.seed, len(sequence.token_ids)) * cumulated[-1]
    # The first token whose cumulated probability lies above the number; never one of probability 0.
    index = int(torch.searchsorted(cumulated, target, right=True))
    return index if token_ids is None else int(token_ids[index])


def nucleus_bound(probabilities: Tensor, top_p: float) -> float:
    """The largest b for which the tokens of probability >= b hold at least top_p together.

    probabilities [tokens] float32, their sum 1
    """
    # All tokens below (1 - top_p) / n hold less than 1 - top_p together: the bound is not there.
    floor = (1.0 - top_p) / probabilities.numel()
    likely = probabilities[probabilities >= floor]
    bits = likely.view(torch.int32)
    # Invariant: tokens with bits >= low hold enough, those with bits >= high hold `above`, which
    # is not enough. Only those in between are looked at again.
    low, high, above = int(bits.min()), int(bits.max()) + 1, 0.0
    while high - low > 1:
        middle = (low + high) // 2
        upper = bits >= middle
        mass = float(likely[upper].sum(dtype=torch.float64))
        if above + mass >= top_p:
            low, kept = middle, upper
        else:
            high, kept, above = middle, ~upper, above + mass
        likely, bits = likely[kept], bits[kept]
    return float(torch.tensor(low, dtype=torch.int32).view(torch.float32))
