"""Runs batches: owns the KV pool, and gives the model an `attend` that reads and writes it.

There are four ways to run a step, and the first that can be had is taken:

GPU               Triton's kernels, recorded for decoding (`runtime.engine.gpu_steps`)
native blocks     all blocks of the decoder in one call of the compiled library; a token's logits
                  have the same bits whatever else is in the step (`runtime.models.native`)
native attention  the model's own operations, with the library's attention
torch             the model's own operations, with attention from PyTorch's; layers of one window
                  share a step's plan
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.cpu import attention
from qtool.kernels.cpu.native import (
    MAX_HEAD_DIM,
    Native,
    load,
    make_cache,
    make_rule,
    plan_spans,
)
from qtool.kernels.cuda.launch import has_float8
from qtool.runtime.config import EngineConfig, KvCacheDtype
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.blocks import Copy
from qtool.runtime.engine.device_draw import DeviceDraw
from qtool.runtime.engine.gpu_steps import GpuSteps
from qtool.runtime.engine.kv_pool import KVPool
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.models.model import Attend, Model, sinks_of
from qtool.runtime.models.native import NativeDecoder, find_slots, why_not


class Runner(Protocol):
    """What the engine asks of whatever runs its batches.

    device_draw  runs batches and draws from them, where that is done on the device
    """

    @property
    def device_draw(self) -> DeviceDraw | None: ...

    def run(self, batch: Batch) -> Tensor:
        """Logits of the sampled rows, [sampled, vocab] float32; the cache holds all rows after."""
        ...

    def copy(self, copies: Sequence[Copy]) -> None:
        """Carry out copies between blocks, one after the other."""
        ...

    def clear(self, block_ids: Sequence[int]) -> None:
        """Zero blocks."""
        ...


class ModelRunner:
    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        block_size: int,
        kv_cache_dtype: KvCacheDtype = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = EngineConfig.max_num_seqs,
        enforce_eager: bool = False,
    ) -> None:
        """max_model_len: of the longest sequence; None, or enforce_eager: no step is recorded.
        max_num_seqs: in a recorded step, at the most
        """
        self._model = model
        self.pool = KVPool(
            model.attention,
            num_blocks,
            block_size,
            kv_cache_dtype,
            dtype=model.dtype,
            device=model.device,
        )
        self.gpu = GpuSteps.of(
            model,
            self.pool,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            enforce_eager=enforce_eager,
        )
        self.device_draw: DeviceDraw | None = None
        if self.gpu is not None:
            self.device_draw = DeviceDraw(self.gpu, model.vocab_size, model.device)
        if kv_cache_dtype == "fp8" and (self.gpu is None or not has_float8(model.device)):
            raise UsageError(
                f"a KV cache in fp8 is not offered for this model on {model.device.type}",
                hint="use --kv-cache-dtype int8, or a GPU of compute capability 8.9 with Triton",
            )
        self._native = _NativeAttention.of(model, self.pool)
        self._decoder: NativeDecoder | None = None
        if isinstance(model, Decoder) and why_not(model) is None:
            self._decoder = NativeDecoder(model, self.pool.layers, block_size)
        self._windows = {spec.window for spec in model.attention}
        self._sinks = [sinks_of(spec, model.device) for spec in model.attention]

    @torch.inference_mode()
    def run(self, batch: Batch, x: Tensor | None = None) -> Tensor:
        """Logits of the sampled rows, [sampled, vocab] float32; the cache holds all rows after.

        x  [rows, hidden], the output of the parts of a model before this one
        """
        if self.gpu is not None:
            return self.gpu.logits(batch, x)
        model = self._decoder or self._model
        hidden = self.hidden(batch, x)
        if batch.sampled_rows.numel() == 0:
            return hidden.new_empty(0, model.vocab_size, dtype=torch.float32)
        if batch.sampled_rows.numel() < hidden.shape[0]:
            hidden = hidden.index_select(0, batch.sampled_rows)
        return model.logits(hidden)

    @torch.inference_mode()
    def hidden(self, batch: Batch, x: Tensor | None = None) -> Tensor:
        """The last block's output [rows, hidden]; the cache holds all rows after. Not for a part
        that the GPU's kernels run: that is the last one.
        """
        assert self.gpu is None
        if self._decoder is not None:
            if x is None:
                return self._decoder.hidden(batch.token_ids, batch.positions, batch.spans)
            return self._decoder.through(x, batch.positions, batch.spans)
        attend = self._attend(batch) if self._native is None else self._native.attend(batch)
        if x is None:
            return self._model.hidden(batch.token_ids, batch.positions, attend)
        assert isinstance(self._model, Decoder)
        return self._model.through(x, batch.positions, attend)

    def _attend(self, batch: Batch) -> Attend:
        model, block_size = self._model, self.pool.block_size
        plans = {
            window: attention.plan(
                batch.spans,
                block_size=block_size,
                window=window,
                dtype=model.dtype,
                device=model.device,
            )
            for window in self._windows
        }

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            spec, pool = model.attention[layer], self.pool.layers[layer]
            plan = plans[spec.window]
            attention.write(pool.keys, pool.values, key, value, plan.slots, scales=pool.scales)
            return attention.attend(
                query,
                pool.keys,
                pool.values,
                plan,
                block_size=block_size,
                scale=spec.scale,
                softcap=spec.softcap,
                sinks=self._sinks[layer],
                scales=pool.scales,
            )

        return attend

    @torch.inference_mode()
    def copy(self, copies: Sequence[Copy]) -> None:
        """Carry out copies between blocks, one after the other."""
        for source, target, num_tokens in copies:
            self.pool.copy_block(source, target, num_tokens)

    @torch.inference_mode()
    def clear(self, block_ids: Sequence[int]) -> None:
        self.pool.clear(block_ids)


class _NativeAttention:
    """`attend` by the compiled library over a pool."""

    def __init__(self, native: Native, model: Model, pool: KVPool) -> None:
        self._native = native
        self._block_size = pool.block_size
        self._caches = [
            make_cache(layer.keys, layer.values, layer.key_scales, layer.value_scales)
            for layer in pool.layers
        ]
        self._rules = [
            make_rule(
                heads=spec.num_heads,
                scale=spec.scale,
                window=spec.window,
                softcap=spec.softcap,
                sinks=sinks_of(spec, model.device),
            )
            for spec in model.attention
        ]

    @classmethod
    def of(cls, model: Model, pool: KVPool) -> "_NativeAttention | None":
        """None where the library does not serve this model."""
        if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16):
            return None
        if any(max(spec.key_dim, spec.value_dim) > MAX_HEAD_DIM for spec in model.attention):
            return None
        native = load()
        return cls(native, model, pool) if isinstance(native, Native) else None

    def attend(self, batch: Batch) -> Attend:
        table = plan_spans(batch.spans, block_size=self._block_size)
        slots = find_slots(batch.spans, self._block_size)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache = self._caches[layer]
            self._native.write_cache(key, value, cache, slots)
            return self._native.paged_attention(query, cache, table, self._rules[layer])

        return attend
