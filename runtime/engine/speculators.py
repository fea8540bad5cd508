"""From a `SpeculativeConfig` to something that guesses."""

from __future__ import annotations

from dataclasses import replace

from qtool.errors import UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.client import ModelInfo
from qtool.runtime.engine.draft_model import DraftProposer
from qtool.runtime.engine.ngram import NgramProposer
from qtool.runtime.engine.speculation import Proposer, Speculation
from qtool.runtime.engine.speculative_config import SpeculativeConfig
from qtool.runtime.loading import LoadedModel, load_for


def make_speculation(
    config: EngineConfig, loaded: LoadedModel, info: ModelInfo
) -> Speculation | None:
    """What `config.speculative_config` asks for; loads the draft model. None: nothing."""
    wanted = config.speculative_config
    if wanted is None:
        return None
    proposer: Proposer
    if wanted.method == "ngram":
        proposer = NgramProposer(wanted.prompt_lookup_min, wanted.prompt_lookup_max)
    else:
        proposer = _draft(config, wanted, loaded, info)
    return Speculation(proposer, wanted.num_speculative_tokens, adaptive=wanted.adaptive)


def _draft(
    config: EngineConfig, wanted: SpeculativeConfig, loaded: LoadedModel, info: ModelInfo
) -> DraftProposer:
    assert wanted.model is not None
    draft = load_for(replace(config, model=wanted.model, revision=None, tensor_parallel_size=1))
    _check_vocabulary(draft, loaded)
    return DraftProposer(
        draft,
        max_model_len=info.max_model_len,
        num_blocks=info.num_kv_blocks,
        block_size=info.block_size,
        vocab_size=info.vocab_size,
        max_rows=info.max_num_batched_tokens,
    )


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
