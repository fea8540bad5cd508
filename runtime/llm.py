"""Offline generation: a list of prompts in, a list of answers out. vLLM's names.

    llm = LLM("builtin:books-7m")
    for output in llm.generate(["It was a cold evening"], SamplingParams(max_tokens=40)):
        print(output.outputs[0].text)

The prompts run through the same engine as the server's, batched as they fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtool.errors import QtoolError, UsageError
from qtool.progress import bar, console
from qtool.runtime.config import Device, Dtype, EngineConfig
from qtool.runtime.engine.client import ModelInfo
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import FinishReason, GenerationRequest, TokenOutput
from qtool.runtime.loading import LoadedModel, load_model
from qtool.runtime.tokenizer import IncrementalDetokenizer, Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. `stop_reason` is the stop string or stop token id that ended it, if one did."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]


class LLM:
    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: Dtype = "auto",
        device: Device = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = EngineConfig.max_num_seqs,
        max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens,
        block_size: int = EngineConfig.block_size,
        kv_cache_memory_bytes: int | None = None,
        seed: int = EngineConfig.seed,
    ) -> None:
        config = EngineConfig(
            model,
            revision=revision,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            seed=seed,
        )
        loaded = load_model(model, dtype=dtype, device=device, revision=revision)
        self._set_up(loaded, config)

    @classmethod
    def from_loaded(cls, loaded: LoadedModel, config: EngineConfig) -> LLM:
        llm = cls.__new__(cls)
        llm._set_up(loaded, config)
        return llm

    def _set_up(self, loaded: LoadedModel, config: EngineConfig) -> None:
        self.loaded = loaded
        self.engine = Engine(loaded, config)
        self._ids = itertools.count()

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    def get_tokenizer(self) -> Tokenizer:
        if self.loaded.tokenizer is None:
            raise UsageError(
                f"{self.loaded.source.name} has no tokenizer",
                hint="put the tokenizer files of the original model beside the weights",
            )
        return self.loaded.tokenizer

    def close(self) -> None:
        """Let go of the model's memory; the object is of no use afterwards."""
        del self.engine, self.loaded

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts, each a string or a list of token ids."""
        texts = _several_prompts(prompts)
        parameters = _one_each(sampling_params, len(texts))
        answers = [
            self._answer(prompt, sampling, add_special_tokens=True)
            for prompt, sampling in zip(texts, parameters, strict=True)
        ]
        return self._run(answers, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers to one conversation or to several."""
        tokenizer = self.get_tokenizer()
        several = _several_conversations(messages)
        parameters = _one_each(sampling_params, len(several))
        if tokenizer.chat_template_origin.startswith("plain"):
            console.print(
                f"{self.loaded.source.name} has no chat template: speakers are named line by line",
                highlight=False,
            )
        answers = []
        for conversation, sampling in zip(several, parameters, strict=True):
            prompt = tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            answer = self._answer(prompt, sampling, add_special_tokens=False)
            answers.append(answer.with_stop(tokenizer.chat_stop))
        return self._run(answers, use_tqdm)

    def _answer(
        self, prompt: Prompt, sampling: SamplingParams, *, add_special_tokens: bool
    ) -> _Answer:
        if isinstance(prompt, str):
            ids = self.get_tokenizer().encode(prompt, add_special_tokens=add_special_tokens)
            text: str | None = prompt
        else:
            ids, text = list(prompt), None
        request = GenerationRequest(str(next(self._ids)), tuple(ids), sampling)
        return _Answer(request, text, self.loaded.tokenizer)

    def _run(self, answers: Sequence[_Answer], show_progress: bool) -> list[RequestOutput]:
        by_id = {answer.request.request_id: answer for answer in answers}
        try:
            for answer in answers:
                self.engine.add(answer.request)
            with bar("generating", len(answers) if show_progress else None) as progress:
                while self.engine.has_work:
                    for output in self.engine.step():
                        answer = by_id[output.request_id]
                        answer.take(output)
                        if answer.stop is not None and output.finish_reason is None:
                            self.engine.abort(output.request_id)
                        progress.advance(answer.finish_reason is not None)
        finally:
            # Left early (a refused prompt, Ctrl-C): nothing of this call stays in the engine.
            for request_id in by_id:
                self.engine.abort(request_id)
        return [answer.result() for answer in answers]


class _Answer:
    """One request, and the answer as it grows."""

    def __init__(
        self,
        request: GenerationRequest,
        prompt: str | None,
        tokenizer: Tokenizer | None,
        stop: Sequence[str] = (),
    ) -> None:
        self.request = request
        self.stop: str | int | None = None
        self.finish_reason: FinishReason | None = None
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._text = ""
        self._detokenizer = (
            None
            if tokenizer is None
            else IncrementalDetokenizer(
                tokenizer, request.prompt_token_ids, (*request.sampling.stop, *stop)
            )
        )

    def with_stop(self, stop: Sequence[str]) -> _Answer:
        return _Answer(self.request, self._prompt, self._tokenizer, stop)

    def take(self, output: TokenOutput) -> None:
        if output.finish_reason == "error":
            raise QtoolError(f"generation failed: {output.error}")
        self._token_ids.extend(output.new_token_ids)
        self.finish_reason = output.finish_reason
        text_ids = output.new_token_ids
        if output.finish_reason == "stop":
            text_ids, self.stop = text_ids[:-1], text_ids[-1]
        if self._detokenizer is None:
            return
        delta = self._detokenizer.push(text_ids)
        self._text += delta.text
        if delta.stop is not None:
            self.stop, self.finish_reason = delta.stop, "stop"
        elif self.finish_reason is not None:
            self._text += self._detokenizer.flush().text

    def result(self) -> RequestOutput:
        assert self.finish_reason is not None
        completion = CompletionOutput(
            index=0,
            text=self._text,
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop,
        )
        request = self.request
        return RequestOutput(
            request.request_id, self._prompt, request.prompt_token_ids, (completion,)
        )


def _several_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _several_conversations(messages: Messages | Sequence[Messages]) -> list[Messages]:
    if messages and isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]
    return list(messages)  # type: ignore[arg-type]


def _one_each(
    parameters: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if parameters is None or isinstance(parameters, SamplingParams):
        return [parameters or SamplingParams()] * count
    if len(parameters) != count:
        raise UsageError(f"there are {count} prompts and {len(parameters)} sampling parameters")
    return list(parameters)
