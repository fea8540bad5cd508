"""Runs a model whose blocks lie on several devices: each part by what its device runs best.

A block of the cache has its number in every part, and keys and values of the part's layers on the
part's device. So the scheduler, prefix caching and preemption know nothing of parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.runtime.config import KvCacheDtype
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.blocks import Copy
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.models.split import SplitDecoder


class SplitRunner:
    """runners  of the parts, in their order; steps of a part are launched, not recorded"""

    def __init__(
        self,
        model: SplitDecoder,
        *,
        num_blocks: int,
        block_size: int,
        kv_cache_dtype: KvCacheDtype = "auto",
    ) -> None:
        self.runners = tuple(
            ModelRunner(
                part,
                num_blocks=num_blocks,
                block_size=block_size,
                kv_cache_dtype=kv_cache_dtype,
            )
            for part in model.parts
        )
        # Drawing begins with logits on the host: the CPU's part of a step is the longest.
        self.device_draw = None
        self._devices = tuple(part.device for part in model.parts)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """See `ModelRunner.run`; the logits are on the last part's device."""
        *before, last = zip(self.runners, self._devices, strict=True)
        x: Tensor | None = None
        for runner, device in before:
            x = runner.hidden(_on(batch, device), _moved(x, device))
        runner, device = last
        return runner.run(_on(batch, device), _moved(x, device))

    def copy(self, copies: Sequence[Copy]) -> None:
        for runner in self.runners:
            runner.copy(copies)

    def clear(self, block_ids: Sequence[int]) -> None:
        for runner in self.runners:
            runner.clear(block_ids)


def _moved(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device)


def _on(batch: Batch, device: torch.device) -> Batch:
    return replace(
        batch,
        token_ids=batch.token_ids.to(device),
        positions=batch.positions.to(device),
        sampled_rows=batch.sampled_rows.to(device),
    )
