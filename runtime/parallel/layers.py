"""The layers of a decoder whose weights are shared out among ranks.

    y = sum over ranks of row(activate(column(x)))        attention and MLP: one sum each
    embedding: a rank looks up its own tokens, zero for others; the sum has one term each
    head: a rank has the logits of its own tokens; rank 0 gathers them
    norm over all heads: the squares of all ranks' heads are summed first

After a sum all ranks hold the same bits, so that routers and norms, which every rank computes by
itself, agree.

A rank runs what one process runs: on GPUs the fused steps, all of a step being recorded, sums
included (`runtime.models.triton_decoder`); on a CPU all blocks in one call of the library, which
calls for two sums a block. That costs 3 to 8 percent of the CPU time of a step of a 0.5B model in 4
bits, where layer by layer it was 50 to 80 (`python benchmarks/ranks.py --rounds 7`, a 2-core Xeon
with AMX at a load of 20, 2026-11).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.kernels.dispatch import LinearKernel
from qtool.runtime.layers import Linear, Linears
from qtool.runtime.models.embedding import Embedding
from qtool.runtime.parallel.collective import Collective
from qtool.runtime.parallel.shard import Shard, ShardPlan


def _never_packed(*unused: object) -> NoReturn:
    raise AssertionError("never chosen: it is for no weight, and wraps what is packed already")


def _wrapper(name: str, matmul: Any) -> LinearKernel:
    """A kernel like the others, so that a wrapped linear is a `Linear`."""
    return LinearKernel(
        name=name,
        takes="a packed linear",
        is_for=lambda weight: False,
        keeps_packed=True,
        refuses=lambda weight, dtype, device, activations: "wraps other kernels",
        pack=_never_packed,
        matmul=matmul,
    )


def _reduced(x: Tensor, packed: tuple[Linear | Linears, Collective], bias: None) -> Tensor:
    base, ranks = packed
    return ranks.all_reduce(base(x))


def _gathered(
    x: Tensor, packed: tuple[Linear | Linears, Collective, tuple[int, ...]], bias: None
) -> Tensor:
    """[tokens, vocab] at rank 0; this rank's part elsewhere."""
    base, ranks, widths = packed
    return _at_rank_0(base(x), ranks, widths)


def _at_rank_0(own: Tensor, ranks: Collective, widths: tuple[int, ...]) -> Tensor:
    # Tensors that are gathered have one shape.
    missing = max(widths) - own.shape[1]
    parts = ranks.gather(F.pad(own, (0, missing)) if missing else own)
    if not parts:
        return own
    cut = [part[:, :width] for part, width in zip(parts, widths, strict=True)]
    return torch.cat(cut, dim=-1)


REDUCED = _wrapper("all_reduce", _reduced)
GATHERED = _wrapper("gather", _gathered)


def own_part(layer: Linear | Linears) -> Linear | Linears:
    """Of a linear that ranks share, what this one multiplies by."""
    if isinstance(layer, Linear) and layer.kernel in (REDUCED, GATHERED):
        base: Linear | Linears = layer.packed[0]
        return base
    return layer


def together(layer: Linear | Linears, own: Tensor) -> Tensor:
    """What a linear that ranks share gives, from what its `own_part` gave."""
    assert isinstance(layer, Linear)
    _, ranks, *widths = layer.packed
    return _at_rank_0(own, ranks, *widths) if widths else ranks.all_reduce(own)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank's part of a model, and the others."""

    plan: ShardPlan
    collective: Collective

    def reduced(self, base: Linear | Linears) -> Linear:
        """A linear whose inputs are shared out."""
        return Linear(REDUCED, (base, self.collective), None)

    def gathered(self, base: Linear | Linears) -> Linear:
        """A head whose tokens are shared out."""
        size, vocab_size = self.plan.shard.size, self.plan.config.vocab_size
        widths = tuple(len(Shard(rank, size).of(vocab_size)) for rank in range(size))
        return Linear(GATHERED, (base, self.collective, widths), None)

    def heads_norm(self, query: Tensor, key: Tensor, eps: float) -> ShardedHeadsNorm:
        """query, key  the gains of this rank's heads"""
        config = self.plan.config
        widths = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return ShardedHeadsNorm(query, key, eps, widths, self.plan.kv_copies, self.collective)

    def look_up(self, embedding: Embedding, token_ids: Tensor) -> Tensor:
        """embedding [own tokens, hidden], token_ids [rows] -> [rows, hidden]."""
        own = self.plan.vocabulary
        places = token_ids - own.start
        foreign = (places < 0) | (places >= len(own))
        rows = embedding(places.clamp(0, len(own) - 1))
        return self.collective.all_reduce(rows.masked_fill_(foreign[:, None], 0))


@dataclass(frozen=True, slots=True, eq=False)
class ShardedHeadsNorm:
    """RMS norm of all query heads together and of all key heads together, of which this rank has
    some.

    query [own heads * head_dim], key [own kv_heads * head_dim]
    widths  of all query heads and all key heads
    copies  ranks that have the same key heads
    """

    query: Tensor
    key: Tensor
    eps: float
    widths: tuple[int, int]
    copies: int
    collective: Collective

    def __call__(self, qk: Tensor) -> Tensor:
        rows, _, head_dim = qk.shape
        wide = qk.reshape(rows, -1).float()
        query, key = wide.tensor_split((self.query.shape[0],), dim=-1)
        squares = torch.stack((query.square().sum(-1), key.square().sum(-1)), dim=-1)
        squares = self.collective.all_reduce(squares)
        means = squares / squares.new_tensor((self.widths[0], self.widths[1] * self.copies))
        scales = torch.rsqrt(means + self.eps)
        normed = (
            (query * scales[:, :1]).to(qk.dtype) * self.query,
            (key * scales[:, 1:]).to(qk.dtype) * self.key,
        )
        return torch.cat(normed, dim=-1).view(rows, -1, head_dim)
