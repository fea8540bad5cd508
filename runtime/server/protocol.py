"""The request body of `/v1/completions`, and the fields that all generating requests share.

Reference: the OpenAI API reference for `completions` and `chat/completions`, and the extensions of
vLLM (`top_k`, `min_p`, `structured_outputs`, `priority`, ...), SGLang (`regex`, `ebnf`) and
llama.cpp (`n_predict`, `grammar`, `json_schema`), under the names that their clients send.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from qtool.runtime.server.parsing import INT32, INT64, Body, Int

MAX_STOP_STRINGS = 128
MAX_CHOICES = 128
MAX_LOGPROBS = 20  # what OpenAI and vLLM offer at most
MAX_BIASES = 4096
TokenIds = tuple[int, ...]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """What completions and chat share. None means "not given": the model's own default, then
    OpenAI's, applies.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[Int, Field(ge=1, lt=INT32)] | None = None
    min_tokens: Annotated[Int, Field(ge=0, lt=INT32)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1, lt=INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: Annotated[list[Int], Field(min_length=1)] | None = None
    seed: Annotated[Int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[Int, Field(ge=-1, lt=INT32)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Annotated[Int, Field(ge=-INT32, lt=INT32)] | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")] | None = None
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "use_beam_search": (False,),
        "logits_processors": ([],),
        "prompt_embeds": (),
    }

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, document: Any) -> Any:
        """llama.cpp's `n_predict`, whose -1 means no limit."""
        if isinstance(document, dict) and "n_predict" in document:
            count = document["n_predict"]
            document = {"max_tokens": None if count == -1 else count, **document}
        return document

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_text(cls, value: object) -> object:
        strings = [value] if isinstance(value, str) else value
        if strings is None:
            return None
        if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
            raise ValueError("must be a string or a list of strings")
        if len(strings) > MAX_STOP_STRINGS:
            raise ValueError(f"has {len(strings)} strings, at most {MAX_STOP_STRINGS} are taken")
        if "" in strings:
            raise ValueError("holds an empty string, which would stop at once")
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases_by_id(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_BIASES:
            raise ValueError(f"has {len(value)} entries, at most {MAX_BIASES} are taken")
        for key, bias in value.items():
            if not str(key).isascii() or not str(key).isdigit():
                raise ValueError(f"has the key {key!r}, which is no token id")
            number = isinstance(bias, int | float) and not isinstance(bias, bool)
            if not number or not -100 <= bias <= 100:
                raise ValueError(f"of {key} must be a number between -100 and 100")
        return value

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        options = self.stream_options
        return options is not None and bool(options.include_usage or options.continuous_usage_stats)

    @property
    def usage_on_every_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


PromptInput = str | list[str] | list[int] | list[list[int]]


class CompletionBody(GenerationBody):
    """`POST /v1/completions`. Whatever form the prompt came in, it is one entry a prompt here."""

    prompt: tuple[str | TokenIds, ...]
    # 0, which only makes sense with echo: score the prompt, write nothing.
    max_tokens: Annotated[Int, Field(ge=0, lt=INT32)] | None = None
    best_of: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationBody.unsupported,
        "suffix": ("",),
    }

    @field_validator("logprobs", mode="before")
    @classmethod
    def _false_is_none(cls, value: object) -> object:
        # Clients that think of chat's boolean: false asks for nothing.
        return None if value is False else value

    @field_validator("prompt", mode="plain", json_schema_input_type=PromptInput)
    @classmethod
    def _one_entry_a_prompt(cls, value: object) -> tuple[str | TokenIds, ...]:
        # By hand: a union of four types reports all four failures, at every position of the list.
        match value:
            case str():
                return (value,)
            case []:
                raise ValueError("is an empty list")
            case list() if _are_token_ids(value):
                return (tuple(value),)
            case list() if all(isinstance(prompt, str) for prompt in value):
                return tuple(value)
            case list() if all(isinstance(prompt, list) and prompt for prompt in value):
                if all(_are_token_ids(prompt) for prompt in value):
                    return tuple(tuple(prompt) for prompt in value)
        raise ValueError(
            "must be a string, a list of strings, a list of token ids, or a list of such lists"
        )

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0 without `echo`, so there would be no answer")
        if self.best_of is not None and self.best_of < self.num_choices:
            raise ValueError(f"best_of is {self.best_of}, must be at least n, {self.num_choices}")
        if self.stream and (self.best_of or 1) > self.num_choices:
            raise ValueError("best_of above n cannot be streamed: the best is known at the end")
        return self

    @property
    def num_generated_choices(self) -> int:
        return self.best_of or self.num_choices


def _are_token_ids(items: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)
