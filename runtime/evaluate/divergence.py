"""KL divergence and its companions: how far predictions are from those of the original model.

For each scored token, with p the original's distribution over the vocabulary, q the candidate's and
t the token that came:

    KLD        sum_v p(v) (ln p(v) - ln q(v))      nats; 0 if and only if the two agree everywhere
    delta p    q(t) - p(t)                         the change in the probability of the right token
    same top   argmax q == argmax p                would greedy decoding have said the same

and over all tokens the statistics block of `llama-perplexity --kl-divergence`
(`tools/perplexity/perplexity.cpp`), same names, same standard errors, same linear percentiles. Two
things differ: llama.cpp reads the original's probabilities from a file that
holds them in 16 bits, clipped at 16 nats (37 GB for a vocabulary of 128k; a floor of about 5e-4
nats on the result), where here both models run side by side and the logits of one batch of windows
are all that is ever held; and terms below e^-16 are not dropped.

Perplexity alone hides damage: errors that raise p(t) cancel those that lower it. KLD has no such
cancellation, which is why it stands first in the report.

Arithmetic: logits in float32 as the models give them (their own error, about 1e-6 nats, is far
below any quantization), every sum over tokens in float64. Equal logits give exactly 0. With a and b
the logits of p and q, A and B their log-sum-exps, and each exponential taken once,

    KLD = sum_v exp(a - max a) ((a - b) - (A - B)) / sum_v exp(a - max a)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qtool.runtime.evaluate.perplexity import mean_and_error, rows_per_slice

KLD_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
DELTA_P_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)


class TokenDivergence(NamedTuple):
    """What is kept of each scored token, [tokens] each: six numbers in place of two rows of the
    vocabulary.
    """

    nll: Tensor  # float64, the candidate's -ln q(t)
    reference_nll: Tensor  # float64, the original's -ln p(t)
    kld: Tensor  # float64
    delta_p: Tensor  # float64
    top: Tensor  # int64, the candidate's likeliest token
    reference_top: Tensor  # int64, the original's

    @property
    def same_top(self) -> Tensor:
        """[tokens] bool"""
        return self.top == self.reference_top


class Estimate(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """llama-perplexity's statistics block. KLD in nats; probabilities as fractions, not percent."""

    num_scored: int
    perplexity: Estimate
    reference_perplexity: Estimate
    ln_perplexity_correlation: float
    ln_perplexity_ratio: Estimate
    perplexity_ratio: Estimate
    perplexity_difference: Estimate
    kld: Estimate
    kld_max: float
    kld_min: float
    kld_percentiles: dict[float, float]
    delta_p: Estimate
    delta_p_rms: Estimate
    delta_p_max: float
    delta_p_min: float
    delta_p_percentiles: dict[float, float]
    same_top: Estimate


def compare(logits: Tensor, reference: Tensor, targets: Tensor) -> TokenDivergence:
    """The six numbers of each row.

    logits, reference   [rows, vocab] float32, of the candidate and of the original
    targets             [rows] int64, the token that came next
    """
    rows = rows_per_slice(logits.shape[-1])
    columns = (torch.split(logits, rows), torch.split(reference, rows), torch.split(targets, rows))
    parts = [_compare_slice(*slices) for slices in zip(*columns, strict=True)]
    return join(parts)


def join(parts: Sequence[TokenDivergence]) -> TokenDivergence:
    return TokenDivergence(*(torch.cat(column) for column in zip(*parts, strict=True)))


def summarize(tokens: TokenDivergence) -> Divergence:
    """The statistics block over all scored tokens."""
    count = tokens.kld.numel()
    mean, error = mean_and_error(tokens.nll)
    reference_mean, reference_error = mean_and_error(tokens.reference_nll)
    covariance = _covariance_of_means(tokens.nll, tokens.reference_nll)
    value, reference_value = math.exp(mean), math.exp(reference_mean)
    # The errors of differences come from the differences token by token: the same as
    # sqrt(var(a) + var(b) - 2 cov(a, b)) and exactly 0 for equal models.
    ln_ratio, ln_ratio_error = mean_and_error(tokens.nll - tokens.reference_nll)
    _, difference_error = mean_and_error(
        value * tokens.nll - reference_value * tokens.reference_nll
    )
    same = tokens.same_top.double().mean().item()
    square, square_error = mean_and_error(tokens.delta_p.square())
    rms = math.sqrt(square)
    kld = tokens.kld.sort().values
    delta_p = tokens.delta_p.sort().values
    return Divergence(
        num_scored=count,
        perplexity=Estimate(value, value * error),
        reference_perplexity=Estimate(reference_value, reference_value * reference_error),
        ln_perplexity_correlation=covariance / (error * reference_error)
        if error * reference_error
        else 1.0,
        ln_perplexity_ratio=Estimate(ln_ratio, ln_ratio_error),
        perplexity_ratio=Estimate(math.exp(ln_ratio), math.exp(ln_ratio) * ln_ratio_error),
        perplexity_difference=Estimate(value - reference_value, difference_error),
        kld=Estimate(*mean_and_error(tokens.kld)),
        kld_max=kld[-1].item(),
        kld_min=kld[0].item(),
        kld_percentiles={percent: percentile(kld, percent) for percent in KLD_PERCENTILES},
        delta_p=Estimate(*mean_and_error(tokens.delta_p)),
        delta_p_rms=Estimate(rms, 0.5 / rms * square_error if rms else 0.0),
        delta_p_max=delta_p[-1].item(),
        delta_p_min=delta_p[0].item(),
        delta_p_percentiles={
            percent: percentile(delta_p, percent) for percent in DELTA_P_PERCENTILES
        },
        same_top=Estimate(same, math.sqrt(same * (1 - same) / (count - 1)) if count > 1 else 0.0),
    )


def percentile(ordered: Tensor, percent: float) -> float:
    """Linear between neighbours: of [0, 10, 20] the 75th is 15. `ordered` [tokens] ascends.

    The place is a float32, as in llama.cpp: where values are far apart, the printed digits tell.
    """
    position = float(np.float32(percent / 100) * np.float32(ordered.numel() - 1))
    below = math.floor(position)
    above = min(below + 1, ordered.numel() - 1)
    low, high = ordered[below].item(), ordered[above].item()
    return low + (position - below) * (high - low)


def _compare_slice(logits: Tensor, reference: Tensor, targets: Tensor) -> TokenDivergence:
    highest, top = logits.max(dim=-1, keepdim=True)
    reference_highest, reference_top = reference.max(dim=-1, keepdim=True)
    weights = (reference - reference_highest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    reference_sum = reference_highest + total.log()
    own_sum = highest + (logits - highest).exp_().sum(dim=-1, keepdim=True).log()
    terms = (reference - logits).sub_(reference_sum - own_sum)
    if bool(reference.amin() == -math.inf):
        # A vocabulary padded with -inf has p = 0 there, and 0 (ln 0 - ln q) is 0.
        terms.masked_fill_(weights == 0, 0.0)
    index = targets[:, None]
    nll = (own_sum - logits.gather(-1, index)).squeeze(-1).double()
    reference_nll = (reference_sum - reference.gather(-1, index)).squeeze(-1).double()
    return TokenDivergence(
        nll=nll,
        reference_nll=reference_nll,
        kld=(torch.linalg.vecdot(weights, terms) / total.squeeze(-1)).double(),
        delta_p=(-nll).exp() - (-reference_nll).exp(),
        top=top.squeeze(-1),
        reference_top=reference_top.squeeze(-1),
    )


def _covariance_of_means(a: Tensor, b: Tensor) -> float:
    """Covariance of the two means over the same tokens: what makes a ratio of perplexities sharper
    than either of them.
    """
    if a.numel() < 2:
        return 0.0
    return ((a - a.mean()) * (b - b.mean())).mean().item() / (a.numel() - 1)
