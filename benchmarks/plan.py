"""Whether `qtool plan` foretells what `qtool serve` does: both on this machine, at several loads.

    python benchmarks/plan.py --out benchmarks/results/plan.json

The steps of a model of Qwen2.5-0.5B's shape (GGUF Q4_0, random weights) are measured; then the same
model is served, and a pure HTTP client sends requests at random times (`qtool bench serve`). The
simulator gets the same times and lengths. Each figure stands beside what was foretold; what is to
be reached is 20 %. Last, the time that a fleet of a thousand replicas takes to simulate.

Other work on the machine slows serving and measuring alike only if it is steady: the steps are
measured again after each load, and the simulator gets the mean of both.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtool.runtime.bench.client import Work, arrivals, prompts, send_all, served_model
from qtool.runtime.bench.conditions import write_result
from qtool.runtime.bench.timing import Answer, load_of
from qtool.runtime.plan.costs import MeasuredCosts, RooflineCosts
from qtool.runtime.plan.fit import Setting, fit, limits
from qtool.runtime.plan.fleet import Targets, required_replicas, simulate
from qtool.runtime.plan.hardware import find_gpu
from qtool.runtime.plan.measure import Measurement, measure
from qtool.runtime.plan.paper import PaperModel
from qtool.runtime.plan.simulate import Arrival, Engine, Workload
from qtool.runtime.plan.variants import find_variant
from qtool.runtime.random_model import QWEN_05B
from qtool.runtime.server.process import running_server
from qtool.settings import share_the_machine

# PYTHONSAFEPATH leaves a script's own folder out.
sys.path.insert(0, str(Path(__file__).parent))
from engine import make_models

INPUT_LEN, OUTPUT_LEN = 128, 48
# Shares of what one engine can answer at most.
LOADS = (0.4, 0.8)
NEAR = 0.2
# A fleet that needs about a thousand replicas.
FLEET_RATE, FLEET_TARGETS = 20_000.0, Targets(0.5, 0.03)


@dataclass(frozen=True, slots=True)
class Figure:
    """Milliseconds, or tokens a second."""

    load: float
    name: str
    foretold: float
    measured: float

    @property
    def off(self) -> float:
        return self.foretold / self.measured - 1


def mean_costs(first: MeasuredCosts, second: MeasuredCosts) -> MeasuredCosts:
    return MeasuredCosts(
        tuple(
            (rows, (a + b) / 2) for (rows, a), (_, b) in zip(first.rows, second.rows, strict=True)
        ),
        (first.seconds_per_draw + second.seconds_per_draw) / 2,
        (first.seconds_per_read + second.seconds_per_read) / 2,
        (first.seconds_per_pair + second.seconds_per_pair) / 2,
    )


def serve_load(model: str, times: list[float], seed: int) -> list[Answer]:
    texts = prompts(len(times), INPUT_LEN, seed)
    work = [Work(at, text, OUTPUT_LEN) for at, text in zip(times, texts, strict=True)]
    with running_server(model, "--max-num-seqs", "16", "--no-enable-prefix-caching") as server:
        name = served_model(server.url, None)
        warm = [Work(0.0, text, 4) for text in prompts(4, INPUT_LEN, seed + 99)]
        for batch in (warm, work):
            answers = asyncio.run(
                send_all(
                    server.url,
                    name,
                    batch,
                    api_key=None,
                    max_concurrency=None,
                    timeout=600.0,
                    advance=lambda count: None,
                )
            )
    return answers


def foretell(found: Measurement, times: list[float], measured: list[Answer]) -> list[Answer]:
    """The same requests through the simulator."""
    engine = Engine(found.costs, found.limits)
    lives = []
    for number, (at, answer) in enumerate(zip(times, measured, strict=True)):
        engine.advance(at)
        lives.append(
            engine.add(Arrival(number, at, answer.num_prompt_tokens, answer.num_output_tokens))
        )
    engine.advance(math.inf)
    return [
        Answer(
            life.arrival.time,
            (life.first_token, life.end),
            life.end,
            life.arrival.input_len,
            life.arrival.output_len,
        )
        for life in lives
    ]


def compare(load: float, foretold: list[Answer], measured: list[Answer]) -> list[Figure]:
    found = [load_of(answers) for answers in (foretold, measured)]
    errors = found[1].errors
    if errors:
        raise SystemExit(f"{found[1].num_failed} requests failed: {errors[0]}")
    pairs: dict[str, list[float]] = {
        "tokens/s": [each.tokens_per_second for each in found],
        "TTFT p50 ms": [each.ttft_ms.p50 for each in found if each.ttft_ms],
        "TPOT p50 ms": [each.tpot_ms.p50 for each in found if each.tpot_ms],
        "E2E p50 ms": [each.e2e_ms.p50 for each in found if each.e2e_ms],
        "E2E p95 ms": [each.e2e_ms.p95 for each in found if each.e2e_ms],
    }
    return [Figure(load, name, *values) for name, values in pairs.items()]


def fleet_seconds() -> tuple[float, int]:
    """Seconds to find the replicas for FLEET_RATE, and how many they are."""
    model = PaperModel.of("0.5B", dict(QWEN_05B))
    form, gpu, setting = find_variant(model, "int4"), find_gpu("T4"), Setting()
    costs = RooflineCosts.of(model, form, gpu)
    # Ten times the weights, so that a thousand are needed.
    slow = replace(costs, dense_bytes=10 * costs.dense_bytes)
    room = limits(fit(model, form, gpu, setting, 1024), setting)
    start = time.perf_counter()
    found = required_replicas(
        Workload(FLEET_RATE, 0, (512, 512), (128, 128)), slow, room, FLEET_TARGETS
    )
    return time.perf_counter() - start, found.num_replicas


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("benchmark-models"))
    parser.add_argument("--num-requests", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    share_the_machine()
    load_before = os.getloadavg()[0]
    model = str(make_models(options.models)[1])
    args: dict[str, Any] = {"max_num_seqs": 16}
    before = measure(model, **args)
    burst = Workload(math.inf, 100, (INPUT_LEN,) * 2, (OUTPUT_LEN,) * 2)
    capacity = simulate(burst, before.costs, before.limits).requests_per_second
    figures: list[Figure] = []
    for load in LOADS:
        times = arrivals(load * capacity, options.num_requests, options.seed)
        answers = serve_load(model, times, options.seed)
        after = measure(model, **args)
        both = replace(after, costs=mean_costs(before.costs, after.costs))
        figures += compare(load, foretell(both, times, answers), answers)
        before = after
    for figure in figures:
        print(
            f"load {figure.load:.1f}  {figure.name:12} foretold {figure.foretold:9.1f}  measured "
            f"{figure.measured:9.1f}  {figure.off:+.0%}"
        )
    seconds, count = fleet_seconds()
    print(f"a fleet of {count} replicas was found in {seconds:.0f} s")
    missed = [figure for figure in figures if abs(figure.off) > NEAR]
    print(f"within {NEAR:.0%}: {len(figures) - len(missed)} of {len(figures)}")
    if options.out:
        rows = [
            {
                "load": figure.load,
                "figure": figure.name,
                "foretold": figure.foretold,
                "measured": figure.measured,
                "off": figure.off,
            }
            for figure in figures
        ]
        write_result(
            options.out,
            {
                "figures": rows,
                "requests_per_second_at_most": capacity,
                "fleet_replicas": count,
                "fleet_seconds": seconds,
            },
            load_before=load_before,
        )


if __name__ == "__main__":
    main()
