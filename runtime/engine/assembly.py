"""What an engine is put together from: a pool that fits, a runner over it, what is told of both."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.adapters import Adapters
from qtool.runtime.engine.client import ModelInfo
from qtool.runtime.engine.kv_pool import block_bytes
from qtool.runtime.engine.runner import ModelRunner, Runner
from qtool.runtime.engine.split_runner import SplitRunner
from qtool.runtime.engine.step_memory import measure_step_bytes
from qtool.runtime.loading import LoadedModel
from qtool.runtime.memory import MemoryBudget, PoolPlan, plan_pool
from qtool.runtime.models.model import Model
from qtool.runtime.models.split import SplitDecoder


def plan(config: EngineConfig, loaded: LoadedModel, draft: LoadedModel | None) -> PoolPlan:
    if isinstance(loaded.decoder, SplitDecoder):
        return _plan_parts(config, loaded.decoder, loaded.max_position_embeddings)
    weight_bytes = loaded.nbytes + (0 if draft is None else draft.nbytes)
    longest = config.max_model_len or loaded.max_position_embeddings
    step_bytes = 0
    if loaded.device.type == "cuda" and loaded.team is None:
        step_bytes = measure_step_bytes(loaded.decoder.for_context(longest), config, longest)
    budget = MemoryBudget.measure(config, loaded.device, weight_bytes=weight_bytes)
    return plan_pool(
        config,
        loaded.decoder,
        loaded.max_position_embeddings,
        replace(budget, used_bytes=budget.used_bytes + step_bytes),
        None if draft is None else draft.decoder,
    )


def _plan_parts(config: EngineConfig, model: SplitDecoder, trained: int) -> PoolPlan:
    """A block has keys and values on each device, so the device with the least room decides."""
    if config.kv_cache_memory_bytes is not None:
        cpu = torch.device("cpu")
        return plan_pool(config, model, trained, MemoryBudget.measure(config, cpu))
    plans = []
    for part, weight_bytes in zip(model.parts, model.part_bytes, strict=True):
        if not part.attention:
            continue
        on_cpu = part.device.type == "cpu"
        # The share that was asked for is the GPU's.
        own = replace(config, gpu_memory_utilization=None) if on_cpu else config
        step_bytes = 0
        if not on_cpu:
            longest = config.max_model_len or trained
            eager = replace(config, enforce_eager=True)
            step_bytes = measure_step_bytes(part.for_context(longest), eager, longest)
        budget = MemoryBudget.measure(own, part.device, weight_bytes=weight_bytes)
        budget = replace(budget, used_bytes=budget.used_bytes + step_bytes)
        plans.append(plan_pool(own, part, trained, budget))
    return PoolPlan(
        num_blocks=min(plan.num_blocks for plan in plans),
        max_model_len=min(plan.max_model_len for plan in plans),
    )


def make_runner(
    loaded: LoadedModel,
    model: Model,
    config: EngineConfig,
    pool: PoolPlan,
    adapters: Adapters | None = None,
) -> Runner:
    if isinstance(model, SplitDecoder):
        return SplitRunner(
            model,
            num_blocks=pool.num_blocks,
            block_size=config.block_size,
            kv_cache_dtype=config.kv_cache_dtype,
        )
    if loaded.team is None:
        return ModelRunner(
            model,
            num_blocks=pool.num_blocks,
            block_size=config.block_size,
            kv_cache_dtype=config.kv_cache_dtype,
            max_model_len=pool.max_model_len,
            max_num_seqs=config.max_num_seqs,
            enforce_eager=config.enforce_eager,
        )
    from qtool.runtime.parallel.runner import TeamRunner

    return TeamRunner(
        loaded.team,
        model,
        num_blocks=pool.num_blocks,
        block_size=config.block_size,
        kv_cache_dtype=config.kv_cache_dtype,
        context=pool.max_model_len,
        max_num_seqs=config.max_num_seqs,
        enforce_eager=config.enforce_eager,
        adapters=adapters,
    )


def describe(config: EngineConfig, loaded: LoadedModel, model: Model, pool: PoolPlan) -> ModelInfo:
    own_bytes = pool.num_blocks * block_bytes(model, config.block_size, config.kv_cache_dtype)
    return ModelInfo(
        name=loaded.source.name,
        max_model_len=pool.max_model_len,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=loaded.device.type,
        format=loaded.format,
        lora_enabled=config.uses_lora,
        lora_names=tuple(name for name, _ in config.lora_modules),
        vocab_size=model.vocab_size,
        num_kv_blocks=pool.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        weight_bytes=loaded.nbytes,
        kv_cache_bytes=own_bytes * loaded.num_ranks,
        num_ranks=loaded.num_ranks,
    )


def widest_window(windows: Iterable[int | None]) -> int | None:
    """Tokens that the layer sees that sees most; None: some layer sees all."""
    widths = list(windows)
    return None if None in widths else max((width for width in widths if width), default=None)
