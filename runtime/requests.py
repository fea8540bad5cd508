"""From what a caller of the Python interface writes to what the engine takes: prompts as text, ids
or mappings, lists of them, one set of sampling values or one each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from qtool.errors import UsageError
from qtool.runtime.engine.sampling_params import BadWord, SamplingParams
from qtool.runtime.engine.sequence import LoRARequest
from qtool.runtime.tokenizer import Tokenizer

# vLLM's forms: text, ids, {"prompt": text} and {"prompt_token_ids": ids}.
Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


def prompt_ids(
    prompt: Prompt, tokenizer: Tokenizer | None, *, add_special_tokens: bool = True
) -> tuple[str | None, tuple[int, ...]]:
    """A prompt's text, where it came as text, and its ids."""
    if isinstance(prompt, Mapping):
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is None and ids is None:
            raise UsageError(
                f"a prompt has the keys {sorted(prompt)}, must have prompt or prompt_token_ids"
            )
        if ids is not None:
            return text, tuple(ids)
        prompt = cast("str", text)
    if not isinstance(prompt, str):
        return None, tuple(prompt)
    return prompt, tuple(_needed(tokenizer).encode(prompt, add_special_tokens))


def several_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def several_conversations(messages: Messages | Sequence[Messages]) -> list[Messages]:
    if messages and isinstance(messages[0], Mapping):
        return [cast("Messages", messages)]
    return list(cast("Sequence[Messages]", messages))


def one_each(
    parameters: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if parameters is None or isinstance(parameters, SamplingParams):
        return [parameters or SamplingParams()] * count
    if len(parameters) != count:
        raise UsageError(f"there are {count} prompts and {len(parameters)} sampling parameters")
    return list(parameters)


def adapter_each(
    adapters: LoRARequest | Sequence[LoRARequest | None] | None, count: int
) -> list[LoRARequest | None]:
    if adapters is None or isinstance(adapters, LoRARequest):
        return [adapters] * count
    if len(adapters) != count:
        raise UsageError(f"there are {count} prompts and {len(adapters)} adapters")
    return list(adapters)


def with_bad_words_as_ids(sampling: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """The engine takes bad words as runs of ids: as the text is tokenized at its beginning, and
    behind a space, where that makes as many tokens of other ids (which is vLLM's rule).
    """
    if not any(isinstance(word, str) for word in sampling.bad_words):
        return sampling
    runs: list[BadWord] = []
    for word in sampling.bad_words:
        if not isinstance(word, str):
            runs.append(word)
            continue
        encode = _needed(tokenizer).encode
        bare = tuple(encode(word.lstrip(), add_special_tokens=False))
        spaced = tuple(encode(f" {word.lstrip()}", add_special_tokens=False))
        runs.append(bare)
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            runs.append(spaced)
    return replace(sampling, bad_words=tuple(runs))


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise UsageError(
            "the model has no tokenizer, so prompts must be token ids",
            hint="put the tokenizer files of the original model beside the weights",
        )
    return tokenizer
