"""The compiled CPU kernels beside PyTorch's own, in one run.

    python benchmarks/kernels_cpu.py --threads 2 --out kernels_cpu.json

linears   Qwen2.5-0.5B's and a 4096 x 4096 one, at several numbers of tokens: native int4 and int8
          against `_weight_int4pack_mm_for_cpu`, `_weight_int8pack_mm` and a bfloat16 matrix. The
          weights are as many copies as outgrow the caches, taken in turn, as a model's layers are.
decode    one step of a model of Qwen2.5-0.5B's shapes, all 24 layers and the head, with attention
          over 512 tokens: the native operations called one by one, the same with a block in one
          call, and PyTorch's as the torch path runs them.

Every number is the smallest of many samples, with the median beside it: other work on the machine
only ever adds. A whole step of the decoder is long enough to be interrupted every time on a busy
machine, so beside it stands the sum of each layer's smallest time, which a quiet machine comes
close to. GB/s counts a packed weight once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.kernels.cpu import attention, native_linear, torch_ops
from qtool.kernels.cpu.build import INSTRUCTION_SETS
from qtool.kernels.cpu.native import Native, load, make_cache, make_rule, plan_spans
from qtool.kernels.cpu.native_blocks import BlockParts, NativeBlocks, NativeLinears, bind
from qtool.kernels.reference import Span
from qtool.native_build import Missing
from qtool.runtime.bench.conditions import environment, write_result
from qtool.scheme import QuantScheme
from qtool.weights import DenseWeight, QuantizedWeight, Weight

HIDDEN, FFN, LAYERS, VOCAB = 896, 4864, 24, 151936
HEADS, KV_HEADS, HEAD_DIM = 14, 2, 64
EPS, SCALE, BLOCK_SIZE = 1e-6, 0.125, 32
LINEARS = {
    "qkv": (HIDDEN + 2 * KV_HEADS * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * FFN, HIDDEN),
    "down": (HIDDEN, FFN),
}
SHAPES = {**LINEARS, "head": (VOCAB, HIDDEN), "square": (4096, 4096)}
TOKENS = (1, 4, 16, 64)
# More than twice any last-level cache of the machines this is run on.
COLD_BYTES = 96 << 20
CPU = torch.device("cpu")
# A decode step; calls its argument after each layer and after the head.
Step = Callable[[Callable[[], None]], Tensor]
BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds."""

    smallest: float
    median: float


@dataclass(frozen=True, slots=True)
class LinearResult:
    shape: str
    out_features: int
    in_features: int
    tokens: int
    kernel: str
    microseconds: float
    median_microseconds: float
    gigabytes_per_second: float
    gigaops_per_second: float


@dataclass(frozen=True, slots=True)
class DecodeResult:
    path: str
    batch: int
    milliseconds: float
    median_milliseconds: float
    sum_of_parts_milliseconds: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """A name, and how one packed copy multiplies."""

    name: str
    word: str | None
    pack: Callable[[Any], Any]
    matmul: Callable[[Tensor, Any], Tensor]


def measure(run: Callable[[], object], seconds: float, least: int = 5) -> Sample:
    run()
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    while len(samples) < least or time.perf_counter() < stop:
        started = time.perf_counter()
        run()
        samples.append(time.perf_counter() - started)
    return Sample(min(samples), statistics.median(samples))


def measure_step(
    run: Callable[[Callable[[], None]], object], seconds: float, least: int = 10
) -> tuple[Sample, float]:
    """A step that calls a function after each of its parts, and the sum of the parts' smallest."""
    samples: list[list[float]] = []
    stop = time.perf_counter() + seconds
    while len(samples) < least or time.perf_counter() < stop:
        times = [time.perf_counter()]
        run(lambda times=times: times.append(time.perf_counter()))  # type: ignore[misc]
        samples.append([after - before for before, after in itertools.pairwise(times)])
    totals = [sum(parts) for parts in samples[1:]]
    return Sample(min(totals), statistics.median(totals)), sum(map(min, zip(*samples, strict=True)))


def random_weight(out_features: int, in_features: int, word: str | None) -> Weight:
    if word is not None:
        return random_codes(out_features, in_features, word)
    return DenseWeight(torch.randn(out_features, in_features).to(BF16))


def random_codes(out_features: int, in_features: int, word: str) -> QuantizedWeight:
    scheme = QuantScheme.parse(word)
    groups = scheme.num_groups(in_features)
    codes = torch.randint(0, scheme.num_codes, (out_features, in_features), dtype=torch.uint8)
    scales = (torch.rand(out_features, groups) * 0.01 + 0.001).to(BF16).float()
    return QuantizedWeight(codes, scales, None, scheme)


def contenders(native: Native) -> list[Contender]:
    def of_native(name: str, word: str) -> Contender:
        return Contender(
            name,
            word,
            lambda weight: native_linear.pack_for(native, weight),
            lambda x, packed: native_linear.matmul(x, packed, None),
        )

    return [
        of_native("native int4 g128", "int4-g128-sym"),
        Contender(
            "torch int4pack g128",
            "int4-g128-sym",
            lambda weight: torch_ops.int4_pack(weight, BF16, CPU),
            lambda x, packed: torch_ops.int4_matmul(x, packed, None),
        ),
        of_native("native int8 row", "int8-row-sym"),
        Contender(
            "torch int8pack row",
            "int8-row-sym",
            lambda weight: torch_ops.int8_pack(weight, BF16, CPU),
            lambda x, packed: torch_ops.int8_matmul(x, packed, None),
        ),
        of_native("native int4 g32", "int4-g32-sym"),
        Contender(
            "torch bfloat16",
            None,
            lambda weight: torch_ops.dense_pack(weight, BF16, CPU),
            lambda x, packed: F.linear(x, packed.values),
        ),
    ]


def weight_bytes(packed: Sequence[object]) -> int:
    return sum(part.nbytes for part in packed if isinstance(part, Tensor))


def measure_linears(native: Native, names: Sequence[str], seconds: float) -> list[LinearResult]:
    results = []
    for name in names:
        out_features, in_features = SHAPES[name]
        for contender in contenders(native):
            weight = random_weight(out_features, in_features, contender.word)
            first = contender.pack(weight)
            size = weight_bytes(first)
            copies = [first, *(contender.pack(weight) for _ in range(COLD_BYTES // size))]
            for tokens in TOKENS:
                x = torch.randn(tokens, in_features).to(BF16)
                turn = 0

                def run(
                    contender: Contender = contender, copies: list[Any] = copies, x: Tensor = x
                ) -> None:
                    nonlocal turn
                    turn = (turn + 1) % len(copies)
                    contender.matmul(x, copies[turn])

                sample = measure(run, seconds)
                results.append(
                    LinearResult(
                        name,
                        out_features,
                        in_features,
                        tokens,
                        contender.name,
                        sample.smallest * 1e6,
                        sample.median * 1e6,
                        size / sample.smallest / 1e9,
                        2 * tokens * out_features * in_features / sample.smallest / 1e9,
                    )
                )
                show_linear(results[-1])
    return results


def show_linear(result: LinearResult) -> None:
    print(
        f"{result.shape:8} [{result.out_features}, {result.in_features}] M={result.tokens:<3}"
        f" {result.kernel:20} {result.microseconds:9.1f} us"
        f" (median {result.median_microseconds:9.1f})"
        f" {result.gigabytes_per_second:6.1f} GB/s {result.gigaops_per_second:7.0f} GOP/s",
        file=sys.stderr,
        flush=True,
    )


def decode_spans(batch: int, context: int) -> list[Span]:
    held = -(-context // BLOCK_SIZE)
    return [Span(1, context, range(row * held, (row + 1) * held)) for row in range(batch)]


@dataclass(frozen=True, slots=True, eq=False)
class NativeModel:
    blocks: list[BlockParts]
    head: native_linear.NativePacked
    norm: Tensor
    embedded: Tensor
    spans: list[Span]
    slots: Tensor


def make_native_model(native: Native, batch: int, context: int) -> NativeModel:
    weights = {name: random_codes(*shape, "int4-g128-sym") for name, shape in LINEARS.items()}
    norm = torch.ones(HIDDEN)
    biases = {"qkv": torch.zeros(LINEARS["qkv"][0], dtype=BF16)}
    spans = decode_spans(batch, context)
    rule = make_rule(heads=HEADS, scale=SCALE)
    blocks = [
        BlockParts(
            attn_norm=norm,
            mlp_norm=norm,
            cache=make_cache(keys, values),
            rule=rule,
            rotated=HEAD_DIM,
            **{
                name: NativeLinears((native_linear.pack_for(native, each),), biases.get(name))
                for name, each in weights.items()
            },
        )
        for keys, values in make_pools(batch, context)
    ]
    slots = [span.block_ids[-1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE for span in spans]
    return NativeModel(
        blocks,
        native_linear.pack_for(native, random_codes(VOCAB, HIDDEN, "int8-row-sym")),
        norm,
        torch.randn(batch, HIDDEN).to(BF16),
        spans,
        torch.tensor(slots),
    )


def rotations(batch: int) -> tuple[Tensor, Tensor]:
    angles = torch.full((batch, HEAD_DIM // 2), 0.5)
    return angles.cos(), angles.sin()


def native_step(native: Native, model: NativeModel) -> Step:
    """A decode step of native operations, eager, as a decoder would call them."""
    batch = len(model.spans)

    def matmul(x: Tensor, linears: NativeLinears) -> Tensor:
        return native_linear.matmul(x, linears.parts[0], linears.bias)

    def step(part_done: Callable[[], None]) -> Tensor:
        table = plan_spans(model.spans, block_size=BLOCK_SIZE)
        cos, sin = rotations(batch)
        x = model.embedded.clone()
        more: Tensor | None = None
        for block in model.blocks:
            normed = native.rms_norm(x, block.attn_norm, EPS, residual=more)
            qkv = matmul(normed, block.qkv).view(batch, -1, HEAD_DIM)
            query = native.rope_and_write(qkv, cos, sin, block.cache, model.slots)
            attended = native.paged_attention(query, block.cache, table, block.rule)
            more = matmul(attended.view(batch, -1), block.o)
            normed = native.rms_norm(x, block.mlp_norm, EPS, residual=more)
            more = matmul(native.gate_mul(matmul(normed, block.gate_up)), block.down)
            part_done()
        normed = native.rms_norm(x, model.norm, EPS, residual=more)
        logits = native_linear.matmul(normed, model.head, None)
        part_done()
        return logits

    return step


def native_step_by_blocks(native: Native, model: NativeModel, at_once: int) -> Step:
    """The same by `native_blocks`, so many blocks a call."""

    def several(first: int) -> NativeBlocks:
        return bind(model.blocks[first : first + at_once], hidden=HIDDEN, eps=EPS, dtype=BF16)

    bound = [several(first) for first in range(0, len(model.blocks), at_once)]

    def step(part_done: Callable[[], None]) -> Tensor:
        table = plan_spans(model.spans, block_size=BLOCK_SIZE)
        cos, sin = rotations(len(model.spans))
        x = model.embedded.clone()
        for blocks in bound:
            blocks(x, cos[None], sin[None], model.slots, table)
            part_done()
        logits = native_linear.matmul(native.rms_norm(x, model.norm, EPS), model.head, None)
        part_done()
        return logits

    return step


def torch_step(batch: int, context: int) -> Step:
    """The same step by the torch path: int4pack linears, a bfloat16 head."""
    layers: list[dict[str, torch_ops.Int4Packed]] = [{} for _ in range(LAYERS)]
    for name, shape in LINEARS.items():
        weight = random_codes(*shape, "int4-g128-sym")
        packed = torch_ops.int4_pack(weight, BF16, CPU)
        for layer in layers:
            layer[name] = packed._replace(words=packed.words.clone())
    head = random_weight(VOCAB, HIDDEN, None).dequantize(BF16)
    norm = torch.ones(HIDDEN, dtype=BF16)
    spans = decode_spans(batch, context)
    caches = make_pools(batch, context)
    embedded = torch.randn(batch, HIDDEN).to(BF16)
    matmul = torch_ops.int4_matmul

    def step(part_done: Callable[[], None]) -> Tensor:
        plan = attention.plan(spans, block_size=BLOCK_SIZE, window=None, dtype=BF16, device=CPU)
        angles = torch.full((batch, 1, HEAD_DIM), 0.5)
        cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)
        x = embedded.clone()
        for layer, (keys, values) in zip(layers, caches, strict=True):
            qkv = matmul(torch_ops.rms_norm(x, norm, EPS), layer["qkv"], None)
            heads = qkv.view(batch, -1, HEAD_DIM)
            qk = torch_ops.rope(heads[:, : HEADS + KV_HEADS], cos, sin)
            key, value = qk[:, HEADS:], heads[:, HEADS + KV_HEADS :]
            attention.write(keys, values, key, value, plan.slots)
            attended = attention.attend(
                qk[:, :HEADS], keys, values, plan, block_size=BLOCK_SIZE, scale=SCALE
            )
            x = x.add_(matmul(attended.reshape(batch, -1), layer["o"], None))
            gate_up = matmul(torch_ops.rms_norm(x, norm, EPS), layer["gate_up"], None)
            x = x.add_(matmul(torch_ops.silu_mul(gate_up), layer["down"], None))
            part_done()
        logits = F.linear(torch_ops.rms_norm(x, norm, EPS), head)
        part_done()
        return logits

    return step


def make_pools(batch: int, context: int) -> list[tuple[Tensor, Tensor]]:
    """keys and values [kv_heads, slots, head_dim] of each layer."""
    slots = -(-context // BLOCK_SIZE) * BLOCK_SIZE * batch
    shape = (KV_HEADS, slots, HEAD_DIM)
    return [(torch.randn(shape).to(BF16), torch.randn(shape).to(BF16)) for _ in range(LAYERS)]


def measure_decode(
    native: Native, batches: Sequence[int], context: int, seconds: float
) -> list[DecodeResult]:
    results = []
    for batch in batches:
        model = make_native_model(native, batch, context)
        steps = {
            "native": native_step(native, model),
            "native, block": native_step_by_blocks(native, model, 1),
            "native, blocks": native_step_by_blocks(native, model, LAYERS),
            "torch": torch_step(batch, context),
        }
        for path, step in steps.items():
            sample, parts = measure_step(step, seconds)
            results.append(
                DecodeResult(
                    path,
                    batch,
                    sample.smallest * 1e3,
                    sample.median * 1e3,
                    parts * 1e3,
                    batch / parts,
                )
            )
            found = results[-1]
            print(
                f"decode batch {batch:<3} context {context} {path:14}"
                f" {found.milliseconds:8.2f} ms (median {found.median_milliseconds:8.2f},"
                f" sum of parts {found.sum_of_parts_milliseconds:8.2f})"
                f" {found.tokens_per_second:8.1f} tok/s",
                file=sys.stderr,
                flush=True,
            )
    return results


def read_bandwidth(native: Native, seconds: float) -> float:
    """GB/s of reading memory straight through."""
    slices = torch.ones(64, 8 << 20, dtype=torch.uint8).unbind()
    turns = itertools.cycle(slices)
    return slices[0].nbytes / measure(lambda: native.read(next(turns)), seconds).smallest / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="The CPU kernels beside PyTorch's own.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", choices=[isa.name for isa in INSTRUCTION_SETS])
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each measurement")
    parser.add_argument("--out", type=Path, help="JSON file; standard output by default")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    native = load(arguments.isa)
    if isinstance(native, Missing):
        raise SystemExit(f"native {native.reason}")
    with torch.inference_mode():
        report = {
            "instruction_set": native.isa,
            "read_gigabytes_per_second": read_bandwidth(native, arguments.seconds),
            "linears": [
                asdict(result)
                for result in measure_linears(native, arguments.shapes, arguments.seconds)
            ],
            "decode": [
                asdict(result)
                for result in measure_decode(
                    native, arguments.batches, arguments.context, 4 * arguments.seconds
                )
            ],
        }
    if arguments.out is None:
        print(json.dumps({"environment": environment(), **report}, indent=1))
    else:
        write_result(arguments.out, report, load_before=load_before)


if __name__ == "__main__":
    main()
