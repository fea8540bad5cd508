"""AWQ: scale up the input channels that matter before rounding, and undo it in the layer before.

Multiplying column k of a weight by s_k and dividing input k by s_k changes nothing but what is
rounded. Channels with large inputs get a larger s, so that rounding hurts them less (Lin et al.,
arXiv 2306.00978). The scales are searched over

    s = mean|x| ** r                              and
    s = mean|x| ** r / mean|w| ** (1 - r)         r on a grid in [0, 1)

each brought to a geometric range around one. The objective is the layer's own output error, written
with the second moment H of its inputs instead of repeated forward passes:

    tr(D H Dᵀ)     D = W - round(W s) / s

r = 0 of the first form is s = 1: doing nothing is always a candidate, so the search cannot lose.
Then each group's grid is clipped where that lowers the error against the group's square of H.

Where the source of the inputs has fewer channels than the weight has columns (value heads shared by
several query heads), `source_channel` says which channel feeds each column; columns with one
source get one scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qtool import grid
from qtool.quantize import rtn
from qtool.quantize.scales import search
from qtool.quantize.solution import Solution, round_to, row_errors
from qtool.recipe import Awq
from qtool.scheme import QuantScheme

# Rows that the search looks at: enough to rank candidates, and the cost of a candidate is one
# product of these rows with H.
_SEARCH_ROWS = 512
# Scales beyond this only move the rounding error into the layer before.
_LARGEST_SCALE = 1e3


class ChannelScales(NamedTuple):
    """scales    [channels] float32, for the layer before to be divided by
    error     of the rows looked at with these scales, and
    identity  with none
    """

    scales: Tensor
    error: float
    identity: float

    @property
    def changes_anything(self) -> bool:
        return bool((self.scales != 1).any())


def search_channel_scales(
    weight: Tensor,
    hessian: Tensor,
    mean_magnitude: Tensor,
    scheme: QuantScheme,
    options: Awq,
    source_channel: Tensor | None = None,
) -> ChannelScales:
    """The scales that lower the output error most.

    weight          [out, in] float32, all linears that share the input stacked
    hessian         [in, in]  float32
    mean_magnitude  [in]      float32, mean |x| of each input
    source_channel  [in]      int64, the source's channel of each column; None for one each
    """
    if source_channel is None:
        source_channel = torch.arange(weight.shape[1], device=weight.device)
    sample = weight[_spread(weight.shape[0], _SEARCH_ROWS).to(weight.device)]
    channels = int(source_channel.max()) + 1
    best = weight.new_ones(channels)
    identity = _scaled_error(sample, hessian, best[source_channel], scheme)
    lowest = identity
    candidates = _candidates(weight, mean_magnitude, scheme, options, source_channel, channels)
    for scales in candidates:
        error = _scaled_error(sample, hessian, scales[source_channel], scheme)
        if error < lowest:
            best, lowest = scales, error
    return ChannelScales(best, lowest, identity)


def solve(weight: Tensor, hessian: Tensor, scheme: QuantScheme, options: Awq) -> Solution:
    """Round a weight that is already scaled, each group clipped where that helps.

    weight   [out, in] float32
    hessian  [in, in]  float32, of the inputs after scaling
    """
    if not options.clip_search:
        return rtn.solve(weight, scheme)
    width = scheme.group_width(weight.shape[1])
    blocks = torch.stack(
        [
            hessian[start : start + width, start : start + width]
            for start in range(0, weight.shape[1], width)
        ]
    )
    found = search(weight, scheme, blocks=blocks, lowest=0.5, highest=1.0, points=20)
    return rtn.keep_better_rows(weight, hessian, round_to(weight, found, scheme))


def _scaled_error(weight: Tensor, hessian: Tensor, scales: Tensor, scheme: QuantScheme) -> float:
    scaled = weight * scales
    rounded = round_to(scaled, grid.fit(scaled, scheme), scheme).dequantized / scales
    error = float(row_errors(weight, rounded, hessian).double().sum())
    return error if error == error else float("inf")


def _candidates(
    weight: Tensor,
    mean_magnitude: Tensor,
    scheme: QuantScheme,
    options: Awq,
    source_channel: Tensor,
    channels: int,
) -> Iterator[Tensor]:
    inputs = _by_channel(mean_magnitude, source_channel, channels)
    weights = _by_channel(_relative_magnitude(weight, scheme), source_channel, channels)
    for point in range(options.grid_points):
        r = point / options.grid_points
        if r > 0:
            yield _around_one(inputs.pow(r))
        yield _around_one(inputs.pow(r) / weights.pow(1 - r))


def _relative_magnitude(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """[in]: mean over rows of |w| as a share of its group's largest."""
    groups = grid.grouped(weight.abs(), scheme)
    largest = groups.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (groups / largest).mean(0).reshape(-1)


def _by_channel(values: Tensor, source_channel: Tensor, channels: int) -> Tensor:
    """The mean over the columns that one channel feeds, kept away from zero."""
    total = values.new_zeros(channels).index_add_(0, source_channel, values)
    count = torch.bincount(source_channel, minlength=channels).clamp(min=1)
    mean = total / count
    # An input that is never used must not send its scale to infinity.
    return mean.clamp(min=float(mean.mean()) * 1e-4 + torch.finfo(torch.float32).tiny)


def _around_one(scales: Tensor) -> Tensor:
    centred = scales / (scales.amax() * scales.amin()).sqrt()
    return centred.clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE)


def _spread(count: int, limit: int) -> Tensor:
    """At most `limit` indices, evenly over 0 .. count - 1."""
    if count <= limit:
        return torch.arange(count)
    return torch.linspace(0, count - 1, limit).round().long()
