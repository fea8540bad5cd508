"""What a request becomes in the engine: a sequence for each answer that it asks for."""

from __future__ import annotations

import random
from collections.abc import Iterable

from qtool.errors import UsageError
from qtool.runtime.engine.client import ModelInfo
from qtool.runtime.engine.grammar import GrammarCompiler
from qtool.runtime.engine.sequence import GenerationRequest, PromptTooLong, Sequence


def make_answers(
    request: GenerationRequest,
    info: ModelInfo,
    *,
    eos_token_ids: Iterable[int],
    seeds: random.Random,
    grammars: GrammarCompiler,
    now: float,
) -> list[Sequence]:
    """The first of them computes the prompt for all.

    seeds  of requests that bring none
    now    in the engine's seconds
    """
    sampling = request.sampling
    num_prompt_tokens = len(request.prompt_token_ids)
    room = info.max_model_len - num_prompt_tokens
    new_tokens = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
    eos = () if sampling.ignore_eos else tuple(eos_token_ids)
    wanted = sampling.structured_outputs
    return [
        Sequence(
            request=request,
            index=index,
            # Numbered on from the given seed: answer 1 of seed 7 is what seed 8 writes.
            seed=seeds.getrandbits(64) if sampling.seed is None else sampling.seed + index,
            stop_token_ids=frozenset((*eos, *sampling.stop_token_ids)),
            max_total_tokens=num_prompt_tokens + new_tokens,
            arrival=now,
            deadline=None if request.timeout is None else now + request.timeout,
            grammar=grammars.grammar(wanted, num_prompt_tokens) if wanted else None,
        )
        for index in range(sampling.num_sequences)
    ]


def validate(request: GenerationRequest, info: ModelInfo) -> None:
    """Raise unless the model can run the request: it fits, and every id is in the vocabulary."""
    prompt = request.prompt_token_ids
    if len(prompt) >= info.max_model_len:
        raise PromptTooLong(len(prompt), info.max_model_len)
    for token_id in (min(prompt), max(prompt)):
        if not 0 <= token_id < info.vocab_size:
            raise UsageError(
                f"token id {token_id} is outside the vocabulary of {info.vocab_size} tokens"
            )
    request.sampling.check_vocabulary(info.vocab_size)
    if request.lora is not None and not info.lora_enabled:
        raise UsageError(
            f"the engine was started without adapters, and {request.lora.lora_name} is one",
            hint="start it with --lora-modules NAME=FOLDER or --enable-lora (enable_lora=True in "
            "Python)",
        )
