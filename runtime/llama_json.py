"""The dictionaries that llama-cpp-python answers with, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from qtool.runtime.outputs import CompletionOutput, PositionLogprobs, RequestOutput

Document = dict[str, Any]


class Writer(ABC):
    """The JSON of one request's answer."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str) -> None:
        self._id = f"{self.prefix}-{uuid.uuid4()}"
        self._created = int(time.time())
        self._model = model

    def _head(self, name: str) -> Document:
        return {"id": self._id, "object": name, "created": self._created, "model": self._model}

    def whole(self, output: RequestOutput) -> Document:
        [answer] = output.outputs
        num_prompt, num_answer = len(output.prompt_token_ids), len(answer.token_ids)
        return {
            **self._head(self.whole_object),
            "choices": [
                {"index": 0, **self.content(answer), "finish_reason": answer.finish_reason}
            ],
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_answer,
                "total_tokens": num_prompt + num_answer,
            },
        }

    def chunks(self, outputs: Iterator[RequestOutput]) -> Iterator[Document]:
        length = num_positions = 0
        for delta in self.opening():
            yield self._chunk(delta, None)
        for output in outputs:
            [answer] = output.outputs
            new = CompletionOutput(
                index=0,
                text=answer.text[length:],
                token_ids=answer.token_ids,
                finish_reason=answer.finish_reason,
                logprobs=None if answer.logprobs is None else answer.logprobs[num_positions:],
            )
            if new.text:
                yield self._chunk(self.piece(new, length), None)
                # What was held back goes with the text that ends the wait.
                num_positions = len(answer.logprobs or ())
                length = len(answer.text)
            if answer.finish_reason is not None:
                yield self._chunk(self.ending(), answer.finish_reason)

    def _chunk(self, content: Document, finish_reason: str | None) -> Document:
        choice = {"index": 0, **content, "finish_reason": finish_reason}
        return {**self._head(self.chunk_object), "choices": [choice]}

    @abstractmethod
    def content(self, answer: CompletionOutput) -> Document:
        """The choice of a whole answer."""

    @abstractmethod
    def opening(self) -> list[Document]:
        """The chunks before the first piece."""

    @abstractmethod
    def piece(self, new: CompletionOutput, offset: int) -> Document:
        """The choice of a chunk: `new` begins `offset` characters into the answer."""

    @abstractmethod
    def ending(self) -> Document:
        """The choice of the last chunk."""


class CompletionWriter(Writer):
    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, model: str, echoed: str) -> None:
        super().__init__(model)
        self._echoed = echoed

    def content(self, answer: CompletionOutput) -> Document:
        return {
            "text": self._echoed + answer.text,
            "logprobs": _completion_logprobs(answer, len(self._echoed)),
        }

    def opening(self) -> list[Document]:
        return [{"text": self._echoed, "logprobs": None}] if self._echoed else []

    def piece(self, new: CompletionOutput, offset: int) -> Document:
        return {
            "text": new.text,
            "logprobs": _completion_logprobs(new, len(self._echoed) + offset),
        }

    def ending(self) -> Document:
        return {"text": "", "logprobs": None}


class ChatWriter(Writer):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def content(self, answer: CompletionOutput) -> Document:
        message = {"role": "assistant", "content": answer.text}
        return {"message": message, "logprobs": _chat_logprobs(answer)}

    def opening(self) -> list[Document]:
        return [{"delta": {"role": "assistant"}, "logprobs": None}]

    def piece(self, new: CompletionOutput, offset: int) -> Document:
        return {"delta": {"content": new.text}, "logprobs": _chat_logprobs(new)}

    def ending(self) -> Document:
        return {"delta": {}, "logprobs": None}


def _chosen(answer: CompletionOutput) -> list[tuple[PositionLogprobs, int]]:
    """Each position with its token; of a piece, the last ones."""
    positions = answer.logprobs or ()
    token_ids = answer.token_ids[len(answer.token_ids) - len(positions) :]
    return list(zip(positions, token_ids, strict=True))


def _completion_logprobs(answer: CompletionOutput, offset: int) -> Document | None:
    if answer.logprobs is None:
        return None
    tokens: list[str] = []
    offsets: list[int] = []
    for position, token_id in _chosen(answer):
        offsets.append(offset + sum(map(len, tokens)))
        tokens.append(position[token_id].decoded_token or "")
    return {
        "tokens": tokens,
        "text_offset": offsets,
        "token_logprobs": [position[token].logprob for position, token in _chosen(answer)],
        "top_logprobs": [
            {entry.decoded_token or "": entry.logprob for entry in position.values()}
            for position in answer.logprobs
        ],
    }


def _chat_logprobs(answer: CompletionOutput) -> Document | None:
    if answer.logprobs is None:
        return None

    def entry(position: PositionLogprobs, token_id: int) -> Document:
        text = position[token_id].decoded_token or ""
        return {"token": text, "logprob": position[token_id].logprob, "bytes": [*text.encode()]}

    return {
        "content": [
            {
                **entry(position, token_id),
                "top_logprobs": [entry(position, other) for other in position],
            }
            for position, token_id in _chosen(answer)
        ],
        "refusal": None,
    }
