"""Tokens per second of greedy generation, one sequence, as `qtool serve` would run the model; on
the side, how long it takes to load and what it takes in memory.

What is timed is the gap between one token and the next, so the prompt has no share in it, and the
median gap is what counts: something else that runs on the machine for a moment does not. Beside an
accuracy report this says what the size buys; for a benchmark under load use a load generator.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from statistics import median

import torch

from qtool.errors import QtoolError
from qtool.progress import bar
from qtool.runtime.config import Device
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.evaluate.agreement import continuations
from qtool.runtime.evaluate.report import Speed
from qtool.runtime.llm import LLM
from qtool.source import Source

PROMPT = "It was a cold evening in November, and the fire in the library had burned low when"
WARM_UP_TOKENS = 8
NUM_TOKENS = 64
# A large model on a small machine gives fewer tokens than that, not a longer wait.
MAX_SECONDS = 5.0


def measure_speed(
    source: Source, name: str, prompts: Sequence[Sequence[int]], *, device: Device = "auto"
) -> tuple[Speed, list[tuple[int, ...]]]:
    """Load the model as the server would, warm it up, and time it; and, as it is loaded, let it
    continue the prompts, for `agreement`.
    """
    began = time.perf_counter()
    with closing(LLM(str(source.path), device=device)) as llm, bar(f"timing {name}"):
        load_seconds = time.perf_counter() - began
        context = llm.info.max_model_len
        prompt = llm.get_tokenizer().encode(PROMPT)[: max(1, context // 4)]
        _gaps(llm.engine, prompt, WARM_UP_TOKENS)
        gaps = _gaps(llm.engine, prompt, min(NUM_TOKENS, context - len(prompt) - 1))
        info = llm.info
        texts = continuations(llm, prompts)
    speed = Speed(
        tokens_per_second=1 / median(gaps),
        num_tokens=len(gaps),
        dtype=info.dtype,
        device=info.device,
        threads=torch.get_num_threads(),
        load_seconds=load_seconds,
        weight_bytes=info.weight_bytes,
    )
    return speed, texts


def _gaps(engine: Engine, prompt: Sequence[int], num_gaps: int) -> list[float]:
    """Seconds between the tokens of one answer."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_gaps + 1, ignore_eos=True)
    engine.add(GenerationRequest("timing", tuple(prompt), sampling))
    times: list[float] = []
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason == "error":
                raise QtoolError(f"generation failed: {output.error}")
            times.append(time.perf_counter())
        if len(times) > 1 and times[-1] - times[0] > MAX_SECONDS:
            engine.abort("timing")
    return [after - before for before, after in pairwise(times)]
