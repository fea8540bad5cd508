"""`bench latency` and `bench throughput`: the engine without a server.

Latency runs one batch of equal prompts at a time: all prompts in, a fixed number of tokens out,
nothing else beside it, some runs to warm up and some that count. Throughput hands the engine
everything at once, lengths drawn from a range, and counts tokens until the last is out. Prompts are
drawn token by token from the vocabulary with a fixed seed: no two share a prefix, so the prefix
cache helps nobody.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qtool.errors import QtoolError, UsageError
from qtool.progress import bar
from qtool.runtime.bench.machine import Roofs, arithmetic_use, bandwidth_use
from qtool.runtime.bench.timing import Answer, Load, Spread, load_of, spread
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.llm import LLM


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """One batch size; times in milliseconds.

    latency_ms                of a whole batch, prompts in to last token out
    decode_tokens_per_second  of all sequences together, prefill not counted
    avg_tokens_per_sec        output tokens over whole batches, prefill counted
    mbu                       of decoding steps, 0 to 1
    mfu                       of prefill, 0 to 1; None where a token uses a part of the weights
    """

    batch_size: int
    n_runs: int
    p50_latency_ms: float
    p95_latency_ms: float
    avg_tokens_per_sec: float
    latency_ms: Spread
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    mbu: float
    mfu: float | None


def latency(
    llm: LLM,
    *,
    batch_sizes: Sequence[int],
    input_len: int,
    output_len: int,
    num_runs: int,
    num_warmups: int,
    num_weights: int | None,
    roofs: Roofs,
) -> Iterator[LatencyRow]:
    """One row a batch size, as soon as it is measured.

    num_weights   that each token is multiplied by; None where that depends on the token
    """
    require_room(llm, input_len, output_len)
    if output_len < 2:
        raise UsageError(f"output_len is {output_len}, must be at least 2: gaps are measured")
    for batch_size in batch_sizes:
        if not 1 <= batch_size <= llm.info.max_num_seqs:
            raise UsageError(
                f"batch size {batch_size} must be between 1 and max_num_seqs, "
                f"{llm.info.max_num_seqs}",
                "raise --max-num-seqs",
            )
        draw = random.Random(batch_size)
        loads = []
        name = f"batch {batch_size}"
        with bar(name, total=num_warmups + num_runs) as shown:
            for number in range(num_warmups + num_runs):
                prompts = [random_prompt(draw, llm, input_len) for _ in range(batch_size)]
                answers = run_all(llm.engine, prompts, [output_len] * batch_size)
                if number >= num_warmups:
                    loads.append(answers)
                shown.advance()
        yield _latency_row(llm, batch_size, input_len, output_len, loads, num_weights, roofs)


def _latency_row(
    llm: LLM,
    batch_size: int,
    input_len: int,
    output_len: int,
    runs: Sequence[Sequence[Answer]],
    num_weights: int | None,
    roofs: Roofs,
) -> LatencyRow:
    totals = [max(a.end for a in run) - min(a.sent for a in run) for run in runs]
    latency_ms = spread([1e3 * total for total in totals])
    both = load_of([answer for run in runs for answer in run])
    # Decoding begins when the last prompt is through, and ends with the first answer's last token.
    decode_seconds = [min(a.end for a in run) - max(a.token_times[0] for a in run) for run in runs]
    steps = output_len - 1
    step_seconds = sum(decode_seconds) / len(runs) / steps
    prefill_seconds = [max(a.token_times[0] for a in run) - run[0].sent for run in runs]
    prefill = sum(prefill_seconds) / len(runs)
    info, loaded = llm.info, llm.loaded
    assert latency_ms is not None
    assert both.ttft_ms is not None
    assert both.tpot_ms is not None
    assert both.itl_ms is not None
    return LatencyRow(
        batch_size=batch_size,
        n_runs=len(runs),
        p50_latency_ms=latency_ms.p50,
        p95_latency_ms=latency_ms.p95,
        avg_tokens_per_sec=batch_size * output_len * len(runs) / sum(totals),
        latency_ms=latency_ms,
        ttft_ms=both.ttft_ms,
        tpot_ms=both.tpot_ms,
        itl_ms=both.itl_ms,
        decode_tokens_per_second=batch_size / step_seconds,
        prefill_tokens_per_second=batch_size * input_len / prefill,
        mbu=bandwidth_use(
            weight_bytes=loaded.nbytes,
            cache_bytes_per_token=info.kv_cache_bytes / (info.num_kv_blocks * info.block_size),
            batch=batch_size,
            context=input_len + output_len / 2,
            step_seconds=step_seconds,
            roofs=roofs,
        ),
        mfu=(
            None
            if num_weights is None
            else arithmetic_use(
                num_weights=num_weights,
                tokens=batch_size * input_len,
                seconds=prefill,
                roofs=roofs,
            )
        ),
    )


def throughput(
    llm: LLM,
    *,
    num_prompts: int,
    input_lens: tuple[int, int],
    output_lens: tuple[int, int],
    seed: int,
) -> Load:
    """Everything at once, lengths drawn between the two ends of each range."""
    require_room(llm, input_lens[1], output_lens[1])
    draw = random.Random(seed)
    run_all(llm.engine, [random_prompt(draw, llm, input_lens[0])], [2])
    prompts = [random_prompt(draw, llm, draw.randint(*input_lens)) for _ in range(num_prompts)]
    lengths = [draw.randint(*output_lens) for _ in range(num_prompts)]
    with bar(f"{num_prompts} requests", total=num_prompts) as shown:
        return load_of(run_all(llm.engine, prompts, lengths, shown.advance))


def random_prompt(draw: random.Random, llm: LLM, length: int) -> list[int]:
    return [draw.randrange(llm.info.vocab_size) for _ in range(length)]


def require_room(llm: LLM, input_len: int, output_len: int) -> None:
    room = llm.info.max_model_len
    if input_len < 1 or output_len < 1 or input_len + output_len > room:
        raise UsageError(
            f"{input_len} prompt tokens and {output_len} new ones must be at least 1 each and fit "
            f"the context of {room}",
            "choose shorter ones with --input-len and --output-len",
        )


def run_all(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """All prompts at once through an idle engine; raises QtoolError if one fails."""
    sent = time.perf_counter()
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        engine.add(GenerationRequest(str(number), tuple(prompt), sampling))
    times: dict[str, list[float]] = {str(number): [] for number in range(len(prompts))}
    counts = dict.fromkeys(times, 0)
    cached = dict.fromkeys(times, 0)
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.finish_reason == "error":
                raise QtoolError(f"generation failed: {output.error}")
            counts[output.request_id] += len(output.new_token_ids)
            cached[output.request_id] = output.num_cached_tokens
            if output.new_token_ids:
                times[output.request_id].append(now)
            if output.finish_reason is not None:
                advance(1)
    return [
        Answer(
            sent,
            tuple(times[str(number)]),
            times[str(number)][-1],
            len(prompt),
            counts[str(number)],
            cached[str(number)],
        )
        for number, prompt in enumerate(prompts)
    ]
