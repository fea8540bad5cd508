"""The attention of a block: its projections, its norms and rotations around a call of `attend`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.runtime.layers import Linear, Linears
from qtool.runtime.models.model import Attend
from qtool.runtime.models.parts import Norm, Turn, rotate


@dataclass(frozen=True, slots=True, eq=False)
class SelfAttention:
    """Grouped-query attention.

        q, k, v = heads of qkv(x); q, k = rotate(qk_norm(q, k)); o(attend(q, k, v))

    qk_norm  on q and k side by side, [rows, heads + kv_heads, head_dim]; None: they stay
    turn     which of the step's rotations; None: positions are not told to this layer
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv: Linear | Linears
    qk_norm: Norm | None
    turn: int | None
    o: Linear | Linears

    def __call__(self, x: Tensor, turns: Sequence[Turn], attend: Attend) -> Tensor:
        rows, heads = x.shape[0], self.num_heads
        num_rotated = heads + self.num_kv_heads
        qkv = self.qkv(x).view(rows, -1, self.head_dim)
        qk = qkv[:, :num_rotated]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if self.turn is not None:
            qk = rotate(qk, turns[self.turn])
        attended = attend(self.layer, qk[:, :heads], qk[:, heads:], qkv[:, num_rotated:])
        return self.o(attended.reshape(rows, -1))


@dataclass(frozen=True, slots=True, eq=False)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434).

    Keys and values of all heads come from one narrow vector a token, c, by key_up and value_up.
    Since q (key_up c) = (q key_up) c, the vector is what is cached and attended to, as one KV head
    whose value is the first part of its key: 576 numbers a token and layer where the heads of
    DeepSeek-V3 would take 40,960.

        c, k_rope = kv_norm(kv), rotate(kv)        of kv_a(x) = [rank + rope]
        q_nope, q_rope = heads of q(x)
        o(value_up attend([q_nope key_up, rotate(q_rope)], [c, k_rope], c))

    q_a, q_a_norm, q  queries through a narrow layer of their own, or q alone
    narrow            q_a (or q) and kv_a in one, since they share their input
    key_up            [heads, nope, rank], value_up [heads, rank, value]
    """

    layer: int
    num_heads: int
    nope: int
    rank: int
    narrow: Linear | Linears
    narrow_query: int
    q_norm: Norm | None
    q: Linear | Linears | None
    kv_norm: Norm
    key_up: Tensor
    value_up: Tensor
    turn: int
    o: Linear | Linears

    def __call__(self, x: Tensor, turns: Sequence[Turn], attend: Attend) -> Tensor:
        rows = x.shape[0]
        query, kv = self.narrow(x).tensor_split((self.narrow_query,), dim=-1)
        if self.q is not None and self.q_norm is not None:
            query = self.q(self.q_norm(query))
        query = query.reshape(rows, self.num_heads, -1)
        turn = turns[self.turn]
        absorbed = torch.bmm(query[..., : self.nope].transpose(0, 1), self.key_up)
        turned = rotate(query[..., self.nope :], turn)
        latent = self.kv_norm(kv[:, : self.rank])[:, None]
        key = torch.cat((latent, rotate(kv[:, None, self.rank :], turn)), dim=-1)
        attended = attend(
            self.layer, torch.cat((absorbed.transpose(0, 1), turned), dim=-1), key, latent
        )
        values = torch.bmm(attended.transpose(0, 1), self.value_up)
        return self.o(values.transpose(0, 1).reshape(rows, -1))
