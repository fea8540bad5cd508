"""One engine in a process of its own, told what to do by lines of JSON; see engine.py.

    python engine_worker.py {qtool,qtool_mapped,llama_cpp,transformers,vllm,vllm_default} MODEL \
        THREADS {wall,cpu}

It imports what its engine needs and nothing else, so that any interpreter can run it. A line is
{"do": "decode", "batch": B, "prompt": P, "steps": N}, {"do": "prefill", "tokens": N} or
{"do": "idle", "seconds": S}; the answer is one line: seconds of each step, or of the prompt, or the
CPU time that waiting took. vllm_default, as its users start it, also takes {"do": "arrival", ...}.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from functools import partial
from typing import Any

VOCAB = 4000
READ_BYTES = 16 << 20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS[sys.argv[4] if len(sys.argv) > 4 else "wall"]


class Qtool:
    """The engine as the server runs it, sampling included."""

    def __init__(self, model: str, threads: int, *, cache_packed: bool = False) -> None:
        import torch

        from qtool.runtime.config import EngineConfig
        from qtool.runtime.engine.engine import Engine as TheEngine
        from qtool.runtime.loading import load_model

        torch.set_num_threads(threads)
        self._loaded = load_model(model, dtype="bfloat16", cache_packed=cache_packed)
        config = EngineConfig(
            model,
            max_model_len=1024,
            max_num_seqs=16,
            max_num_batched_tokens=512,
            target_itl_ms=0,
            enable_prefix_caching=False,
        )
        self._engine = TheEngine(self._loaded, config)
        self._count = 0

    def _add(self, tokens: int, max_tokens: int) -> None:
        from qtool.runtime.engine.sampling_params import SamplingParams
        from qtool.runtime.engine.sequence import GenerationRequest

        self._count += 1
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        prompt = tuple(random.randrange(5, VOCAB) for _ in range(tokens))
        self._engine.add(GenerationRequest(str(self._count), prompt, sampling))

    def decode(self, batch: int, prompt: int, steps: int) -> list[float]:
        for _ in range(batch):
            self._add(prompt, steps + 4)
        seconds = []
        while self._engine.has_work:
            started = clock()
            outputs = self._engine.step()
            took = clock() - started
            if len(outputs) == batch and not any(output.finish_reason for output in outputs):
                seconds.append(took)
        return seconds[2:]  # the prompts' own steps come first

    def prefill(self, tokens: int) -> float:
        self._add(tokens, 1)
        started = clock()
        while self._engine.has_work:
            self._engine.step()
        return clock() - started

    def read(self, megabytes: int) -> dict[str, Any]:
        """What a token reads, and the seconds in which each of some stretches of memory is read."""
        import torch

        from qtool.kernels.cpu.huge_pages import HugePages
        from qtool.kernels.cpu.native import Native, load

        native = load()
        assert isinstance(native, Native), native.reason
        data = HugePages().zeros((megabytes << 20,), torch.uint8).fill_(1)
        seconds = []
        for stretch in data.split(READ_BYTES):
            started = clock()
            native.read(stretch)
            seconds.append(clock() - started)
        return {"token_bytes": self._loaded.token_bytes, "bytes": READ_BYTES, "seconds": seconds}


class LlamaCpp:
    """Through its C interface: llama_decode alone, no sampling."""

    def __init__(self, model: str, threads: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        # Kept: the library calls it as long as it lives.
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), loading)
        assert self._model, model
        asked = llama_cpp.llama_context_default_params()
        asked.n_ctx, asked.n_batch, asked.n_ubatch, asked.n_seq_max = 16 * 256, 512, 512, 16
        asked.n_threads = asked.n_threads_batch = threads
        asked.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, asked)
        assert self._context
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)

    def _run(self, rows: list[tuple[int, int, bool]]) -> float:
        """(position, sequence, whether logits are wanted) of each row."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (position, sequence, wanted) in enumerate(rows):
            batch.token[i] = random.randrange(5, VOCAB)
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        started = clock()
        assert self._lib.llama_decode(self._context, batch) == 0
        self._lib.llama_synchronize(self._context)
        return clock() - started

    def _forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def decode(self, batch: int, prompt: int, steps: int) -> list[float]:
        self._forget()
        for sequence in range(batch):
            self._run([(t, sequence, t == prompt - 1) for t in range(prompt)])
        return [
            self._run([(prompt + step, sequence, True) for sequence in range(batch)])
            for step in range(steps)
        ]

    def prefill(self, tokens: int) -> float:
        self._forget()
        return self._run([(t, 0, t == tokens - 1) for t in range(tokens)])


class Transformers:
    """AutoModelForCausalLM in bfloat16, its own cache, the last row's logits."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def _run(self, tokens: Any, cache: Any) -> tuple[Any, float]:
        started = clock()
        with self._torch.inference_mode():
            out = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.past_key_values, clock() - started

    def _tokens(self, batch: int, count: int) -> Any:
        return self._torch.randint(5, VOCAB, (batch, count))

    def decode(self, batch: int, prompt: int, steps: int) -> list[float]:
        cache, _ = self._run(self._tokens(batch, prompt), None)
        seconds = []
        for _ in range(steps):
            cache, took = self._run(self._tokens(batch, 1), cache)
            seconds.append(took)
        return seconds

    def prefill(self, tokens: int) -> float:
        return self._run(self._tokens(1, tokens), None)[1]


class Vllm:
    """Its engine in this process, token ids in and out. `tuned`: with qtool's budget of a step, and
    both cores; without, as `vllm serve` runs it.
    """

    def __init__(self, model: str, threads: int, *, tuned: bool = True) -> None:
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_LOGGING_LEVEL="ERROR",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
        )
        from vllm import LLM, SamplingParams

        own: dict[str, Any] = {"max_model_len": 4096}
        if tuned:
            own = {"max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 512}
        llm = LLM(
            model,
            dtype="bfloat16",
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            **own,
        )
        self._engine = llm.llm_engine
        self._params = SamplingParams
        self._count = 0

    def _add(self, tokens: int, max_tokens: int) -> str:
        self._count += 1
        sampling = self._params(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        prompt = [random.randrange(5, VOCAB) for _ in range(tokens)]
        self._engine.add_request(str(self._count), {"prompt_token_ids": prompt}, sampling)
        return str(self._count)

    def decode(self, batch: int, prompt: int, steps: int) -> list[float]:
        for _ in range(batch):
            self._add(prompt, steps + 4)
        seconds = []
        while self._engine.has_unfinished_requests():
            started = clock()
            outputs = self._engine.step()
            took = clock() - started
            if len(outputs) == batch and not any(output.finished for output in outputs):
                seconds.append(took)
        return seconds[2:]

    def prefill(self, tokens: int) -> float:
        self._add(tokens, 1)
        started = clock()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return clock() - started

    def arrival(
        self, streams: int, stream_prompt: int, long_prompt: int, steps_before: int
    ) -> dict[str, Any]:
        """Gaps between tokens of the streams, alone and while a long prompt is computed."""
        names = [self._add(stream_prompt, 2000) for _ in range(streams)]
        latest: dict[str, float] = {}

        def step() -> list[float]:
            outputs = self._engine.step()
            now = clock()
            gaps = [now - latest[o.request_id] for o in outputs if o.request_id in latest]
            latest.update((output.request_id, now) for output in outputs)
            return gaps

        alone = [gap for _ in range(steps_before) for gap in step()]
        long = self._add(long_prompt, 8)
        started = clock()
        gaps: list[float] = []
        steps = 0
        while long not in latest:
            gaps.extend(step())
            steps += 1
        first_token = clock() - started
        gaps.extend(step())
        self._engine.abort_request([*names, long])
        return {"alone": alone, "gaps": gaps, "first_token": first_token, "steps": steps}


ENGINES: dict[str, Any] = {
    "qtool": Qtool,
    "qtool_mapped": partial(Qtool, cache_packed=True),
    "llama_cpp": LlamaCpp,
    "transformers": Transformers,
    "vllm": Vllm,
    "vllm_default": partial(Vllm, tuned=False),
}


def idle(seconds: float) -> float:
    before = sum(os.times()[:2])
    time.sleep(seconds)
    return sum(os.times()[:2]) - before


def about(name: str) -> str:
    if name == "llama_cpp":
        import llama_cpp

        flags = llama_cpp.llama_print_system_info().decode()
        return f"llama-cpp-python {llama_cpp.__version__}: {flags}"
    import torch

    versions = f"torch {torch.__version__}"
    if name.startswith("vllm"):
        import vllm

        return f"vllm {vllm.__version__}, {versions}"
    return versions


def main() -> None:
    name, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    random.seed(0)
    # The answers' own: some engines write logs to the standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Any = ENGINES[name](model, threads)
    engine.prefill(4)  # the first token
    ready = {"about": about(name), "cpu_seconds": time.process_time()}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        match asked.pop("do"):
            case "decode":
                answer: Any = engine.decode(**asked)
            case "prefill":
                answer = engine.prefill(**asked)
            case "arrival":
                answer = engine.arrival(**asked)
            case "read":
                answer = engine.read(**asked)
            case "idle":
                answer = idle(**asked)
            case other:
                raise ValueError(other)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
