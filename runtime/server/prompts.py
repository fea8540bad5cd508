"""From a request body to what the engine takes: token ids, checked against the context, and
sampling values.

Nothing is cut off unasked. A prompt that does not fit, or would not with the tokens asked for, is
refused with both numbers; the defaults for `max_tokens` are chosen so that they always fit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from qtool.errors import QtoolError
from qtool.runtime.engine.client import ModelInfo
from qtool.runtime.engine.sampling_params import SamplingParams, StructuredOutputsParams
from qtool.runtime.server.config import SamplingDefaults
from qtool.runtime.server.errors import context_length_exceeded, from_qtool_error, invalid
from qtool.runtime.server.protocol import CompletionBody, GenerationBody, TokenIds
from qtool.runtime.tokenizer import Tokenizer

OPENAI_COMPLETION_TOKENS = 16
# Longer texts are tokenized in a thread: about a millisecond of the event loop, the others'
# streams run on.
THREAD_ABOVE_CHARACTERS = 4_000


def room(info: ModelInfo) -> int:
    """Tokens that one sequence can have: the context, or the whole KV cache where that is
    smaller.
    """
    return min(info.max_model_len, info.num_kv_blocks * info.block_size)


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> TokenIds:
    if len(text) <= THREAD_ABOVE_CHARACTERS:
        return tuple(tokenizer.encode(text, add_special_tokens))

    def encode_long() -> TokenIds:
        # `encode` holds the interpreter lock to its end, 1.7 s for 2 MB; the batch call does not.
        [encoding] = tokenizer.backend.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        return tuple(encoding.ids)

    return await asyncio.to_thread(encode_long)


class Prompt(NamedTuple):
    """text: as the client wrote it; None where token ids came."""

    token_ids: TokenIds
    text: str | None


async def completion_prompts(
    body: CompletionBody, tokenizer: Tokenizer, info: ModelInfo, *, param: str = "prompt"
) -> list[Prompt]:
    """Ids that are given are taken as they are: no beginning-of-text id is put before them."""
    add_special_tokens = body.add_special_tokens is not False
    prompts: list[Prompt] = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            ids = await encode(tokenizer, prompt, add_special_tokens=add_special_tokens)
        else:
            ids = prompt
            _check_ids(ids, info.vocab_size, param)
        ids = truncated(ids, body.truncate_prompt_tokens, info)
        if not ids:
            raise invalid(f"`{param}` is empty: this model needs at least one token", param=param)
        prompts.append(Prompt(ids, prompt if isinstance(prompt, str) else None))
    return prompts


def truncated(ids: TokenIds, keep: int | None, info: ModelInfo) -> TokenIds:
    """The last tokens of a prompt, where the client asks for it; -1: as many as there is room."""
    if keep is None:
        return ids
    most = room(info) - 1 if keep == -1 else keep
    return ids[-most:] if most > 0 else ()


def _check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise invalid(
                f"`{param}` holds token id {token_id} at position {position}; this model has "
                f"the ids 0 to {vocab_size - 1}",
                param=param,
            )


def num_new_tokens(
    asked: int | None, default: int | None, num_prompt_tokens: int, info: ModelInfo, *, param: str
) -> int:
    """How many tokens may be generated: what was asked for, if it fits; else the default, as far
    as it fits.
    """
    limit = room(info)
    free = limit - num_prompt_tokens
    if free < 1 or (asked is not None and asked > free):
        raise context_length_exceeded(
            limit=limit, num_prompt_tokens=num_prompt_tokens, max_tokens=asked, param=param
        )
    return asked if asked is not None else min(free, default or free)


def sampling_params(
    body: GenerationBody,
    defaults: SamplingDefaults,
    info: ModelInfo,
    *,
    max_tokens: int,
    extra_stop: tuple[str, ...] = (),
    structured: StructuredOutputsParams | None = None,
    num_top_logprobs: int | None = None,
    num_top_prompt_logprobs: int | None = None,
) -> SamplingParams:
    for name in ("stop_token_ids", "allowed_token_ids"):
        _check_ids(getattr(body, name) or (), info.vocab_size, name)
    _check_ids([int(key) for key in body.logit_bias or ()], info.vocab_size, "logit_bias")

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    allowed = body.allowed_token_ids
    try:
        return SamplingParams(
            temperature=given(body.temperature, defaults.temperature),
            top_p=given(body.top_p, defaults.top_p),
            top_k=defaults.top_k if body.top_k is None else body.top_k,
            min_p=given(body.min_p, defaults.min_p),
            typical_p=given(body.typical_p, 1.0),
            presence_penalty=given(body.presence_penalty, 0.0),
            frequency_penalty=given(body.frequency_penalty, 0.0),
            repetition_penalty=given(body.repetition_penalty, defaults.repetition_penalty),
            logit_bias={int(key): bias for key, bias in (body.logit_bias or {}).items()} or None,
            bad_words=tuple(body.bad_words or ()),
            allowed_token_ids=None if allowed is None else tuple(allowed),
            max_tokens=max_tokens,
            min_tokens=body.min_tokens or 0,
            stop=(*body.stop_strings, *extra_stop),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            include_stop_str_in_output=bool(body.include_stop_str_in_output),
            ignore_eos=bool(body.ignore_eos),
            skip_special_tokens=body.skip_special_tokens is not False,
            logprobs=num_top_logprobs,
            prompt_logprobs=num_top_prompt_logprobs,
            seed=defaults.seed if body.seed is None else body.seed,
            structured_outputs=structured,
        )
    except QtoolError as error:
        raise from_qtool_error(error) from None
