"""Tokens per second of greedy generation, one sequence, as `qtool serve` would run the model.

The prompt's share is taken out by timing the same prompt with one new token and with many: what
remains is the time of the tokens between. Beside an accuracy report this says what the size buys;
for a benchmark under load use a load generator.
"""

from __future__ import annotations

import time

import torch
from qtool.runtime.llm import LLM

from qtool.checkpoint import Source
from qtool.runtime.config import Device
from qtool.runtime.engine.sequence import SamplingParams
from qtool.runtime.evaluate.report import Speed

PROMPT = "It was a cold evening in November, and the fire in the library had burned low when"
NUM_TOKENS = 64


def measure_speed(source: Source, *, device: Device = "auto") -> Speed:
    """Load the model as the server would, warm it up, and time it; the better of two runs."""
    llm = LLM(str(source.path), device=device)
    try:
        _seconds(llm, 8)
        per_run = [_seconds(llm, NUM_TOKENS + 1) - _seconds(llm, 1) for _ in range(2)]
        info = llm.info
    finally:
        llm.close()
    return Speed(
        NUM_TOKENS / min(per_run), NUM_TOKENS, info.dtype, info.device, torch.get_num_threads()
    )


def _seconds(llm: LLM, num_tokens: int) -> float:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    started = time.perf_counter()
    llm.generate([PROMPT], sampling)
    return time.perf_counter() - started
