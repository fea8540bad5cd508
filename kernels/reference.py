"""What each operation of a decoder means, in plain torch and float32.

Nothing here is fast. Every kernel in this package is tested against these functions, and whoever
wants to know what a kernel computes reads them and not the kernel.

Axis names: tokens (of all sequences, one after the other), heads, kv_heads, head_dim, in, out,
slots (places for one token in the KV pool: block number times block size plus offset).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.weights import Weight


class Span(NamedTuple):
    """One sequence's part in a step.

    num_queries  tokens of the step that belong to it, the last ones of the sequence
    length       tokens in the cache once the step's own are written; num_queries <= length
    block_ids    the blocks that hold them, in order: token t lies in block_ids[t // block_size]
    """

    num_queries: int
    length: int
    block_ids: Sequence[int]


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] -> [tokens, out]: x times the dequantized weight [out, in], transposed."""
    bias = None if bias is None else bias.float()
    return F.linear(x.float(), weight.dequantize(torch.float32), bias).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., channels] over the root of its mean square, times weight [channels]."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def rope_angles(positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """positions [tokens] and radians a position [head_dim / 2] -> [tokens, head_dim / 2]."""
    return positions.float()[:, None] * inverse_frequencies.float()[None, :]


def rope(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + head_dim / 2]) of every head by angles [tokens, head_dim / 2].

    x [tokens, heads, head_dim]
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[tokens, 2 * channels], gates first -> [tokens, channels]: silu(gate) times up."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: Sequence[Span],
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of every span's queries over its own cached tokens.

    query        [tokens, heads, key_dim], the spans' queries one after the other
    keys, values [kv_heads, slots, dim]; heads h * g .. h * g + g - 1 read kv head h
    window       a token sees itself and the window - 1 tokens before it; None: all before it
    softcap      scores become softcap * tanh(score / softcap)
    sinks        [heads], a logit of each head that takes its share of the softmax, with no value
    returns      [tokens, heads, value_dim]
    """
    group = query.shape[1] // keys.shape[0]
    outputs = []
    row = 0
    for span in spans:
        slots = [
            span.block_ids[t // block_size] * block_size + t % block_size
            for t in range(span.length)
        ]
        k = keys[:, slots].float().repeat_interleave(group, dim=0)
        v = values[:, slots].float().repeat_interleave(group, dim=0)
        for index in range(span.num_queries):
            position = span.length - span.num_queries + index
            first = 0 if window is None else max(0, position - window + 1)
            seen = slice(first, position + 1)
            scores = torch.einsum("hd,htd->ht", query[row].float(), k[:, seen]) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks.float()[:, None]), dim=-1)
            weights = scores.softmax(dim=-1)[:, : position + 1 - first]
            outputs.append(torch.einsum("ht,htd->hd", weights, v[:, seen]))
            row += 1
    return torch.stack(outputs).to(query.dtype)
