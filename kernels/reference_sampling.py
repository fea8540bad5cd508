"""What drawing on a device means, in plain torch: see `kernels.cuda.sampling` and
`kernels.cuda.sampling_rules`, whose kernels are tested against it.

Row by row and by sorting, so nothing here is fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qtool.kernels.cuda.sampling import Draws
from qtool.kernels.cuda.sampling_rules import IN_PROMPT, Masks, Penalized, Rules, add_biases


def apply_rules(logits: Tensor, rules: Rules) -> None:
    """logits [rows, vocab] float32, changed in place; tokens are counted."""
    add_biases(logits, rules.biases)
    for row in range(logits.shape[0]):
        if rules.masks is not None:
            _mask(logits[row], rules.masks, row)
        if rules.penalized is not None:
            _penalize(logits[row], rules.penalized, row)


def _mask(scores: Tensor, masks: Masks, row: int) -> None:
    """scores [vocab]"""
    if masks.rows[row] < 0:
        return
    words = masks.bits[masks.rows[row]]
    bits = (words[:, None] >> torch.arange(32, device=words.device)) & 1
    scores.masked_fill_(bits.flatten()[: scores.numel()] == 0, -torch.inf)


def _penalize(scores: Tensor, penalized: Penalized, row: int) -> None:
    """scores [vocab]"""
    if penalized.slots[row] < 0:
        return
    counts = penalized.counts[penalized.slots[row]]
    if penalized.counted[row] >= 0:
        counts[penalized.counted[row]] += 1
    repetition, frequency, presence = penalized.penalties[:, row]
    changed = torch.where(scores > 0, scores / repetition, scores * repetition)
    times = (counts & (IN_PROMPT - 1)).float()
    scores.copy_(torch.where(counts != 0, changed, scores))
    scores.sub_(frequency * times).sub_(presence * (times > 0))


def draw_tokens(logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """logits [rows, vocab] float32 -> tokens [rows] int64, and 1 where all of a row are numbers
    and some of them finite, else 0: [rows] int32.
    """
    tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    best, likeliest = logits.max(dim=-1)
    finite = best.isfinite()
    for row in finite.nonzero().flatten().tolist():
        temperature, top_k, top_p, min_p, typical_p, number = (float(part[row]) for part in draws)
        if temperature <= 0:
            tokens[row] = likeliest[row]
            continue
        x = (logits[row] - best[row]) / temperature
        mass = _kept(x, int(top_k), top_p, min_p, typical_p)
        cumulated = mass.double().cumsum(0)
        place = torch.searchsorted(cumulated, number * cumulated[-1], right=True)
        tokens[row] = torch.minimum(place, mass.nonzero().max())
    return tokens, finite.to(torch.int32)


def _kept(x: Tensor, top_k: int, top_p: float, min_p: float, typical_p: float) -> Tensor:
    """x [vocab] scaled logits, the largest 0 -> [vocab] masses of the tokens to draw from, else 0.
    As likely as the last one that is kept are kept, too.
    """
    mass = x.exp()
    if 0 < top_k < x.numel():
        mass[x < x.topk(top_k).values[-1]] = 0
    if min_p > 0:
        mass[x < math.log(min_p)] = 0
    if top_p < 1:
        mass[mass < mass[_last_of_share(mass, -mass, top_p)]] = 0
    if typical_p < 1:
        surprise = torch.where(mass > 0, -x, 0.0)
        distance = (surprise - (mass * surprise).sum() / mass.sum()).abs()
        distance[mass == 0] = torch.inf
        mass[distance > distance[_last_of_share(mass, distance, typical_p)]] = 0
    return mass


def _last_of_share(mass: Tensor, order: Tensor, share: float) -> int:
    """The item with which, taken in rising order, the items hold this share of all."""
    places = order.argsort(stable=True)
    cumulated = mass[places].double().cumsum(0)
    place = int(torch.searchsorted(cumulated, share * cumulated[-1]))
    return int(places[min(place, len(places) - 1)])
