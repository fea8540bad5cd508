"""The KV cache: for each layer keys and values of every slot, and what is done to whole blocks.

keys [kv_heads, slots, key_dim] and values [kv_heads, slots, value_dim] of a layer, sized by its
`AttentionSpec`; a slot is block number times block size plus offset. The blocks of a head lie side
by side, which is how `kernels.cpu.attention` wants to gather them. On a CPU pages are touched as
they are first used, so a large pool costs nothing until it is needed.

int8 holds each head of a token in whole numbers of a 127th of its largest channel, with that scale
in float32: 4 bytes for 64 to 256, so that a cache of the same memory has nearly twice the tokens of
bfloat16. fp8 holds 8-bit floats (e4m3) as they are: numbers beyond 448 become 448's.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.runtime.config import KvCacheDtype
from qtool.runtime.models.attention_spec import AttentionSpec
from qtool.runtime.models.model import Model

SCALE_BYTES = 4
# What a cache that is not of the model's type holds.
HELD: dict[KvCacheDtype, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True, eq=False)
class LayerPool:
    """One layer: keys and values as above, of the model's type or int8 with scales
    [kv_heads, slots] float32. Values may be a view of the keys' first channels.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None

    @property
    def scales(self) -> tuple[Tensor, Tensor] | None:
        if self.key_scales is None or self.value_scales is None:
            return None
        return self.key_scales, self.value_scales

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Each memory once."""
        parts = [self.keys, self.key_scales]
        if self.values.data_ptr() != self.keys.data_ptr():
            parts += [self.values, self.value_scales]
        return tuple(part for part in parts if part is not None)


class KVPool:
    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        num_blocks: int,
        block_size: int,
        kv_cache_dtype: KvCacheDtype,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """dtype: the model's, which "auto" caches in."""
        self.block_size = block_size
        self.num_slots = num_blocks * block_size
        held = HELD.get(kv_cache_dtype, dtype)
        self.layers = tuple(_layer(spec, self.num_slots, held, device) for spec in specs)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer.tensors)

    def copy_block(self, source: int, target: int, num_tokens: int) -> None:
        """The first tokens of one block to another."""
        here = slice(source * self.block_size, source * self.block_size + num_tokens)
        there = slice(target * self.block_size, target * self.block_size + num_tokens)
        for layer in self.layers:
            for part in layer.tensors:
                part[:, there] = part[:, here]

    def clear(self, block_ids: Sequence[int]) -> None:
        """Zero blocks whose content may not be finite.

        A block's next owner reads its unwritten end behind a mask, and 0 times NaN is NaN.
        """
        for block in block_ids:
            slots = slice(block * self.block_size, (block + 1) * self.block_size)
            for layer in self.layers:
                for part in layer.tensors:
                    part[:, slots] = 0


def block_bytes(model: Model, block_size: int, kv_cache_dtype: KvCacheDtype = "auto") -> int:
    """Bytes of one block over all layers, keys and values."""
    return sum(
        layer_bytes(spec, block_size, kv_cache_dtype, model.dtype) for spec in model.attention
    )


def layer_bytes(
    spec: AttentionSpec, num_tokens: int, kv_cache_dtype: KvCacheDtype, dtype: torch.dtype
) -> int:
    """Of so many tokens in one layer; dtype: the model's."""
    if kv_cache_dtype != "int8":
        return spec.cached_channels * num_tokens * HELD.get(kv_cache_dtype, dtype).itemsize
    heads = spec.num_kv_heads * (1 if spec.value_in_key else 2)
    return (spec.cached_channels + heads * SCALE_BYTES) * num_tokens


def _layer(spec: AttentionSpec, slots: int, dtype: torch.dtype, device: torch.device) -> LayerPool:
    def scales() -> Tensor | None:
        if dtype != torch.int8:
            return None
        return _zeros((spec.num_kv_heads, slots), torch.float32, device)

    keys, key_scales = _zeros((spec.num_kv_heads, slots, spec.key_dim), dtype, device), scales()
    if spec.value_in_key:
        return LayerPool(keys, keys[..., : spec.value_dim], key_scales, key_scales)
    values = _zeros((spec.num_kv_heads, slots, spec.value_dim), dtype, device)
    return LayerPool(keys, values, key_scales, scales())


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Pages of the system, zero when they are first touched. Not numpy's: it asks for huge pages,
    # and when sequences take their next block, one of 2 MB is then cleared for every head of every
    # layer (100 ms and more in one step). Nor torch's, which writes the zeros.
    num_bytes = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(num_bytes, 1))
    return torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes).view(dtype).view(shape)
