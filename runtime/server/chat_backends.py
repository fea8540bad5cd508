"""What the terminal chat needs of whoever answers: texts as they come, then an end.

There are two: a model in this process (`chat_local.py`) and a server at a URL (`chat_remote.py`).
Closing the iterator early (Ctrl-C) stops the answer at once.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

Message = dict[str, str]


class AnswerEnd(NamedTuple):
    finish_reason: str
    num_prompt_tokens: int
    num_generated_tokens: int
    seconds_to_first_text: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        decode_seconds = self.seconds - self.seconds_to_first_text
        return (self.num_generated_tokens - 1) / decode_seconds if decode_seconds > 0 else 0.0


class ChatBackend(Protocol):
    name: str

    def answer(
        self, messages: Sequence[Message], sampling: Mapping[str, Any]
    ) -> Generator[str | AnswerEnd, None, None]:
        """Texts as they come, then the end. ``sampling``: fields of a chat request body."""
        ...

    def close(self) -> None: ...


class Stopwatch:
    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first: float | None = None

    def text_came(self) -> None:
        if self._first is None:
            self._first = time.monotonic() - self._started

    def end(self, finish_reason: str, num_prompt_tokens: int, num_tokens: int) -> AnswerEnd:
        seconds = time.monotonic() - self._started
        first = seconds if self._first is None else self._first
        return AnswerEnd(finish_reason, num_prompt_tokens, num_tokens, first, seconds)
