"""A decoder's step in one call of the compiled library, if the library has all of its parts.

Greedy text on this path does not depend on what else runs: a token's logits have the same bits in
any batch, with its prompt in one chunk or many, with a prefix from the cache or computed, before
and after a preemption. Every operation works row by row, products of whole numbers are exact,
float sums run in one order, and attention adds its blocks in the order of their positions whatever
the query length. PyTorch's own products and attention choose their order by the shape of a step.

A rank of several waits within the call for what the others add to its products.

What the library does not compute (experts, latent attention, layer norms, linears of other kernels)
keeps the decoder's own operations; `why_not` names the first thing that stands in the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qtool.kernels.cpu import native_linear
from qtool.kernels.cpu.native import (
    MAX_HEAD_DIM,
    Native,
    Rule,
    load,
    make_cache,
    make_rule,
    plan_spans,
)
from qtool.kernels.cpu.native_blocks import MAX_PARTS, BlockParts, NativeLinears, bind
from qtool.kernels.cpu.native_linear import NativePacked
from qtool.kernels.reference import Span
from qtool.native_build import Missing
from qtool.runtime.layers import Linear, Linears
from qtool.runtime.models.attention import SelfAttention
from qtool.runtime.models.attention_spec import AttentionSpec
from qtool.runtime.models.decoder import Block, Decoder
from qtool.runtime.models.mlp import Mlp
from qtool.runtime.models.model import sinks_of
from qtool.runtime.models.parts import GATED, HeadNorm, Norm, RmsNorm, WideRmsNorm
from qtool.runtime.parallel.layers import own_part

ACTIVATIONS = ("silu", "gelu_tanh")


class LayerCache(Protocol):
    """One layer of the KV pool (runtime/engine/kv_pool.py)."""

    @property
    def keys(self) -> Tensor: ...

    @property
    def values(self) -> Tensor: ...

    @property
    def key_scales(self) -> Tensor | None: ...

    @property
    def value_scales(self) -> Tensor | None: ...


def why_not(decoder: Decoder) -> str | None:
    """Why the library cannot run the decoder's blocks in one call; None if it can."""
    if decoder.device.type != "cpu":
        return f"the library runs on cpu, not {decoder.device.type}"
    if decoder.dtype not in (torch.float32, torch.bfloat16):
        name = str(decoder.dtype).removeprefix("torch.")
        return f"the library computes in bfloat16 or float32, not {name}"
    if not decoder.blocks:
        return "there are no blocks"
    native = load()
    if isinstance(native, Missing):
        return f"the library {native.reason}"
    return next((reason for block in decoder.blocks for reason in _obstacles(block)), None)


def _obstacles(block: Block) -> Iterator[str]:
    attention, mlp = block.attention, block.mlp
    if not isinstance(attention, SelfAttention):
        yield "latent attention is not in the library"
        return
    if not isinstance(mlp, Mlp):
        yield "experts are not in the library"
        return
    if attention.head_dim > MAX_HEAD_DIM or attention.head_dim % 2:
        yield f"heads of {attention.head_dim} channels are not in the library"
    if attention.qk_norm is not None and not isinstance(attention.qk_norm, HeadNorm):
        yield "a norm over all heads is not in the library"
    norms = (
        *(block.attention_norm, block.attention_post_norm),
        *(block.mlp_norm, block.mlp_post_norm),
    )
    if any(norm is not None and not isinstance(norm, RmsNorm | WideRmsNorm) for norm in norms):
        yield "layer norms are not in the library"
    if _activation(mlp) is None:
        yield "this MLP is not in the library"
    for name, layer in _linears(block).items():
        parts = _parts(layer)
        other = next((part for part in parts if not isinstance(part.packed, NativePacked)), None)
        if other is not None:
            yield f"{name} runs by {other.kernel.name}"
        if len(parts) > MAX_PARTS:
            yield f"{name} is in {len(parts)} parts"


def _linears(block: Block) -> dict[str, Linear | Linears]:
    assert isinstance(block.attention, SelfAttention)
    assert isinstance(block.mlp, Mlp)
    return {
        "qkv": block.attention.qkv,
        "o": own_part(block.attention.o),
        "gate_up": block.mlp.up,
        "down": own_part(block.mlp.down),
    }


def _parts(layer: Linear | Linears) -> tuple[Linear, ...]:
    return layer.parts if isinstance(layer, Linears) else (layer,)


def _activation(mlp: Mlp) -> str | None:
    return next((name for name in ACTIVATIONS if mlp.activate is GATED[name]), None)  # type: ignore[index]


class NativeDecoder:
    """A decoder that `why_not` has nothing against, bound to the layers of a KV pool."""

    def __init__(self, decoder: Decoder, pool: Sequence[LayerCache], block_size: int) -> None:
        self._decoder = decoder
        self._block_size = block_size
        native = load()
        assert isinstance(native, Native)
        self._native = native
        self._tables = [
            (rotation.inverse_frequencies, rotation.rope.attention_factor)
            for rotation in decoder.rotations
        ]
        first = decoder.blocks[0].mlp
        assert isinstance(first, Mlp)
        activation = _activation(first)
        assert activation is not None
        self._blocks = bind(
            [self._bound(block, pool) for block in decoder.blocks],
            hidden=decoder.embedding.hidden_size,
            eps=decoder.config.norm_eps,
            dtype=decoder.dtype,
            activation=activation,
            sum_over_ranks=None if decoder.ranks is None else decoder.ranks.collective.all_reduce,
        )
        self._norm = _gain(decoder.norm)
        head = decoder.head
        self._head = head if isinstance(head, Linear) else None

    @property
    def vocab_size(self) -> int:
        return self._decoder.vocab_size

    def _bound(self, block: Block, pool: Sequence[LayerCache]) -> BlockParts:
        attention = block.attention
        assert isinstance(attention, SelfAttention)
        layer, spec = pool[attention.layer], self._decoder.attention[attention.layer]
        turn = attention.turn
        linears = {name: self._packed(linear) for name, linear in _linears(block).items()}
        return BlockParts(
            **linears,
            cache=make_cache(layer.keys, layer.values, layer.key_scales, layer.value_scales),
            rule=_rule(spec, self._decoder.device),
            attn_norm=_gain(block.attention_norm),
            mlp_norm=_gain(block.mlp_norm),
            post_attn_norm=_gain(block.attention_post_norm),
            post_mlp_norm=_gain(block.mlp_post_norm),
            qk_norm=None if attention.qk_norm is None else _gain_of_heads(attention.qk_norm),
            rotation=0 if turn is None else turn,
            rotated=0 if turn is None else 2 * len(self._tables[turn][0]),
            residual_scale=block.residual_scale,
        )

    def _packed(self, layer: Linear | Linears) -> NativeLinears:
        parts = _parts(layer)
        packed = tuple(part.packed for part in parts)
        if all(part.bias is None for part in parts):
            return NativeLinears(packed)
        dtype = self._decoder.dtype
        biases = [
            torch.zeros(part.packed.out_features) if part.bias is None else part.bias
            for part in parts
        ]
        return NativeLinears(packed, torch.cat([bias.to(dtype) for bias in biases]).contiguous())

    def hidden(self, token_ids: Tensor, positions: Tensor, spans: Sequence[Span]) -> Tensor:
        """As `Model.hidden`, with the spans whose rows these are."""
        return self.through(self._decoder.embed(token_ids), positions, spans)

    def through(self, x: Tensor, positions: Tensor, spans: Sequence[Span]) -> Tensor:
        """x [rows, hidden], the first block's input -> the last one's output."""
        x = x.contiguous()
        cos, sin = self._angles(positions)
        slots = find_slots(spans, self._block_size)
        return self._blocks(x, cos, sin, slots, plan_spans(spans, block_size=self._block_size))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> [rows, vocab] float32."""
        head = self._head
        if self._norm is None or head is None or not isinstance(head.packed, NativePacked):
            return self._decoder.logits(hidden)
        normed = self._native.rms_norm(
            hidden.contiguous(), self._norm, self._decoder.config.norm_eps
        )
        logits = native_linear.matmul(normed, head.packed, head.bias, torch.float32)
        return self._decoder.shape_logits(logits)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [rotations, rows, half] float32."""
        shape = (self._blocks.rotations, len(positions), self._blocks.decoder.half)
        cos, sin = torch.ones(shape), torch.zeros(shape)
        for index, (frequencies, factor) in enumerate(self._tables[: shape[0]]):
            angles = positions.float()[:, None] * frequencies
            cos[index, :, : len(frequencies)] = angles.cos() * factor
            sin[index, :, : len(frequencies)] = angles.sin() * factor
        return cos, sin


def find_slots(spans: Sequence[Span], block_size: int) -> Tensor:
    """Where each row's key and value go, [rows] int64."""
    slots: list[int] = []
    for span in spans:
        table = span.block_ids
        slots.extend(
            table[t // block_size] * block_size + t % block_size
            for t in range(span.length - span.num_queries, span.length)
        )
    return torch.tensor(slots)


def _rule(spec: AttentionSpec, device: torch.device) -> Rule:
    return make_rule(
        heads=spec.num_heads,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        sinks=sinks_of(spec, device),
    )


def _gain(norm: Norm | None) -> Tensor | None:
    """An RMS norm's weight in float32; None for other norms and for none."""
    if not isinstance(norm, RmsNorm | WideRmsNorm):
        return None
    return norm.weight.float().contiguous()


def _gain_of_heads(norm: Norm) -> Tensor:
    assert isinstance(norm, HeadNorm)
    return norm.weight.float().contiguous()
