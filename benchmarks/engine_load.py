"""The engine under load: what a long prompt does to everybody else, and what sharing saves.

    python benchmarks/engine_load.py --json load.json

arrival   16 streams decode, and a prompt of 2,000 tokens arrives in the middle: gaps between the
          tokens of the streams until its first token, with the chunks sized by measurement (the
          default), and with whole budgets of 512 and 2048 tokens as other engines do (--peers);
          with --vllm-python also vLLM as `vllm serve` runs it, on a bfloat16 checkpoint
prefix    32 requests that share their first 1,000 tokens arrive together: prompt tokens that were
          computed, and the seconds beside those of one prompt
overhead  a step of 16 decoding sequences with a model that computes nothing: what is left is the
          engine's own work. CPU time of the thread, so that other programs do not count
memory    resident memory of a KV pool whose pages have all been touched, beside the arithmetic

The model has the shape of Qwen2.5-0.5B and random weights, int4 in groups of 128. On a machine that
is busy with other things, `--clock cpu` times one thread by the CPU time it gets: what a single
core of a quiet machine would take.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qtool.runtime.bench.conditions import write_result
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.layers import PackingRules
from qtool.runtime.loading import LoadedModel
from qtool.runtime.models.attention_spec import AttentionSpec
from qtool.runtime.random_model import random_model
from qtool.settings import child_environment

Clock = Callable[[], float]

STREAMS = 16
STREAM_PROMPT = 64
LONG_PROMPT = 2000
STEPS_BEFORE = 30
SHARED_PREFIX = 1000
SHARERS = 32
OWN_TOKENS = 16
# What a step may take at the most, and the share by which memory may differ from the arithmetic.
ITL_LIMIT_MS = 300.0
MEMORY_TOLERANCE = 0.05
STEP_LIMIT_MS = 1.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """Gaps between tokens of the streams while the long prompt was computed, in milliseconds.

    chunks  how the prompt was cut, or the engine that did it
    """

    chunks: str
    p50_ms: float
    p95_ms: float
    p99_ms: float
    longest_ms: float
    alone_p50_ms: float
    first_token_seconds: float
    steps: int

    @classmethod
    def of(
        cls, chunks: str, alone: Sequence[float], gaps: Sequence[float], first: float, steps: int
    ) -> Arrival:
        """From gaps in seconds; the first half of those before the prompt is warming up."""
        quantiles = statistics.quantiles(gaps, n=100)
        return cls(
            chunks=chunks,
            p50_ms=1e3 * statistics.median(gaps),
            p95_ms=1e3 * quantiles[94],
            p99_ms=1e3 * quantiles[98],
            longest_ms=1e3 * max(gaps),
            alone_p50_ms=1e3 * statistics.median(alone[len(alone) // 2 :]),
            first_token_seconds=first,
            steps=steps,
        )


@dataclass(frozen=True, slots=True)
class Prefix:
    requests: int
    prompt_tokens: int
    computed_tokens: int
    seconds: float
    one_prompt_seconds: float


@dataclass(frozen=True, slots=True)
class Overhead:
    sequences: int
    cpu_ms: float
    wall_ms: float


@dataclass(frozen=True, slots=True)
class Memory:
    arithmetic_bytes: int
    resident_bytes: int

    @property
    def ratio(self) -> float:
        return self.resident_bytes / self.arithmetic_bytes


def tokens(generator: torch.Generator, count: int, vocab: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, vocab, (count,), generator=generator).tolist())


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def measure_arrival(
    loaded: LoadedModel, chunks: str, config: EngineConfig, clock: Clock
) -> Arrival:
    engine = Engine(loaded, config, clock=clock)
    generator = torch.Generator().manual_seed(1)
    vocab = engine.info.vocab_size
    for index in range(STREAMS):
        prompt = tokens(generator, STREAM_PROMPT, vocab)
        engine.add(GenerationRequest(f"stream {index}", prompt, greedy(2000)))
    latest: dict[str, float] = {}
    alone: list[float] = []
    for _ in range(STEPS_BEFORE):
        alone.extend(_step(engine, latest, clock))
    engine.add(GenerationRequest("long", tokens(generator, LONG_PROMPT, vocab), greedy(8)))
    started = clock()
    gaps: list[float] = []
    steps = 0
    while "long" not in latest:
        gaps.extend(_step(engine, latest, clock))
        steps += 1
    first_token = clock() - started
    # The gap in which the first token came is one of them.
    gaps.extend(_step(engine, latest, clock))
    return Arrival.of(chunks, alone, gaps, first_token, steps)


def vllm_arrival(python: str, model: Path, threads: int, clock: str) -> Arrival:
    """The same by vLLM with its own defaults, in a process of its own (engine_worker.py)."""
    worker = Path(__file__).parent / "engine_worker.py"
    asked = {
        "do": "arrival",
        "streams": STREAMS,
        "stream_prompt": STREAM_PROMPT,
        "long_prompt": LONG_PROMPT,
        "steps_before": STEPS_BEFORE,
    }
    done = subprocess.run(
        [python, str(worker), "vllm_default", str(model), str(threads), clock],
        input=json.dumps(asked) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=child_environment(OMP_NUM_THREADS=str(threads), PYTHONSAFEPATH="1"),
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return Arrival.of("vLLM", found["alone"], found["gaps"], found["first_token"], found["steps"])


def _step(engine: Engine, latest: dict[str, float], clock: Clock) -> list[float]:
    """One step; the gaps that ended with it."""
    outputs = engine.step()
    now = clock()
    gaps = [now - latest[o.request_id] for o in outputs if o.request_id in latest]
    latest.update((output.request_id, now) for output in outputs)
    return gaps


def measure_prefix(loaded: LoadedModel, config: EngineConfig, clock: Clock) -> Prefix:
    generator = torch.Generator().manual_seed(2)
    vocab = loaded.decoder.vocab_size
    shared = tokens(generator, SHARED_PREFIX, vocab)

    def run(count: int) -> tuple[float, Engine]:
        engine = Engine(loaded, config, clock=clock)
        for index in range(count):
            own = tokens(generator, OWN_TOKENS, vocab)
            engine.add(GenerationRequest(str(index), (*shared, *own), greedy(1)))
        started = clock()
        while engine.has_work:
            engine.step()
        return clock() - started, engine

    one, _ = run(1)
    seconds, engine = run(SHARERS)
    stats = engine.stats()
    return Prefix(
        requests=SHARERS,
        prompt_tokens=stats.prompt_tokens_total,
        computed_tokens=stats.prompt_tokens_total - stats.prefix_cache_hits_total,
        seconds=seconds,
        one_prompt_seconds=one,
    )


class Nothing:
    """A model without layers that says 0 to everything."""

    attention: tuple[AttentionSpec, ...] = (AttentionSpec(1, 1, 8, 8, 1.0),)
    dtype = torch.float32
    device = torch.device("cpu")
    vocab_size = 256

    def for_context(self, num_tokens: int) -> Nothing:
        return self

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: object) -> Tensor:
        return torch.zeros(token_ids.shape[0], 8)

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape[0], self.vocab_size)


def measure_overhead(loaded: LoadedModel, steps: int = 1000) -> Overhead:
    """With one thread: waking a second one for an argmax of so few is no work of the engine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    nothing = replace(loaded, decoder=Nothing(), nbytes=0)
    config = EngineConfig("nothing", max_num_seqs=STREAMS, max_model_len=8192)
    engine = Engine(nothing, config)
    for index in range(STREAMS):
        prompt = tuple(range(index, index + 100))
        engine.add(GenerationRequest(str(index), prompt, greedy(8000)))
    for _ in range(100):
        engine.step()
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(steps):
        engine.step()
    cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
    torch.set_num_threads(threads)
    return Overhead(STREAMS, 1e3 * cpu / steps, 1e3 * wall / steps)


def measure_memory(loaded: LoadedModel, num_bytes: int = 256 * 2**20) -> Memory:
    # What the C library keeps of memory that was freed would be used again, and not be seen.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes()
    config = EngineConfig("random", kv_cache_memory_bytes=num_bytes, max_model_len=2048)
    engine = Engine(loaded, config)
    engine._runner.clear(range(engine.info.num_kv_blocks))
    return Memory(engine.info.kv_cache_bytes, resident_bytes() - before)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--activations", choices=("int8", "bf16"), default="int8")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=("arrival", "prefix", "overhead", "memory"),
        default=["arrival", "prefix", "overhead", "memory"],
    )
    parser.add_argument("--peers", action="store_true", help="arrival: fixed chunks as well")
    parser.add_argument("--vllm-python", help="arrival: an interpreter with a CPU build of vllm")
    parser.add_argument(
        "--vllm-model",
        type=Path,
        default=Path("benchmark-models/qwen2.5-0.5b-random"),
        help="the checkpoint that engine.py makes",
    )
    options = parser.parse_args(arguments)
    load_before = os.getloadavg()[0]
    clock: Clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    threads = 1 if options.clock == "cpu" else options.threads
    torch.set_num_threads(threads)
    loaded = random_model(rules=PackingRules(activations=options.activations))
    config = EngineConfig("random", max_model_len=4096, max_num_seqs=64)
    results: dict[str, object] = {
        "threads": threads,
        "clock": options.clock,
        "activations": options.activations,
        "kernels": sorted({f"{use.kernel}: {use.reason}" for use in loaded.kernels}),
    }
    failures: list[str] = []
    if "overhead" in options.rows:
        overhead = measure_overhead(loaded)
        results["overhead"] = asdict(overhead)
        print(
            f"overhead   {overhead.cpu_ms:.3f} ms CPU, {overhead.wall_ms:.3f} ms wall a step "
            f"of {overhead.sequences} sequences"
        )
        if overhead.cpu_ms > STEP_LIMIT_MS:
            failures.append(f"a step costs {overhead.cpu_ms:.2f} ms outside kernels")
    if "memory" in options.rows:
        memory = measure_memory(loaded)
        results["memory"] = asdict(memory)
        print(
            f"memory     {memory.resident_bytes:,} bytes resident, {memory.arithmetic_bytes:,} by "
            f"arithmetic: {memory.ratio:.3f}"
        )
        if abs(memory.ratio - 1) > MEMORY_TOLERANCE:
            failures.append(f"the pool takes {memory.ratio:.3f} of the arithmetic")
    if "arrival" in options.rows:
        contenders = [("measured", config)]
        if options.peers:
            fixed = replace(config, target_itl_ms=0.0)
            contenders += [
                (f"fixed {budget}", replace(fixed, max_num_batched_tokens=budget))
                for budget in (512, 2048)
            ]
        arrivals = [measure_arrival(loaded, name, given, clock) for name, given in contenders]
        if options.vllm_python is not None:
            arrivals.append(
                vllm_arrival(options.vllm_python, options.vllm_model, threads, options.clock)
            )
        results["arrival"] = [asdict(arrival) for arrival in arrivals]
        for arrival in arrivals:
            print(
                f"arrival    chunks {arrival.chunks:<10} gaps p50 {arrival.p50_ms:6.1f}  "
                f"p95 {arrival.p95_ms:6.1f}  p99 {arrival.p99_ms:6.1f}  "
                f"longest {arrival.longest_ms:6.1f} ms; before {arrival.alone_p50_ms:.1f} ms; "
                f"first token after {arrival.first_token_seconds:.2f} s, {arrival.steps} steps"
            )
        if arrivals[0].p99_ms > ITL_LIMIT_MS:
            failures.append(f"p99 of the gaps is {arrivals[0].p99_ms:.0f} ms")
    if "prefix" in options.rows:
        prefix = measure_prefix(loaded, config, clock)
        results["prefix"] = asdict(prefix)
        print(
            f"prefix     {prefix.requests} prompts of {prefix.prompt_tokens:,} tokens: "
            f"{prefix.computed_tokens:,} computed, {prefix.seconds:.2f} s; one prompt "
            f"{prefix.one_prompt_seconds:.2f} s"
        )
        most = SHARED_PREFIX + SHARERS * (OWN_TOKENS + config.block_size)
        if prefix.computed_tokens > most:
            failures.append(f"{prefix.computed_tokens} prompt tokens were computed")
    results["failures"] = failures
    if options.json is not None:
        write_result(options.json, results, load_before=load_before)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())
