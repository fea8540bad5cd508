"""What sharing a model out among ranks costs on a CPU, where the shares themselves cost nothing.

    python benchmarks/ranks.py --out ranks.json

blocks  a step of a 0.5B model in 4 bits: all blocks in one call of the library as one process runs
        them, as ranks do, which the library calls for two sums a block (of one rank, here), and
        layer by layer. CPU time of one thread, all in turns, median of several
sums    one sum over ranks, by gloo over this machine's loopback, of a step's [tokens, hidden]
        float32: microseconds of wall time, median. A step of a model of N layers takes 2 N + 1

"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.kernels.reference import Span
from qtool.runtime.bench.conditions import write_result
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.models.mlp import Mlp
from qtool.runtime.parallel.layers import Ranks
from qtool.runtime.parallel.process_group import ProcessGroup
from qtool.runtime.parallel.shard import Shard, ShardPlan
from qtool.runtime.random_model import random_model

STEPS = {"1 sequence": (1, 1), "4": (4, 1), "16": (16, 1), "a prompt of 256": (1, 256)}
CONTEXT, BLOCK = 320, 32
HIDDEN = 896


def batch(sequences: int, tokens: int) -> Batch:
    """The last tokens of sequences of CONTEXT tokens."""
    blocks = CONTEXT // BLOCK
    spans = tuple(
        Span(tokens, CONTEXT, range(index * blocks, (index + 1) * blocks))
        for index in range(sequences)
    )
    positions = list(range(CONTEXT - tokens, CONTEXT)) * sequences
    return Batch(
        token_ids=torch.arange(sequences * tokens) + 1000,
        positions=torch.tensor(positions),
        spans=tuple(Span(span.num_queries, span.length, list(span.block_ids)) for span in spans),
        sampled_rows=torch.arange(1, sequences + 1) * tokens - 1,
        row_ranges=(),
    )


def measure_blocks(rounds: int) -> dict[str, Any]:
    model = random_model().decoder
    assert isinstance(model, Decoder)
    num_blocks = 16 * CONTEXT // BLOCK
    ways = {
        "one call": ModelRunner(model, num_blocks=num_blocks, block_size=BLOCK),
        "as a rank": ModelRunner(_as_a_rank(model), num_blocks=num_blocks, block_size=BLOCK),
        "layer by layer": ModelRunner(_by_layers(model), num_blocks=num_blocks, block_size=BLOCK),
    }
    found = {}
    for name, (sequences, tokens) in STEPS.items():
        step = batch(sequences, tokens)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, runner in ways.items():
                started = time.process_time()
                runner.run(step)
                if number:  # the first touches the cache's pages
                    times[way].append(1e3 * (time.process_time() - started))
        medians = {way: statistics.median(values) for way, values in times.items()}
        found[name] = medians
        one = medians["one call"]
        shown = (f"{way} {ms:.1f} ms ({ms / one:.2f})" for way, ms in medians.items())
        print(f"{name:<18}{', '.join(shown)}", flush=True)
    return found


def _as_a_rank(model: Decoder) -> Decoder:
    """The same, run as a rank runs it, by the only rank that there is."""
    plan = ShardPlan(Shard(0, 1), model.config, channel_unit=1, shared_unit=1)
    return dataclasses.replace(model, ranks=Ranks(plan, _Alone()))


def _by_layers(model: Decoder) -> Decoder:
    """The same with a first block that the library does not take: its MLP is none of its own."""
    first, *rest = model.blocks
    assert isinstance(first.mlp, Mlp)
    activate = first.mlp.activate
    other = dataclasses.replace(first.mlp, activate=lambda x: activate(x))
    return dataclasses.replace(model, blocks=(dataclasses.replace(first, mlp=other), *rest))


class _Alone:
    """A `Collective` of one rank."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


def measure_sums(rounds: int) -> dict[str, Any]:
    found = {}
    for size in (2, 4):
        for tokens in (1, 16, 512):
            with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(size) as pool:
                meeting = Path(folder) / "meeting"
                ranks = [pool.submit(_sums, r, size, meeting, tokens, rounds) for r in range(size)]
                micros, *_ = [rank.result() for rank in ranks]
            found[f"{size} ranks, {tokens} tokens"] = micros
            print(f"{size} ranks, {tokens:>3} tokens: {micros:.0f} us", flush=True)
    return found


def _sums(rank: int, size: int, meeting: Path, tokens: int, rounds: int) -> float:
    group = ProcessGroup(rank, size, meeting, "gloo", timeout_seconds=300)
    values = torch.ones(tokens, HIDDEN)
    times = []
    for _ in range(10 * rounds):
        started = time.perf_counter()
        group.all_reduce(values)
        times.append(1e6 * (time.perf_counter() - started))
        values.fill_(1.0)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    found = {"blocks": measure_blocks(options.rounds), "sums_us": measure_sums(options.rounds)}
    if options.out is not None:
        write_result(options.out, found, load_before=load_before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
