"""How much memory a model and its KV cache may take, decided before either is allocated.

    CPU   pool = utilization x memory free at the start - weights - one step's logits
    GPU   pool = utilization x the device's memory - what is in use - what the largest step takes,
                 measured (`runtime.engine.step_memory`) - one step's logits

or exactly `kv_cache_memory_bytes`, or, when the user says neither, a share of what is free once the
weights are there. What a draft model takes counts with the model's own. Free memory on Linux is
what can be had without swapping (the page cache counts as free), within the limit of the control
group that a container sets.

A model too large for that is refused from the headers of its files. What they say is the least that
the weights will take: types that no kernel multiplies by packed are unpacked when they are read.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from qtool.convert.formats import Held, WeightReader
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.errors import QtoolError, UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.kv_pool import block_bytes
from qtool.runtime.engine.scheduler import PROMPT_ROWS
from qtool.runtime.models.model import Model
from qtool.units import size_text

# Of the memory that is free once the weights are loaded, what the pool takes when nobody says.
CPU_SHARE = 0.25
CUDA_SHARE = 0.85
# Copies of the logits drawn from that exist at once: the model's, scaled, as probabilities.
LOGITS_COPIES = 3
# And of the rows that judge a prompt: the model's, as log-probabilities.
PROMPT_LOGITS_COPIES = 2
FLOATS = ("float16", "bfloat16", "float32", "float64")
# Of packed kinds that name no scheme, the narrowest are four bits wide.
LEAST_PACKED_BYTES = 0.5


class NotEnoughMemory(QtoolError):
    """A model and its cache that are larger than the memory they may have."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What may be taken, of what there is.

    total_bytes     of what `utilization` is a share: memory free before the model was loaded, or
                    all of a GPU's
    used_bytes      of it, in use already (a GPU's other users; the weights once they are loaded)
    device          "cpu" or "cuda"
    utilization     share of total_bytes for everything together; None: nobody said
    kv_cache_bytes  for the cache alone, exactly; None: what is left
    num_ranks       that share the model out: on a CPU they take of this same memory, on GPUs each
                    has its own, and this is one of them
    """

    total_bytes: int
    used_bytes: int
    device: str
    utilization: float | None = None
    kv_cache_bytes: int | None = None
    num_ranks: int = 1

    @property
    def ranks_here(self) -> int:
        """Ranks whose weights and cache are in this memory."""
        return self.num_ranks if self.device == "cpu" else 1

    @classmethod
    def measure(
        cls, config: EngineConfig, device: torch.device, *, weight_bytes: int = 0
    ) -> "MemoryBudget":
        """weight_bytes  of a model that is loaded already"""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            used = total - free
        else:
            total, used = free_ram() + weight_bytes, weight_bytes
        return cls(
            total,
            used,
            device.type,
            config.gpu_memory_utilization,
            config.kv_cache_memory_bytes,
            config.tensor_parallel_size,
        )

    @property
    def usable_bytes(self) -> int:
        """For everything together, what is in use included."""
        return int(self.total_bytes * (1.0 if self.utilization is None else self.utilization))

    def check_weights(self, name: str, weight_bytes: int) -> None:
        """Raise NotEnoughMemory unless weights of this size, all ranks' together, leave room for
        the cache asked for.
        """
        weight_bytes = weight_bytes * self.ranks_here // self.num_ranks
        cache = self.kv_cache_bytes or 0
        if self.used_bytes + weight_bytes + cache <= self.usable_bytes:
            return
        parts = [f"its weights take at least {size_text(weight_bytes)}"]
        if cache:
            parts.append(f"the KV cache {size_text(cache)} as asked")
        if self.used_bytes:
            parts.append(f"{size_text(self.used_bytes)} are in use")
        raise NotEnoughMemory(
            f"{name} does not fit into memory: {', '.join(parts)}; {self._usable()}",
            hint="use a format with fewer bits (qtool quantize), a smaller model, or a machine "
            "with more memory"
            + ("" if self.utilization is None else "; or raise --gpu-memory-utilization"),
        )

    def pool_bytes(self, logits_bytes: int) -> int:
        """What the KV pool may take, the weights being loaded (they are in used_bytes)."""
        if self.kv_cache_bytes is not None:
            return self.kv_cache_bytes
        return max(self.free_share - (0 if self.utilization is None else logits_bytes), 0)

    @property
    def free_share(self) -> int:
        """Of what is free, what may be taken."""
        if self.utilization is None:
            free = self.total_bytes - self.used_bytes
            return int(free * (CUDA_SHARE if self.device == "cuda" else CPU_SHARE))
        return self.usable_bytes - self.used_bytes

    def arithmetic(self, logits_bytes: int) -> str:
        """Where `pool_bytes` comes from."""
        if self.kv_cache_bytes is not None:
            return "as asked"
        if self.utilization is None:
            share = CUDA_SHARE if self.device == "cuda" else CPU_SHARE
            return f"{share:g} of {size_text(self.total_bytes - self.used_bytes)} free"
        return (
            f"{self._usable()}, less {size_text(self.used_bytes)} in use and "
            f"{size_text(logits_bytes)} for a step's logits"
        )

    def _usable(self) -> str:
        what = "of the GPU" if self.device == "cuda" else "free at the start"
        if self.utilization is None:
            return f"there are {size_text(self.total_bytes)} {what}"
        return (
            f"{self.utilization:g} x {size_text(self.total_bytes)} {what} = "
            f"{size_text(self.usable_bytes)} may be used"
        )


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The pool that was decided on, and the longest sequence that it lets run."""

    num_blocks: int
    max_model_len: int


def step_logits_bytes(config: EngineConfig, model: Model, draft: Model | None = None) -> int:
    """What the logits of a step take at the most, in float32.

    rows drawn from   one a sequence, and one for each guess
    rows that judge   of prompts whose log-probabilities are asked for: PROMPT_ROWS
    """
    guesses = config.speculative_config
    tokens = config.max_num_seqs * (1 + (guesses.num_speculative_tokens if guesses else 0))
    drawn = max(config.max_num_seqs, min(tokens, config.max_num_batched_tokens))
    rows = LOGITS_COPIES * drawn + PROMPT_LOGITS_COPIES * PROMPT_ROWS[model.device.type]
    guessing = 0 if draft is None else LOGITS_COPIES * config.max_num_seqs * draft.vocab_size
    return 4 * (rows * model.vocab_size + guessing)


def plan_pool(
    config: EngineConfig,
    model: Model,
    max_position_embeddings: int,
    budget: MemoryBudget,
    draft: Model | None = None,
) -> PoolPlan:
    """Within memory and, unless its size was asked for, within what can ever be used.

    draft  a model that guesses: each block of the pool has one of its own beside it
    """
    own = block_bytes(model, config.block_size, config.kv_cache_dtype)
    each = own * budget.ranks_here
    if draft is not None:
        each += block_bytes(draft, config.block_size)
    logits_bytes = step_logits_bytes(config, model, draft)
    affordable = budget.pool_bytes(logits_bytes) // each
    if affordable < 1:
        raise UsageError(
            f"the KV cache may take {budget.pool_bytes(logits_bytes):,} bytes "
            f"({budget.arithmetic(logits_bytes)}), and one block of {config.block_size} tokens "
            f"takes {each:,}" + ("" if draft is None else " with the draft model's"),
            hint="give it more memory (--kv-cache-memory-bytes), or use smaller blocks",
        )
    max_model_len = choose_max_model_len(
        config.max_model_len, max_position_embeddings, affordable * config.block_size
    )
    useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    exact = config.kv_cache_memory_bytes is not None
    return PoolPlan(affordable if exact else min(affordable, useful), max_model_len)


def choose_max_model_len(asked: int | None, trained: int, pool_tokens: int) -> int:
    """The longest sequence: as asked, or what the model was made for and the pool can hold."""
    if asked is None:
        return min(trained, pool_tokens)
    if asked > trained:
        raise UsageError(
            f"max_model_len is {asked}, and the model was made for {trained} tokens",
            hint=f"use --max-model-len {trained} or less",
        )
    if asked > pool_tokens:
        raise UsageError(
            f"max_model_len is {asked}, and the KV cache has room for {pool_tokens} tokens",
            hint=f"use --max-model-len {pool_tokens}, or give the cache more memory "
            "(--kv-cache-memory-bytes)",
        )
    return asked


def least_weight_bytes(reader: WeightReader, dtype: torch.dtype) -> int:
    """What a model's weights take at the least, by the headers of its files."""
    return least_bytes(reader, (*reader.modules(), *reader.tensor_names()), dtype)


def least_bytes(reader: WeightReader, names: Iterable[str], dtype: torch.dtype) -> int:
    """The same of some of its tensors."""
    return sum(int(_held_bytes(reader.describe(name), dtype)) for name in names)


def _held_bytes(held: Held, dtype: torch.dtype) -> float:
    numel = math.prod(held.shape)
    if held.kind in FLOATS:
        return numel * dtype.itemsize
    if held.is_plain:
        dtype = getattr(torch, held.kind)
        return float(numel * dtype.itemsize)
    if held.scheme is not None:
        return numel * held.scheme.bits / 8
    if held.kind in TENSOR_TYPES:
        return numel * TENSOR_TYPES[held.kind].bits_per_weight / 8
    return numel * LEAST_PACKED_BYTES


def free_ram(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping, on the machine and in this control group.

    root  where /proc and /sys are
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # Not Linux: half of what is built in.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    left = _left_in_group(root / "sys/fs/cgroup")
    return free if left is None else min(free, left)


# Limit, use and statistics of a control group, and what its file cache is called: version 2, 1.
GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", ("active_file", "inactive_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_active_file", "total_inactive_file"),
    ),
)


def _left_in_group(group: Path) -> int | None:
    """Bytes until the limit of a container's control group; None: there is none."""
    for limit_file, used_file, stat_file, reclaimable in GROUP_FILES:
        try:
            limit = int((group / limit_file).read_text(encoding="ascii"))
            used = int((group / used_file).read_text(encoding="ascii"))
            lines = (group / stat_file).read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            continue  # not this version, or "max"
        stat = dict(line.split() for line in lines)
        return max(limit - used + sum(int(stat.get(name, 0)) for name in reclaimable), 0)
    return None
