"""What the server costs beside its engine, and whether it holds a load: by a pure HTTP client.

    python benchmarks/serve.py --out serve.json
    python benchmarks/serve.py --model builtin:books-7m --hold-seconds 300

added   the same prompts answered by the bare engine and over HTTP, in turns, in one process:
        tokens a second of both by the clock, and CPU time a token of the process that holds the
        model. The client is a process of its own, which on few cores takes time from both
first   a short prompt alone: seconds to the first token by the engine, and to the first byte of
        text over HTTP
idle    CPU time of the waiting server
hold    so many streams, each followed by another, for so long: errors, and the KV pool after it

The model is `serve_host.py`'s. Lengths are drawn as conversations have them, many short and few
long (log-normal, ShareGPT's median and spread scaled to the context).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from qtool.runtime.bench.client import Work, prompts, send_all
from qtool.runtime.bench.conditions import write_result
from qtool.runtime.bench.output import plain
from qtool.runtime.bench.timing import Answer, load_of

HOST = Path(__file__).with_name("serve_host.py")
RANDOM = "random-0.5b"
RANDOM_VOCABULARY = 150_000
SHORT_PROMPT = 8
# Natural logarithms' spread of the lengths; the medians are options.
SPREAD = 0.7
LONGEST = 240
TIMEOUT_SECONDS = 600.0
# What is to be reached.
MOST_ADDED = 0.05
MOST_FIRST_MS = 50.0
MOST_IDLE = 0.01


@dataclass(slots=True)
class Host:
    process: subprocess.Popen[str]
    url: str

    def ask(self, **order: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def host(model: str, streams: int) -> Iterator[Host]:
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, str(HOST), model, str(streams)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise SystemExit(_tail(log))
            yield Host(process, url)
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)
        finally:
            process.kill()
            process.wait()


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-3000:]


class Texts:
    """Prompts for a model, no two alike, and lengths of answers."""

    def __init__(self, model: str, seed: int, input_len: int, output_len: int) -> None:
        self._model, self._draw = model, random.Random(seed)
        self._medians = input_len, output_len

    def length(self, median: int) -> int:
        return max(1, min(LONGEST, round(median * self._draw.lognormvariate(0.0, SPREAD))))

    def prompt(self, tokens: int) -> str:
        if self._model == RANDOM:
            return " ".join(f"t{self._draw.randrange(RANDOM_VOCABULARY)}" for _ in range(tokens))
        return prompts(1, tokens, self._draw.randrange(1 << 30))[0]

    def work(self) -> Work:
        prompt, answer = self._medians
        return Work(0.0, self.prompt(self.length(prompt)), max(8, self.length(answer)))


def send(url: str, model: str, work: Sequence[Work]) -> list[Answer]:
    return asyncio.run(
        send_all(
            url,
            model,
            work,
            api_key=None,
            max_concurrency=None,
            timeout=TIMEOUT_SECONDS,
            advance=lambda count: None,
        )
    )


def added(here: Host, model: str, texts: Texts, streams: int, tokens: int, rounds: int) -> Any:
    """Equal lengths, so that all streams run from the first step to the last."""
    ways: dict[str, list[dict[str, float]]] = {"engine": [], "server": []}
    for number in range(rounds + 1):
        work = [Work(0.0, texts.prompt(32), tokens) for _ in range(streams)]
        plain = [(item.prompt, item.max_tokens) for item in work]
        engine = here.ask(do="engine", work=plain)
        before, started = here.ask(do="cpu"), time.perf_counter()
        answers = send(here.url, model, work)
        seconds, cpu = time.perf_counter() - started, here.ask(do="cpu") - before
        load = load_of(answers)
        if load.num_failed:
            raise SystemExit(f"requests failed: {load.errors}")
        if number == 0:
            continue  # to warm up
        ways["engine"].append(engine)
        ways["server"].append(
            {"seconds": seconds, "cpu_seconds": cpu, "tokens": load.num_output_tokens}
        )

    def per_token(way: str, kind: str) -> list[float]:
        return [one[kind] / one["tokens"] for one in ways[way]]

    def ratio(kind: str) -> float:
        pairs = zip(per_token("server", kind), per_token("engine", kind), strict=True)
        return statistics.median(server / engine for server, engine in pairs)

    return {
        "streams": streams,
        "tokens_each": tokens,
        "rounds": rounds,
        **{
            f"{way}_tokens_per_second": 1 / statistics.median(per_token(way, "seconds"))
            for way in ways
        },
        **{
            f"{way}_cpu_ms_per_token": 1e3 * statistics.median(per_token(way, "cpu_seconds"))
            for way in ways
        },
        "added_by_clock": ratio("seconds") - 1,
        "added_by_cpu": ratio("cpu_seconds") - 1,
        "most": MOST_ADDED,
    }


def first(here: Host, model: str, texts: Texts, count: int) -> Any:
    """In turns of one, so that what else the machine does falls on both."""
    engine, server = [], []
    for number in range(count + 2):
        work = Work(0.0, texts.prompt(SHORT_PROMPT), 2)
        (alone,) = here.ask(do="first", work=[(work.prompt, work.max_tokens)])
        (answer,) = send(here.url, model, [work])
        if answer.ttft is None:
            raise SystemExit(f"a request failed: {answer.error}")
        if number >= 2:
            engine.append(1e3 * alone)
            server.append(1e3 * answer.ttft)
    return {
        "count": count,
        "engine_ms": statistics.median(engine),
        "server_ms": statistics.median(server),
        "added_ms": statistics.median(s - e for s, e in zip(server, engine, strict=True)),
        "most_ms": MOST_FIRST_MS,
    }


def hold(here: Host, model: str, texts: Texts, streams: int, seconds: float) -> Any:
    answers: list[Answer] = []
    until = time.perf_counter() + seconds

    async def one_after_the_other() -> None:
        while time.perf_counter() < until:
            answers.extend(
                await send_all(
                    here.url,
                    model,
                    [texts.work()],
                    api_key=None,
                    max_concurrency=1,
                    timeout=TIMEOUT_SECONDS,
                    advance=lambda count: None,
                )
            )

    async def all_of_them() -> None:
        await asyncio.gather(*(one_after_the_other() for _ in range(streams)))

    asyncio.run(all_of_them())
    load = load_of(answers)
    health = httpx.get(f"{here.url}/health", timeout=60).status_code
    return {
        "streams": streams,
        "asked_seconds": seconds,
        **plain(load),
        "pool_after": here.ask(do="pool"),
        "health_after": health,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=RANDOM, help=f"{RANDOM}, or any model")
    parser.add_argument("--streams", type=int, default=16, help="for what the server adds")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-count", type=int, default=20)
    parser.add_argument("--idle-seconds", type=float, default=10.0)
    parser.add_argument("--hold-streams", type=int, default=64)
    parser.add_argument("--hold-seconds", type=float, default=300.0, help="0: leave it out")
    parser.add_argument("--input-len", type=int, default=64, help="median of the held streams'")
    parser.add_argument("--output-len", type=int, default=96, help="median of the held streams'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    texts = Texts(options.model, options.seed, options.input_len, options.output_len)
    result: dict[str, Any] = {
        "benchmark": "serve",
        "model": options.model,
    }
    with host(options.model, max(options.streams, options.hold_streams)) as here:
        model = options.model
        result["added"] = added(here, model, texts, options.streams, options.tokens, options.rounds)
        report("added", result["added"])
        result["first"] = first(here, model, texts, options.first_count)
        report("first", result["first"])
        cpu = here.ask(do="idle", seconds=options.idle_seconds)
        result["idle"] = {"cpu_share": cpu / options.idle_seconds, "most": MOST_IDLE}
        report("idle", result["idle"])
        if options.hold_seconds:
            result["hold"] = hold(here, model, texts, options.hold_streams, options.hold_seconds)
            report("hold", result["hold"])
    if options.out is not None:
        write_result(options.out, plain(result), load_before=load_before)


def report(name: str, values: dict[str, Any]) -> None:
    print(name)
    for key, value in values.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        if isinstance(value, dict) and "p50" in value:
            shown = f"p50 {value['p50']:.4g}, p95 {value['p95']:.4g}, p99 {value['p99']:.4g}"
        print(f"  {key:<26}{shown}")


if __name__ == "__main__":
    main()
