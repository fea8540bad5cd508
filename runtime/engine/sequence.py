"""What travels through the engine: a request in, token ids out, and the sequence between them.

A request carries token ids, never text: the engine knows nothing about tokenizers. Stop strings
are part of the sampling parameters because clients write them there, but they are found by whoever
turns ids into text (`runtime.tokenizer.IncrementalDetokenizer`), who then aborts the request. The
engine itself stops at end-of-text ids, `stop_token_ids`, `max_tokens` and the end of the context.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from qtool.errors import QtoolError, UsageError
from qtool.runtime.engine.grammar import Grammar
from qtool.runtime.engine.logit_rules import LogitRules
from qtool.runtime.engine.logprobs import TokenLogprobs
from qtool.runtime.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


class PromptTooLong(QtoolError):
    """A prompt that leaves no room for a single new token; nothing is ever cut off."""

    def __init__(self, num_prompt_tokens: int, max_model_len: int) -> None:
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens and the context holds {max_model_len}, "
            "one of which must be left for the answer",
            hint=f"shorten the prompt to at most {max_model_len - 1} tokens",
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_model_len = max_model_len


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """Which adapter writes an answer; vLLM's names.

    lora_name    what it is called from its first use on
    lora_int_id  vLLM's number for it, of no use here
    lora_path    peft's folder; None: an adapter that is known by its name already
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue.

    priority    lower runs earlier, under `scheduling_policy="priority"`
    cache_salt  the cache is shared only with requests of an equal one: who does not know it cannot
                find out by timing what others have asked
    timeout     seconds after which the request ends, wherever it is; None: no bound
    lora        the adapter to use; None: the model as it is
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    timeout: float | None = None
    lora: LoRARequest | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise UsageError(
                f"request {self.request_id}: timeout is {self.timeout}, must be above 0 seconds"
            )
        if not self.prompt_token_ids:
            raise UsageError(
                f"request {self.request_id}: the prompt is empty",
                hint="a model without a beginning-of-text token needs at least one prompt token",
            )


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step did for one request. The last one of a request has a `finish_reason`.

    With finish_reason "stop" the last id is the end-of-text or stop id: counted, but no text.

    index            which of the request's answers, from 0
    queue_seconds    how long it waited before the first of its tokens was computed
    num_preemptions  how often it had to give up its blocks
    logprobs         one entry for each new token, where the request asks for them
    prompt_logprobs  with the first output of answer 0, where asked for: one entry for each prompt
                     token, the first of them None
    """

    request_id: str
    new_token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int = 0
    error: str | None = None
    index: int = 0
    queue_seconds: float = 0.0
    num_preemptions: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request inside the engine: its tokens, and how many of them the KV cache holds.

    token_ids:    [ prompt | generated ] unread
                  [ computed  | to do         ]      num_computed_tokens counts from the left

    A running sequence whose only uncomputed token is the last is decoding; one with more is being
    prefilled, in as many chunks as the token budget takes. Preemption sets num_computed_tokens
    back to 0 and keeps token_ids, so the text goes on where it stopped.

    num_unread_tokens  drawn by a step that runs, and not read yet: they follow token_ids, and where
                     they are needed the device takes them from where they were drawn
    draft_token_ids  guesses at what follows token_ids, for the next step to verify; set before
                     the step is scheduled, and gone after it
    index            which of the request's answers this is
    arrival          when the request came, in the engine's seconds
    queue_seconds    from then until it first ran
    deadline         when it ends at the latest; None: whenever it is done
    num_cached_tokens  of the prompt, found in the cache
    num_preemptions  how often it had to give up its blocks
    grammar          what the answer must look like, compiled; None: anything
    rules            what the request changes in the logits; None: nothing
    siblings         further answers to the same prompt, which begin when its prefill is done
    prompt_logprobs  what the model thought of the prompt, as far as it is known; empty: not asked
    """

    request: GenerationRequest
    seed: int
    stop_token_ids: frozenset[int]
    max_total_tokens: int
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_unread_tokens: int = 0
    draft_token_ids: list[int] = field(default_factory=list)
    index: int = 0
    arrival: float = 0.0
    queue_seconds: float = 0.0
    deadline: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    grammar: Grammar | None = None
    rules: LogitRules | None = field(init=False)
    siblings: "list[Sequence]" = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        prompt = self.request.prompt_token_ids
        self.token_ids = list(prompt)
        self.rules = LogitRules.for_request(
            self.request.sampling, prompt, self.stop_token_ids, self.grammar
        )

    @property
    def id(self) -> str:
        """Unique in the engine: the request's id, and behind it the index of a further answer."""
        name = self.request.request_id
        return f"{name}#{self.index}" if self.index else name

    @property
    def cache_scope(self) -> Hashable:
        """Keys and values are shared only between sequences of an equal one."""
        return self.request.cache_salt, self.adapter

    @property
    def adapter(self) -> str | None:
        lora = self.request.lora
        return None if lora is None else lora.lora_name

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_tokens(self) -> int:
        """Of the text, those that are not read yet included."""
        return len(self.token_ids) + self.num_unread_tokens

    @property
    def ends_unread(self) -> bool:
        """Whether the answer ends with the token that is not read yet, whatever it is."""
        return self.num_unread_tokens > 0 and self.num_tokens >= self.max_total_tokens

    def append(self, token_id: int) -> FinishReason | None:
        """Take the sampled token; says whether it was the last."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_total_tokens else None

    def output(
        self,
        new_token_ids: tuple[int, ...] = (),
        finish_reason: FinishReason | None = None,
        error: str | None = None,
        logprobs: tuple[TokenLogprobs, ...] | None = None,
    ) -> TokenOutput:
        # With the first tokens of the first answer, and never again.
        is_first = new_token_ids and self.num_generated_tokens == len(new_token_ids)
        prompt_logprobs = tuple(self.prompt_logprobs) if is_first else ()
        return TokenOutput(
            request_id=self.request.request_id,
            index=self.index,
            queue_seconds=self.queue_seconds,
            num_preemptions=self.num_preemptions,
            new_token_ids=new_token_ids,
            finish_reason=finish_reason,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=self.num_generated_tokens,
            num_cached_tokens=self.num_cached_tokens,
            error=error,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs or None,
        )
