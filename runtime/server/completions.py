"""`POST /v1/completions`: text to go on with, whole or streamed, and scores of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qtool.runtime.server.answers import AnswerWriter, Head, Timing, Usage
from qtool.runtime.server.chunks import DONE, ChunkWriter, error_event
from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.exchange import Exchange
from qtool.runtime.server.generation import Answer, Job, Piece
from qtool.runtime.server.prompts import (
    OPENAI_COMPLETION_TOKENS,
    Prompt,
    completion_prompts,
    num_new_tokens,
    sampling_params,
)
from qtool.runtime.server.protocol import CompletionBody
from qtool.runtime.server.service import Service
from qtool.runtime.server.structured import structured_outputs
from qtool.runtime.server.token_texts import TokenTexts, completion_logprobs, prompt_logprobs

WriterFactory = Callable[[Head, CompletionBody, TokenTexts, Sequence[Prompt]], AnswerWriter]


class CompletionExchange(Exchange):
    id_prefix = "cmpl"

    def __init__(
        self, service: Service, body: CompletionBody, writer: WriterFactory | None = None
    ) -> None:
        super().__init__(service, body)
        self._completion = body
        self._writer = writer or CompletionWriter

    async def prepare(self) -> tuple[list[Job], AnswerWriter]:
        body, service = self._completion, self.service
        info = service.client.info
        prompts = await completion_prompts(body, service.tokenizer, info)
        structured = structured_outputs(body)
        jobs: list[Job] = []
        for prompt in prompts:
            # A given max_tokens must fit behind every prompt; the default shrinks to fit.
            max_tokens = num_new_tokens(
                body.max_tokens,
                OPENAI_COMPLETION_TOKENS,
                len(prompt.token_ids),
                info,
                param="prompt",
            )
            sampling = sampling_params(
                body,
                service.config.sampling,
                info,
                max_tokens=max(max_tokens, 1),
                structured=structured,
                num_top_logprobs=self._num_top_logprobs,
                num_top_prompt_logprobs=self._num_top_prompt_logprobs,
            )
            count = body.num_generated_choices
            jobs += self.jobs_for(prompt.token_ids, sampling, count, first_index=len(jobs))
        return jobs, self._writer(self.head, body, service.texts, self._echoes(prompts))

    @property
    def _num_top_logprobs(self) -> int | None:
        body = self._completion
        ranks_answers = body.num_generated_choices > body.num_choices
        return 0 if body.logprobs is None and ranks_answers else body.logprobs

    @property
    def _num_top_prompt_logprobs(self) -> int | None:
        """What is told of the prompt's tokens, for `echo` and for vLLM's own field."""
        body = self._completion
        echoed = body.logprobs if body.echo else None
        asked = [count for count in (echoed, body.prompt_logprobs) if count is not None]
        return max(asked, default=None)

    def _echoes(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompt of each choice, with its text where it is to be repeated."""
        decode, body = self.service.tokenizer.decode, self._completion
        return [
            Prompt(
                prompt.token_ids,
                prompt.text
                if prompt.text is not None or not body.echo
                else decode(prompt.token_ids, skip_special_tokens=False),
            )
            for prompt in prompts
            for _ in range(body.num_choices)
        ]

    def chosen(self, answers: list[Answer]) -> list[Answer]:
        """Of `best_of` answers to a prompt, the `n` that are likeliest a token."""
        body = self._completion
        made, sent = body.num_generated_choices, body.num_choices
        if made == sent:
            return answers
        groups = [answers[start : start + made] for start in range(0, len(answers), made)]
        return [
            answer
            for group in groups
            for answer in sorted(group, key=lambda answer: -answer.mean_logprob)[:sent]
        ]


class CompletionWriter(AnswerWriter):
    """prompts: of each choice."""

    def __init__(
        self, head: Head, body: CompletionBody, texts: TokenTexts, prompts: Sequence[Prompt]
    ) -> None:
        self._head = {
            "id": head.id,
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
            "system_fingerprint": None,
        }
        self._body = body
        self._texts = texts
        self._prompts = prompts
        self._chunks = ChunkWriter(self._head, body)
        self._offsets = [len(self._echoed_text(index)) for index in range(len(prompts))]
        self._begun: set[int] = set()

    def document(self, answers: Sequence[Answer], usage: Usage, timing: Timing) -> dict[str, Any]:
        if self._body.max_tokens == 0:
            usage = Usage(usage.prompt_tokens, 0, usage.cached_tokens)
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head, "choices": choices, "usage": usage.as_dict()}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        body, scored_only = self._body, self._body.max_tokens == 0
        text = self._echoed_text(index) + ("" if scored_only else answer.text)
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": "length" if scored_only else answer.finish_reason,
            "stop_reason": None if scored_only else answer.stop_reason,
        }
        token_ids = [] if scored_only else answer.token_ids
        if body.logprobs is not None:
            entries = [] if scored_only else answer.logprobs
            choice["logprobs"] = self._logprobs(
                index, answer.prompt_logprobs, entries, token_ids, first=True
            )
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                answer.prompt_logprobs, self._texts, body.prompt_logprobs
            )
        if body.return_token_ids:
            choice["prompt_token_ids"] = list(self._prompts[index].token_ids)
            choice["token_ids"] = list(token_ids)
        return choice

    def _echoed_text(self, index: int) -> str:
        return (self._prompts[index].text or "") if self._body.echo else ""

    def _logprobs(
        self,
        index: int,
        of_prompt: Sequence[Any],
        entries: Sequence[Any],
        token_ids: Sequence[int],
        *,
        first: bool,
    ) -> dict[str, Any]:
        body = self._body
        assert body.logprobs is not None
        ids, offset = list(token_ids), self._offsets[index]
        if body.echo and first:
            ids = [*self._prompts[index].token_ids, *ids]
            entries = [*of_prompt, *entries]
            offset = 0
        as_ids = bool(body.return_tokens_as_token_ids)
        return completion_logprobs(
            entries, ids, self._texts, body.logprobs, offset=offset, as_ids=as_ids
        )

    def piece(self, index: int, piece: Piece, usage: Usage) -> bytes:
        body = self._body
        first = index not in self._begun
        self._begun.add(index)
        scored_only = body.max_tokens == 0
        text = "" if scored_only else piece.text
        token_ids = () if scored_only else piece.token_ids
        logprobs = None
        if body.logprobs is not None:
            entries = () if scored_only else piece.logprobs
            logprobs = self._logprobs(index, piece.prompt_logprobs, entries, token_ids, first=first)
            new = logprobs["tokens"][len(logprobs["tokens"]) - len(token_ids) :]
            self._offsets[index] += sum(map(len, new))
        return self._chunks.completion(
            index,
            self._echoed_text(index) + text if first else text,
            usage,
            logprobs=logprobs,
            finish_reason="length" if scored_only else piece.finish_reason,
            stop_reason=None if scored_only else piece.stop_reason,
            token_ids=list(token_ids) if body.return_token_ids else None,
        )

    def closing(self, usage: Usage, timing: Timing) -> bytes:
        return self._chunks.usage(usage) + DONE

    def error(self, error: ApiError) -> bytes:
        return error_event(error) + DONE
