"""Loads a model of which a part lies on a GPU and the rest on the CPU: `--n-gpu-layers`.

As llama.cpp counts, a model of L blocks has L + 1 layers, the last of which is the head with its
norm, and the last N of them are on the GPU (llama-model.cpp: `n_layer + 1 - n_gpu_layers` is the
first). The others, and the table that tokens are looked up in, are on the CPU. So a step goes from
the CPU to the GPU once, and what is drawn from is on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qtool.errors import UnsupportedModel
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.kv_pool import layer_bytes
from qtool.runtime.layers import PackingRules
from qtool.runtime.loading import (
    FoundModel,
    LoadedModel,
    choose_device,
    find_model,
    load_model,
)
from qtool.runtime.memory import MemoryBudget, least_bytes
from qtool.runtime.models.decoder import attention_specs
from qtool.runtime.models.load import FallbackPlan, NativePlan
from qtool.runtime.models.split import Stretch
from qtool.runtime.packed_cache import say

CPU = torch.device("cpu")
# Tokens of cache that "auto" leaves room for where nobody says how long a sequence may be.
AUTO_CONTEXT = 4096


def load_offloaded(config: EngineConfig) -> LoadedModel:
    """With the last `config.n_gpu_layers` layers on the GPU.

    Raises what `load_model` raises. Where there is no GPU and none is asked for by name, all layers
    are on the CPU, which is said.
    """
    gpu = choose_device(config.device)
    if gpu.type == "cpu":
        say(f"--n-gpu-layers {config.n_gpu_layers}: there is no GPU, all layers are on the CPU")
        return _load_whole(config, gpu)
    found = find_model(
        config.model, dtype=config.dtype, device="cpu", revision=config.revision, budget=None
    )
    plan = found.plan
    if isinstance(plan, FallbackPlan):
        return _load_undivided(config, found.source.name, plan, gpu)
    num_blocks = plan.config.num_layers
    weights = weight_bytes_by_layer(plan, found.dtype)
    if isinstance(config.n_gpu_layers, int):
        wanted = config.n_gpu_layers
    else:
        free = MemoryBudget.measure(config, gpu).free_share
        cache = cache_bytes_by_layer(plan, config, found.dtype)
        sizes = [each + held for each, held in zip(weights, cache, strict=True)]
        wanted = most_gpu_layers(sizes, free)
        say(f"--n-gpu-layers auto: {wanted} of {num_blocks + 1} layers fit on the GPU")
    parts = divide(num_blocks, wanted, gpu)
    if len(parts) == 1:
        return _load_whole(config, parts[0].device)
    for part in parts:
        held = sum(weights[part.blocks.start : part.blocks.stop])
        held += weights[-1] if part is parts[-1] else 0
        MemoryBudget.measure(config, part.device).check_weights(found.source.name, held)
    if config.cache_packed:
        say("no packed form is kept: it is of whole models")
    return load_parts(found, parts, PackingRules(config.activations, config.lm_head))


def _load_whole(config: EngineConfig, device: torch.device) -> LoadedModel:
    return load_model(
        config.model,
        dtype=config.dtype,
        device="cpu" if device.type == "cpu" else "cuda",
        revision=config.revision,
        rules=PackingRules(config.activations, config.lm_head),
        budget=MemoryBudget.measure(config, device),
        cache_packed=config.cache_packed,
    )


def _load_undivided(
    config: EngineConfig, name: str, plan: FallbackPlan, gpu: torch.device
) -> LoadedModel:
    """Of a model that transformers' code runs, all layers or none can be on a GPU."""
    num_blocks = getattr(plan.config, "num_hidden_layers", None)
    asked = config.n_gpu_layers
    if isinstance(asked, int) and isinstance(num_blocks, int) and asked > num_blocks:
        return _load_whole(config, gpu)
    raise UnsupportedModel(
        f"{name} cannot be divided between a GPU and the CPU: transformers' code runs it "
        f"({plan.reason})",
        "use --n-gpu-layers all or 0",
    )


def load_parts(found: FoundModel, parts: Sequence[Stretch], rules: PackingRules) -> LoadedModel:
    """All blocks of a model, in their order, on the devices of `parts`."""
    assert isinstance(found.plan, NativePlan)
    with torch.inference_mode():
        built = found.plan.load_split(found.dtype, parts, rules)
    return found.loaded(built)


def divide(num_blocks: int, num_gpu_layers: int, gpu: torch.device) -> tuple[Stretch, ...]:
    """Of the devices that have any layer, the CPU first.

    >>> [part.blocks for part in divide(24, 5, torch.device("cuda"))]
    [range(0, 20), range(20, 24)]
    """
    first = max(num_blocks + 1 - num_gpu_layers, 0)
    if first == 0:
        return (Stretch(range(num_blocks), gpu),)
    if num_gpu_layers <= 0:
        return (Stretch(range(num_blocks), CPU),)
    return Stretch(range(first), CPU), Stretch(range(first, num_blocks), gpu)


def most_gpu_layers(sizes: Sequence[int], free_bytes: int) -> int:
    """How many of the last layers fit.

    >>> most_gpu_layers([10, 10, 10, 25], 46)
    3
    """
    taken = 0
    for count, size in enumerate(reversed(sizes)):
        taken += size
        if taken > free_bytes:
            return count
    return len(sizes)


def weight_bytes_by_layer(plan: NativePlan, dtype: torch.dtype) -> list[int]:
    """What each block and, last, the head with its norm take at the least, by the headers."""
    config = plan.config
    embedding = plan.architecture.hf_name("embed", None)
    names: list[list[str]] = [[] for _ in range(config.num_layers + 1)]
    for name in (*plan.reader.modules(), *plan.reader.tensor_names()):
        # "model.layers.12.mlp.up_proj.weight"
        number = next((int(word) for word in name.split(".") if word.isdigit()), None)
        is_embedding = name in (embedding, f"{embedding}.weight")
        if number is not None or config.tie_word_embeddings or not is_embedding:
            names[config.num_layers if number is None else number].append(name)
    return [least_bytes(plan.reader, each, dtype) for each in names]


def cache_bytes_by_layer(plan: NativePlan, config: EngineConfig, dtype: torch.dtype) -> list[int]:
    """Of the keys and values of the longest sequence in each block and, none, in the head."""
    trained = plan.config.max_position_embeddings
    longest = config.max_model_len or min(trained, AUTO_CONTEXT)
    specs = attention_specs(plan.config)
    each = [layer_bytes(spec, longest, config.kv_cache_dtype, dtype) for spec in specs]
    return [*each, 0]
