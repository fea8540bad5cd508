"""All experts of a layer in two products: every tile of rows belongs to one expert.

    tokens' choices -> rows sorted by expert, each expert's padded to whole tiles
    gate_up of all tiles -> gated -> down of all tiles -> each token's, weighted and added

How many tiles an expert has is known on the device alone: there are as many as could be needed, and
those that are not needed end at once. So nothing waits for the device, and a step can be recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.kernels.cuda import fused, marlin_linear
from qtool.kernels.cuda.fused import Activation
from qtool.kernels.cuda.marlin_linear import MarlinPacked
from qtool.kernels.cuda.tuning import linear_tile

COMBINE_BLOCK = 1024
# Above so many rows an expert on average, its tiles are large.
LARGE_ROWS = 32


class Alignment(NamedTuple):
    """Where each choice of each token is computed.

    rows     [tiles * height] int32: the token that each row is of; -1: none
    places   [tokens, choices] int32: the row of each choice
    experts  [tiles] int32: whose rows a tile holds; -1: it is not used
    """

    rows: Tensor
    places: Tensor
    experts: Tensor


def align(chosen: Tensor, num_experts: int, height: int) -> Alignment:
    """chosen [tokens, choices] int64 -> tiles of `height` rows, each of one expert.

    Two tokens that choose experts (1, 0) and (1, 2), in tiles of 2: expert 0 has token 0, expert 1
    both, expert 2 token 1; rows 0 -1 | 0 1 | 1 -1, places (2, 0) and (3, 4).
    """
    tokens, choices = chosen.shape
    flat, device = chosen.flatten(), chosen.device
    count = flat.numel()
    num_tiles = count // height + min(num_experts, count)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    last_tiles = ((counts + (height - 1)) // height).cumsum(0)
    first_tiles = last_tiles - (counts + (height - 1)) // height
    first_choices = counts.cumsum(0) - counts
    order = flat.argsort(stable=True)
    owners = flat[order]
    rank = torch.arange(count, device=device) - first_choices[owners]
    sorted_places = first_tiles[owners] * height + rank
    places = torch.empty_like(flat).scatter_(0, order, sorted_places)
    rows = torch.full((num_tiles * height,), -1, dtype=torch.int64, device=device)
    rows.scatter_(0, sorted_places, order // choices)
    tiles = torch.arange(num_tiles, device=device)
    experts = torch.searchsorted(last_tiles, tiles, right=True)
    experts = torch.where(experts < num_experts, experts, -1)
    return Alignment(rows.int(), places.view(tokens, choices).int(), experts.to(torch.int32))


class Experts(NamedTuple):
    """gate_up and down of all experts, their words [experts, in / 16, ..]."""

    gate_up: MarlinPacked
    down: MarlinPacked
    activation: Activation

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, in]; chosen, weights [tokens, choices] -> [tokens, in]."""
        from qtool.kernels.cuda.device.experts import combine

        tokens, choices = chosen.shape
        num_experts = self.gate_up.words.shape[0]
        each = -(-tokens * choices // num_experts)
        # The tile that as many rows take as an expert has; all of them have its height.
        height = linear_tile(self.gate_up.shape_for(min(each, LARGE_ROWS)), x.device).rows
        where = align(chosen, num_experts, height)
        parts = _product(x, self.gate_up, where.rows, where.experts, each, height)
        gated = fused.gate_mul(
            parts, self.activation, x.dtype, sum_block=marlin_linear.sum_block(self.down)
        )
        own = torch.arange(len(where.rows), dtype=torch.int32, device=x.device)
        own = torch.where(where.rows >= 0, own, -1)
        parts = _product(gated.values, self.down, own, where.experts, each, height, gated.sums)
        channels = parts.shape[2]
        out = x.new_empty((tokens, channels))
        combine[(tokens, -(-channels // COMBINE_BLOCK))](
            parts,
            where.places,
            weights.contiguous(),
            out,
            parts.stride(0),
            CHANNELS=channels,
            BLOCK=COMBINE_BLOCK,
            SPLIT=parts.shape[0],
            CHOICES=choices,
            num_warps=4,
        )
        return out


def _product(
    x: Tensor,
    packed: MarlinPacked,
    rows: Tensor,
    experts: Tensor,
    each: int,
    height: int,
    sums: Tensor | None = None,
) -> Tensor:
    """[parts, rows, out] of the rows of x that `rows` names, by the experts of their tiles."""
    config = linear_tile(packed.shape_for(min(each, LARGE_ROWS)), x.device)
    # There are tiles enough to fill the GPU without cutting the inputs, but for one or two tokens.
    split = config.split if each <= 1 and len(experts) <= 16 else 1
    return marlin_linear.matmul_parts(
        x,
        packed,
        sums=sums,
        config=replace(config, rows=height, split=split),
        rows=rows,
        experts=experts,
    )


def stack(
    gate_up: Sequence[MarlinPacked], down: Sequence[MarlinPacked], activation: Activation
) -> Experts | None:
    """One for all, if they are packed alike."""
    pairs = [_stack_one(packed) for packed in (gate_up, down)]
    if pairs[0] is None or pairs[1] is None:
        return None
    return Experts(pairs[0], pairs[1], activation)


def _stack_one(each: Sequence[MarlinPacked]) -> MarlinPacked | None:
    first = each[0]
    alike = {
        (one.words.shape, one.scales.shape, one.scales.dtype, one.zeros is None, one[3:])
        for one in each
    }
    if len(alike) > 1:
        return None
    zeros = [one.zeros for one in each if one.zeros is not None]
    return first._replace(
        words=torch.stack([one.words for one in each]),
        scales=torch.stack([one.scales for one in each]),
        zeros=torch.stack(zeros) if zeros else None,
    )


def view(stacked: MarlinPacked, expert: int) -> MarlinPacked:
    """One of them again, in the same memory."""
    return stacked._replace(
        words=stacked.words[expert],
        scales=stacked.scales[expert],
        zeros=None if stacked.zeros is None else stacked.zeros[expert],
    )
