"""Offline generation: a list of prompts in, a list of answers out. vLLM's names.

    llm = LLM("builtin:books-7m")
    for output in llm.generate(["It was a cold evening"], SamplingParams(max_tokens=40)):
        print(output.outputs[0].text)

The prompts run through the same engine as the server's, batched as they fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from qtool.errors import UsageError
from qtool.progress import bar, console
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.client import ModelInfo
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest, LoRARequest
from qtool.runtime.engine_args import engine_config
from qtool.runtime.loading import LoadedModel, load_for
from qtool.runtime.outputs import Answers, RequestOutput
from qtool.runtime.requests import (
    Messages,
    Prompt,
    adapter_each,
    one_each,
    prompt_ids,
    several_conversations,
    several_prompts,
    with_bad_words_as_ids,
)
from qtool.runtime.tokenizer import Tokenizer


class LLM:
    def __init__(self, model: str, **engine_args: Any) -> None:
        """model  folder, .gguf file, builtin:NAME or Hub id; engine_args: the fields of
        `EngineConfig`, which are vLLM's names.
        """
        config = engine_config(model, engine_args)
        self._set_up(load_for(config), config)

    @classmethod
    def from_loaded(cls, loaded: LoadedModel, config: EngineConfig) -> LLM:
        llm = cls.__new__(cls)
        llm._set_up(loaded, config)
        return llm

    def _set_up(self, loaded: LoadedModel, config: EngineConfig) -> None:
        self.config = config
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
        self.engine.close()
        del self.engine, self.loaded

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts: strings, lists of token ids, or mappings with
        `prompt` or `prompt_token_ids`.
        """
        several = several_prompts(prompts)
        parameters = one_each(sampling_params, len(several))
        adapters = adapter_each(lora_request, len(several))
        return self._run(
            [
                self._answers(prompt, sampling, lora)
                for prompt, sampling, lora in zip(several, parameters, adapters, strict=True)
            ],
            use_tqdm,
        )

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers to one conversation or to several."""
        tokenizer = self.get_tokenizer()
        several = several_conversations(messages)
        parameters = one_each(sampling_params, len(several))
        adapters = adapter_each(lora_request, len(several))
        if use_tqdm and tokenizer.chat_template_origin.startswith("plain"):
            console.print(
                f"{self.loaded.source.name} has no chat template: speakers are named line by line",
                highlight=False,
            )
        answers = []
        for conversation, sampling, lora in zip(several, parameters, adapters, strict=True):
            prompt = tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            answers.append(
                self._answers(
                    prompt,
                    sampling,
                    lora,
                    add_special_tokens=False,
                    extra_stop=tokenizer.chat_stop,
                )
            )
        return self._run(answers, use_tqdm)

    def _answers(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        lora: LoRARequest | None,
        *,
        add_special_tokens: bool = True,
        extra_stop: Sequence[str] = (),
    ) -> Answers:
        tokenizer = self.loaded.tokenizer
        text, ids = prompt_ids(prompt, tokenizer, add_special_tokens=add_special_tokens)
        sampling = with_bad_words_as_ids(sampling, tokenizer)
        request = GenerationRequest(str(next(self._ids)), ids, sampling, lora=lora)
        return Answers(request, text, tokenizer, extra_stop)

    def _run(self, several: Sequence[Answers], show_progress: bool) -> list[RequestOutput]:
        by_id = {answers.request.request_id: answers for answers in several}
        try:
            for answers in several:
                self.engine.add(answers.request)
            with bar("generating", len(several)) if show_progress else nullcontext() as progress:
                while self.engine.has_work:
                    for output in self.engine.step():
                        answers = by_id[output.request_id]
                        if answers.take(output):
                            self.engine.abort(output.request_id, output.index)
                        if progress is not None:
                            progress.advance(answers.finished)
        finally:
            # Left early (a refused prompt, Ctrl-C): nothing of this call stays in the engine.
            for request_id in by_id:
                self.engine.abort(request_id)
        return [answers.result() for answers in several]
