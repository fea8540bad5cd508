"""Loads a model that several ranks share, with this process as rank 0.

What can be known beforehand is checked before a process is started or a weight is read: that the
machine has what the ranks need, that the memory does, and that the model can be shared out so.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from qtool.runtime.config import EngineConfig
from qtool.runtime.layers import PackingRules
from qtool.runtime.loading import FoundModel, LoadedModel, choose_device, find_model
from qtool.runtime.memory import MemoryBudget
from qtool.runtime.parallel.layers import Ranks
from qtool.runtime.parallel.members import Errand
from qtool.runtime.parallel.process_group import Backend, backend_here
from qtool.runtime.parallel.shard import Shard, ShardPlan
from qtool.runtime.parallel.team import Team


def load_together(config: EngineConfig) -> LoadedModel:
    """Raises what `load_model` raises, and UsageError where the ranks cannot be had."""
    size, device = config.tensor_parallel_size, choose_device(config.device)
    backend = backend_here(device, size)
    found = find_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        revision=config.revision,
        budget=MemoryBudget.measure(config, device),
    )
    plan = found.plan.shard(Shard(0, size))
    given = _give_threads(device, size)
    num_threads = torch.get_num_threads()
    team = Team.start(
        size,
        lambda rank, meeting: _errand(config, found, rank, meeting, backend, num_threads),
        at_end=lambda: _take_threads_back(given),
        timeout_seconds=config.distributed_timeout_seconds,
    )
    try:
        return _loaded(config, found, plan, team, backend)
    except BaseException:
        team.stop()
        raise


def _loaded(
    config: EngineConfig, found: FoundModel, plan: ShardPlan, team: Team, backend: Backend
) -> LoadedModel:
    ranks = Ranks(plan, team.meet(backend))
    rules = PackingRules(config.activations, config.lm_head)
    with torch.inference_mode():
        own = found.loaded(found.plan.load(found.dtype, found.device, rules, ranks))
    team.wait_until_loaded(own.nbytes)
    return dataclasses.replace(own, nbytes=sum(team.weight_bytes), team=team)


def _errand(
    config: EngineConfig,
    found: FoundModel,
    rank: int,
    meeting: Path,
    backend: Backend,
    num_threads: int,
) -> Errand:
    device = found.device.type
    return Errand(
        model=str(found.source.path),
        dtype=str(found.dtype).removeprefix("torch."),
        device=f"cuda:{rank}" if device == "cuda" else device,
        activations=config.activations,
        lm_head=config.lm_head,
        rank=rank,
        size=config.tensor_parallel_size,
        meeting=str(meeting),
        backend=backend,
        num_threads=num_threads,
        timeout_seconds=config.distributed_timeout_seconds,
    )


def _give_threads(device: torch.device, size: int) -> int:
    """On a CPU the ranks divide the threads that this process had for itself: how many fewer it
    has until they end, or every model that is loaded would have fewer than the one before.
    """
    if device.type != "cpu":
        return 0
    before = _threads_of_process()
    num_threads = max(1, before // size)
    torch.set_num_threads(num_threads)
    return before - num_threads


def _take_threads_back(given: int) -> None:
    if given:
        torch.set_num_threads(_threads_of_process() + given)


def _threads_of_process() -> int:
    """What a new thread computes with; one that has computed before keeps what it had then."""
    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(torch.get_num_threads).result()
