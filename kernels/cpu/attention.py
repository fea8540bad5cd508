"""Paged causal attention from PyTorch's own operators.

The KV pool of a layer is [kv_heads, slots, head_dim]. Blocks of one head lie side by side, so the
blocks of a sequence come out of one `index_select` as [kv_heads, tokens, head_dim], ready to
multiply, and as a plain slice where the block numbers happen to follow each other, which is what a
sequence alone in the pool gets.

Heads are folded: the g query heads that share a KV head become g rows of one matrix. PyTorch's
grouped-query path with one query is a trap (14 heads on 2, bfloat16, 4096 tokens, 2 cores: 2660 us;
folded, 180 us; folded as two `bmm`, 100 us). So:

decode    sequences of similar length share one padded, masked call. bfloat16 with long contexts
          goes through two `bmm`, everything else through SDPA, which keeps float32 exact.
prefill   one SDPA a sequence, heads as they are.

Scores that are capped, or that share their softmax with sinks, are computed plainly: SDPA has no
room for either. Values may be the first channels of the keys, one pool for both, as in latent
attention.

What depends only on the step (which blocks, which masks) is planned once and used by every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.kernels.reference import Span

# bfloat16: tokens of all sequences of one call from which two bmm beat SDPA (Zen 5, 1 or 2 cores).
BMM_FROM_TOKENS = 1024
# A sequence joins a padded decode call if it fills at least this much of it...
MIN_FILL = 0.75
# ...or if the whole call is so short that its fixed cost is all it costs.
SHORT_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Gather:
    """Where a call's keys and values lie.

    block_ids   [sequences * blocks] int64, or None where the tokens are one slice of the pool
    first_slot  start of that slice
    tokens      tokens of each sequence, padding included
    """

    block_ids: Tensor | None
    first_slot: int
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class DecodeCall:
    """One new token for each of several sequences.

    rows  their rows in the step; None: all of them, in order
    mask  [1, sequences, 1, tokens], 0 where visible and -inf elsewhere; None: all visible
    """

    rows: Tensor | None
    gather: Gather
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillCall:
    """Several new tokens of one sequence, rows start .. stop - 1 of the step.

    mask  [queries, tokens] bool, True where visible; None: plain causal from the first token
    """

    start: int
    stop: int
    gather: Gather
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """decode and prefill calls that cover every row of a step once.

    slots  [rows] int64, where each row's key and value go
    """

    decode: tuple[DecodeCall, ...]
    prefill: tuple[PrefillCall, ...]
    slots: Tensor


def plan(
    spans: Sequence[Span],
    *,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionPlan:
    """Turn the spans of a step into calls; see `reference.Span`."""
    slots: list[int] = []
    decoding: list[tuple[int, Span]] = []
    prefill: list[PrefillCall] = []
    row = 0
    for span in spans:
        first = span.length - span.num_queries
        slots.extend(
            span.block_ids[t // block_size] * block_size + t % block_size
            for t in range(first, span.length)
        )
        if span.num_queries == 1:
            decoding.append((row, span))
        else:
            prefill.append(_plan_prefill(row, span, block_size, window, device))
        row += span.num_queries
    decode = _plan_decode(decoding, row, block_size, window, dtype, device)
    return AttentionPlan(decode, tuple(prefill), torch.tensor(slots, device=device))


def _first_visible_block(position: int, block_size: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1) // block_size


def _gather(block_ids: Sequence[int], length: int, block_size: int, device: torch.device) -> Gather:
    """One sequence's `length` tokens, a slice of the pool if its blocks follow each other."""
    first = block_ids[0]
    if all(block == first + index for index, block in enumerate(block_ids)):
        return Gather(None, first * block_size, 1, length)
    return Gather(torch.tensor(block_ids, device=device), 0, 1, length)


def _plan_prefill(
    row: int, span: Span, block_size: int, window: int | None, device: torch.device
) -> PrefillCall:
    first_query = span.length - span.num_queries
    skipped = _first_visible_block(first_query, block_size, window)
    block_ids = span.block_ids[skipped : -(-span.length // block_size)]
    offset = skipped * block_size
    gather = _gather(block_ids, span.length - offset, block_size, device)
    mask = None
    if first_query > 0 or (window is not None and span.length > window):
        queries = torch.arange(first_query, span.length, device=device)[:, None]
        keys = torch.arange(offset, span.length, device=device)[None, :]
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
    return PrefillCall(row, row + span.num_queries, gather, mask)


def _plan_decode(
    decoding: list[tuple[int, Span]],
    num_rows: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[DecodeCall, ...]:
    """Group sequences of similar length; in the order of their rows where one call takes all."""
    needs = []
    for row, span in decoding:
        skipped = _first_visible_block(span.length - 1, block_size, window)
        block_ids = span.block_ids[skipped : -(-span.length // block_size)]
        needs.append(_Need(row, block_ids, span.length - skipped * block_size))
    sizes = [len(need.block_ids) for need in needs]
    if needs and not _share_a_call(max(sizes), min(sizes)):
        needs.sort(key=lambda need: -len(need.block_ids))
    calls: list[DecodeCall] = []
    while needs:
        longest = max(map(len, (need.block_ids for need in needs)))
        taken = [need for need in needs if _share_a_call(longest, len(need.block_ids))]
        needs = needs[len(taken) :]
        rows = [need.row for need in taken]
        gather, mask = _decode_inputs(taken, longest, block_size, window, dtype, device)
        in_order = rows == list(range(num_rows))
        calls.append(
            DecodeCall(None if in_order else torch.tensor(rows, device=device), gather, mask)
        )
    return tuple(calls)


class _Need(NamedTuple):
    """A decoding sequence: its row, the blocks it still sees, and the tokens from their start."""

    row: int
    block_ids: Sequence[int]
    tokens: int


def _share_a_call(longest: int, blocks: int) -> bool:
    return longest <= SHORT_BLOCKS or blocks >= MIN_FILL * longest


def _decode_inputs(
    needs: Sequence[_Need],
    num_blocks: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Gather, Tensor | None]:
    """The gather and mask of one call, padded to num_blocks blocks a sequence."""
    lengths = [need.tokens for need in needs]
    if len(needs) == 1 and (window is None or lengths[0] <= window):
        return _gather(needs[0].block_ids, lengths[0], block_size, device), None
    tokens = num_blocks * block_size
    # Padding repeats a block of the sequence itself: finite numbers, and masked.
    block_ids = [
        block
        for ids in (need.block_ids for need in needs)
        for block in (*ids, *([ids[0]] * (num_blocks - len(ids))))
    ]
    keys = torch.arange(tokens, device=device)[None, :]
    last = torch.tensor(lengths, device=device)[:, None] - 1
    visible = keys <= last
    if window is not None:
        visible &= keys > last - window
    mask = torch.zeros(visible.shape, dtype=dtype, device=device)
    mask.masked_fill_(~visible, float("-inf"))
    gather = Gather(torch.tensor(block_ids, device=device), 0, len(needs), tokens)
    return gather, mask[None, :, None, :]


# Scales [kv_heads, slots] float32 of a cache's keys and of its values, in 8 bits.
Scales = tuple[Tensor, Tensor]


def write(
    keys: Tensor,
    values: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    *,
    scales: Scales | None = None,
) -> None:
    """Store a step's key and value [rows, kv_heads, head_dim] in the pools, at `slots` [rows].

    Where `values` is a view of the keys' first channels, the key has the value in it.
    """
    pairs = [(keys, key, None if scales is None else scales[0])]
    if not _is_view_of(values, keys):
        pairs.append((values, value, None if scales is None else scales[1]))
    for pool, new, scale in pairs:
        rows = new.transpose(0, 1)
        if scale is not None:
            rows, steps = to_8_bits(rows)
            scale.index_copy_(1, slots, steps)
        pool.index_copy_(1, slots, rows)


def to_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., channels] -> whole numbers of a 127th of the largest channel, int8, and that step
    [...] float32. NaN in a channel is NaN in the step.
    """
    wide = x.float()
    top = wide.abs().amax(-1)
    tiny = top < 1e-30
    inverse = torch.where(tiny, 0.0, 127.0 / top)
    codes = torch.round(wide * inverse[..., None]).nan_to_num_(0.0).to(torch.int8)
    return codes, torch.where(tiny, 0.0, top / 127.0)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: AttentionPlan,
    *,
    block_size: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scales: Scales | None = None,
) -> Tensor:
    """query [rows, heads, key_dim] over pools [kv_heads, slots, dim] -> [rows, heads, value_dim].

    softcap  scores become softcap * tanh(score / softcap)
    sinks    [heads], a logit of each head that takes its share of the softmax and gives nothing
    scales   of pools in 8 bits
    """
    pools = _Pools(keys, values, block_size, scales, query.dtype)
    rule = _Rule(scale, softcap, sinks)
    if not plan.prefill and len(plan.decode) == 1 and plan.decode[0].rows is None:
        return _decode(query, pools, plan.decode[0], rule)
    output = query.new_empty(*query.shape[:2], values.shape[-1])
    for call in plan.decode:
        assert call.rows is not None
        picked = query.index_select(0, call.rows)
        output.index_copy_(0, call.rows, _decode(picked, pools, call, rule))
    for span in plan.prefill:
        output[span.start : span.stop] = _prefill(query[span.start : span.stop], pools, span, rule)
    return output


class _Rule(NamedTuple):
    """How scores become weights; see `attend`."""

    scale: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sinks is None


class _Pools(NamedTuple):
    """keys, values [kv_heads, slots, dim] of one layer."""

    keys: Tensor
    values: Tensor
    block_size: int
    scales: Scales | None
    dtype: torch.dtype

    def fetch(self, gather: Gather) -> tuple[Tensor, Tensor]:
        """[kv_heads, sequences, tokens, dim] of a call's keys and of its values."""
        keys = self._part(self.keys, gather, 0)
        if _is_view_of(self.values, self.keys):
            return keys, keys[..., : self.values.shape[-1]]
        return keys, self._part(self.values, gather, 1)

    def _part(self, pool: Tensor, gather: Gather, which: int) -> Tensor:
        found = _fetch(pool, gather, self.block_size)
        if self.scales is None:
            return found
        steps = _fetch(self.scales[which].unsqueeze(-1), gather, self.block_size)
        return (found * steps).to(self.dtype)


def _is_view_of(values: Tensor, keys: Tensor) -> bool:
    return values.data_ptr() == keys.data_ptr()


def _fetch(pool: Tensor, gather: Gather, block_size: int) -> Tensor:
    """[kv_heads, slots, dim] -> [kv_heads, sequences, tokens, dim]."""
    kv_heads, slots, dim = pool.shape
    if gather.block_ids is None:
        return pool.narrow(1, gather.first_slot, gather.tokens).unsqueeze(1)
    blocks = pool.view(kv_heads, slots // block_size, block_size * dim)
    picked = blocks.index_select(1, gather.block_ids)
    return picked.view(kv_heads, gather.sequences, -1, dim)[:, :, : gather.tokens]


def _decode(query: Tensor, pools: _Pools, call: DecodeCall, rule: _Rule) -> Tensor:
    """query [sequences, heads, key_dim] -> [sequences, heads, value_dim]."""
    sequences, heads, key_dim = query.shape
    kv_heads = pools.keys.shape[0]
    group = heads // kv_heads
    # [kv_heads, sequences, group, key_dim]
    folded = query.view(sequences, kv_heads, group, key_dim).transpose(0, 1)
    k, v = pools.fetch(call.gather)
    value_dim = v.shape[-1]
    tokens = call.gather.tokens
    if not rule.is_plain:
        sinks = None if rule.sinks is None else rule.sinks.view(kv_heads, 1, group, 1)
        output = _plainly(folded, k, v, call.mask, rule, sinks)
    elif query.dtype == torch.bfloat16 and sequences * tokens >= BMM_FROM_TOKENS:
        calls = kv_heads * sequences
        scores = torch.bmm(
            folded.reshape(calls, group, key_dim),
            k.reshape(calls, tokens, key_dim).transpose(1, 2),
        ).mul_(rule.scale)
        if call.mask is not None:
            scores.view(kv_heads, sequences, group, tokens).add_(call.mask)
        output = torch.bmm(scores.softmax(-1), v.reshape(calls, tokens, value_dim))
        output = output.view(kv_heads, sequences, group, value_dim)
    else:
        output = F.scaled_dot_product_attention(folded, k, v, attn_mask=call.mask, scale=rule.scale)
    return output.transpose(0, 1).reshape(sequences, heads, value_dim)


def _prefill(query: Tensor, pools: _Pools, call: PrefillCall, rule: _Rule) -> Tensor:
    """query [queries, heads, key_dim] of one sequence -> [queries, heads, value_dim]."""
    k, v = pools.fetch(call.gather)
    return causal_attention(
        query[None],
        k[None, :, 0],
        v[None, :, 0],
        scale=rule.scale,
        mask=call.mask,
        softcap=rule.softcap,
        sinks=rule.sinks,
    )[0]


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention without a cache: independent sequences of one length, causal or by `mask`.

    query [batch, queries, heads, key_dim]; key, value [batch, kv_heads, tokens, dim];
    mask [queries, tokens] bool; softcap and sinks as in `attend`. Returns
    [batch, queries, heads, value_dim].
    """
    batch, queries, heads, key_dim = query.shape
    kv_heads, tokens = key.shape[1:3]
    group = heads // kv_heads
    value_dim = value.shape[-1]
    rule = _Rule(scale, softcap, sinks)
    # One batch entry a KV head; its group sees it through a stride of 0, so nothing is copied.
    by_group = query.view(batch, queries, kv_heads, group, key_dim).permute(0, 2, 3, 1, 4)
    folded = by_group.reshape(batch * kv_heads, group, queries, key_dim)
    key = key.reshape(batch * kv_heads, 1, tokens, key_dim)
    value = value.reshape(batch * kv_heads, 1, tokens, value_dim)
    if rule.is_plain:
        repeated = (batch * kv_heads, group, tokens)
        output = F.scaled_dot_product_attention(
            folded,
            key.expand(*repeated, key_dim),
            value.expand(*repeated, value_dim),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
    else:
        if mask is None:
            mask = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril()
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        bias.masked_fill_(~mask, float("-inf"))
        if sinks is not None:
            sinks = sinks.view(kv_heads, group, 1, 1).repeat(batch, 1, 1, 1)
        output = _plainly(folded, key, value, bias, rule, sinks)
    output = output.view(batch, heads, queries, value_dim).transpose(1, 2)
    return output.reshape(batch, queries, heads, value_dim)


def _plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rule: _Rule,
    sinks: Tensor | None,
) -> Tensor:
    """query, key, value [a, b, tokens, dim]; mask is added to scores [a, b, queries, tokens], and
    sinks [a, b, queries, 1] join them; each broadcasts. Softmax in float32.
    """
    scores = (query @ key.transpose(-1, -2)).float().mul_(rule.scale)
    if rule.softcap is not None:
        scores = scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
    if mask is not None:
        scores = scores.add_(mask)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.float().expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    return weights.to(query.dtype) @ value
