"""From a `SpeculativeConfig` to something that guesses."""

from __future__ import annotations

from dataclasses import replace

from qtool.errors import UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.client import ModelInfo
from qtool.runtime.engine.draft_model import DraftProposer
from qtool.runtime.engine.ngram import NgramProposer
from qtool.runtime.engine.speculation import Proposer, Speculation
from qtool.runtime.layers import PackingRules
from qtool.runtime.loading import LoadedModel, load_model
from qtool.runtime.memory import MemoryBudget


def load_draft(config: EngineConfig, loaded: LoadedModel) -> LoadedModel | None:
    """The model that guesses, if `config` names one and both fit into memory."""
    wanted = config.speculative_config
    if wanted is None or wanted.model is None:
        return None
    draft = load_model(
        wanted.model,
        dtype=config.dtype,
        device=config.device,
        rules=PackingRules(config.activations, config.lm_head),
        # The draft model is on rank 0 as a whole.
        budget=MemoryBudget.measure(
            replace(config, tensor_parallel_size=1), loaded.device, weight_bytes=loaded.nbytes
        ),
        cache_packed=config.cache_packed,
    )
    _check_vocabulary(draft, loaded)
    return draft


def make_speculation(
    config: EngineConfig, draft: LoadedModel | None, info: ModelInfo
) -> Speculation | None:
    """What `config.speculative_config` asks for; None: nothing."""
    wanted = config.speculative_config
    if wanted is None:
        return None
    proposer: Proposer
    if draft is None:
        proposer = NgramProposer(wanted.prompt_lookup_min, wanted.prompt_lookup_max)
    else:
        proposer = DraftProposer(
            draft,
            max_model_len=info.max_model_len,
            num_blocks=info.num_kv_blocks,
            block_size=info.block_size,
            vocab_size=info.vocab_size,
            max_rows=info.max_num_batched_tokens,
        )
    return Speculation(proposer, wanted.num_speculative_tokens, adaptive=wanted.adaptive)


def _check_vocabulary(draft: LoadedModel, loaded: LoadedModel) -> None:
    if draft.tokenizer is not None and loaded.tokenizer is not None:
        # Not the sizes: models of one family pad their embeddings differently.
        alike = draft.tokenizer.backend.get_vocab() == loaded.tokenizer.backend.get_vocab()
    else:
        alike = draft.decoder.vocab_size == loaded.decoder.vocab_size
    if not alike:
        raise UsageError(
            f"the draft model {draft.source.name} has another vocabulary than {loaded.source.name}",
            hint="a draft model is of the same family: its token ids must mean the same",
        )
