"""How a dialect writes answers, whole and streamed. What it must not decide is in `exchange.py`.

    stream    opening, piece, piece, ..., closing      or, wherever it fails, error
    whole     document

All of them give bytes to be sent as they are; an empty string sends nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.generation import Answer, Piece

EVENT_STREAM = "text/event-stream"
NDJSON = "application/x-ndjson"


@dataclass(slots=True)
class Usage:
    """Token counts of one HTTP request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Head(NamedTuple):
    """What all parts of one answer are signed with."""

    id: str
    model: str
    created: int


class Timing(NamedTuple):
    """Seconds of one request, for dialects that tell them."""

    total: float
    to_first_token: float


class AnswerWriter(ABC):
    media_type = EVENT_STREAM

    @abstractmethod
    def document(self, answers: Sequence[Answer], usage: Usage, timing: Timing) -> dict[str, Any]:
        """The whole answer; one entry of `answers` for each choice."""

    def opening(self, usage: Usage) -> bytes:
        return b""

    @abstractmethod
    def piece(self, index: int, piece: Piece, usage: Usage) -> bytes:
        """What a stream sends for one step of one choice."""

    def closing(self, usage: Usage, timing: Timing) -> bytes:
        return b""

    @abstractmethod
    def error(self, error: ApiError) -> bytes:
        """What a stream sends when it fails after its headers are gone."""
