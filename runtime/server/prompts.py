"""From a request body to what the engine takes: token ids, checked against the context, and
sampling values.

Nothing is ever cut off. A prompt that does not fit, or would not with the tokens asked for, is
refused with both numbers; the defaults for `max_tokens` are chosen so that they always fit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from qtool.errors import QtoolError, UsageError
from qtool.runtime.engine.client import ModelInfo
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.server.config import SamplingDefaults
from qtool.runtime.server.errors import context_length_exceeded, from_qtool_error, invalid
from qtool.runtime.server.protocol import (
    ChatBody,
    ChatMessage,
    CompletionBody,
    GenerationBody,
    TokenIds,
)
from qtool.runtime.tokenizer import Tokenizer

OPENAI_COMPLETION_TOKENS = 16
# Longer texts are tokenized in a thread: about a millisecond of the event loop, the others'
# streams run on.
THREAD_ABOVE_CHARACTERS = 4_000


# Arguments of transformers' apply_chat_template that are not variables of the template. A template
# of the client's own could loop for hours inside the sandbox.
RESERVED_TEMPLATE_OPTIONS = frozenset(
    {
        "chat_template", "continue_final_message", "conversation", "documents", "max_length",
        "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors",
        "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip


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


async def completion_prompts(
    body: CompletionBody, tokenizer: Tokenizer, info: ModelInfo
) -> list[TokenIds]:
    """One list of ids a prompt. Ids that are given are taken as they are: no beginning-of-text id
    is put before them.
    """
    add_special_tokens = body.add_special_tokens is not False
    prompts: list[TokenIds] = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            ids = await encode(tokenizer, prompt, add_special_tokens=add_special_tokens)
        else:
            ids = prompt
            _check_ids(ids, info.vocab_size, "prompt")
        if not ids:
            raise invalid("`prompt` is empty: this model needs at least one token", param="prompt")
        prompts.append(ids)
    return prompts


async def chat_prompt(body: ChatBody, tokenizer: Tokenizer) -> TokenIds:
    """The conversation in the model's chat template, which writes the special tokens by itself."""
    options = dict(body.chat_template_kwargs or {})
    for name in sorted(RESERVED_TEMPLATE_OPTIONS.intersection(options)):
        where = f"chat_template_kwargs.{name}"
        raise invalid(f"`{where}` is not supported", param=where, code="unsupported_parameter")
    if body.add_generation_prompt is not None:
        options["add_generation_prompt"] = body.add_generation_prompt
    try:
        text = tokenizer.apply_chat_template([_as_dict(m) for m in body.messages], **options)
    except UsageError as error:
        raise invalid(error.message, param="messages") from None
    ids = await encode(tokenizer, text, add_special_tokens=False)
    if not ids:
        raise invalid("the messages are empty: there is nothing to answer", param="messages")
    return ids


def _as_dict(message: ChatMessage) -> dict[str, str]:
    # "developer" is OpenAI's newer word for "system", which is the one that models' templates know.
    role = "system" if message.role == "developer" else message.role
    fields = {"role": role, "content": message.content or ""}
    return fields if message.name is None else {**fields, "name": message.name}


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
    extra_stop: tuple[str, ...],
) -> SamplingParams:
    _check_ids(body.stop_token_ids or (), info.vocab_size, "stop_token_ids")

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    try:
        return SamplingParams(
            temperature=given(body.temperature, defaults.temperature),
            top_p=given(body.top_p, defaults.top_p),
            top_k=defaults.top_k if body.top_k is None else body.top_k,
            min_p=given(body.min_p, defaults.min_p),
            max_tokens=max_tokens,
            min_tokens=body.min_tokens or 0,
            stop=(*body.stop_strings, *extra_stop),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            seed=body.seed,
        )
    except QtoolError as error:
        raise from_qtool_error(error) from None
