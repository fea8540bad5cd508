"""Which code runs a model, decided from its headers: the native decoder, or transformers' own.

The native decoder has the families of `qtool.arch`; a config of one of them that says something it
does not compute is run by transformers, with that as the reason. What neither runs is refused. Of a
multimodal model the part that writes text is run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qtool.arch import Architecture, find_architecture
from qtool.convert.formats import WeightReader
from qtool.decoder_config import DecoderConfig
from qtool.errors import UnsupportedModel
from qtool.runtime.layers import DEFAULT_RULES, PackingRules
from qtool.runtime.models.build import Built, build_decoder, build_split
from qtool.runtime.models.kernel_use import KernelUse
from qtool.runtime.models.layer_store import UNSTORED, LayerStore
from qtool.runtime.models.model import Model
from qtool.runtime.models.split import Stretch
from qtool.runtime.models.tensors import check_tensors
from qtool.runtime.models.text_part import text_part
from qtool.runtime.parallel.layers import Ranks
from qtool.runtime.parallel.shard import Shard, ShardPlan, plan_shard

Code = Literal["native", "transformers"]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedDecoder:
    """code: which of the two runs it, and `code_reason` why not the native one, or ""."""

    model: Model
    code: Code
    code_reason: str
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    kernels: tuple[KernelUse, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class NativePlan:
    reader: WeightReader
    architecture: Architecture
    config: DecoderConfig

    def shard(self, shard: Shard) -> ShardPlan:
        """What one of several ranks has of it; UsageError where it cannot be shared out so."""
        return plan_shard(self.reader, self.architecture, self.config, shard)

    def load(
        self,
        dtype: torch.dtype,
        device: torch.device,
        rules: PackingRules = DEFAULT_RULES,
        ranks: Ranks | None = None,
        store: LayerStore = UNSTORED,
    ) -> LoadedDecoder:
        """With `ranks`, the part of one of them; `store` may have packed layers already."""
        built = build_decoder(
            self.reader, self.architecture, self.config, dtype, device, rules, ranks, store
        )
        return self._loaded(built)

    def load_split(
        self, dtype: torch.dtype, stretches: Sequence[Stretch], rules: PackingRules = DEFAULT_RULES
    ) -> LoadedDecoder:
        """On several devices: all blocks, in their order."""
        return self._loaded(
            build_split(self.reader, self.architecture, self.config, dtype, stretches, rules)
        )

    def _loaded(self, built: Built) -> LoadedDecoder:
        return LoadedDecoder(
            model=built.decoder,
            code="native",
            code_reason="",
            max_position_embeddings=self.config.max_position_embeddings,
            eos_token_ids=self.config.eos_token_ids,
            kernels=built.kernels,
            nbytes=built.nbytes,
        )


@dataclass(frozen=True, slots=True, eq=False)
class FallbackPlan:
    """config is transformers' own of the family."""

    reader: WeightReader
    config: Any
    reason: str

    def shard(self, shard: Shard) -> ShardPlan:
        family = self.config.model_type
        raise UnsupportedModel(
            f"{family} cannot be shared by {shard.size} ranks: transformers' code runs it "
            f"({self.reason})",
            "use --tensor-parallel-size 1, or a family of the native decoder "
            "(qtool serve --list-models)",
        )

    def load(
        self,
        dtype: torch.dtype,
        device: torch.device,
        rules: PackingRules = DEFAULT_RULES,
        ranks: Ranks | None = None,
    ) -> LoadedDecoder:
        assert ranks is None, "shard() refuses"
        from qtool.runtime.models.fallback import load_fallback

        loaded = load_fallback(self.reader, self.config, dtype, device, rules)
        blocks = str(dtype).removeprefix("torch.")
        use = KernelUse("blocks", blocks, "transformers", self.reason, len(loaded.model.attention))
        return LoadedDecoder(
            model=loaded.model,
            code="transformers",
            code_reason=self.reason,
            max_position_embeddings=loaded.max_position_embeddings,
            eos_token_ids=loaded.eos_token_ids,
            kernels=(use, *loaded.kernels),
            nbytes=loaded.nbytes,
        )


def plan_decoder(reader: WeightReader) -> NativePlan | FallbackPlan:
    """Raises UnsupportedModel for a family that neither code runs, FormatError for tensors that are
    missing or of another shape.
    """
    part = text_part(reader)
    text = reader if part is None else part
    try:
        architecture = find_architecture(text.config)
        config = DecoderConfig.from_hf(text.config)
    except UnsupportedModel as refusal:
        # Loads transformers' table of families, which takes a second.
        from qtool.runtime.models.fallback import read_config

        if part is not None:
            try:
                return FallbackPlan(part, read_config(part), refusal.message)
            except UnsupportedModel:
                pass  # its text part is no model by itself, the whole may be
        return FallbackPlan(reader, read_config(reader), refusal.message)
    check_tensors(text, architecture, config)
    return NativePlan(text, architecture, config)


def model_dtype(config: dict[str, Any]) -> str:
    """The type that config.json names, its text part's where it is multimodal."""
    inner = config.get("text_config")
    parts = [config, inner] if isinstance(inner, dict) else [config]
    found = (part.get("dtype") or part.get("torch_dtype") for part in parts)
    return str(next((dtype for dtype in found if dtype), "float32"))
