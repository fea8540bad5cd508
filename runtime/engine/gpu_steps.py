"""A step on a GPU: fused where the decoder allows it, else its own operations with our attention.

Decoding steps of a fused decoder are recorded once for each size of batch and replayed
(`runtime.engine.graphs`): a token of a small model takes less time than launching its kernels one
by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.kernels.cuda import fused, paged_attention, sampling
from qtool.kernels.cuda.fused import CacheLayer
from qtool.kernels.cuda.sampling import Draw
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.graphs import CudaRecorder, DecodeGraphs
from qtool.runtime.engine.kv_pool import KVPool
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.models.model import Attend, Model, sinks_of
from qtool.runtime.models.triton_decoder import (
    TritonDecoder,
    attention_obstacle,
    is_static,
    shape_of,
    why_not,
)


class GpuSteps:
    """A model bound to a pool; made by `of`."""

    def __init__(
        self,
        model: Model,
        pool: KVPool,
        *,
        max_model_len: int | None,
        max_num_seqs: int,
        enforce_eager: bool,
    ) -> None:
        """max_model_len: of the longest sequence, for recorded steps; None: none are recorded.
        max_num_seqs: in one of them, at the most
        """
        self._model = model
        self._pool = pool
        self._sinks = [sinks_of(spec, model.device) for spec in model.attention]
        self._shapes = tuple(dict.fromkeys(shape_of(spec) for spec in model.attention))
        self._fused: TritonDecoder | None = None
        self.graphs: DecodeGraphs | None = None
        if isinstance(model, Decoder) and why_not(model) is None:
            self._fused = TritonDecoder(model, pool.layers, pool.block_size)
            if not enforce_eager and max_model_len is not None and is_static(model):
                self.graphs = DecodeGraphs(
                    self._fused.logits,
                    self._shapes,
                    vocab_size=model.num_logits,
                    block_size=pool.block_size,
                    max_model_len=max_model_len,
                    max_num_seqs=max_num_seqs,
                    device=model.device,
                    record=CudaRecorder(),
                )

    @classmethod
    def of(
        cls,
        model: Model,
        pool: KVPool,
        *,
        max_model_len: int | None,
        max_num_seqs: int,
        enforce_eager: bool,
    ) -> GpuSteps | None:
        """None where the kernels do not serve this model."""
        if attention_obstacle(model.attention, model.dtype, model.device) is not None:
            return None
        return cls(
            model,
            pool,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            enforce_eager=enforce_eager,
        )

    @torch.inference_mode()
    def logits(self, batch: Batch, x: Tensor | None = None) -> Tensor:
        """Of the sampled rows, [sampled, vocab] float32; the cache holds all rows after.

        x  [rows, hidden], the output of the parts of a model before this one
        """
        if x is None and self.graphs is not None and self.graphs.takes(batch):
            return self.graphs.logits(batch)
        return self._compute(batch, x)

    @torch.inference_mode()
    def draw(self, batch: Batch, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """A token for each sampled row: [sampled] int64, and whether its logits are finite."""
        if self.graphs is not None and self.graphs.takes(batch):
            return self.graphs.draw(batch, draws)
        logits = self._compute(batch)
        return sampling.draw_tokens(logits, sampling.on_device(draws, logits.device))

    def _compute(self, batch: Batch, x: Tensor | None = None) -> Tensor:
        model, sampled = self._model, batch.sampled_rows
        tables = paged_attention.plan(
            batch.spans, self._shapes, block_size=self._pool.block_size, device=model.device
        )
        rows = None if len(sampled) == len(batch.token_ids) else sampled
        if self._fused is not None:
            return self._fused.logits(batch.token_ids, batch.positions, tables, rows, x)
        attend = self._attend(tables)
        if x is None:
            hidden = model.hidden(batch.token_ids, batch.positions, attend)
        else:
            assert isinstance(model, Decoder)
            hidden = model.through(x, batch.positions, attend)
        if not len(sampled):
            return hidden.new_empty(0, model.vocab_size, dtype=torch.float32)
        return model.logits(hidden if rows is None else hidden.index_select(0, rows))

    def _attend(self, tables: paged_attention.StepTables) -> Attend:
        model, block_size = self._model, self._pool.block_size

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            spec, pool = model.attention[layer], self._pool.layers[layer]
            cache = CacheLayer(pool.keys, pool.values, pool.key_scales, pool.value_scales)
            fused.write_cache(_dense(key), _dense(value), tables.slots, cache)
            return paged_attention.attend(
                _dense(query),
                pool.keys,
                pool.values,
                tables,
                block_size=block_size,
                scale=spec.scale,
                window=spec.window,
                softcap=spec.softcap,
                sinks=self._sinks[layer],
                scales=pool.scales,
            )

        return attend


def _dense(x: Tensor) -> Tensor:
    """x [rows, heads, channels] with the heads of a row side by side."""
    rows_apart = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if rows_apart else x.contiguous()
