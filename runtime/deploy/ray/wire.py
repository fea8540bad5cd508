"""What travels between the HTTP app and an engine on Ray, beside requests and outputs themselves.

Errors go over as values: an exception whose constructor takes other arguments than its text does
not survive pickling, and Ray would wrap it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qtool.errors import QtoolError, UsageError
from qtool.runtime.engine.async_engine import EngineStopped
from qtool.runtime.engine.client import QueueFull
from qtool.runtime.engine.embedding import Pooling
from qtool.runtime.engine.sequence import GenerationRequest, PromptTooLong

# Characters from here on are surrogates, which are no text alone.
FIRST_SURROGATE, NUM_SURROGATES = 0xD800, 0x800


def as_text(token_ids: tuple[int, ...]) -> str:
    """One character for each token: Ray's router compares prompts as texts, and two prompts share
    as many characters here as they share tokens.
    """
    return "".join(
        chr(token if token < FIRST_SURROGATE else token + NUM_SURROGATES) for token in token_ids
    )


@dataclass(frozen=True, slots=True)
class Routed:
    """A request with what Ray's prefix router looks at: an attribute named prompt."""

    prompt: str
    request: GenerationRequest

    @classmethod
    def of(cls, request: GenerationRequest) -> Routed:
        return cls(as_text(request.prompt_token_ids), request)


@dataclass(frozen=True, slots=True)
class RoutedText:
    """A text to embed, in the same form."""

    prompt: str
    token_ids: tuple[int, ...]
    pooling: Pooling


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error of the engine's. numbers: what the constructor of its kind takes."""

    kind: Literal["too_long", "queue_full", "usage", "stopped", "failed"]
    message: str
    hint: str | None = None
    numbers: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, error: QtoolError) -> Refusal:
        match error:
            case PromptTooLong():
                numbers = (error.num_prompt_tokens, error.max_model_len)
                return cls("too_long", error.message, error.hint, numbers)
            case QueueFull():
                numbers = (error.num_inside, error.limit)
                return cls("queue_full", error.message, error.hint, numbers)
            case UsageError():
                return cls("usage", error.message, error.hint)
            case EngineStopped():
                return cls("stopped", error.message, error.hint)
        return cls("failed", error.message, error.hint)

    def error(self) -> QtoolError:
        """The error again."""
        match self.kind:
            case "too_long":
                return PromptTooLong(*self.numbers)
            case "queue_full":
                return QueueFull(*self.numbers)
            case "usage":
                return UsageError(self.message, self.hint)
            case "stopped":
                return EngineStopped(self.message, self.hint)
        return QtoolError(self.message, self.hint)
