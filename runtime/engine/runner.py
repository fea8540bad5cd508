"""Runs batches: owns the KV pool, and gives the decoder an `attend` that reads and writes it.

The pool is one tensor for keys and one for values a layer, [kv_heads, slots, dim], sized by the
layer's `AttentionSpec`: the blocks of a head lie side by side, which is how `kernels.cpu.attention`
wants to gather them. On a CPU its pages are touched as they are first used, so a large pool costs
nothing until it is needed. Layers of one window share a step's plan.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qtool.kernels.cpu import attention
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.blocks import Copy
from qtool.runtime.models.attention_spec import AttentionSpec
from qtool.runtime.models.model import Model, sinks_of


class ModelRunner:
    def __init__(self, model: Model, *, num_blocks: int, block_size: int) -> None:
        self._model = model
        self._block_size = block_size
        slots = num_blocks * block_size
        self._pools = [_pools(spec, slots, model.dtype, model.device) for spec in model.attention]
        self._windows = {spec.window for spec in model.attention}
        self._sinks = [sinks_of(spec, model.device) for spec in model.attention]

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Logits of the sampled rows, [sampled, vocab] float32; the cache holds all rows after."""
        model = self._model
        plans = {
            window: attention.plan(
                batch.spans,
                block_size=self._block_size,
                window=window,
                dtype=model.dtype,
                device=model.device,
            )
            for window in self._windows
        }

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            spec = model.attention[layer]
            keys, values = self._pools[layer]
            plan = plans[spec.window]
            attention.write(keys, values, key, value, plan.slots)
            return attention.attend(
                query,
                keys,
                values,
                plan,
                block_size=self._block_size,
                scale=spec.scale,
                softcap=spec.softcap,
                sinks=self._sinks[layer],
            )

        hidden = model.hidden(batch.token_ids, batch.positions, attend)
        if batch.sampled_rows.numel() == 0:
            return hidden.new_empty(0, model.vocab_size, dtype=torch.float32)
        if batch.sampled_rows.numel() < hidden.shape[0]:
            hidden = hidden.index_select(0, batch.sampled_rows)
        return model.logits(hidden)

    @torch.inference_mode()
    def copy(self, copies: Sequence[Copy]) -> None:
        """Carry out copies between blocks, one after the other."""
        for source, target, num_tokens in copies:
            there = slice(target * self._block_size, target * self._block_size + num_tokens)
            here = slice(source * self._block_size, source * self._block_size + num_tokens)
            for keys, values in self._pools:
                keys[:, there] = keys[:, here]
                values[:, there] = values[:, here]

    @torch.inference_mode()
    def clear(self, block_ids: Sequence[int]) -> None:
        """Zero blocks whose content may not be finite.

        A block's next owner reads its unwritten end behind a mask, and 0 times NaN is NaN.
        """
        for block in block_ids:
            slots = slice(block * self._block_size, (block + 1) * self._block_size)
            for keys, values in self._pools:
                keys[:, slots] = 0
                values[:, slots] = 0


def _pools(
    spec: AttentionSpec, slots: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """keys [kv_heads, slots, key_dim] and values [kv_heads, slots, value_dim] of one layer."""
    keys = _zeros((spec.num_kv_heads, slots, spec.key_dim), dtype, device)
    if spec.value_in_key:
        return keys, keys[..., : spec.value_dim]
    return keys, _zeros((spec.num_kv_heads, slots, spec.value_dim), dtype, device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zero pages (calloc), torch writes the zeros.
    words = np.zeros(shape, dtype=np.uint16 if dtype.itemsize == 2 else np.uint32)
    return torch.from_numpy(words).view(dtype)
