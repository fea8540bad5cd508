"""A decoder's step on a GPU in few launches: the fused steps of `kernels.cuda` around its linears.

    x, sums = add_norm(residual, down's parts)      sums: of the inputs that the next linear adds up
    parts   = qkv(x, sums)
    query   = rope_and_write(parts)                 norms of heads, rotation, keys and values cached
    y       = attention(query)
    parts   = o(y)
    x, sums = add_norm(residual, o's parts)
    parts   = gate_up(x, sums)
    x, sums = gate_mul(parts)
    parts   = down(x, sums)

Every operation's shape follows from the number of rows alone and everything else is read from the
device, so that a step can be recorded and replayed (`runtime.engine.graphs`). A token's logits have
the same bits in every batch that takes the same tiles; across numbers of rows they may differ in
the last bit, as dense products do.

Ranks add up their o's and down's in between (`runtime.parallel.layers`), each in one call of the
collective, which NCCL lets be recorded with the rest.

What is not fused (latent attention, norms over all heads, layer norms) keeps the decoder's
own operations with attention by the same kernels; `why_not` names the first thing in the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from qtool.kernels.cuda import fused, marlin_linear, paged_attention
from qtool.kernels.cuda.fused import CacheLayer, Summed
from qtool.kernels.cuda.launch import obstacle
from qtool.kernels.cuda.marlin_linear import MarlinPacked
from qtool.kernels.cuda.paged_attention import AttentionShape, StepTables
from qtool.kernels.cuda.tuning import rows_to_unpack_at
from qtool.kernels.dispatch import KERNELS
from qtool.runtime.layers import Linear, Linears
from qtool.runtime.models.attention import SelfAttention
from qtool.runtime.models.attention_spec import AttentionSpec
from qtool.runtime.models.decoder import Block, Decoder
from qtool.runtime.models.mlp import Mlp, SparseMlp
from qtool.runtime.models.model import sinks_of
from qtool.runtime.models.native import LayerCache
from qtool.runtime.models.parts import GATED, HeadNorm, Norm, RmsNorm, WideRmsNorm
from qtool.runtime.parallel.layers import own_part, together

ACTIVATIONS: tuple[fused.Activation, ...] = ("silu", "gelu_tanh")


def attention_obstacle(
    specs: Sequence[AttentionSpec], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why Triton's attention does not serve layers like these; None if it does."""
    found = obstacle(device)
    if found is not None:
        return found
    if device.type == "cuda" and dtype == torch.float32:
        return "computes in 16 bits, and activations are float32"
    for spec in specs:
        widest = max(spec.key_dim, spec.value_dim)
        if widest > paged_attention.MAX_HEAD_DIM:
            return f"takes heads of {paged_attention.MAX_HEAD_DIM} channels, these have {widest}"
        if spec.value_in_key:
            return "does not take values that are in the keys"
    return None


def why_not(decoder: Decoder) -> str | None:
    """Why a decoder's blocks are not fused; None if they are."""
    found = attention_obstacle(decoder.attention, decoder.dtype, decoder.device)
    if found is not None:
        return found
    if not _is_rms(decoder.norm):
        return "layer norms are not fused"
    return next((reason for block in decoder.blocks for reason in _obstacles(block)), None)


def _obstacles(block: Block) -> Iterator[str]:
    attention = block.attention
    if not isinstance(attention, SelfAttention):
        yield "latent attention is not fused"
        return
    if attention.qk_norm is not None and not isinstance(attention.qk_norm, HeadNorm):
        yield "a norm over all heads is not fused"
    norms = (
        *(block.attention_norm, block.attention_post_norm),
        *(block.mlp_norm, block.mlp_post_norm),
    )
    if any(norm is not None and not _is_rms(norm) for norm in norms):
        yield "layer norms are not fused"


def _is_rms(norm: Norm) -> bool:
    return isinstance(norm, RmsNorm | WideRmsNorm)


def _gain(norm: Norm | None) -> Tensor | None:
    return None if norm is None else cast("RmsNorm | WideRmsNorm", norm).weight


def sum_block(layer: Linear | Linears) -> int:
    """Inputs whose sums a linear reads beside them; 0: it reads none."""
    layer = own_part(layer)
    if isinstance(layer, Linear) and isinstance(layer.packed, MarlinPacked):
        return marlin_linear.sum_block(layer.packed)
    return 0


def product(layer: Linear | Linears, x: Summed) -> Tensor:
    """[parts, rows, out], whose sum over the parts is the layer's output."""
    own = own_part(layer)
    if own is not layer:
        parts = product(own, x)
        whole = parts[0] if parts.shape[0] == 1 else parts.sum(0).to(x.values.dtype)
        return together(layer, whole)[None]
    values = x.values
    if isinstance(layer, Linear) and isinstance(layer.packed, MarlinPacked):
        packed, rows = layer.packed, values.shape[0]
        if rows < rows_to_unpack_at(packed.shape_for(rows), values.device):
            sums = x.sums if sum_block(layer) else None
            return marlin_linear.matmul_parts(values, packed, layer.bias, sums)
    return layer(values)[None]


def _summed(x: Tensor, layer: Linear | Linears) -> Summed:
    """Of inputs that no fused step made."""
    layer = own_part(layer)
    if sum_block(layer):
        assert isinstance(layer, Linear)
        return Summed(x, marlin_linear.block_sums(x, layer.packed))
    return Summed(x, x.new_empty((0, x.shape[0]), dtype=torch.float32))


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A block with what is looked up once."""

    block: Block
    attention: SelfAttention
    spec: AttentionSpec
    cache: CacheLayer
    sinks: Tensor | None
    qk_norm: Tensor | None
    activation: fused.Activation | None


class TritonDecoder:
    """A decoder that `why_not` has nothing against, bound to the layers of a KV pool."""

    def __init__(self, decoder: Decoder, pool: Sequence[LayerCache], block_size: int) -> None:
        self._decoder = decoder
        self._block_size = block_size
        self._eps = decoder.config.norm_eps
        self._layers = [self._bound(block, pool) for block in decoder.blocks]
        self.shapes = tuple(dict.fromkeys(shape_of(spec) for spec in decoder.attention))

    def _bound(self, block: Block, pool: Sequence[LayerCache]) -> _Layer:
        attention = block.attention
        assert isinstance(attention, SelfAttention)
        spec, held = self._decoder.attention[attention.layer], pool[attention.layer]
        norm = attention.qk_norm
        mlp = block.mlp
        return _Layer(
            block=block,
            attention=attention,
            spec=spec,
            cache=CacheLayer(held.keys, held.values, held.key_scales, held.value_scales),
            sinks=sinks_of(spec, self._decoder.device),
            qk_norm=norm.weight.contiguous() if isinstance(norm, HeadNorm) else None,
            activation=_activation(mlp) if isinstance(mlp, Mlp) else None,
        )

    @property
    def vocab_size(self) -> int:
        return self._decoder.vocab_size

    def logits(
        self,
        token_ids: Tensor,
        positions: Tensor,
        tables: StepTables,
        sampled_rows: Tensor | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """token_ids, positions [rows] int64 -> logits [sampled, vocab] float32; the cache holds all
        rows after.

        sampled_rows  [sampled] int64, as many as are wanted; None: all
        before        the first block's input [rows, hidden], changed in place; None: of the tokens
        """
        residual = (self._decoder.embed(token_ids) if before is None else before).contiguous()
        angles = self._angles(positions)
        parts: Tensor | None = None
        post: Tensor | None = None
        scale = 1.0
        for layer in self._layers:
            block = layer.block
            x = self._add_norm(
                residual, parts, post, scale, block.attention_norm, layer.attention.qkv
            )
            scale = block.residual_scale
            parts = self._attention(layer, x, angles, tables)
            post = _gain(block.attention_post_norm)
            x = self._add_norm(residual, parts, post, scale, block.mlp_norm, _first(block.mlp))
            parts = self._mlp(layer, x)
            post = _gain(block.mlp_post_norm)
        head = self._decoder.head
        if sampled_rows is not None and not len(sampled_rows):
            return residual.new_empty((0, self.vocab_size), dtype=torch.float32)
        x = self._add_norm(residual, parts, post, scale, self._decoder.norm, head)
        if sampled_rows is not None:
            x = _summed(x.values.index_select(0, sampled_rows), head)
        parts = product(head, x)
        logits = parts[0].float() if parts.shape[0] == 1 else parts.sum(0)
        return self._decoder.shape_logits(logits)

    def _add_norm(
        self,
        residual: Tensor,
        parts: Tensor | None,
        post_weight: Tensor | None,
        residual_scale: float,
        norm: Norm | None,
        reader: Linear | Linears | None,
    ) -> Summed:
        return fused.add_norm(
            residual,
            parts,
            _gain(norm),
            self._eps,
            post_weight=post_weight,
            residual_scale=residual_scale,
            sum_block=0 if reader is None else sum_block(reader),
        )

    def _attention(
        self, layer: _Layer, x: Summed, angles: list[tuple[Tensor, Tensor]], tables: StepTables
    ) -> Tensor:
        attention, spec, cache = layer.attention, layer.spec, layer.cache
        parts = product(attention.qkv, x)
        turn = attention.turn
        rows = parts.shape[1]
        none = parts.new_empty((rows, 0), dtype=torch.float32)
        cos, sin = (none, none) if turn is None else angles[turn]
        query = fused.rope_and_write(
            parts.contiguous(),
            cos,
            sin,
            tables.slots,
            cache,
            x.values.dtype,
            heads=attention.num_heads,
            rotated=2 * cos.shape[1],
            qk_norm=layer.qk_norm,
            eps=self._eps,
        )
        scales = None
        if cache.key_scales is not None and cache.value_scales is not None:
            scales = (cache.key_scales, cache.value_scales)
        attended = paged_attention.attend(
            query,
            cache.keys,
            cache.values,
            tables,
            block_size=self._block_size,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            sinks=layer.sinks,
            scales=scales,
        )
        return product(attention.o, _summed(attended.view(rows, -1), attention.o))

    def _mlp(self, layer: _Layer, x: Summed) -> Tensor:
        mlp = layer.block.mlp
        if not isinstance(mlp, Mlp):
            return mlp(x.values)[None]
        if layer.activation is None:
            return mlp(x.values)[None]
        gated = fused.gate_mul(
            product(mlp.up, x).contiguous(),
            layer.activation,
            x.values.dtype,
            sum_block=sum_block(mlp.down),
        )
        return product(mlp.down, gated)

    def _angles(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """cos and sin [rows, rotated / 2] float32 of each rotation."""
        found = []
        for rotation in self._decoder.rotations:
            angles = positions.float()[:, None] * rotation.inverse_frequencies
            factor = rotation.rope.attention_factor
            found.append((angles.cos() * factor, angles.sin() * factor))
        return found


def shape_of(spec: AttentionSpec) -> AttentionShape:
    return AttentionShape(spec.num_heads, spec.num_kv_heads)


def _activation(mlp: Mlp) -> fused.Activation | None:
    return next((name for name in ACTIVATIONS if mlp.activate is GATED[name]), None)


def _first(mlp: Mlp | SparseMlp) -> Linear | Linears | None:
    return mlp.up if isinstance(mlp, Mlp) else None


def is_static(decoder: Decoder) -> bool:
    """Whether a step does the same operations whatever its numbers are, and can be recorded:
    experts one by one read on the host which tokens are theirs, adapters which rows.
    """
    kernels = {kernel.name for kernel in KERNELS}
    layers: list[Linear | Linears] = [decoder.head]
    for block in decoder.blocks:
        attention, mlp = block.attention, block.mlp
        if not isinstance(attention, SelfAttention):
            return False
        layers += [attention.qkv, attention.o]
        if isinstance(mlp, SparseMlp) and mlp.batched is None:
            return False
        every = mlp.shared if isinstance(mlp, SparseMlp) else mlp
        if every is not None:
            layers += [every.up, every.down]
    parts = [
        part
        for layer in map(own_part, layers)
        for part in (layer.parts if isinstance(layer, Linears) else [layer])
    ]
    return all(part.kernel.name in kernels for part in parts)
