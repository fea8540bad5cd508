"""What a generation gives back, under vLLM's names, and how it is gathered from engine outputs.

`Answers` follows one request: it turns ids into text, finds stop strings, keeps log-probabilities,
and of `best_of` answers picks the ones to return. `LLM` takes its result once everything is there,
`AsyncLLMEngine` after every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qtool.errors import QtoolError
from qtool.runtime.engine.logprobs import TokenLogprobs
from qtool.runtime.engine.sequence import FinishReason, GenerationRequest, TokenOutput
from qtool.runtime.tokenizer import IncrementalDetokenizer, Tokenizer


class Logprob(NamedTuple):
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# The chosen token and the likeliest ones, by id.
PositionLogprobs = Mapping[int, Logprob]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. `stop_reason` is the stop string or stop token id that ended it, if one did."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    logprobs: tuple[PositionLogprobs, ...] | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool = True
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    num_cached_tokens: int = 0


class Answers:
    """One request, and its answers as they grow."""

    def __init__(
        self,
        request: GenerationRequest,
        prompt: str | None,
        tokenizer: Tokenizer | None,
        extra_stop: Sequence[str] = (),
    ) -> None:
        self.request = request
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._answers = [
            _Answer(request, tokenizer, extra_stop, index)
            for index in range(request.sampling.num_sequences)
        ]
        self._prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
        self._num_cached_tokens = 0

    @property
    def finished(self) -> bool:
        return all(answer.finish_reason is not None for answer in self._answers)

    def take(self, output: TokenOutput) -> bool:
        """Take one output of the engine. True if its answer has ended before the engine knows (at
        a stop string), so that it must be told.
        """
        if output.finish_reason == "error":
            raise QtoolError(f"generation failed: {output.error}")
        answer = self._answers[output.index]
        if answer.finish_reason is not None:
            return False  # on its way when the answer ended
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = tuple(
                None if found is None else self._position(found) for found in output.prompt_logprobs
            )
        answer.take(output)
        if output.logprobs is not None:
            for found in output.logprobs:
                answer.take_logprobs(found, self._position(found))
        return answer.finish_reason is not None and output.finish_reason is None

    def _position(self, found: TokenLogprobs) -> PositionLogprobs:
        def entry(token_id: int, logprob: float, rank: int) -> Logprob:
            text = None if self._tokenizer is None else self._tokenizer.decode([token_id], False)
            return Logprob(logprob, rank, text)

        position = {found.token_id: entry(found.token_id, found.logprob, found.rank)}
        for rank, (token_id, logprob) in enumerate(found.top, start=1):
            if token_id not in position:
                position[token_id] = entry(token_id, logprob, rank)
        return position

    def result(self) -> RequestOutput:
        """The answers so far; of `best_of` the best, once all are there."""
        sampling = self.request.sampling
        answers: Iterable[_Answer] = self._answers
        if sampling.num_sequences > sampling.n:
            # Ties go to the first: sorting is stable.
            answers = sorted(answers, key=lambda answer: -answer.mean_logprob)
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=tuple(
                answer.output(index)
                for index, answer in zip(range(sampling.n), answers, strict=False)
            ),
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
        )


class _Answer:
    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer | None,
        extra_stop: Sequence[str],
        index: int,
    ) -> None:
        sampling = request.sampling
        self.finish_reason: FinishReason | None = None
        self._sampling = sampling
        self._stop: str | int | None = None
        self._token_ids: list[int] = []
        self._text = ""
        self._logprobs: list[PositionLogprobs] = []
        self._cumulative_logprob = 0.0
        self._detokenizer = (
            None
            if tokenizer is None
            else IncrementalDetokenizer(
                tokenizer,
                request.prompt_token_ids,
                (*sampling.stop, *extra_stop),
                sampling.include_stop_str_in_output,
                skip_special_tokens=sampling.skip_special_tokens,
            )
        )

    @property
    def mean_logprob(self) -> float:
        return self._cumulative_logprob / max(len(self._token_ids), 1)

    def take(self, output: TokenOutput) -> None:
        self._token_ids.extend(output.new_token_ids)
        self.finish_reason = output.finish_reason
        text_ids = output.new_token_ids
        if output.finish_reason == "stop":
            self._stop = text_ids[-1]
            if not self._sampling.include_stop_str_in_output:
                text_ids = text_ids[:-1]  # what ended the text is no part of it
        if self._detokenizer is None:
            return
        delta = self._detokenizer.push(text_ids)
        self._text += delta.text
        if delta.stop is not None:
            self._stop, self.finish_reason = delta.stop, "stop"
        elif self.finish_reason is not None:
            self._text += self._detokenizer.flush().text

    def take_logprobs(self, found: TokenLogprobs, position: PositionLogprobs) -> None:
        self._cumulative_logprob += found.logprob
        if self._sampling.logprobs is not None:
            self._logprobs.append(position)

    def output(self, index: int) -> CompletionOutput:
        asked = self._sampling.num_logprobs is not None
        return CompletionOutput(
            index=index,
            text=self._text,
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self._stop,
            cumulative_logprob=self._cumulative_logprob if asked else None,
            logprobs=None if self._sampling.logprobs is None else tuple(self._logprobs),
        )
