"""Which part of every weight a rank of a tensor-parallel group has, by the weight's role.

    column   its outputs are shared out: q, k, v by heads, gate and up by channels
    row      its inputs are: o by heads, down by channels; the ranks' products are added up
    vocab    embedding and head by tokens
    experts  whole experts, so that no packed block of theirs is cut
    whole    norms, routers, the narrow layers of latent attention

(Megatron-LM, https://arxiv.org/abs/1909.08053.) Ranks have equal numbers of query heads. With fewer
KV heads than ranks, several ranks keep the same one; the one KV head of latent attention is kept by
all. Channels are shared out in whole groups of down's inputs, so that a rank may have one group
more than another. Where the edge of a rank's heads lies inside a group of o's inputs, the group is
held as two (qtool.weight_parts).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qtool.arch import Architecture, QkNorm, Role
from qtool.convert.formats import Held, WeightReader
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.decoder_config import DecoderConfig
from qtool.errors import UsageError
from qtool.runtime.models.tensors import has
from qtool.weight_parts import WHOLE, Part

# Channels that kernels take at a time.
CHANNELS = 32
# A smaller group than this would take more memory for its scale than for its codes.
LEAST_GROUP = 16


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `size` ranks."""

    rank: int
    size: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, self

    def of(self, total: int, unit: int = 1) -> range:
        """This rank's run of `total`, in whole units, as even as they can be shared out.

        >>> [Shard(rank, 2).of(9 * 128, 128) for rank in range(2)]
        [range(0, 640), range(640, 1152)]
        """
        units = -(-total // unit)
        each, more = divmod(units, self.size)
        start = self.rank * each + min(self.rank, more)
        stop = start + each + (self.rank < more)
        return range(start * unit, min(stop * unit, total))


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """How one model is cut for one rank.

    config         of the whole model
    channel_unit   channels of the MLP that stay together
    shared_unit    the same of the expert that every token goes through
    """

    shard: Shard
    config: DecoderConfig
    channel_unit: int
    shared_unit: int

    @property
    def kv_copies(self) -> int:
        """Ranks that keep the same KV head."""
        return max(1, self.shard.size // self.config.num_kv_heads)

    @property
    def kv_heads(self) -> range:
        owner, copies = self.shard.rank // self.kv_copies, self.kv_copies
        return Shard(owner, self.shard.size // copies).of(self.config.num_kv_heads)

    @property
    def vocabulary(self) -> range:
        return self.shard.of(self.config.vocab_size)

    @property
    def channels(self) -> range:
        return self.shard.of(self.config.intermediate_size, self.channel_unit)

    @property
    def experts(self) -> range:
        count = 0 if self.config.experts is None else self.config.experts.count
        return self.shard.of(count)

    @property
    def local_config(self) -> DecoderConfig:
        """What this rank computes, as a decoder of its own. Experts are numbered as in the whole
        model, and tokens too.
        """
        config = self.config
        latent = config.latent is not None
        return dataclasses.replace(
            config,
            num_heads=config.num_heads // self.shard.size,
            num_kv_heads=1 if latent else len(self.kv_heads),
            intermediate_size=len(self.channels),
        )

    def part(self, role: Role) -> Part:
        """Of the weight [out, in] of a role that is not an expert's."""
        if role in ("embed", "head"):
            return Part(rows=(self.vocabulary,))
        find = _PARTS.get(role)
        return WHOLE if find is None else find(self)

    def vector(self, role: Role, norm: QkNorm | None) -> tuple[range, ...] | None:
        """Of a role's vector: gains of a norm over all heads are shared out as the heads are."""
        if norm == "all" and role in ("q_norm", "k_norm"):
            return self.part("q" if role == "q_norm" else "k").rows
        return None

    def holds_bias(self, role: Role) -> bool:
        """Whether this rank adds a linear's bias: of outputs that are added up, one rank does."""
        return self.shard.rank == 0 or self.part(role).columns is None

    def _heads(self, width: int) -> range:
        return _scaled(self.shard.of(self.config.num_heads), width)

    def _queries(self) -> range:
        latent = self.config.latent
        width = self.config.head_dim if latent is None else latent.nope + latent.rope
        return self._heads(width)

    def _attended(self) -> range:
        latent = self.config.latent
        return self._heads(self.config.head_dim if latent is None else latent.value)

    def _keys(self) -> range:
        return _scaled(self.kv_heads, self.config.head_dim)

    def _shared(self) -> range:
        experts = self.config.experts
        assert experts is not None
        return self.shard.of(experts.shared_size, self.shared_unit)

    def _up_projected(self) -> range:
        latent = self.config.latent
        assert latent is not None
        return self._heads(latent.nope + latent.value)

    def _fused_qkv(self) -> tuple[range, ...]:
        queries = self.config.num_heads * self.config.head_dim
        keys = self.config.num_kv_heads * self.config.head_dim
        own = self._keys()
        return self._queries(), _shifted(own, queries), _shifted(own, queries + keys)

    def _fused_gate_up(self) -> tuple[range, ...]:
        return self.channels, _shifted(self.channels, self.config.intermediate_size)


def _scaled(run: range, width: int) -> range:
    return range(run.start * width, run.stop * width)


def _shifted(run: range, by: int) -> range:
    return range(run.start + by, run.stop + by)


_PARTS: dict[Role, Callable[[ShardPlan], Part]] = {
    "q": lambda plan: Part(rows=(plan._queries(),)),
    "q_b": lambda plan: Part(rows=(plan._queries(),)),
    "k": lambda plan: Part(rows=(plan._keys(),)),
    "v": lambda plan: Part(rows=(plan._keys(),)),
    "qkv": lambda plan: Part(rows=plan._fused_qkv()),
    "kv_b": lambda plan: Part(rows=(plan._up_projected(),)),
    "o": lambda plan: Part(columns=plan._attended()),
    "gate": lambda plan: Part(rows=(plan.channels,)),
    "up": lambda plan: Part(rows=(plan.channels,)),
    "gate_up": lambda plan: Part(rows=plan._fused_gate_up()),
    "down": lambda plan: Part(columns=plan.channels),
    "shared_gate": lambda plan: Part(rows=(plan._shared(),)),
    "shared_up": lambda plan: Part(rows=(plan._shared(),)),
    "shared_down": lambda plan: Part(columns=plan._shared()),
}


def plan_shard(
    reader: WeightReader, architecture: Architecture, config: DecoderConfig, shard: Shard
) -> ShardPlan:
    """Decided from the headers of the files; UsageError where the model cannot be shared out so."""
    _check_heads(config, shard.size)
    holders = {
        role: [reader.describe(name) for name in _stored_names(reader, architecture, config, role)]
        for role in ("o", "down", "shared_down")
    }
    plan = ShardPlan(
        shard,
        config,
        _unit(config.intermediate_size, holders["down"]),
        _unit(config.experts.shared_size if config.experts else 0, holders["shared_down"]),
    )
    _check_channels("the MLP", config.intermediate_size, plan.channel_unit, holders["down"], shard)
    if config.experts is not None:
        count, shared = config.experts.count, config.experts.shared_size
        if count % shard.size:
            raise _refusal(f"{count} experts cannot be shared by {shard.size} ranks", count)
        held = holders["shared_down"]
        _check_channels("the shared expert", shared, plan.shared_unit, held, shard)
    _check_o(plan, holders["o"])
    return plan


def _check_heads(config: DecoderConfig, size: int) -> None:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % size:
        raise _refusal(f"{heads} attention heads cannot be shared by {size} ranks", heads)
    if config.latent is None and kv_heads % size and size % kv_heads:
        raise _refusal(
            f"{kv_heads} KV heads can be neither shared by {size} ranks nor kept by equal numbers "
            "of them",
            heads,
            also=lambda ranks: not (kv_heads % ranks and ranks % kv_heads),
        )
    if config.vocab_size < size:
        raise UsageError(f"{config.vocab_size} tokens cannot be shared by {size} ranks")


def _check_channels(
    what: str, channels: int, unit: int, held: Sequence[Held], shard: Shard
) -> None:
    groups = channels // unit
    if held and groups < shard.size:
        raise _refusal(
            f"{what} has {channels} channels, in groups of {unit} that cannot be cut: {groups} "
            f"for {shard.size} ranks",
            groups,
            upto=groups,
        )


def _check_o(plan: ShardPlan, held: Sequence[Held]) -> None:
    """Edges between the ranks' heads may lie inside a group of integers, not inside a block."""
    run = plan._attended()
    for one in held:
        group = group_of(one)
        least = group if one.kind in TENSOR_TYPES else min(group, LEAST_GROUP)
        if math.gcd(group, len(run)) < least:
            total = plan.config.num_heads
            raise _refusal(
                f"the attention's output has {len(run)} inputs a rank, which cut groups of {group} "
                f"({one.kind})",
                total,
                also=lambda ranks, group=group, least=least: (  # type: ignore[misc]
                    math.gcd(group, len(run) * plan.shard.size // ranks) >= least
                ),
            )


def _refusal(
    problem: str,
    total: int,
    *,
    also: Callable[[int], bool] = lambda ranks: True,
    upto: int | None = None,
) -> UsageError:
    if upto is not None:
        most = "1" if upto == 1 else f"{upto} or less"
        return UsageError(problem, f"use --tensor-parallel-size {most}")
    sizes = (ranks for ranks in range(1, total + 1) if total % ranks == 0 and also(ranks))
    return UsageError(
        problem, f"use --tensor-parallel-size {_listed([str(ranks) for ranks in sizes][:6])}"
    )


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _unit(channels: int, held: Sequence[Held]) -> int:
    """Channels that every one of these weights [out, channels] can be cut between."""
    base = CHANNELS if channels % CHANNELS == 0 else 1
    groups = (group_of(one) for one in held)
    return math.lcm(base, *(group for group in groups if channels % group == 0))


def group_of(held: Held) -> int:
    """Inputs that share a scale, 1 where no edge cuts anything: kinds are those of `Held`."""
    if held.scheme is not None:
        return held.scheme.group_size or 1
    if held.kind in TENSOR_TYPES:
        return TENSOR_TYPES[held.kind].block_size
    word = held.kind.partition(" ")[0].rpartition("-")[2]  # "fp8-128x128", "nf4-g64"
    size = word.rpartition("x")[2].removeprefix("g")
    return int(size) if size.isdigit() else 1


def _stored_names(
    reader: WeightReader, architecture: Architecture, config: DecoderConfig, role: Role
) -> list[str]:
    if role not in architecture.tensors:
        return []
    packed = set(reader.modules())
    modules = [
        architecture.hf_name(role, block)
        for block in range(config.num_layers)
        if has(config, role, block)
    ]
    return [name if name in packed else f"{name}.weight" for name in modules]
