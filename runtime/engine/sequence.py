"""What travels through the engine: a request in, token ids out, and the sequence between them.

A request carries token ids, never text: the engine knows nothing about tokenizers. Stop strings
are part of the sampling parameters because clients write them there, but they are found by whoever
turns ids into text (`runtime.tokenizer.IncrementalDetokenizer`), who then aborts the request. The
engine itself stops at end-of-text ids, `stop_token_ids`, `max_tokens` and the end of the context.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from qtool.errors import QtoolError, UsageError

FinishReason = Literal["stop", "length", "abort", "error"]


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
class SamplingParams:
    """How the next token is drawn. vLLM's names and defaults.

    temperature      0: always the likeliest token
    top_p            keep the smallest set of likeliest tokens with this much probability
    top_k            keep this many likeliest tokens; 0 or -1: all
    min_p            keep tokens at least this likely, relative to the likeliest
    max_tokens       new tokens at most; None: until the context is full
    stop             strings that end the text and are left out of it
    stop_token_ids   token ids that end the text, as the model's own end-of-text ids do
    ignore_eos       run past the model's end-of-text ids
    seed             makes the text a function of the prompt, whatever else runs beside it
    min_tokens       end-of-text and stop ids cannot be drawn before this many new tokens
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, rule: str) -> None:
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)!r}, must be {rule}")

        # Tuples, so that a value cannot change under a running sequence.
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", ">= 0")
        require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        require(self.top_k >= -1, "top_k", "at least 1, or 0 or -1 for all tokens")
        require(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        require(self.min_tokens >= 0, "min_tokens", "at least 0")
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"at most max_tokens, {self.max_tokens}",
        )
        require("" not in self.stop, "stop", "without empty strings")

    @property
    def greedy(self) -> bool:
        # Below this a float32 softmax has one non-zero entry anyway, and logits / T overflows.
        return self.temperature < 1e-5


def _strings(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise UsageError(f"{name} is {value!r}, must be a string or several")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue. `priority`: lower runs earlier; kept for the scheduler to come."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise UsageError(
                f"request {self.request_id}: the prompt is empty",
                hint="a model without a beginning-of-text token needs at least one prompt token",
            )


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step did for one request. The last one of a request has a `finish_reason`.

    With finish_reason "stop" the last id is the end-of-text or stop id: counted, but no text.
    """

    request_id: str
    new_token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int = 0
    error: str | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request inside the engine: its tokens, and how many of them the KV cache holds.

    token_ids:    [ prompt | generated ]
                  [ computed  | to do  ]       num_computed_tokens counts from the left

    A running sequence whose only uncomputed token is the last is decoding; one with more is being
    prefilled, in as many chunks as the token budget takes. Preemption sets num_computed_tokens
    back to 0 and keeps token_ids, so the text goes on where it stopped.
    """

    request: GenerationRequest
    seed: int
    stop_token_ids: frozenset[int]
    max_total_tokens: int
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

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
    ) -> TokenOutput:
        return TokenOutput(
            request_id=self.id,
            new_token_ids=new_token_ids,
            finish_reason=finish_reason,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=self.num_generated_tokens,
            error=error,
        )
