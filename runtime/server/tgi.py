"""The API of Hugging Face's Text Generation Inference, which `InferenceClient.text_generation`
speaks: `/generate`, `/generate_stream`, `/` for both, and `/info`.

An answer is greedy unless something asks for sampling, and has 100 tokens unless told. Source:
huggingface.co/docs/text-generation-inference, its OpenAPI description.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from qtool import __version__
from qtool.runtime.engine.logprobs import TokenLogprobs
from qtool.runtime.server.answers import AnswerWriter, Head, Timing, Usage
from qtool.runtime.server.completions import CompletionExchange
from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.exchange import json_response
from qtool.runtime.server.generation import Answer, Piece
from qtool.runtime.server.openai import body_schema, parsed_body
from qtool.runtime.server.parsing import INT32, Body, Int, validated
from qtool.runtime.server.prompts import Prompt
from qtool.runtime.server.protocol import CompletionBody
from qtool.runtime.server.service import Service
from qtool.runtime.server.token_texts import TokenTexts

DEFAULT_NEW_TOKENS = 100
SAMPLED_BY = ("temperature", "top_k", "top_p", "typical_p")


class TgiParameters(Body):
    max_new_tokens: Annotated[Int, Field(ge=1, lt=INT32)] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    top_k: Annotated[Int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Int | None = None
    stop: list[str] | None = None
    stop_sequences: list[str] | None = None
    return_full_text: bool | None = None
    truncate: Annotated[Int, Field(ge=1)] | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    best_of: Annotated[Int, Field(ge=1)] | None = None
    top_n_tokens: Annotated[Int, Field(ge=0, le=20)] | None = None
    grammar: dict[str, Any] | None = None


class TgiBody(Body):
    inputs: str
    parameters: TgiParameters | None = None
    stream: bool | None = None

    def as_completion(self, *, stream: bool) -> CompletionBody:
        asked = self.parameters or TgiParameters()
        samples = asked.do_sample or any(getattr(asked, name) is not None for name in SAMPLED_BY)
        fields: dict[str, Any] = {
            name: getattr(asked, name)
            for name in (
                "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
                "frequency_penalty", "seed", "best_of",
            )
        }  # fmt: skip
        fields |= {
            "prompt": self.inputs,
            "stream": stream,
            "max_tokens": asked.max_new_tokens or DEFAULT_NEW_TOKENS,
            "stop": asked.stop or asked.stop_sequences,
            "echo": asked.return_full_text,
            "truncate_prompt_tokens": asked.truncate,
            "logprobs": asked.top_n_tokens or 0,
            "prompt_logprobs": 0 if asked.decoder_input_details else None,
            "response_format": asked.grammar,
        }
        if not samples:
            fields["temperature"] = 0.0
        return validated(CompletionBody, fields)


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    async def answer(request: Request, *, stream: bool | None, in_list: bool) -> Response:
        body = await parsed_body(service, TgiBody, request)
        streams = bool(body.stream) if stream is None else stream

        def writer(
            head: Head, completion: CompletionBody, texts: TokenTexts, prompts: Sequence[Prompt]
        ) -> TgiWriter:
            return TgiWriter(body, texts, prompts[0])

        completion = body.as_completion(stream=streams)
        response = await CompletionExchange(service, completion, writer).response(request)
        if in_list and not streams:
            # The route of Hugging Face's own inference endpoints answers with a list.
            return Response(b"[" + bytes(response.body) + b"]", media_type="application/json")
        return response

    @router.post("/generate", openapi_extra=body_schema(TgiBody))
    async def generate(request: Request) -> Response:
        return await answer(request, stream=False, in_list=False)

    @router.post("/generate_stream", openapi_extra=body_schema(TgiBody))
    async def generate_stream(request: Request) -> Response:
        return await answer(request, stream=True, in_list=False)

    @router.post("/", openapi_extra=body_schema(TgiBody))
    @router.post("/invocations", include_in_schema=False)
    async def either(request: Request) -> Response:
        return await answer(request, stream=None, in_list=True)

    @router.get("/info")
    async def info() -> Response:
        model = service.client.info
        return json_response(
            {
                "model_id": service.config.served_model_names[0],
                "model_sha": None,
                "model_dtype": model.dtype,
                "model_device_type": model.device,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": service.admission.limit,
                "max_best_of": 128,
                "max_stop_sequences": 128,
                "max_input_tokens": model.max_model_len - 1,
                "max_total_tokens": model.max_model_len,
                "max_batch_total_tokens": model.num_kv_blocks * model.block_size,
                "max_client_batch_size": 1,
                "router": "qtool",
                "version": __version__,
            }
        )

    return router


class TgiWriter(AnswerWriter):
    def __init__(self, body: TgiBody, texts: TokenTexts, prompt: Prompt) -> None:
        self._asked = body.parameters or TgiParameters()
        self._texts = texts
        self._prompt = prompt
        self._text = (prompt.text or "") if self._asked.return_full_text else ""
        self._num_tokens = 0

    def document(self, answers: Sequence[Answer], usage: Usage, timing: Timing) -> dict[str, Any]:
        answer = answers[0]
        document: dict[str, Any] = {"generated_text": self._text + answer.text}
        if self._asked.details or self._asked.decoder_input_details:
            document["details"] = self._details(answer)
        return document

    def _details(self, answer: Answer) -> dict[str, Any]:
        prefill = zip(self._prompt.token_ids, answer.prompt_logprobs, strict=False)
        return {
            "finish_reason": _finish_reason(answer),
            "generated_tokens": answer.num_generated_tokens,
            "seed": self._asked.seed,
            "prefill": [
                {
                    "id": token_id,
                    "text": self._texts.text_of(token_id),
                    "logprob": None if entry is None else entry.logprob,
                }
                for token_id, entry in prefill
            ],
            "tokens": [self._token(entry) for entry in answer.logprobs],
            "top_tokens": [self._top(entry) for entry in answer.logprobs],
        }

    def _token(self, entry: TokenLogprobs, text: str | None = None) -> dict[str, Any]:
        token_id = entry.token_id
        return {
            "id": token_id,
            "text": self._texts.text_of(token_id) if text is None else text,
            "logprob": entry.logprob,
            "special": self._texts.is_special(token_id),
        }

    def _top(self, entry: TokenLogprobs) -> list[dict[str, Any]]:
        return [
            {
                "id": token_id,
                "text": self._texts.text_of(token_id),
                "logprob": logprob,
                "special": self._texts.is_special(token_id),
            }
            for token_id, logprob in entry.top[: self._asked.top_n_tokens or 0]
        ]

    def piece(self, index: int, piece: Piece, usage: Usage) -> bytes:
        self._text += piece.text
        events = []
        for position, entry in enumerate(piece.logprobs):
            self._num_tokens += 1
            last = position == len(piece.logprobs) - 1
            ends = last and piece.finish_reason is not None
            # Clients put the texts of tokens together: together they are what the step wrote.
            event: dict[str, Any] = {
                "index": self._num_tokens,
                "token": self._token(entry, piece.text if last else ""),
                "top_tokens": self._top(entry),
                "generated_text": self._text if ends else None,
                "details": None,
            }
            if ends:
                event["details"] = {
                    "finish_reason": _finish_reason(piece),
                    "generated_tokens": piece.num_generated_tokens,
                    "input_length": usage.prompt_tokens,
                    "seed": self._asked.seed,
                }
            events.append(b"data:" + orjson.dumps(event) + b"\n\n")
        return b"".join(events)

    def error(self, error: ApiError) -> bytes:
        return b"data:" + orjson.dumps(tgi_error(error)) + b"\n\n"


def _finish_reason(answer: Answer | Piece) -> str:
    if answer.finish_reason == "length":
        return "length"
    return "eos_token" if answer.stop_reason is None else "stop_sequence"


def tgi_error(error: ApiError) -> dict[str, Any]:
    kinds = {429: "overloaded", 503: "overloaded", 400: "validation", 413: "validation"}
    return {"error": error.message, "error_type": kinds.get(error.status, "generation")}
