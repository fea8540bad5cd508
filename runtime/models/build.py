"""Builds a decoder from a family's row, a config.json and a reader of weights.

Roles decide the wiring: a row with norms after a layer gets them there, one with a router gets
experts, one with kv_a latent attention. One block at a time is read, packed by the kernel that
`kernels.dispatch` chooses, and let go, so the peak is the packed model and one block. What was
chosen for which layer, and why, is counted.

One rank of several builds a decoder of its own from its part of every weight
(`runtime.parallel.shard`): fewer heads, channels, experts and tokens, and sums where the parts of
one product come together.

On several devices (`runtime.models.split`) each has a stretch of the blocks, the first looks tokens
up, and the last has the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.arch import Architecture, Role
from qtool.convert.formats import WeightReader
from qtool.decoder_config import DecoderConfig, ExpertsConfig, LatentConfig
from qtool.progress import bar
from qtool.rope import Rope
from qtool.runtime.layers import DEFAULT_RULES, PackingRules
from qtool.runtime.models.attention import LatentAttention, SelfAttention
from qtool.runtime.models.batched_experts import batch
from qtool.runtime.models.decoder import Block, Decoder, attention_specs
from qtool.runtime.models.kernel_use import KernelUse, count_uses
from qtool.runtime.models.layer_maker import LayerMaker
from qtool.runtime.models.layer_store import UNSTORED, LayerStore
from qtool.runtime.models.mlp import Mlp, SparseMlp
from qtool.runtime.models.parts import (
    ACTIVATIONS,
    GATED,
    AllHeadsNorm,
    HeadNorm,
    Norm,
    RmsNorm,
    Rotation,
)
from qtool.runtime.models.split import SplitDecoder, Stretch
from qtool.runtime.parallel.layers import Ranks


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """nbytes counts each weight once, however many layers share it."""

    decoder: Decoder | SplitDecoder
    kernels: tuple[KernelUse, ...]
    nbytes: int


def build_decoder(
    reader: WeightReader,
    architecture: Architecture,
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    rules: PackingRules = DEFAULT_RULES,
    ranks: Ranks | None = None,
    store: LayerStore = UNSTORED,
) -> Built:
    """Of weights that `tensors.check_tensors` has accepted; with `ranks`, this rank's part.

    store  where packed layers may lie already; it has whole layers, so not for ranks
    """
    assert ranks is None or store is UNSTORED
    local = config if ranks is None else ranks.plan.local_config
    maker = LayerMaker(reader, architecture, local, dtype, device, rules, ranks, store)
    whole = Stretch(range(config.num_layers), device)
    (decoder,) = _build(reader.source.name, architecture, local, [maker], [whole], ranks)
    return Built(decoder, count_uses(maker.uses), maker.nbytes)


def build_split(
    reader: WeightReader,
    architecture: Architecture,
    config: DecoderConfig,
    dtype: torch.dtype,
    stretches: Sequence[Stretch],
    rules: PackingRules = DEFAULT_RULES,
) -> Built:
    """The same on several devices: all blocks, in their order."""
    makers = [
        LayerMaker(reader, architecture, config, dtype, stretch.device, rules, None, UNSTORED)
        for stretch in stretches
    ]
    parts = _build(reader.source.name, architecture, config, makers, stretches, None)
    kernels = [
        dataclasses.replace(use, part=index)
        for index, maker in enumerate(makers)
        for use in count_uses(maker.uses)
    ]
    sizes = tuple(maker.nbytes for maker in makers)
    split = SplitDecoder(tuple(parts), tuple(stretches), sizes)
    return Built(split, tuple(kernels), sum(sizes))


def _build(
    name: str,
    architecture: Architecture,
    config: DecoderConfig,
    makers: Sequence[LayerMaker],
    stretches: Sequence[Stretch],
    ranks: Ranks | None,
) -> list[Decoder]:
    """A decoder for each stretch of blocks. All have the embedding and the head."""
    ropes = list(dict.fromkeys(layer.rope for layer in config.layers if layer.rope))
    embedding = makers[0].embedding()
    blocks: list[tuple[Block, ...]] = []
    with bar(f"loading {name}", config.num_layers) as progress:
        for maker, stretch in zip(makers, stretches, strict=True):
            wiring = _Wiring(maker, architecture, config, ropes, stretch.blocks.start, ranks)
            made = []
            for index in stretch.blocks:
                made.append(wiring.block(index))
                progress.advance()
            blocks.append(tuple(made))
    head = makers[-1].head(embedding)
    norm = makers[-1].norm("norm", None)
    assert norm is not None
    parts = []
    for stretch, own in zip(stretches, blocks, strict=True):
        layers = config.layers[stretch.blocks.start : stretch.blocks.stop]
        own_config = dataclasses.replace(config, layers=layers)
        decoder = Decoder(
            config=own_config,
            attention=attention_specs(own_config),
            embedding=embedding,
            rotations=tuple(
                Rotation.of(rope, config.rope_dim, config.max_position_embeddings, stretch.device)
                for rope in ropes
            ),
            blocks=own,
            norm=norm,
            head=head,
            device=stretch.device,
            ranks=ranks,
        )
        parts.append(decoder)
    return parts


class _Wiring:
    """Blocks from layers; first: the number of the block whose attention is layer 0."""

    def __init__(
        self,
        maker: LayerMaker,
        architecture: Architecture,
        config: DecoderConfig,
        ropes: Sequence[Rope],
        first: int,
        ranks: Ranks | None,
    ) -> None:
        self._make = maker
        self._architecture = architecture
        self._config = config
        self._ropes = ropes
        self._first = first
        self._ranks = ranks

    def block(self, index: int) -> Block:
        latent = self._config.latent
        return Block(
            attention_norm=self._make.norm("attn_norm", index),
            attention=self._attention(index) if latent is None else self._latent(index, latent),
            attention_post_norm=self._make.norm("attn_post_norm", index),
            mlp_norm=self._make.norm("mlp_norm", index),
            mlp=self._mlp(index),
            mlp_post_norm=self._make.norm("mlp_post_norm", index),
            residual_scale=self._config.residual_scale,
        )

    def _attention(self, index: int) -> SelfAttention:
        config = self._config
        rope = config.layers[index].rope
        return SelfAttention(
            layer=index - self._first,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv=self._make.linear(self._present(("qkv",), ("q", "k", "v")), index),
            qk_norm=self._qk_norm(index),
            turn=None if rope is None else self._ropes.index(rope),
            o=self._make.reduced("o", index),
        )

    def _qk_norm(self, index: int) -> Norm | None:
        config, kind = self._config, self._architecture.qk_norm
        if kind is None:
            return None
        q, k = self._make.gain("q_norm", index), self._make.gain("k_norm", index)
        if kind == "all" and self._ranks is not None:
            return self._ranks.heads_norm(q, k, config.norm_eps)
        if kind == "all":
            return AllHeadsNorm(q, k, config.norm_eps)
        gains = torch.cat((q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)))
        return HeadNorm(gains, config.norm_eps)

    def _latent(self, index: int, latent: LatentConfig) -> LatentAttention:
        config = self._config
        heads = config.num_heads
        rope = config.layers[index].rope
        assert rope is not None
        queries: Role = "q" if latent.query_rank is None else "q_b"
        first: Role = "q" if latent.query_rank is None else "q_a"
        orders = {queries: _query_rows(heads, latent), "kv_a": _latent_rows(latent)}
        if not latent.interleaved:
            orders = {}
        reason = "multiplied head by head, unpacked at load"
        up = self._make.unpacked("kv_b", index, reason).view(heads, -1, latent.rank)
        key_up, value_up = up.tensor_split((latent.nope,), dim=1)
        return LatentAttention(
            layer=index - self._first,
            num_heads=heads,
            nope=latent.nope,
            rank=latent.rank,
            narrow=self._make.linear((first, "kv_a"), index, orders=orders),
            narrow_query=latent.query_rank or heads * (latent.nope + latent.rope),
            q_norm=None if latent.query_rank is None else self._make.norm("q_a_norm", index),
            q=None
            if latent.query_rank is None
            else self._make.linear(("q_b",), index, orders=orders),
            kv_norm=RmsNorm(self._make.tensor("kv_a_norm", index), config.norm_eps),
            key_up=key_up.contiguous(),
            value_up=value_up.transpose(1, 2).contiguous(),
            turn=self._ropes.index(rope),
            o=self._make.reduced("o", index),
        )

    def _mlp(self, index: int) -> Mlp | SparseMlp:
        activation = self._config.activation
        if self._config.layers[index].sparse:
            assert self._config.experts is not None
            return self._sparse(index, self._config.experts)
        if "gate" not in self._architecture.tensors and "gate_up" not in self._architecture.tensors:
            return Mlp(
                self._make.linear(("up",), index),
                ACTIVATIONS[activation],
                self._make.reduced("down", index),
            )
        gate_up = self._present(("gate_up",), ("gate", "up"))
        return Mlp(
            self._make.linear(gate_up, index),
            GATED[activation],
            self._make.reduced("down", index),
        )

    def _sparse(self, index: int, experts: ExpertsConfig) -> SparseMlp:
        gated = GATED[self._config.activation]
        tensors = self._architecture.tensors
        own = range(experts.count) if self._ranks is None else self._ranks.plan.experts
        each: tuple[Mlp | None, ...] = tuple(
            Mlp(
                self._make.linear(("experts_gate", "experts_up"), index, expert),
                gated,
                self._make.linear(("experts_down",), index, expert),
            )
            if expert in own
            else None
            for expert in range(experts.count)
        )
        each, batched = batch(each)
        shared = None
        if experts.shared_size:
            gate_up = self._make.linear(("shared_gate", "shared_up"), index)
            shared = Mlp(gate_up, gated, self._make.linear(("shared_down",), index))
        return SparseMlp(
            config=experts,
            router=self._make.tensor("router", index, torch.float32),
            router_bias=self._make.tensor("router_bias", index, torch.float32)
            if "router_bias" in tensors
            else None,
            experts=each,
            shared=shared,
            shared_gate=self._make.tensor("shared_router", index)
            if shared is not None and "shared_router" in tensors
            else None,
            reduce=None if self._ranks is None else self._ranks.collective.all_reduce,
            batched=batched,
        )

    def _present(self, *choices: tuple[Role, ...]) -> tuple[Role, ...]:
        """The first of these ways to store a linear that the family has."""
        return next(roles for roles in choices if roles[0] in self._architecture.tensors)


def _halves(channels: int) -> list[int]:
    """Pairs side by side to pairs half apart: [0, 2, 4, 1, 3, 5]."""
    return [*range(0, channels, 2), *range(1, channels, 2)]


def _latent_rows(latent: LatentConfig) -> Tensor:
    """kv_a's rows, the rotated ones at the end reordered."""
    turned: Iterable[int] = (latent.rank + row for row in _halves(latent.rope))
    return torch.tensor([*range(latent.rank), *turned])


def _query_rows(heads: int, latent: LatentConfig) -> Tensor:
    """The queries' rows, the rotated ones at the end of each head reordered."""
    turned = [latent.nope + row for row in _halves(latent.rope)]
    one = torch.tensor([*range(latent.nope), *turned])
    width = latent.nope + latent.rope
    return (torch.arange(heads)[:, None] * width + one).flatten()
