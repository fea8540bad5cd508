"""OpenAI's Responses API: `/v1/responses`, whole and as typed events.

Events are numbered, and each item of the output is announced, written and closed in turn:

    response.created, response.in_progress
      output_item.added, content_part.added, output_text.delta ..., output_text.done,
      content_part.done, output_item.done                      and likewise for thoughts and calls
    response.completed, or response.incomplete where max_output_tokens ended it
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from qtool.runtime.server.answers import Timing, Usage
from qtool.runtime.server.call_readers import CallArguments, CallStart
from qtool.runtime.server.chat_exchange import ChatExchange, ChatHead, ChatWriter
from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.exchange import json_response
from qtool.runtime.server.generation import Answer, Piece
from qtool.runtime.server.message_parser import Content, Part, Reasoning
from qtool.runtime.server.openai import body_schema, parsed_body
from qtool.runtime.server.responses_protocol import Items, ResponsesBody, ResponseStore
from qtool.runtime.server.service import Service
from qtool.runtime.server.token_texts import chat_logprobs


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    store = ResponseStore()

    @router.post("/v1/responses", openapi_extra=body_schema(ResponsesBody))
    async def responses(request: Request) -> Response:
        body = await parsed_body(service, ResponsesBody, request)
        earlier = store.items(body.previous_response_id) if body.previous_response_id else []

        def writer(head: ChatHead) -> ResponsesWriter:
            return ResponsesWriter(head, body, earlier, store)

        exchange = ChatExchange(service, body.as_chat(earlier), writer, id_prefix="resp")
        return await exchange.response(request)

    @router.get("/v1/responses/{response_id}")
    async def stored(response_id: str) -> Response:
        return json_response(store.response(response_id))

    @router.delete("/v1/responses/{response_id}")
    async def forget(response_id: str) -> Response:
        store.forget(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    return router


class ResponsesWriter(ChatWriter):
    def __init__(
        self, head: ChatHead, body: ResponsesBody, earlier: Items, store: ResponseStore
    ) -> None:
        super().__init__(head)
        self._asked = body
        self._earlier = earlier
        self._store = store
        self._number = -1
        self._output: Items = []
        self._open: dict[str, Any] | None = None
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []
        self._finish_reason: str | None = None

    def _response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        asked = self._asked
        cut = status == "incomplete"
        return {
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.head.model,
            "output": list(self._output),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": asked.reasoning,
            "service_tier": "default",
            "store": asked.store is not False,
            "temperature": asked.temperature,
            "text": asked.text or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }

    def _finished(self, usage: Usage) -> dict[str, Any]:
        status = "incomplete" if self._finish_reason == "length" else "completed"
        response = self._response(status, usage)
        if self._asked.store is not False:
            items = [*self._earlier, *self._asked.items, *self._output]
            self._store.keep(response, items)
        return response

    def document(self, answers: Sequence[Answer], usage: Usage, timing: Timing) -> dict[str, Any]:
        answer = answers[0]
        whole = Piece(answer.text, 0, finish_reason=answer.finish_reason)
        self._note_logprobs(answer)
        for part in self.read(0, whole):
            self._events(part)
        self._end()
        self._finish_reason = answer.finish_reason
        return self._finished(usage)

    def _note_logprobs(self, answer: Answer | Piece) -> None:
        if self.body.logprobs:
            told = chat_logprobs(
                answer.logprobs, self._head.texts, self.body.top_logprobs or 0, as_ids=False
            )
            self._logprobs += told["content"]

    def opening(self, usage: Usage) -> bytes:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def piece(self, index: int, piece: Piece, usage: Usage) -> bytes:
        self._note_logprobs(piece)
        events = [self._events(part) for part in self.read(index, piece)]
        if piece.finish_reason is not None:
            events.append(self._end())
            self._finish_reason = piece.finish_reason
        return b"".join(events)

    def _events(self, part: Part) -> bytes:
        match part:
            case Content(text):
                return self._begin("message") + self._delta("response.output_text.delta", text)
            case Reasoning(text):
                begin = self._begin("reasoning")
                return begin + self._delta("response.reasoning_text.delta", text)
            case CallStart(name):
                return self._end() + self._begin("function_call", name)
            case CallArguments(text):
                return self._delta("response.function_call_arguments.delta", text)

    def _begin(self, kind: str, name: str = "") -> bytes:
        if self._open is not None and self._open["type"] == kind:
            return b""
        ended = self._end()
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item: dict[str, Any] = {
            "id": f"{prefix}_{uuid.uuid4().hex}",
            "type": kind,
            "status": "in_progress",
        }
        match kind:
            case "message":
                item |= {"role": "assistant", "content": []}
            case "reasoning":
                item |= {"summary": [], "content": []}
            case _:
                item |= {"call_id": self.new_call_id(), "name": name, "arguments": ""}
        self._open, self._text = item, ""
        added = self._event("response.output_item.added", output_index=self._place, item=item)
        if kind == "function_call":
            return ended + added
        part = self._part("")
        return ended + added + self._in_content("response.content_part.added", part=part)

    @property
    def _place(self) -> int:
        return len(self._output)

    def _part(self, text: str) -> dict[str, Any]:
        assert self._open is not None
        if self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = self._logprobs if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _in_content(self, name: str, /, **fields: Any) -> bytes:
        return self._in_item(name, content_index=0, **fields)

    def _in_item(self, name: str, /, **fields: Any) -> bytes:
        assert self._open is not None
        return self._event(name, item_id=self._open["id"], output_index=self._place, **fields)

    def _delta(self, name: str, text: str) -> bytes:
        assert self._open is not None
        if not text:
            return b""
        self._text += text
        match self._open["type"]:
            case "function_call":
                return self._in_item(name, delta=text)
            case "message":
                return self._in_content(name, delta=text, logprobs=[])
            case _:
                return self._in_content(name, delta=text)

    def _end(self) -> bytes:
        item = self._open
        if item is None:
            return b""
        text, events = self._text, []
        match item["type"]:
            case "function_call":
                item["arguments"] = text
                events.append(
                    self._in_item(
                        "response.function_call_arguments.done", arguments=text, name=item["name"]
                    )
                )
            case "message":
                part = self._part(text)
                item["content"] = [part]
                done = "response.output_text.done"
                events.append(self._in_content(done, text=text, logprobs=part["logprobs"]))
                events.append(self._in_content("response.content_part.done", part=part))
            case _:
                part = self._part(text)
                item["content"] = [part]
                events.append(self._in_content("response.reasoning_text.done", text=text))
                events.append(self._in_content("response.content_part.done", part=part))
        item["status"] = "completed"
        place, self._open = self._place, None
        self._output.append(item)
        events.append(self._event("response.output_item.done", output_index=place, item=item))
        return b"".join(events)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        self._number += 1
        event = {"type": name, "sequence_number": self._number, **fields}
        return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(event))

    def closing(self, usage: Usage, timing: Timing) -> bytes:
        response = self._finished(usage)
        return self._event(f"response.{response['status']}", response=response)

    def error(self, error: ApiError) -> bytes:
        response = self._response("failed")
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=response)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
