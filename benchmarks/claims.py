"""What is said of serving engines, measured on this machine, or put right with the arithmetic.

    python benchmarks/claims.py --out benchmarks/results/claims.json
    python benchmarks/claims.py --model ./Qwen3-0.6B-int4 --original Qwen/Qwen3-0.6B

Claims that tell of something a machine can show (batching, prefix caching, speculation, paging,
four bits, speed beside transformers) are measured with --model and its --original, each against
its alternative in the same run. Claims about other hardware are arithmetic: bytes that must be
read, by the bandwidth of the card's data sheet. Times are the CPU time of this process on one
thread, so that other work on the machine counts little; `--clock wall` takes the clock's.

`holds` says whether what was found supports the claim as it is worded; `says` puts it right. A
small model shows overheads, a large one bandwidth: what is measured holds for the model it names.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qtool.runtime.bench.conditions import write_result
from qtool.runtime.bench.machine import BUFFER_BYTES
from qtool.runtime.bench.offline import random_prompt, run_all
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.llm import LLM

REQUESTS, PROMPT, ANSWER = 16, 32, 32
LONG_PROMPT = 384

# Of data sheets: bytes a second of memory, and of the bus between card and host.
A100_40GB, RTX_4090, PCIE4 = 1.555e12, 1.008e12, 25e9
# Bits a weight of llama.cpp's types over a whole 8B file, from its table for Llama 3.1 8B.
BITS = {"BF16": 16.0, "INT8": 8.5, "Q4_K_M": 4.89, "Q3_K_M": 4.0, "Q2_K": 3.16}
WEIGHTS_8B, WEIGHTS_70B = 8.03e9, 70.6e9
# Llama 3 70B: 80 layers, 8 heads of keys and values, 128 channels, 2 bytes.
KV_BYTES_70B = 2 * 80 * 8 * 128 * 2


@dataclass(frozen=True, slots=True)
class Finding:
    """how: "measured" here, "arithmetic", or "neither", where it needs what is not here.

    figures  what was found, with the unit in the name
    """

    claim: str
    how: str
    figures: dict[str, float]
    holds: bool | None
    says: str


# -- arithmetic -----------------------------------------------------------------------------------


def by_arithmetic() -> Iterator[Finding]:
    seconds = 14e9 / A100_40GB
    yield Finding(
        "decode: 7B x 2 bytes = 14 GB, on an A100 of 2 TB/s 7 ms a token, 140 tokens/s",
        "arithmetic",
        {
            "tokens_per_second_at_2_TB_s": 2e12 / 14e9,
            "tokens_per_second_of_the_40_GB_card": 1 / seconds,
        },
        True,
        "right for the 80 GB card's 2 TB/s, as a bound: engines reach 70 to 80 % of it",
    )
    yield Finding(
        "quantized to 3.5 GB: 4x",
        "arithmetic",
        {"bytes_ratio": 14e9 / (7e9 * 4.25 / 8), "least_bits_per_weight": 4.25},
        False,
        "4 bits with a scale for 64 weights and a head in more are 4.2 to 4.9 bits: 3.3 to 3.8x, "
        "as a bound and for one sequence; batches gain less",
    )
    bits = BITS["Q4_K_M"]
    weights = WEIGHTS_70B * bits / 8
    beyond = weights + 8e9 + 2e9 - 24e9
    yield Finding(
        "70B Q4 on an RTX 4090: 15 tokens/s alone, 140 in a batch of 16, with CPU offload",
        "arithmetic",
        {
            "weights_gigabytes": weights / 1e9,
            "tokens_per_second_if_all_were_on_the_card": RTX_4090 / weights,
            "gigabytes_over_the_bus_a_step": beyond / 1e9,
            "tokens_per_second_with_offload": 1 / (beyond / PCIE4 + 24e9 / RTX_4090),
        },
        False,
        "what does not fit crosses the bus for every step: about one token a second alone",
    )
    yield Finding(
        "70B, context 4096: about 80 GB of KV cache at full batch",
        "arithmetic",
        {
            "kilobytes_per_token": KV_BYTES_70B / 1024,
            "gigabytes_per_sequence": 4096 * KV_BYTES_70B / 1e9,
            "sequences_in_80_gigabytes": 80e9 / (4096 * KV_BYTES_70B),
        },
        True,
        "true of a batch of 60 sequences, all of 4096 tokens",
    )
    yield Finding(
        "70B BF16: 70 GB of weights",
        "arithmetic",
        {"bf16_gigabytes": 2 * WEIGHTS_70B / 1e9, "fp8_gigabytes": WEIGHTS_70B / 1e9},
        False,
        "70 GB is FP8 or INT8; BF16 is twice that",
    )
    sizes = {f"{name}_gigabytes": WEIGHTS_8B * bits / 8e9 for name, bits in BITS.items()}
    said = {"BF16": 16, "INT8": 8, "Q4_K_M": 5, "Q3_K_M": 4, "Q2_K": 3}
    yield Finding(
        "8B: BF16 16 GB, INT8 8, Q4_K_M 5, Q3_K_M 4, Q2_K 3",
        "arithmetic",
        sizes,
        all(abs(sizes[f"{name}_gigabytes"] - size) < 0.6 for name, size in said.items()),
        "right to half a gigabyte; the bits a weight are 4.9, 4.0 and 3.2, not 4.5, 3.5 and 2.5",
    )
    yield Finding(
        "INT4: 2x less memory",
        "arithmetic",
        {"ratio_to_bf16": 16 / BITS["Q4_K_M"], "ratio_to_int8": BITS["INT8"] / BITS["Q4_K_M"]},
        False,
        "3.3x less than BF16; 2x is the ratio to INT8",
    )
    yield Finding(
        "FlashAttention: 2-4x less memory",
        "arithmetic",
        {"scores_megabytes_of_a_head_at_8192": 8192 * 8192 * 2 / 1e6, "with_tiles": 0.0},
        None,
        "scores are not kept at all: what is saved grows with the square of the prompt",
    )
    for claim in (
        "TensorRT-LLM up to 2x vLLM, with a compilation for each GPU",
        "tensor parallelism is linear",
        "awq_marlin 60-65 tokens/s, awq 6, gptq 45-55, GGUF 6, of a 24B model on an RTX 4090",
        "GPU utilisation 30 % to 90 % by continuous batching",
        "FasterTransformer: 2x",
    ):
        yield Finding(claim, "neither", {}, None, "needs GPUs or engines that are not here")


# -- measured -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """model: quantized; original: what it was made from."""

    model: str
    original: str
    clock: Callable[[], float]
    rounds: int

    def seconds(self, run: Callable[[], object]) -> float:
        """The least of some runs, after one to warm up."""
        run()
        found = []
        for _ in range(self.rounds):
            began = self.clock()
            run()
            found.append(self.clock() - began)
        return min(found)


def prompts_of(llm: LLM, count: int, length: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [random_prompt(draw, llm, length) for _ in range(count)]


def batching(setting: Setting) -> Iterator[Finding]:
    with closing(LLM(setting.model, max_num_seqs=REQUESTS, enable_prefix_caching=False)) as llm:
        prompts = prompts_of(llm, REQUESTS, PROMPT, 0)
        tokens = REQUESTS * ANSWER

        def at_once(count: int) -> float:
            groups = [prompts[start : start + count] for start in range(0, REQUESTS, count)]
            return setting.seconds(
                lambda: [run_all(llm.engine, group, [ANSWER] * len(group)) for group in groups]
            )

        alone, three, all_of_them = at_once(1), at_once(3), at_once(REQUESTS)
    yield Finding(
        "continuous batching: 10-50x the throughput",
        "measured",
        {
            "tokens_per_second_one_by_one": tokens / alone,
            f"tokens_per_second_{REQUESTS}_at_once": tokens / all_of_them,
            "ratio": alone / all_of_them,
        },
        alone / all_of_them >= 10,
        "bounded by where arithmetic, not memory, limits a step: 5 to 20 sequences on a CPU, 50 "
        "and more on a GPU",
    )
    yield Finding(
        "2-3 users at once: 3-5x over one by one",
        "measured",
        {"ratio_of_3_at_once": alone / three},
        alone / three >= 3,
        "three sequences cannot give more than 3x",
    )


def prefix_caching(setting: Setting) -> Iterator[Finding]:
    with closing(LLM(setting.model)) as llm:
        number = iter(range(10_000))
        shared = prompts_of(llm, 1, LONG_PROMPT, 1)[0]

        def cold() -> object:
            return run_all(llm.engine, prompts_of(llm, 1, LONG_PROMPT + 8, next(number) + 2), [1])

        def warm() -> object:
            own = prompts_of(llm, 1, 8, next(number) + 2)[0]
            return run_all(llm.engine, [[*shared, *own]], [1])

        first, again = setting.seconds(cold), setting.seconds(warm)
    yield Finding(
        "prompt caching: 5-10x less latency",
        "measured",
        {
            "prompt_tokens": LONG_PROMPT + 8,
            "first_token_ms_computed": 1e3 * first,
            "first_token_ms_cached": 1e3 * again,
            "ratio": first / again,
        },
        first / again >= 5,
        "of the first token, and as long as the shared part is: it has no share in later tokens",
    )


def speculation(setting: Setting) -> Iterator[Finding]:
    config = {"method": "ngram", "num_speculative_tokens": 4}
    text = "The ships are in the harbour, and the harbour is full of ships. " * 4
    plain_sampling = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    found: dict[str, float] = {}
    for name, speculative in (("plain", None), ("ngram", config)):
        with closing(LLM(setting.model, speculative_config=speculative)) as llm:
            # What repeats can be guessed: a prompt that does, and whatever the answer repeats.
            for kind, prompt in (("repeating", text), ("plain", "It was a dark and")):
                found[f"{name}_{kind}"] = setting.seconds(
                    lambda: llm.generate([prompt], plain_sampling, use_tqdm=False)  # noqa: B023
                )
    ratios = {
        f"ratio_{kind}_prompt": found[f"plain_{kind}"] / found[f"ngram_{kind}"]
        for kind in ("repeating", "plain")
    }
    yield Finding(
        "speculation: 2-3x less latency",
        "measured",
        ratios,
        max(ratios.values()) >= 2,
        "as much as guesses are right; greedy text of a small model repeats itself anyway",
    )


def paging(setting: Setting) -> Iterator[Finding]:
    """How many requests run at once in the same memory, of which each uses an eighth at most."""
    with closing(LLM(setting.model)) as llm:
        length = llm.info.max_model_len
        per_token = llm.info.kv_cache_bytes / (llm.info.num_kv_blocks * llm.info.block_size)
    reserved = 4
    with closing(
        LLM(
            setting.model,
            max_num_seqs=256,
            kv_cache_memory_bytes=int(reserved * length * per_token),
            enable_prefix_caching=False,
        )
    ) as llm:
        used = length // 8
        # Mostly answer: who has its answer leaves, and the prompts of 64 do not come in one step.
        prompts = prompts_of(llm, 64, used // 4, 3)
        most = 0
        sampling = SamplingParams(temperature=0.0, max_tokens=3 * used // 4, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            llm.engine.add(GenerationRequest(str(number), tuple(prompt), sampling))
        while llm.engine.has_work:
            llm.engine.step()
            most = max(most, llm.engine.stats().num_requests_running)
    yield Finding(
        "paging: 10-30x more requests at once; 2k used of 16k wastes 14k",
        "measured",
        {
            "requests_with_room_reserved": float(reserved),
            "requests_with_pages": float(most),
            "ratio": most / reserved,
            "context": float(length),
            "tokens_used_by_each": float(used),
        },
        most / reserved >= 10,
        "the ratio is context over tokens used, 8 here and 8 in the claim's own example; 10 to 30 "
        "take answers of a tenth to a thirtieth of the context",
    )
    yield Finding(
        "contiguous KV wastes 40 %",
        "arithmetic",
        {"share_wasted_at_an_eighth": 1 - 1 / 8, "share_wasted_at_60_percent": 0.4},
        None,
        "1 - used / reserved: 40 % if requests fill 60 % of what is reserved",
    )


def transformers_generate(setting: Setting) -> Iterator[Finding]:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(setting.original, dtype=torch.bfloat16).eval()
    with closing(LLM(setting.model, max_num_seqs=REQUESTS, enable_prefix_caching=False)) as llm:
        prompts = prompts_of(llm, REQUESTS, PROMPT, 4)
        ours = setting.seconds(lambda: run_all(llm.engine, prompts, [ANSWER] * REQUESTS))
    inputs = torch.tensor(prompts)
    options = {"do_sample": False, "min_new_tokens": ANSWER, "max_new_tokens": ANSWER}

    def generate(some: torch.Tensor) -> object:
        with torch.inference_mode():
            return theirs.generate(some, attention_mask=torch.ones_like(some), **options)

    alone = setting.seconds(lambda: [generate(row[None]) for row in inputs])
    together = setting.seconds(lambda: generate(inputs))
    yield Finding(
        "24x the throughput of transformers",
        "measured",
        {
            "tokens_per_second": REQUESTS * ANSWER / ours,
            "ratio_to_generate_one_by_one": alone / ours,
            "ratio_to_generate_in_one_batch": together / ours,
        },
        alone / ours >= 24,
        "against one request after another; against a batch of equal lengths far less",
    )


def four_bits(setting: Setting) -> Iterator[Finding]:
    found = {}
    for name, model in (("bf16", setting.original), ("quantized", setting.model)):
        with closing(LLM(model, dtype="bfloat16", enable_prefix_caching=False)) as llm:
            prompts = prompts_of(llm, 1, PROMPT, 5)
            short = setting.seconds(lambda: run_all(llm.engine, prompts, [2]))  # noqa: B023
            long = setting.seconds(lambda: run_all(llm.engine, prompts, [2 + ANSWER]))  # noqa: B023
            found[name] = (ANSWER / (long - short), llm.loaded.nbytes)
    buffer = torch.ones(BUFFER_BYTES // 4)
    bandwidth = buffer.nbytes / setting.seconds(buffer.sum)
    (before, plain_bytes), (after, packed_bytes) = found["bf16"], found["quantized"]
    in_cache = packed_bytes < largest_cache()
    yield Finding(
        "decode is bound by bandwidth, so fewer bytes are as many times faster",
        "measured",
        {
            "bytes_ratio": plain_bytes / packed_bytes,
            "speed_ratio": after / before,
            "tokens_per_second_bf16": before,
            "tokens_per_second_quantized": after,
            "bound_by_memory_tokens_per_second_quantized": bandwidth / packed_bytes,
        },
        None if in_cache else after / before >= 0.8 * plain_bytes / packed_bytes,
        "this model lies in the cache, so kernels and steps differ here, not memory"
        if in_cache
        else "where the weights do not fit the cache",
    )


def largest_cache() -> int:
    """Bytes of the last-level cache; 32 MB where Linux does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(path.read_text(encoding="ascii").strip().rstrip("K")) << 10 for path in sizes]
    return max(found, default=32 << 20)


MEASURED = {
    "batching": batching,
    "prefix": prefix_caching,
    "speculation": speculation,
    "paging": paging,
    "transformers": transformers_generate,
    "bits": four_bits,
}


def quantized(original: str, folder: Path) -> str:
    """The original in 4 bits, by rounding: speed does not depend on how it was chosen."""
    from qtool.quantize.pipeline import quantize_model
    from qtool.recipe import load_recipe

    quantize_model(original, load_recipe("rtn-int4"), out=folder)
    return str(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="quantized; by default the original in int4")
    parser.add_argument("--original", default="builtin:books-7m")
    parser.add_argument("--only", nargs="+", choices=[*MEASURED, "arithmetic"])
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    load_before = os.getloadavg()[0]
    if options.clock == "cpu":
        torch.set_num_threads(1)
    wanted = options.only or [*MEASURED, "arithmetic"]
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as temporary:
        model = options.model or ""
        if not model and any(name in MEASURED for name in wanted):
            model = quantized(options.original, Path(temporary) / "int4")
        clock = time.process_time if options.clock == "cpu" else time.perf_counter
        for name, measure in MEASURED.items():
            if name in wanted:
                setting = Setting(model, _folder(options.original), clock, options.rounds)
                findings += _shown(measure(setting))
    if "arithmetic" in wanted:
        findings += _shown(by_arithmetic())
    if options.out is not None:
        facts: dict[str, Any] = {
            "original": options.original,
            "model": options.model or "the original in int4 (recipe rtn-int4)",
            "clock": options.clock,
            "threads": torch.get_num_threads(),
            "findings": [asdict(finding) for finding in findings],
        }
        write_result(options.out, facts, load_before=load_before)


def _folder(original: str) -> str:
    """Where transformers finds it."""
    from qtool.source import resolve

    return str(resolve(original).path)


def _shown(findings: Iterator[Finding]) -> list[Finding]:
    found = list(findings)
    words = {True: "holds", False: "does not hold", None: "-"}
    for finding in found:
        print(f"\n{finding.claim}\n  {finding.how}: {words[finding.holds]}", flush=True)
        for name, value in finding.figures.items():
            print(f"    {name:45} {value:12.4g}")
        print(f"  {finding.says}", flush=True)
    return found


if __name__ == "__main__":
    main()
