"""Drawing the next tokens from their logits.

    logits -> log-probabilities, where asked for
           -> rules (grammar, allowed and bad words, min_tokens, logit_bias, penalties)
           -> temperature -> min_p -> top_k -> top_p -> typical_p -> one uniform number -> token

The number comes from a counter, not a stream: it is a hash of the request's seed and of the
position drawn for. So a seeded text does not depend on what else is in the batch, on the order of
requests, or on having been preempted. The token is where the number falls in the cumulated
probabilities, in the order of token ids: one pass, no noise a token, no sorting.

The same makes speculation exact with no arithmetic of its own. A sequence with k drafted tokens
brings k + 1 rows; each is drawn from as if it were the only one, with the number of its position,
and the next is looked at only if the token drawn is the one that was drafted. What comes out is,
token for token, what would have come out one step at a time.

top_p needs the smallest set of likeliest tokens that holds its share. Sorting 150,000 tokens for it
takes 10 ms; instead the set's lower bound is found by bisection on the bits of the probability
(positive floats compare as their bits do), after leaving out all tokens so unlikely that together
they cannot matter, until so few are in question that sorting them is sooner done. Tokens exactly as
likely as the last one of the set belong to it, too.
"""

import math
from collections.abc import Sequence as Series
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.runtime.engine.logprobs import TokenLogprobs, token_logprobs
from qtool.runtime.engine.sampling_params import SamplingParams
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


class NothingAllowed(ArithmeticError):
    """What the request rules out leaves no token to write."""


class Sampled(NamedTuple):
    """The tokens that one step gives one sequence: the accepted drafts and one more.

    logprobs  one entry a token, None where they were not asked for
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


@torch.inference_mode()
def sample(
    logits: Tensor, sequences: Series[Sequence], num_rows: Series[int] | None = None
) -> list[Sampled | Exception]:
    """The next tokens of each sequence; logits [rows, vocab] float32, changed in place.

    num_rows  rows of each sequence, in order: one more than it has drafted tokens; None: one each

    A sequence that fails (its logits are not finite, its rules leave nothing) gets the error in
    place of tokens, and no other does.
    """
    counts = [1] * len(sequences) if num_rows is None else num_rows
    finite, greedy = _likeliest(logits)
    results: list[Sampled | Exception] = []
    start = 0
    for sequence, count in zip(sequences, counts, strict=True):
        rows = range(start, start + count)
        start += count
        try:
            results.append(_sample_rows(logits, rows, sequence, finite, greedy))
        except Exception as error:
            results.append(error)
    return results


def _likeliest(logits: Tensor) -> tuple[list[bool], list[int]]:
    """Of each row, whether its largest logit is finite, and where that is first.

    PyTorch looks for places one number at a time: 0.5 ms for 4 rows of 150,000 on a CPU, 0.06 by
    numpy.
    """
    if logits.device.type != "cpu":
        best, places = logits.max(dim=-1)
        return torch.isfinite(best).tolist(), places.tolist()
    rows = logits.numpy()
    found = rows.argmax(axis=-1)
    finite = np.isfinite(np.take_along_axis(rows, found[:, None], axis=-1)[:, 0])
    return finite.tolist(), found.tolist()


def _sample_rows(
    logits: Tensor, rows: range, sequence: Sequence, finite: list[bool], greedy: list[int]
) -> Sampled:
    sampling = sequence.request.sampling
    rules = sequence.rules
    accepted: list[int] = []
    for row in rows:
        if not finite[row]:
            raise NotFinite("the model's output is not finite")
        scores, likeliest = logits[row], greedy[row]
        if rules is not None:
            if sampling.num_logprobs is not None:
                scores = scores.clone()  # the row's own numbers are needed below
            rules.apply(scores, sequence.token_ids, accepted)
            best, index = scores.max(dim=-1)
            if not math.isfinite(best):
                raise NothingAllowed("the request's rules leave no token that could be written")
            likeliest = int(index)
        token_id = (
            likeliest
            if sampling.greedy
            else draw(scores, sampling, sequence.seed, len(sequence.token_ids) + len(accepted))
        )
        drafted = sequence.draft_token_ids[len(accepted) : len(accepted) + 1]
        accepted.append(token_id)
        if token_id in sequence.stop_token_ids or [token_id] != drafted:
            break
    if sampling.num_logprobs is None:
        return Sampled(tuple(accepted))
    used = logits[rows.start : rows.start + len(accepted)]
    tops = [sampling.num_logprobs] * len(accepted)
    return Sampled(tuple(accepted), tuple(token_logprobs(used, accepted, tops)))


def draw(logits: Tensor, sampling: SamplingParams, seed: int, position: int) -> int:
    """logits [vocab] float32 -> a token id."""
    found = candidates(logits, sampling)
    index = pick(torch.from_numpy(found.probabilities), uniform(seed, position))
    return index if found.token_ids is None else int(found.token_ids[index])


# Longer rows are summed in blocks first, and then within one: a tenth of the memory to go through.
BLOCK = 512


def pick(masses: Tensor, number: float) -> int:
    """The first index up to which the masses [items] float32 sum to more than this share of their
    sum, number in [0, 1); never one of mass 0.
    """
    num_blocks = masses.numel() // BLOCK
    if num_blocks < 8:
        return _pick(masses.double(), number)
    whole, rest = masses[: num_blocks * BLOCK], masses[num_blocks * BLOCK :]
    sums = whole.view(num_blocks, BLOCK).sum(dim=1, dtype=torch.float64)
    sums = torch.cat((sums, rest.sum(dtype=torch.float64)[None]))
    block = _pick(sums, number)
    cumulated = sums.cumsum(dim=0)
    before = float(cumulated[block - 1]) if block else 0.0
    share = (number * float(cumulated[-1]) - before) / float(sums[block])
    # Two roundings may leave it a hair outside of the block.
    share = min(max(share, 0.0), 1 - 2.0**-48)
    return block * BLOCK + _pick(masses[block * BLOCK : (block + 1) * BLOCK].double(), share)


def _pick(masses: Tensor, number: float) -> int:
    """masses [items] float64"""
    cumulated = masses.cumsum(dim=0)
    return int(torch.searchsorted(cumulated, number * cumulated[-1], right=True))


# What is left of a vocabulary is mostly a few hundred numbers, for which numpy's calls take a
# fraction of the time of torch's.
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Candidates(NamedTuple):
    """The tokens to draw from.

    probabilities  [kept] up to a common factor
    token_ids      [kept] rising; None: all of the vocabulary
    """

    probabilities: Floats
    token_ids: Ints | None

    def where(self, mask: NDArray[np.bool_]) -> "Candidates":
        kept = mask.nonzero()[0]
        return Candidates(
            self.probabilities[kept], kept if self.token_ids is None else self.token_ids[kept]
        )


def candidates(logits: Tensor, sampling: SamplingParams) -> Candidates:
    """What temperature, min_p, top_k, top_p and typical_p leave of logits [vocab] float32."""
    scaled = logits / sampling.temperature
    token_ids: Ints | None = None
    if 0 < sampling.top_k < scaled.numel():
        scaled, places = torch.topk(scaled, sampling.top_k, sorted=False)
        places, order = places.sort()
        scaled, token_ids = scaled[order], places.numpy(force=True)
    # min_p before top_k or after it is the same: both keep the likeliest, and the first is in both.
    if sampling.min_p > 0:
        scaled = scaled.masked_fill(scaled < scaled.max() + math.log(sampling.min_p), -torch.inf)
    found = Candidates(scaled.softmax(dim=-1).numpy(force=True), token_ids)
    if sampling.top_p < 1:
        # All tokens below (1 - top_p) / n hold less than 1 - top_p together: they are not in it.
        floor = (1.0 - sampling.top_p) / len(found.probabilities)
        found = found.where(found.probabilities >= floor)
        bound = nucleus_bound(found.probabilities, sampling.top_p)
        found = found.where(found.probabilities >= bound)
    if sampling.typical_p < 1:
        found = _typical(found.where(found.probabilities > 0), sampling.typical_p)
    return found


def nucleus_bound(probabilities: Floats, top_p: float) -> float:
    """The largest b for which the tokens of probability >= b hold at least top_p together.

    probabilities [tokens], their sum at most 1
    """
    # Negated bits: the likeliest tokens come first, as `_smallest_set` wants them.
    order = -_smallest_set(-probabilities.view(np.int32), probabilities, top_p)
    return float(np.int32(order).view(np.float32))


def _typical(found: Candidates, typical_p: float) -> Candidates:
    """The tokens whose surprise is nearest to its expectation, which hold typical_p together
    (locally typical sampling, arXiv:2202.00666).
    """
    probabilities = found.probabilities / found.probabilities.sum()
    surprise = -np.log(probabilities)
    distance: Floats = np.abs(surprise - (probabilities * surprise).sum())
    bits = distance.view(np.int32)
    return found.where(bits <= _smallest_set(bits, probabilities, typical_p))


# So many are sorted sooner than bisected to the end.
SORTED_AT_MOST = 2048


def _smallest_set(order: NDArray[np.int32], masses: Floats, share: float) -> int:
    """The smallest bound for which the items of order <= bound hold at least this share; the
    largest order of all where rounding keeps even the whole below it.
    """
    # Invariant: items of order <= high hold enough, or are all; those of order <= low hold `below`,
    # which is not enough. Only those in between are looked at again.
    low, high, below = int(order.min()) - 1, int(order.max()), 0.0
    while len(order) > SORTED_AT_MOST and high - low > 1:
        middle = (low + high) // 2
        lower = order <= middle
        mass = float(masses[lower].sum(dtype=np.float64))
        if below + mass >= share:
            high, kept = middle, lower
        else:
            low, kept, below = middle, ~lower, below + mass
        order, masses = order[kept], masses[kept]
    if len(order) == 0 or high - low == 1:
        return high
    places = order.argsort(kind="stable")
    cumulated = masses[places].cumsum(dtype=np.float64)
    place = int(cumulated.searchsorted(share - below))
    return int(order[places[min(place, len(places) - 1)]])
