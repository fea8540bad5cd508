"""From a model's name to a decoder that is ready to run, and the record of what was decided.

Everything is checked against the file's headers before the first weight is read: family, config,
the presence and shape of every tensor. What was chosen for which layer, and why, is kept in
`LoadedModel.kernels` and printed by whoever starts a server; nothing falls back silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import Tensor

from qtool.convert.formats import WeightReader, open_weights
from qtool.convert.partial import MappedReader
from qtool.errors import UnknownName, UsageError
from qtool.kernels.cpu.native import measure_bandwidth
from qtool.runtime.config import Device, Dtype, EngineConfig
from qtool.runtime.layers import DEFAULT_RULES, PackingRules
from qtool.runtime.memory import MemoryBudget, least_weight_bytes
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.models.kernel_use import KernelUse
from qtool.runtime.models.load import (
    Code,
    FallbackPlan,
    LoadedDecoder,
    NativePlan,
    model_dtype,
    plan_decoder,
)
from qtool.runtime.models.model import Model, causal_logits
from qtool.runtime.models.native import why_not
from qtool.runtime.models.split import SplitDecoder
from qtool.runtime.models.triton_decoder import why_not as why_not_fused
from qtool.runtime.packed_cache import packed_store, say
from qtool.runtime.tokenizer import Tokenizer
from qtool.source import Source, resolve

if TYPE_CHECKING:
    from qtool.runtime.parallel.team import Team

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in memory. `tokenizer` is None where the source has none.

    nbytes  of all ranks' weights together
    team    the ranks that it is shared out among; None: it is here as a whole
    """

    source: Source
    decoder: Model
    code: Code
    model_type: str
    max_position_embeddings: int
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    dtype_reason: str
    device: torch.device
    format: str
    kernels: tuple[KernelUse, ...]
    nbytes: int
    team: Team | None = None

    @property
    def num_ranks(self) -> int:
        return 1 if self.team is None else self.team.size

    def close(self) -> None:
        """End the other ranks, if there are any."""
        if self.team is not None:
            self.team.stop()

    def logits(self, tokens: Tensor) -> Tensor:
        """Independent sequences [batch, tokens] int64 -> float32 [batch, tokens, vocab]."""
        if self.team is None:
            return causal_logits(self.decoder, tokens)
        with self.team.full_pass(tokens, logits=True):
            return causal_logits(self.decoder, tokens)

    def kernel_table(self) -> Table:
        """The start-up table: which kernel runs which layers, and why."""
        table = Table("layers", "stored as", "kernel", "count", "because", title=self._title())
        alike: dict[tuple[int, str, str, str], list[KernelUse]] = {}
        for use in self.kernels:
            alike.setdefault((use.part, use.weight, use.kernel, use.reason), []).append(use)
        for (part, weight, kernel, reason), uses in alike.items():
            count = sum(use.count for use in uses)
            layers = " ".join(use.layer for use in uses)
            table.add_row(f"{layers}{self._place(part)}", weight, kernel, str(count), reason)
        for index, decoder in enumerate(self._decoders):
            way, reason = _way_of(decoder)
            blocks = f"blocks{self._place(index)}"
            table.add_row(blocks, "", way, str(len(decoder.blocks)), reason)
        return table

    @property
    def _decoders(self) -> tuple[Decoder, ...]:
        """One a device; none of transformers' code."""
        if isinstance(self.decoder, SplitDecoder):
            return self.decoder.parts
        return (self.decoder,) if isinstance(self.decoder, Decoder) else ()

    def _place(self, part: int) -> str:
        """Where a part of a model on several devices is."""
        return f" ({self.decoder.place(part)})" if isinstance(self.decoder, SplitDecoder) else ""

    @property
    def token_bytes(self) -> int:
        """What decoding reads for a token: all weights but rows that are looked up."""
        decoder = self.decoder
        looked_up = decoder.looked_up_bytes if isinstance(decoder, Decoder | SplitDecoder) else 0
        return self.nbytes - looked_up * self.num_ranks

    def expected_speed(self) -> str:
        """What a token reads, and how often this machine's memory gives that in a second."""
        read = self.token_bytes
        if isinstance(self.decoder, SplitDecoder):
            places = enumerate(self.decoder.part_bytes)
            parts = (f"{held / 1e6:,.0f} MB {self.decoder.place(part)}" for part, held in places)
            return f"weights: {', '.join(parts)}"
        bandwidth = measure_bandwidth() if self.device.type == "cpu" else None
        if bandwidth is None:
            return f"a token reads {read / 1e6:,.0f} MB"
        return (
            f"a token reads {read / 1e6:,.0f} MB, memory gives {bandwidth / 1e9:.0f} GB/s: "
            f"at most {bandwidth / read:,.0f} tokens/s alone"
        )

    def _title(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        ranks = "" if self.team is None else f" in {self.num_ranks} ranks"
        return (
            f"{self.source.short_name}: {self.model_type}, {self.format}, "
            f"{self.nbytes / 1e6:,.1f} MB{ranks}, {name} on {self.device.type} "
            f"({self.dtype_reason})"
        )


def _way_of(decoder: Decoder) -> tuple[str, str]:
    """How a decoder's blocks are run, and why so."""
    if decoder.device.type == "cuda":
        obstacle, one = why_not_fused(decoder), "fused"
        reason = obstacle or "all operations of a step have Triton kernels"
    else:
        obstacle, one = why_not(decoder), "one call"
        reason = obstacle or "all operations of a step are in the library"
    return (one if obstacle is None else "one by one"), reason


def load_for(config: EngineConfig) -> LoadedModel:
    """Load the model that an engine is to run, if it fits into the memory that it may have."""
    if config.tensor_parallel_size > 1:
        from qtool.runtime.parallel.loading import load_together

        return load_together(config)
    if config.divides_layers:
        from qtool.runtime.offload import load_offloaded

        return load_offloaded(config)
    return load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        revision=config.revision,
        rules=PackingRules(config.activations, config.lm_head),
        budget=MemoryBudget.measure(config, choose_device(config.device)),
        cache_packed=config.cache_packed,
    )


def load_model(
    model: str,
    *,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: str | None = None,
    rules: PackingRules = DEFAULT_RULES,
    budget: MemoryBudget | None = None,
    cache_packed: bool = False,
) -> LoadedModel:
    """Load any model this tool writes or reads: a folder, a GGUF file, builtin:NAME or a Hub id.

    rules         how quantized layers and the head are packed
    budget        what the weights have to fit into; None: that is the caller's affair
    cache_packed  keep the packed form in a file beside the model, and map what was kept
    """
    found = find_model(model, dtype=dtype, device=device, revision=revision, budget=budget)
    with torch.inference_mode():
        return found.loaded(found.load(rules, cache_packed=cache_packed))


@dataclass(frozen=True, slots=True, eq=False)
class FoundModel:
    """What is known of a model before its weights are read; see `LoadedModel`."""

    source: Source
    reader: WeightReader
    plan: NativePlan | FallbackPlan
    dtype: torch.dtype
    dtype_reason: str
    device: torch.device

    def load(self, rules: PackingRules, *, cache_packed: bool) -> LoadedDecoder:
        built = self._load(rules, cache_packed=cache_packed)
        if isinstance(self.reader, MappedReader):
            self.reader.release()
        return built

    def _load(self, rules: PackingRules, *, cache_packed: bool) -> LoadedDecoder:
        plan = self.plan
        if not cache_packed:
            return plan.load(self.dtype, self.device, rules)
        if isinstance(plan, FallbackPlan):
            say(f"no packed form is kept: transformers' code runs the model ({plan.reason})")
            return plan.load(self.dtype, self.device, rules)
        with packed_store(self.reader, self.dtype, self.device, rules) as store:
            return plan.load(self.dtype, self.device, rules, store=store)

    def loaded(self, built: LoadedDecoder) -> LoadedModel:
        tokenizer = Tokenizer.load(self.source, self.reader)
        eos = () if tokenizer is None else tokenizer.eos_token_ids
        return LoadedModel(
            source=self.source,
            decoder=built.model,
            code=built.code,
            model_type=str(self.reader.config["model_type"]),
            max_position_embeddings=built.max_position_embeddings,
            tokenizer=tokenizer,
            eos_token_ids=tuple(dict.fromkeys((*built.eos_token_ids, *eos))),
            dtype=self.dtype,
            dtype_reason=self.dtype_reason,
            device=self.device,
            format=self.reader.format,
            kernels=built.kernels,
            nbytes=built.nbytes,
        )


def find_model(
    model: str, *, dtype: Dtype, device: Device, revision: str | None, budget: MemoryBudget | None
) -> FoundModel:
    """Everything that can be wrong is found here, by the headers of the files."""
    source = resolve(model, revision)
    reader = open_weights(source)
    plan = plan_decoder(reader)
    where = choose_device(device)
    chosen, reason = choose_dtype(dtype, model_dtype(reader.config), where)
    if budget is not None:
        budget.check_weights(source.name, least_weight_bytes(reader, chosen))
    return FoundModel(source, reader, plan, chosen, reason, where)


def choose_device(device: Device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device is cuda, and this PyTorch finds no CUDA device",
            hint="use --device cpu, or install a CUDA build of torch",
        )
    return torch.device(device)


def choose_dtype(dtype: Dtype, model_dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type of activations and unquantized weights, and why."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UnknownName("dtype", dtype, ["auto", *DTYPES])
        return DTYPES[dtype], "as asked"
    if model_dtype == "float32":
        return torch.float32, "as the model"
    if model_dtype == "float16" and device.type == "cpu":
        # float16 products of more than one row run 10 times slower than bfloat16 on AVX-512.
        return torch.bfloat16, "the model is float16, which CPUs are slow at"
    if model_dtype in DTYPES:
        return DTYPES[model_dtype], "as the model"
    return torch.bfloat16, f"the model is {model_dtype}"
