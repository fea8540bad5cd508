"""What the GPU kernels and the engine on them reach: one command, within nine minutes on an H200.

    python benchmarks/gpu.py                        writes benchmarks/results/<gpu>.json
    python benchmarks/gpu.py --rows linears engine
    make bench-gpu                                  the same, in the project's own environment

roofs      bytes a second that a copy moves, and bfloat16 operations a second of cuBLAS
linears    the linears of an 8B model in 4 bits, groups of 128, for 1 to 512 rows: microseconds,
           share of the copy's bandwidth, and ratios to cuBLAS in bfloat16, to PyTorch's int4
           operator and, where it is installed, to gemlite. Weights are used in turn, so that they
           come from memory
attention  decoding 16 sequences of 8192 tokens (share of bandwidth), a prompt of 8192 (FLOP/s)
sampling   drawing tokens from 151,936, by what requests ask for
engine     milliseconds a step and tokens a second of models with random weights, shaped as
           Qwen2.5-0.5B, Llama-3.1-8B and Qwen3-30B-A3B, at 1, 16 and 64 sequences; with recorded
           steps and, for one sequence, without
peers      transformers' `generate` of the 8B in bfloat16, one prompt after the other, beside 64 at
           once here

Kernels are timed by the GPU's clock over recordings, so that launching costs nothing; steps of the
engine by the wall's, with everything that the host does.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtool.errors import QtoolError, UsageError
from qtool.kernels.cuda import paged_attention, sampling
from qtool.kernels.cuda.paged_attention import AttentionShape
from qtool.kernels.cuda.sampling import Draw, Draws
from qtool.kernels.reference import Span
from qtool.runtime.bench.conditions import write_result
from qtool.runtime.bench.gpu_timing import copy_bandwidth, seconds_of
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.loading import LoadedModel
from qtool.runtime.random_model import QWEN_05B, random_model

# PYTHONSAFEPATH leaves a script's own folder out.
sys.path.insert(0, str(Path(__file__).parent))
from gpu_products import CUDA, GROUP, SCHEME, contenders_of

ROWS = ("roofs", "linears", "attention", "sampling", "engine", "peers")
# config.json of meta-llama/Llama-3.1-8B and of Qwen/Qwen3-30B-A3B, as far as shapes go.
LLAMA_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN3_30B_A3B: Mapping[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
MODELS = {"0.5B": QWEN_05B, "8B": LLAMA_8B, "30B-A3B": QWEN3_30B_A3B}
LINEARS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SEQUENCES = (1, 16, 64)
PROMPT, NEW_TOKENS = 128, 96


def roofs() -> dict[str, float]:
    size = 8192
    a, b = (torch.randn(size, size, device=CUDA).bfloat16() for _ in range(2))
    product = seconds_of(lambda index: a @ b)
    return {
        "copy_bytes_per_second": copy_bandwidth(CUDA),
        "bf16_flops_per_second": 2 * size**3 / product,
    }


def linears(bandwidth: float) -> list[dict[str, Any]]:
    rows = []
    for name, (out, inputs) in LINEARS.items():
        contenders = contenders_of(out, inputs)
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs, device=CUDA).bfloat16()
            took = {}
            for contender, product in contenders.items():
                took[contender] = seconds_of(partial(product, x))
            read = out * inputs / 2 + out * inputs / GROUP * 2
            rows.append(
                {
                    "linear": name,
                    "tokens": tokens,
                    "microseconds": {key: 1e6 * value for key, value in took.items()},
                    "share_of_copy_bandwidth": read / took["qtool"] / bandwidth,
                    "tflops": 2 * tokens * out * inputs / took["qtool"] / 1e12,
                    "ratio": {
                        key: value / took["qtool"] for key, value in took.items() if key != "qtool"
                    },
                }
            )
            print(f"linears    {_line(rows[-1])}", flush=True)
        del contenders
        _free()
    return rows


def _line(row: Mapping[str, Any]) -> str:
    ratios = ", ".join(f"{value:.2f} x {name}" for name, value in row["ratio"].items())
    return (
        f"{row['linear']:8} {row['tokens']:4} tokens {row['microseconds']['qtool']:8.1f} us "
        f"{row['share_of_copy_bandwidth']:6.1%} of copy, {row['tflops']:6.1f} TFLOP/s; {ratios}"
    )


def attention(bandwidth: float) -> dict[str, float]:
    heads, kv_heads, channels, block = 32, 8, 128, 16
    length, sequences = 8192, 16
    num_blocks = length // block * sequences
    order = torch.randperm(num_blocks).tolist()
    pool = (kv_heads, num_blocks * block, channels)
    keys, values = (torch.randn(pool, device=CUDA).bfloat16() for _ in range(2))
    shape = AttentionShape(heads, kv_heads)

    def run(spans: list[Span]) -> float:
        rows = sum(span.num_queries for span in spans)
        query = torch.randn(rows, heads, channels, device=CUDA).bfloat16()
        tables = paged_attention.plan(spans, [shape], block_size=block, device=CUDA)
        return seconds_of(
            lambda index: paged_attention.attend(
                query, keys, values, tables, block_size=block, scale=channels**-0.5
            )
        )

    each = length // block
    decode = run([Span(1, length, order[i * each : (i + 1) * each]) for i in range(sequences)])
    read = 2 * sequences * length * kv_heads * channels * 2
    prefill = run([Span(length, length, order[:each])])
    operations = 4 * heads * channels * length * (length + 1) / 2
    return {
        "decode_16x8192_microseconds": 1e6 * decode,
        "decode_share_of_copy_bandwidth": read / decode / bandwidth,
        "prefill_8192_milliseconds": 1e3 * prefill,
        "prefill_tflops": operations / prefill / 1e12,
    }


def drawing() -> list[dict[str, Any]]:
    asked = {
        "greedy": Draw(),
        "temperature": Draw(temperature=0.8, number=0.5),
        "top_p": Draw(temperature=0.8, top_p=0.95, number=0.5),
        "top_k, top_p": Draw(temperature=0.7, top_k=20, top_p=0.8, number=0.5),
    }
    found = []
    for rows in (1, 16, 64):
        logits = 3 * torch.randn(rows, 151_936, device=CUDA)
        for name, draw in asked.items():
            draws = sampling.on_device([draw] * rows, CUDA)
            took = seconds_of(partial(_draw, logits, draws))
            found.append({"rows": rows, "request": name, "microseconds": 1e6 * took})
    return found


def _draw(logits: torch.Tensor, draws: Draws, index: int) -> object:
    return sampling.draw_tokens(logits, draws)


def engine() -> list[dict[str, Any]]:
    rows = []
    for name, config in MODELS.items():
        loaded = random_model(config, SCHEME, device=CUDA, repeat=True)
        for sequences, eager in [*((count, False) for count in SEQUENCES), (1, True)]:
            rows.append({"model": name, "eager": eager, **_decode(loaded, sequences, eager)})
            print(
                f"engine     {name:8} {sequences:3} sequences{' eager' if eager else '':6} "
                f"{rows[-1]['step_milliseconds']:8.3f} ms a step, "
                f"{rows[-1]['tokens_per_second']:9.0f} tokens/s",
                flush=True,
            )
        del loaded
        _free()
    return rows


def _decode(loaded: LoadedModel, sequences: int, eager: bool) -> dict[str, Any]:
    """All at once: prompts first, then steps that decode, which are timed one by one."""
    config = EngineConfig(
        "random",
        device="cuda",
        max_model_len=1024,
        max_num_seqs=sequences,
        max_num_batched_tokens=8192,
        block_size=16,
        enforce_eager=eager,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=4 << 30,
    )
    running = Engine(loaded, config)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    vocab = loaded.decoder.vocab_size
    for index in range(sequences):
        prompt = tuple((7919 * (index + 1) * (place + 1)) % vocab for place in range(PROMPT))
        running.add(GenerationRequest(str(index), prompt, greedy))
    seconds, tokens = [], []
    while running.has_work:
        started = time.perf_counter()
        outputs = running.step()
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(len(output.new_token_ids) for output in outputs))
    running.close()
    # Prompts, compilation and the recording are in the first steps.
    steady = [
        took for took, count in zip(seconds[8:], tokens[8:], strict=True) if count == sequences
    ]
    step = statistics.median(steady)
    return {
        "sequences": sequences,
        "step_milliseconds": 1e3 * step,
        "tokens_per_second": sequences / step,
        "end_to_end_tokens_per_second": sum(tokens) / sum(seconds),
        "weight_bytes": loaded.nbytes,
    }


def peers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """transformers, one prompt after the other, beside `rows` of the same model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**LLAMA_8B)
    with torch.device(CUDA):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    prompt = torch.randint(0, config.vocab_size, (1, PROMPT), device=CUDA)
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            model.generate(
                prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
            )
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    theirs = NEW_TOKENS / min(seconds)
    found: dict[str, Any] = {"transformers_bf16_one_by_one_tokens_per_second": theirs}
    ours = [row for row in rows if row["model"] == "8B" and row["sequences"] == max(SEQUENCES)]
    if ours:
        found["ratio_at_64"] = ours[0]["end_to_end_tokens_per_second"] / theirs
    return found


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def measure(asked: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    bandwidth = copy_bandwidth(CUDA)
    work: dict[str, Callable[[], Any]] = {
        "roofs": roofs,
        "linears": lambda: linears(bandwidth),
        "attention": lambda: attention(bandwidth),
        "sampling": drawing,
        "engine": engine,
        "peers": lambda: peers(results.get("engine", [])),
    }
    for row in ROWS:
        if row in asked:
            with torch.inference_mode():
                results[row] = work[row]()
            _free()
            if row not in ("linears", "engine"):
                print(f"{row:10} {results[row]}", flush=True)
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise UsageError("there is no CUDA device", hint="run it on a machine with a GPU")
    load_before = os.getloadavg()[0]
    results = measure(options.rows)
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    out = options.out or Path(__file__).with_name("results") / f"{name}.json"
    write_result(out, results, load_before=load_before)
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except QtoolError as error:
        sys.exit(f"Error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
