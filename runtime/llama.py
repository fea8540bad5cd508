"""The class that llama-cpp-python's users know, over this engine and any model that it loads.

    llm = Llama(model_path="model.gguf", n_ctx=4096, n_gpu_layers=-1, n_threads=8)
    llm.create_chat_completion(messages=[{"role": "user", "content": "Hello"}], max_tokens=256)
    llm("The sea", max_tokens=32, stream=True)

Names, defaults and the shape of answers are llama-cpp-python's (its API reference), so that a
program changes its import and nothing else. Parameters that only make sense for ggml (n_batch,
use_mmap, ...) are accepted and have no effect. What would change the text and is not offered
(Mirostat, tail-free sampling, XTC) is refused by name.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from qtool.errors import UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.sampling_params import SamplingParams, StructuredOutputsParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.llama_json import ChatWriter, CompletionWriter, Document, Writer
from qtool.runtime.llm import LLM
from qtool.runtime.loading import load_for
from qtool.runtime.outputs import Answers, RequestOutput
from qtool.runtime.requests import Prompt, prompt_ids
from qtool.runtime.tokenizer import Tokenizer

# What llama-cpp-python takes for "draw a seed".
RANDOM_SEED = 0xFFFFFFFF

# Sampling that is not offered -> the value that leaves it off.
NOT_OFFERED: Mapping[str, object] = {
    "mirostat_mode": 0,
    "tfs_z": 1.0,
    "xtc_probability": 0.0,
    "dry_multiplier": 0.0,
    "top_n_sigma": -1.0,
    "logits_processor": None,
    "stopping_criteria": None,
    "suffix": None,
    "tools": None,
    "functions": None,
}


class Llama:
    """One model and one conversation with it at a time."""

    def __init__(
        self,
        model_path: str,
        *,
        n_gpu_layers: int = 0,
        seed: int = RANDOM_SEED,
        n_ctx: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        verbose: bool = True,
        **unused: Any,
    ) -> None:
        """model_path    a .gguf file, a folder, builtin:NAME or a Hub id
        n_gpu_layers  on the GPU where there is one, the last layers of all blocks and the head; -1:
                      all of them, 0: none
        n_ctx         tokens of prompt and answer; 0: as many as the model was made for
        n_threads     of the process; None: as they are
        unused        llama-cpp-python's other parameters, which have no meaning here
        """
        if n_threads is not None or n_threads_batch is not None:
            torch.set_num_threads(max(n_threads or 1, n_threads_batch or 1))
        asked = EngineConfig(
            model_path,
            n_gpu_layers=n_gpu_layers,
            max_num_seqs=1,
            seed=time.time_ns() if seed == RANDOM_SEED else seed,
        )
        loaded = load_for(asked)
        longest = loaded.max_position_embeddings
        if n_ctx > longest and verbose:
            print(
                f"n_ctx is {n_ctx}, and the model was made for {longest} tokens: {longest} is used",
                file=sys.stderr,
            )
        config = replace(asked, max_model_len=min(n_ctx, longest) if n_ctx > 0 else None)
        self.model_path = model_path
        self._llm = LLM.from_loaded(loaded, config)
        self._ids = itertools.count()

    @classmethod
    def from_pretrained(cls, repo_id: str, filename: str | None = None, **options: Any) -> Llama:
        """A model on the Hub: a repository, or the .gguf file in it that the pattern fits."""
        if filename is None:
            return cls(model_path=repo_id, **options)
        from fnmatch import fnmatch

        from huggingface_hub import HfApi, hf_hub_download

        names = [name for name in HfApi().list_repo_files(repo_id) if fnmatch(name, filename)]
        if len(names) != 1:
            raise UsageError(
                f"{len(names)} files of {repo_id} fit {filename!r}, must be one",
                hint=", ".join(names[:10]) or None,
            )
        return cls(model_path=hf_hub_download(repo_id, names[0]), **options)

    def n_ctx(self) -> int:
        return self._llm.info.max_model_len

    def n_vocab(self) -> int:
        return self._llm.info.vocab_size

    def token_bos(self) -> int:
        token = self._tokenizer.bos_token_id
        return -1 if token is None else token

    def token_eos(self) -> int:
        return next(iter(self._tokenizer.eos_token_ids), -1)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """special  whether names of special tokens in the text become those tokens"""
        backend = self._tokenizer.backend
        before = backend.encode_special_tokens
        try:
            backend.encode_special_tokens = not special
            ids = self._tokenizer.encode(text.decode("utf-8", "replace"), add_bos)
        finally:
            backend.encode_special_tokens = before
        while add_bos and len(ids) > 1 and ids[-1] in self._tokenizer.eos_token_ids:
            ids.pop()  # some tokenizers end a text as well as beginning it
        return ids

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        decode = self._tokenizer.decode
        if not prev_tokens:
            return decode(tokens, skip_special_tokens=not special).encode()
        # With what stands before it: whether the text begins with a space depends on that.
        before = decode(prev_tokens, skip_special_tokens=not special)
        both = decode([*prev_tokens, *tokens], skip_special_tokens=not special)
        return both[len(before) :].encode()

    def close(self) -> None:
        self._llm.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()

    def __call__(self, prompt: Prompt, **options: Any) -> Document | Iterator[Document]:
        """`create_completion`."""
        return self.create_completion(prompt, **options)

    def create_completion(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        echo: bool = False,
        logprobs: int | None = None,
        stream: bool = False,
        model: str | None = None,
        **options: Any,
    ) -> Document | Iterator[Document]:
        """Continue a text; with `stream`, the pieces as they come."""
        sampling = _sampling(
            options, max_tokens=max_tokens, temperature=temperature, logprobs=logprobs
        )
        text, ids = prompt_ids(prompt, self._tokenizer)
        if text is None:
            text = self._tokenizer.decode(ids)
        writer = CompletionWriter(model or self.model_path, text if echo else "")
        return self._write(writer, text, ids, sampling, (), stream)

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.2,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        stream: bool = False,
        model: str | None = None,
        **options: Any,
    ) -> Document | Iterator[Document]:
        """Answer a conversation; with `stream`, the pieces as they come."""
        sampling = _sampling(
            options,
            max_tokens=max_tokens,
            temperature=temperature,
            logprobs=(top_logprobs or 0) if logprobs else None,
            structured_outputs=_form(response_format),
        )
        tokenizer = self._tokenizer
        text = tokenizer.apply_chat_template(messages)
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        writer = ChatWriter(model or self.model_path)
        return self._write(writer, text, ids, sampling, tokenizer.chat_stop, stream)

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._llm.get_tokenizer()

    def _write(
        self,
        writer: Writer,
        prompt: str,
        ids: tuple[int, ...],
        sampling: SamplingParams,
        extra_stop: Sequence[str],
        stream: bool,
    ) -> Document | Iterator[Document]:
        request = GenerationRequest(str(next(self._ids)), ids, sampling)
        answers = Answers(request, prompt, self._tokenizer, extra_stop)
        outputs = self._outputs(answers)
        first = next(outputs)  # now, so that a refused request raises here and not at its first use
        if stream:
            return writer.chunks(itertools.chain([first], outputs))
        *_, last = first, *outputs
        return writer.whole(last)

    def _outputs(self, answers: Answers) -> Iterator[RequestOutput]:
        engine, request = self._llm.engine, answers.request
        engine.add(request)
        try:
            while not answers.finished:
                for output in engine.step():
                    if answers.take(output):
                        engine.abort(request.request_id, output.index)
                yield answers.result()
        finally:
            engine.abort(request.request_id)


def _sampling(
    options: Mapping[str, Any],
    *,
    max_tokens: int | None,
    temperature: float,
    logprobs: int | None,
    structured_outputs: StructuredOutputsParams | None = None,
) -> SamplingParams:
    """llama-cpp-python's names and defaults -> ours."""
    options = dict(options)
    for name, off in NOT_OFFERED.items():
        if options.pop(name, off) not in (off, None):
            raise UsageError(f"{name} is not offered", hint=f"leave it out, or pass {off!r}")
    stop = options.pop("stop", None) or ()
    seed = options.pop("seed", None)
    grammar = options.pop("grammar", None)
    if grammar is not None:
        structured_outputs = StructuredOutputsParams(grammar=str(grammar))
    top_k = options.pop("top_k", 40)
    values = {
        "top_p": options.pop("top_p", 0.95),
        "min_p": options.pop("min_p", 0.05),
        "typical_p": options.pop("typical_p", 1.0),
        "frequency_penalty": options.pop("frequency_penalty", None)
        or options.pop("frequence_penalty", 0.0),
        "presence_penalty": options.pop("presence_penalty", 0.0),
        "repetition_penalty": options.pop("repeat_penalty", 1.0),
        "logit_bias": options.pop("logit_bias", None),
    }
    ignored = {"mirostat_tau", "mirostat_eta", "tool_choice", "function_call"}
    if unknown := sorted(set(options) - ignored):
        raise UsageError(f"{unknown[0]} is not a parameter of a completion")
    return SamplingParams(
        **values,
        temperature=max(temperature, 0.0),
        top_k=max(top_k, 0),
        max_tokens=max_tokens if max_tokens is not None and max_tokens > 0 else None,
        stop=tuple([stop] if isinstance(stop, str) else stop),
        seed=None if seed == RANDOM_SEED else seed,
        logprobs=logprobs,
        structured_outputs=structured_outputs,
    )


def _form(response_format: Mapping[str, Any] | None) -> StructuredOutputsParams | None:
    if response_format is None or response_format.get("type") == "text":
        return None
    if response_format.get("type") != "json_object":
        raise UsageError(f"response_format is {response_format!r:.80}, must be text or json_object")
    schema = response_format.get("schema")
    if schema is None:
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=schema)
