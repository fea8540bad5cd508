"""One conversation and its answer, whichever dialect it came in.

ChatExchange   what is generated
ChatWriter     reads each answer into thoughts, text and tool calls as it arrives; a dialect's
               writer says how those look
OpenAIChat     the writer of `/v1/chat/completions`
"""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qtool.runtime.server.answers import AnswerWriter, Head, Timing, Usage
from qtool.runtime.server.call_readers import CallArguments, CallStart
from qtool.runtime.server.chat_prompt import PreparedChat, prepare_chat
from qtool.runtime.server.chat_protocol import ChatBody
from qtool.runtime.server.chunks import (
    DONE,
    EMPTY_DELTA,
    ROLE_DELTA,
    ChunkWriter,
    arguments_delta,
    call_delta,
    content_delta,
    error_event,
    reasoning_delta,
)
from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.exchange import Exchange
from qtool.runtime.server.generation import Answer, Job, Piece
from qtool.runtime.server.message_parser import Content, ParsedMessage, Part, Reasoning
from qtool.runtime.server.prompts import num_new_tokens, sampling_params
from qtool.runtime.server.service import Service
from qtool.runtime.server.token_texts import TokenTexts, chat_logprobs, prompt_logprobs


class ChatHead(NamedTuple):
    """What a writer needs to know of its request."""

    head: Head
    body: ChatBody
    chat: PreparedChat
    texts: TokenTexts
    num_prompt_tokens: int


WriterFactory = Callable[[ChatHead], "ChatWriter"]


class ChatExchange(Exchange):
    id_prefix = "chatcmpl"

    def __init__(
        self,
        service: Service,
        body: ChatBody,
        writer: WriterFactory | None = None,
        *,
        id_prefix: str = "chatcmpl",
    ) -> None:
        self.id_prefix = id_prefix
        super().__init__(service, body)
        self._chat = body
        self._writer = writer or OpenAIChat

    async def prepare(self) -> tuple[list[Job], AnswerWriter]:
        body, service = self._chat, self.service
        chat = await prepare_chat(body, service)
        max_tokens = num_new_tokens(
            body.max_new_tokens,
            service.config.sampling.max_new_tokens,
            len(chat.token_ids),
            service.client.info,
            param="messages",
        )
        top = body.top_logprobs or 0
        sampling = sampling_params(
            body,
            service.config.sampling,
            service.client.info,
            max_tokens=max_tokens,
            extra_stop=chat.stop,
            structured=chat.structured,
            num_top_logprobs=top if body.logprobs else None,
            num_top_prompt_logprobs=body.prompt_logprobs,
        )
        jobs = self.jobs_for(
            chat.token_ids, sampling, body.num_choices, keep_special=chat.keep_special
        )
        head = ChatHead(self.head, body, chat, service.texts, len(chat.token_ids))
        return jobs, self._writer(head)


class ChatWriter(AnswerWriter):
    """Answers as thoughts, text and calls. `finish_reason` is OpenAI's."""

    def __init__(self, head: ChatHead) -> None:
        self.head = head.head
        self.body = head.body
        self._chat = head.chat
        self._head = head
        choices = range(head.body.num_choices)
        self._readers = [head.chat.new_reader() for _ in choices]
        self._num_calls = [0 for _ in choices]
        self._begun = [False for _ in choices]

    def read(self, index: int, piece: Piece) -> list[Part]:
        """What a step added to an answer."""
        reader = self._readers[index]
        text = piece.text
        if not self._begun[index]:
            self._begun[index] = True
            text = self._chat.opening + text
        parts = reader.push(text)
        if piece.finish_reason is not None:
            parts += reader.finish()
        self._num_calls[index] += sum(isinstance(part, CallStart) for part in parts)
        if self.body.include_reasoning is False:
            parts = [part for part in parts if not isinstance(part, Reasoning)]
        return parts

    def finish_reason(self, index: int, piece_or_answer: Piece | Answer) -> str | None:
        reason = piece_or_answer.finish_reason
        return "tool_calls" if reason == "stop" and self._num_calls[index] else reason

    def message(self, index: int, answer: Answer) -> ParsedMessage:
        """A whole answer, read."""
        message = ParsedMessage()
        for part in self.read(index, Piece(answer.text, 0, finish_reason=answer.finish_reason)):
            message.add(part)
        return message

    def new_call_id(self) -> str:
        letters = uuid.uuid4().hex
        return letters[:9] if self._chat.short_ids else f"call_{letters[:24]}"

    @abstractmethod
    def piece(self, index: int, piece: Piece, usage: Usage) -> bytes: ...


class OpenAIChat(ChatWriter):
    def __init__(self, head: ChatHead) -> None:
        super().__init__(head)
        self._chunks = ChunkWriter(self._signed("chat.completion.chunk"), head.body)
        self._open_calls = [-1 for _ in self._readers]

    def _signed(self, object_name: str) -> dict[str, Any]:
        return {
            "id": self.head.id,
            "object": object_name,
            "created": self.head.created,
            "model": self.head.model,
            "system_fingerprint": None,
        }

    def document(self, answers: Sequence[Answer], usage: Usage, timing: Timing) -> dict[str, Any]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        signed = self._signed("chat.completion")
        document = {**signed, "choices": choices, "usage": usage.as_dict()}
        body = self.body
        if body.prompt_logprobs is not None:
            document["prompt_logprobs"] = prompt_logprobs(
                answers[0].prompt_logprobs, self._head.texts, body.prompt_logprobs
            )
        if body.return_token_ids:
            document["prompt_token_ids"] = list(self._chat.token_ids)
        return document

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        read = self.message(index, answer)
        message: dict[str, Any] = {
            "role": "assistant",
            # Null only beside calls: readers of plain answers want a string.
            "content": read.content if read.content or not read.calls else None,
            "refusal": None,
        }
        if read.reasoning:
            message |= {"reasoning": read.reasoning, "reasoning_content": read.reasoning}
        if read.calls:
            message["tool_calls"] = [
                {
                    "id": self.new_call_id(),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in read.calls
            ]
        choice = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer) if self.body.logprobs else None,
            "finish_reason": self.finish_reason(index, answer),
            "stop_reason": answer.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = list(answer.token_ids)
        return choice

    def _logprobs(self, answer: Answer | Piece) -> dict[str, Any]:
        return chat_logprobs(
            answer.logprobs,
            self._head.texts,
            self.body.top_logprobs or 0,
            as_ids=bool(self.body.return_tokens_as_token_ids),
        )

    def opening(self, usage: Usage) -> bytes:
        return b"".join(
            self._chunks.chat(index, ROLE_DELTA, usage) for index in range(len(self._readers))
        )

    def piece(self, index: int, piece: Piece, usage: Usage) -> bytes:
        deltas = [self._delta(index, part) for part in self.read(index, piece)]
        last = piece.finish_reason is not None
        if not deltas and (not last or (self.body.logprobs and piece.token_ids)):
            # One chunk a step, also where its text is held back: clients time tokens by them.
            deltas = [content_delta("")]
        written = []
        for position, delta in enumerate(deltas):
            first = position == 0
            written.append(
                self._chunks.chat(
                    index,
                    delta,
                    usage,
                    logprobs=self._logprobs(piece) if self.body.logprobs and first else None,
                    token_ids=list(piece.token_ids)
                    if self.body.return_token_ids and first
                    else None,
                )
            )
        if last:
            written.append(
                self._chunks.chat(
                    index,
                    EMPTY_DELTA,
                    usage,
                    finish_reason=self.finish_reason(index, piece),
                    stop_reason=piece.stop_reason,
                )
            )
        return b"".join(written)

    def _delta(self, index: int, part: Part) -> bytes:
        match part:
            case Content(text):
                return content_delta(text)
            case Reasoning(text):
                return reasoning_delta(text)
            case CallStart(name):
                self._open_calls[index] += 1
                return call_delta(self._open_calls[index], self.new_call_id(), name)
            case CallArguments(text):
                return arguments_delta(self._open_calls[index], text)

    def closing(self, usage: Usage, timing: Timing) -> bytes:
        return self._chunks.usage(usage) + DONE

    def error(self, error: ApiError) -> bytes:
        return error_event(error) + DONE
