"""Makes a decoder's layers by role: reads a role's weight, packs it by the kernel that
`kernels.dispatch` chooses, and counts what was chosen and how many bytes it takes.

Linears that share an input become one. With `ranks`, of every weight this rank's part
(`runtime.parallel.shard`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qtool.arch import Architecture, Role
from qtool.convert.formats import WeightReader
from qtool.convert.partial import read_part
from qtool.decoder_config import DecoderConfig
from qtool.kernels.cpu import native_linear
from qtool.kernels.dispatch import describe
from qtool.runtime.layers import Fused, Linear, Linears, PackingRules, pack, pack_head
from qtool.runtime.models.embedding import Embedding
from qtool.runtime.models.kernel_use import Use
from qtool.runtime.models.layer_store import LayerStore, PackedLayer
from qtool.runtime.models.parts import LayerNorm, Norm, RmsNorm, WideRmsNorm
from qtool.runtime.parallel.layers import Ranks
from qtool.weight_parts import WHOLE, Part, take_runs
from qtool.weights import DenseWeight, Weight


class LayerMaker:
    """
    config  of what is computed here
    uses    of every weight so far, one after the other
    nbytes  of every layer so far, each counted once
    """

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
        self._architecture = architecture
        self._config = config
        self._dtype = dtype
        self._device = device
        self._rules = rules
        self._ranks = ranks
        self._store = store
        self.uses: list[Use] = []
        self.nbytes = 0

    def embedding(self) -> Embedding:
        module = self._architecture.hf_name("embed", None)
        weight = read_part(self._reader, module, self._part("embed"), stored=True)
        embedding = Embedding.of(weight, self._dtype, self._device)
        self.nbytes += embedding.nbytes
        return embedding

    def head(self, embedding: Embedding) -> Linear:
        """Its own weight or the embedding's, as that is stored where it is packed."""
        native = any(use.kernel == "native_w4a8" for use in self.uses)
        made = self._made("head", lambda: self._packed_head(embedding, beside_native=native))
        assert isinstance(made, Linear)
        if embedding.values is not None and made.shares(embedding.values):
            self.nbytes -= embedding.nbytes
        return made if self._ranks is None else self._ranks.gathered(made)

    def linear(
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

    def reduced(self, role: Role, index: int) -> Linear | Linears:
        """A linear whose inputs the ranks share, as its whole product."""
        base = self.linear((role,), index)
        return base if self._ranks is None else self._ranks.reduced(base)

    def unpacked(self, role: Role, index: int, reason: str) -> Tensor:
        """A weight [out, in] that no kernel multiplies by as it is stored."""
        weight = read_part(self._reader, self._architecture.hf_name(role, index), self._part(role))
        values = weight.dequantize(self._dtype).to(self._device)
        self.nbytes += values.nbytes
        self.uses.append(Use(role, describe(weight), "dense", reason))
        return values

    def norm(self, role: Role, index: int | None) -> Norm | None:
        """None where the family has none."""
        if role not in self._architecture.tensors:
            return None
        eps = self._config.norm_eps
        gain = self.gain(role, index)
        if self._architecture.norm == "layer":
            bias = self._reader.tensor(f"{self._architecture.hf_name(role, index)}.bias")
            self.nbytes += bias.numel() * self._dtype.itemsize
            return LayerNorm(gain, bias.to(self._device, self._dtype).contiguous(), eps)
        return RmsNorm(gain, eps) if gain.dtype == self._dtype else WideRmsNorm(gain, eps)

    def gain(self, role: Role, index: int | None) -> Tensor:
        """A norm's weight, with the family's offset in it: then in float32."""
        offset = self._architecture.norm_offset
        if not offset:
            return self.tensor(role, index)
        return self.tensor(role, index, torch.float32) + offset

    def tensor(self, role: Role, index: int | None, dtype: torch.dtype | None = None) -> Tensor:
        """A role's weight as it is, in `dtype` or the decoder's."""
        name = self._architecture.hf_name(role, index)
        name = name if role == "router_bias" else f"{name}.weight"
        tensor = self._reader.tensor(name)
        if self._ranks is not None:
            runs = self._ranks.plan.vector(role, self._architecture.qk_norm)
            tensor = tensor if runs is None else take_runs(tensor, runs)
        tensor = tensor.to(self._device, dtype or self._dtype).contiguous()
        self.nbytes += tensor.nbytes
        return tensor

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
        self.nbytes += made.layer.nbytes
        self.uses.extend(made.uses)
        return made.layer

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
