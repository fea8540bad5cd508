"""Builds a decoder from a family's row, a config.json and a reader of weights.

Roles decide the wiring: a row with norms after a layer gets them there, one with a router gets
experts, one with kv_a latent attention. One block at a time is read, packed by the kernel that
`kernels.dispatch` chooses, and let go, so the peak is the packed model and one block. What was
chosen for which layer, and why, is counted.

One rank of several builds a decoder of its own from its part of every weight
(`runtime.parallel.shard`): fewer heads, channels, experts and tokens, and sums where the parts of
one product come together.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.arch import Architecture, Role
from qtool.convert.formats import WeightReader
from qtool.convert.partial import read_part
from qtool.decoder_config import DecoderConfig, ExpertsConfig, LatentConfig
from qtool.kernels.cpu import native_linear
from qtool.kernels.dispatch import describe
from qtool.progress import bar
from qtool.runtime.layers import (
    DEFAULT_RULES,
    Fused,
    Linear,
    Linears,
    PackingRules,
    pack,
    pack_head,
)
from qtool.runtime.models.attention import LatentAttention, SelfAttention
from qtool.runtime.models.batched_experts import batch
from qtool.runtime.models.decoder import Block, Decoder, attention_specs
from qtool.runtime.models.embedding import Embedding
from qtool.runtime.models.layer_store import UNSTORED, LayerStore, PackedLayer, Use
from qtool.runtime.models.mlp import Mlp, SparseMlp
from qtool.runtime.models.parts import (
    ACTIVATIONS,
    GATED,
    AllHeadsNorm,
    HeadNorm,
    LayerNorm,
    Norm,
    RmsNorm,
    Rotation,
    WideRmsNorm,
)
from qtool.runtime.parallel.layers import Ranks
from qtool.weight_parts import WHOLE, Part, take_runs
from qtool.weights import DenseWeight, Weight


@dataclass(frozen=True, slots=True)
class KernelUse:
    """`count` layers of one kind, stored one way, run by one kernel for one reason."""

    layer: str
    weight: str
    kernel: str
    reason: str
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """nbytes counts each weight once, however many layers share it."""

    decoder: Decoder
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
    return _Builder(reader, architecture, config, dtype, device, rules, ranks, store).build()


class _Builder:
    def __init__(
        self,
        reader: WeightReader,
        architecture: Architecture,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
        rules: PackingRules,
        ranks: Ranks | None,
        store: LayerStore,
    ) -> None:
        self._reader = reader
        self._store = store
        self._architecture = architecture
        self._ranks = ranks
        self._config = config if ranks is None else ranks.plan.local_config
        self._dtype = dtype
        self._device = device
        self._rules = rules
        self._ropes = list(dict.fromkeys(layer.rope for layer in config.layers if layer.rope))
        self._uses: Counter[Use] = Counter()
        self._nbytes = 0

    def build(self) -> Built:
        config = self._config
        embedding = self._embedding()
        blocks = []
        with bar(f"loading {self._reader.source.name}", config.num_layers) as progress:
            for index in range(config.num_layers):
                blocks.append(self._block(index))
                progress.advance()
        head = self._head(embedding)
        norm = self._norm("norm", None)
        assert norm is not None
        decoder = Decoder(
            config=config,
            attention=attention_specs(config),
            embedding=embedding,
            rotations=tuple(
                Rotation.of(rope, config.rope_dim, config.max_position_embeddings, self._device)
                for rope in self._ropes
            ),
            blocks=tuple(blocks),
            norm=norm,
            head=head if self._ranks is None else self._ranks.gathered(head),
            ranks=self._ranks,
        )
        if decoder.head_is_embedding:
            self._nbytes -= embedding.nbytes
        uses = tuple(KernelUse(*key, count) for key, count in self._uses.items())
        return Built(decoder, uses, self._nbytes)

    def _embedding(self) -> Embedding:
        module = self._architecture.hf_name("embed", None)
        weight = read_part(self._reader, module, self._part("embed"), stored=True)
        embedding = Embedding.of(weight, self._dtype, self._device)
        self._nbytes += embedding.nbytes
        return embedding

    def _head(self, embedding: Embedding) -> Linear:
        """Its own weight or the embedding's, as that is stored where it is packed."""
        native = any(use.kernel == "native_w4a8" for use in self._uses)
        made = self._made("head", lambda: self._packed_head(embedding, beside_native=native))
        assert isinstance(made, Linear)
        return made

    def _packed_head(self, embedding: Embedding, *, beside_native: bool) -> PackedLayer:
        tied = self._config.tie_word_embeddings
        role: Role = "embed" if tied else "head"
        module = self._architecture.hf_name(role, None)
        weight = self._stored(role, module)
        stored = describe(weight)
        if tied:
            stored = f"the embedding, {stored}"
            if isinstance(weight, DenseWeight) and embedding.values is not None:
                weight = DenseWeight(embedding.values)
        bias = self._bias("head", self._architecture.hf_name("head", None))
        layer, choice = pack_head(
            weight, bias, self._dtype, self._device, self._rules, beside_native=beside_native
        )
        return PackedLayer(layer, (Use("head", stored, choice.kernel.name, choice.reason),))

    def _block(self, index: int) -> Block:
        latent = self._config.latent
        return Block(
            attention_norm=self._norm("attn_norm", index),
            attention=self._attention(index) if latent is None else self._latent(index, latent),
            attention_post_norm=self._norm("attn_post_norm", index),
            mlp_norm=self._norm("mlp_norm", index),
            mlp=self._mlp(index),
            mlp_post_norm=self._norm("mlp_post_norm", index),
            residual_scale=self._config.residual_scale,
        )

    def _attention(self, index: int) -> SelfAttention:
        config = self._config
        rope = config.layers[index].rope
        return SelfAttention(
            layer=index,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv=self._linear(self._present(("qkv",), ("q", "k", "v")), index),
            qk_norm=self._qk_norm(index),
            turn=None if rope is None else self._ropes.index(rope),
            o=self._reduced(self._linear(("o",), index)),
        )

    def _qk_norm(self, index: int) -> Norm | None:
        config, kind = self._config, self._architecture.qk_norm
        if kind is None:
            return None
        q, k = self._gain("q_norm", index), self._gain("k_norm", index)
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
        up = read_part(self._reader, self._architecture.hf_name("kv_b", index), self._part("kv_b"))
        heads_up = up.dequantize(self._dtype).to(self._device).view(heads, -1, latent.rank)
        key_up, value_up = heads_up.tensor_split((latent.nope,), dim=1)
        self._nbytes += heads_up.nbytes
        reason = "multiplied head by head, unpacked at load"
        self._uses[Use("kv_b", describe(up), "dense", reason)] += 1
        return LatentAttention(
            layer=index,
            num_heads=heads,
            nope=latent.nope,
            rank=latent.rank,
            narrow=self._linear((first, "kv_a"), index, orders=orders),
            narrow_query=latent.query_rank or heads * (latent.nope + latent.rope),
            q_norm=None if latent.query_rank is None else self._norm("q_a_norm", index),
            q=None if latent.query_rank is None else self._linear(("q_b",), index, orders=orders),
            kv_norm=RmsNorm(self._tensor("kv_a_norm", index), config.norm_eps),
            key_up=key_up.contiguous(),
            value_up=value_up.transpose(1, 2).contiguous(),
            turn=self._ropes.index(rope),
            o=self._reduced(self._linear(("o",), index)),
        )

    def _mlp(self, index: int) -> Mlp | SparseMlp:
        activation = self._config.activation
        if self._config.layers[index].sparse:
            assert self._config.experts is not None
            return self._sparse(index, self._config.experts)
        if "gate" not in self._architecture.tensors and "gate_up" not in self._architecture.tensors:
            return Mlp(
                self._linear(("up",), index),
                ACTIVATIONS[activation],
                self._reduced(self._linear(("down",), index)),
            )
        gate_up = self._present(("gate_up",), ("gate", "up"))
        return Mlp(
            self._linear(gate_up, index),
            GATED[activation],
            self._reduced(self._linear(("down",), index)),
        )

    def _sparse(self, index: int, experts: ExpertsConfig) -> SparseMlp:
        gated = GATED[self._config.activation]
        tensors = self._architecture.tensors
        own = range(experts.count) if self._ranks is None else self._ranks.plan.experts
        each: tuple[Mlp | None, ...] = tuple(
            Mlp(
                self._linear(("experts_gate", "experts_up"), index, expert),
                gated,
                self._linear(("experts_down",), index, expert),
            )
            if expert in own
            else None
            for expert in range(experts.count)
        )
        each, batched = batch(each)
        shared = None
        if experts.shared_size:
            gate_up = self._linear(("shared_gate", "shared_up"), index)
            shared = Mlp(gate_up, gated, self._linear(("shared_down",), index))
        return SparseMlp(
            config=experts,
            router=self._tensor("router", index, torch.float32),
            router_bias=self._tensor("router_bias", index, torch.float32)
            if "router_bias" in tensors
            else None,
            experts=each,
            shared=shared,
            shared_gate=self._tensor("shared_router", index)
            if shared is not None and "shared_router" in tensors
            else None,
            reduce=None if self._ranks is None else self._ranks.collective.all_reduce,
            batched=batched,
        )

    def _present(self, *choices: tuple[Role, ...]) -> tuple[Role, ...]:
        """The first of these ways to store a linear that the family has."""
        return next(roles for roles in choices if roles[0] in self._architecture.tensors)

    def _norm(self, role: Role, index: int | None) -> Norm | None:
        if role not in self._architecture.tensors:
            return None
        eps = self._config.norm_eps
        gain = self._gain(role, index)
        if self._architecture.norm == "layer":
            bias = self._reader.tensor(f"{self._architecture.hf_name(role, index)}.bias")
            self._nbytes += bias.numel() * self._dtype.itemsize
            return LayerNorm(gain, bias.to(self._device, self._dtype).contiguous(), eps)
        return RmsNorm(gain, eps) if gain.dtype == self._dtype else WideRmsNorm(gain, eps)

    def _gain(self, role: Role, index: int | None) -> Tensor:
        """A norm's weight, with the family's offset in it: then in float32."""
        offset = self._architecture.norm_offset
        if not offset:
            return self._tensor(role, index)
        return self._tensor(role, index, torch.float32) + offset

    def _tensor(self, role: Role, index: int | None, dtype: torch.dtype | None = None) -> Tensor:
        name = self._architecture.hf_name(role, index)
        name = name if role == "router_bias" else f"{name}.weight"
        tensor = self._reader.tensor(name)
        if self._ranks is not None:
            runs = self._ranks.plan.vector(role, self._architecture.qk_norm)
            tensor = tensor if runs is None else take_runs(tensor, runs)
        tensor = tensor.to(self._device, dtype or self._dtype).contiguous()
        self._nbytes += tensor.nbytes
        return tensor

    def _linear(
        self,
        roles: Sequence[Role],
        index: int | None,
        expert: int | None = None,
        *,
        orders: dict[Role, Tensor] | None = None,
    ) -> Linear | Linears:
        """One packed layer of the roles' weights side by side, their rows in `orders`."""
        modules = [self._architecture.hf_name(role, index, expert) for role in roles]
        return self._made("+".join(modules), lambda: self._packed(roles, modules, orders or {}))

    def _packed(
        self, roles: Sequence[Role], modules: Sequence[str], orders: Mapping[Role, Tensor]
    ) -> PackedLayer:
        weights = [self._stored(*each) for each in zip(roles, modules, strict=True)]
        biases = [self._bias(*each) for each in zip(roles, modules, strict=True)]
        for place, role in enumerate(roles):
            order = orders.get(role)
            if order is not None:
                bias = biases[place]
                weights[place] = weights[place].rows(order)
                biases[place] = None if bias is None else bias[order]
        fused: Fused = pack(weights, biases, self._dtype, self._device, self._rules)
        uses = (
            Use(role, describe(weight), choice.kernel.name, choice.reason)
            for role, weight, choice in zip(roles, weights, fused.choices, strict=True)
        )
        return PackedLayer(fused.layer, tuple(uses))

    def _made(self, name: str, make: Callable[[], PackedLayer]) -> Linear | Linears:
        """From the store, and counted."""
        made = self._store.layer(name, make)
        self._nbytes += made.layer.nbytes
        self._uses.update(made.uses)
        return made.layer

    def _reduced(self, base: Linear | Linears) -> Linear | Linears:
        """A linear whose inputs the ranks share, as its whole product."""
        return base if self._ranks is None else self._ranks.reduced(base)

    def _part(self, role: Role) -> Part:
        return WHOLE if self._ranks is None else self._ranks.plan.part(role)

    def _stored(self, role: Role, module: str) -> Weight:
        """A weight in the form that is packed with the least work: GGUF's Q4_0 as its blocks for
        the kernel that takes them, and as codes for the others.
        """
        rounds = native_linear.refuses_any(self._dtype, self._device, self._rules.activations)
        return read_part(self._reader, module, self._part(role), stored=rounds is None)

    def _bias(self, role: Role, module: str) -> Tensor | None:
        name = f"{module}.bias"
        if not self._reader.has(name) or not (
            self._ranks is None or self._ranks.plan.holds_bias(role)
        ):
            return None
        bias, rows = self._reader.tensor(name), self._part(role).rows
        return bias if rows is None else take_runs(bias, rows)


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
