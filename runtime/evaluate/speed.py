"""Tokens per second of greedy generation, one sequence, as `qtool serve` would run the model.

The prompt's share is taken out by timing the same prompt with one new token and with many: what
remains is the time of the tokens between. Beside an accuracy report this says what the size buys;
for a benchmark under load use a load generator.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing

import torch

from qtool.checkpoint import Source
from qtool.progress import bar
from qtool.runtime.config import Device
from qtool.runtime.engine.sequence import SamplingParams
from qtool.runtime.evaluate.report import Speed
from qtool.runtime.llm import LLM

PROMPT = "It was a cold evening in November, and the fire in the library had burned low when"
NUM_TOKENS = 64
RUNS = 2


def measure_speed(source: Source, name: str, *, device: Device = "auto") -> Speed:
    """Load the model as the server would, warm it up, and time it; the better of two runs."""
    with closing(LLM(str(source.path), device=device)) as llm, bar(f"timing {name}"):
        context = llm.info.max_model_len
        prompt = llm.get_tokenizer().encode(PROMPT)[: max(1, context // 4)]
        num_tokens = min(NUM_TOKENS, context - len(prompt) - 1)
        _seconds(llm, prompt, 8)
        best = min(
            _seconds(llm, prompt, num_tokens + 1) - _seconds(llm, prompt, 1) for _ in range(RUNS)
        )
        info = llm.info
    return Speed(num_tokens / best, num_tokens, info.dtype, info.device, torch.get_num_threads())


def _seconds(llm: LLM, prompt: Sequence[int], num_tokens: int) -> float:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    started = time.perf_counter()
    llm.generate([prompt], sampling, use_tqdm=False)
    return time.perf_counter() - started
