"""The engine on a GPU: recorded steps, and text beside the CPU's. `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch

from qtool import LLM, SamplingParams
from qtool.kernels.reference import Span
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.engine.sampling_params import StructuredOutputsParams
from qtool.runtime.loading import LoadedModel
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.random_model import QWEN_05B, random_model

pytestmark = pytest.mark.gpu
MODEL = "builtin:books-7m"
PROMPTS = ["It was a cold evening in November, and", "The captain said", "In the beginning"]
SMALL = {**QWEN_05B, "num_hidden_layers": 4, "vocab_size": 4096}


@pytest.fixture(scope="module", params=["int4-g128-sym", "int8-row-sym"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return random_model(SMALL, request.param, device=torch.device("cuda"))


def batch(parts: list[tuple[list[int], int, list[int]]]) -> Batch:
    ids = [token for part, _, _ in parts for token in part]
    positions = [start + i for part, start, _ in parts for i in range(len(part))]
    return Batch(
        token_ids=torch.tensor(ids, device="cuda"),
        positions=torch.tensor(positions, device="cuda"),
        spans=tuple(Span(len(part), start + len(part), table) for part, start, table in parts),
        sampled_rows=torch.arange(len(ids), device="cuda"),
        row_ranges=(),
    )


def runner(loaded: LoadedModel, *, eager: bool) -> ModelRunner:
    return ModelRunner(
        loaded.decoder, num_blocks=64, block_size=16, max_model_len=512, enforce_eager=eager
    )


def test_replayed_steps_equal_launched_ones(loaded: LoadedModel) -> None:
    eager, recorded = runner(loaded, eager=True), runner(loaded, eager=False)
    assert recorded.gpu is not None
    assert recorded.gpu.graphs is not None
    tables = [[3 * index, 3 * index + 1, 3 * index + 2] for index in range(8)]
    for steps in (eager, recorded):
        steps.run(batch([(list(range(5, 25 + row)), 0, table) for row, table in enumerate(tables)]))
    # 8 fills its size; 3 leaves numbers of others behind.
    for count in (8, 3, 8, 5):
        step = batch([([count + row], 20 + row, tables[row]) for row in range(count)])
        expected, found = eager.run(step), recorded.run(step).clone()
        # Attention may cut its keys differently in a step that was recorded for any length.
        error = float((found - expected).norm() / expected.norm())
        assert error < 5e-3, count
        # The same recording gives the same bits.
        assert torch.equal(recorded.run(step), found)
    assert recorded.gpu.graphs.sizes == (4, 8, 64)


def test_prompts_in_parts_give_the_logits_of_whole_ones(loaded: LoadedModel) -> None:
    text, table = list(range(7, 107)), list(range(10, 20))
    whole = runner(loaded, eager=True).run(batch([(text, 0, table)]))
    steps = runner(loaded, eager=True)
    parts = [
        steps.run(batch([(text[first : first + 30], first, table)])) for first in range(0, 100, 30)
    ]
    error = (torch.cat(parts) - whole).norm() / whole.norm()
    assert float(error) < 1e-2


def texts(device: str, **options: Any) -> list[str]:
    greedy = SamplingParams(temperature=0, max_tokens=40)
    with closing(LLM(MODEL, device=device, **options)) as llm:
        return [answer.outputs[0].text for answer in llm.generate(PROMPTS, greedy)]


def test_greedy_text_equals_the_cpus_in_float32() -> None:
    assert texts("cuda", dtype="float32") == texts("cpu", dtype="float32", activations="bf16")


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_text_in_bfloat16_does_not_depend_on_recording(kv_cache_dtype: str) -> None:
    options = {"dtype": "bfloat16", "kv_cache_dtype": kv_cache_dtype}
    recorded, eager = texts("cuda", **options), texts("cuda", enforce_eager=True, **options)
    same = sum(a == b for a, b in zip(recorded, eager, strict=True))
    # A near tie may fall differently, and the rest of that text with it.
    assert same >= len(PROMPTS) - 1


RULES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 3},
    "typical": {"temperature": 1.0, "typical_p": 0.6, "min_p": 0.01, "seed": 4},
    "penalties": {
        "temperature": 0.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.4,
    },
    "masks": {
        "temperature": 0.0,
        "allowed_token_ids": tuple(range(20, 2000)),
        "bad_words": ((300,), (40, 41)),
        "logit_bias": {50: 2.0},
        "min_tokens": 10,
    },
    "grammar": {
        "temperature": 0.0,
        "structured_outputs": StructuredOutputsParams(regex="[a-z ]{20,30}"),
    },
}


def answers(rules: Sequence[str], **options: Any) -> tuple[list[tuple[int, ...]], int]:
    """Token ids of a batch with these rules, and how many steps were launched ahead."""
    asked = [SamplingParams(max_tokens=30, **RULES[rule]) for rule in rules]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(rules))]
    with closing(LLM(MODEL, device="cuda", dtype="bfloat16", **options)) as llm:
        found = llm.generate(prompts, asked)
        ahead = llm.engine.stats().steps_launched_ahead_total
    return [tuple(answer.outputs[0].token_ids) for answer in found], ahead


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("eager", [True, False])
def test_steps_launched_ahead_change_no_token(rule: str, eager: bool) -> None:
    """The same steps, in the same order, of the same sizes: to the bit."""
    found, ahead = answers([rule] * 3, enforce_eager=eager)
    waiting, none = answers([rule] * 3, enforce_eager=eager, async_scheduling=False)
    assert found == waiting
    assert none == 0
    reads_last_token = rule in ("masks", "grammar")  # a word of two tokens is ruled out
    assert (ahead == 0) if reads_last_token else (ahead > 20)


def test_replayed_steps_ahead_write_what_launched_ones_do() -> None:
    rules = ["greedy", "seeded", "typical", "penalties"]
    replayed, _ = answers(rules)
    launched, _ = answers(rules, enforce_eager=True, async_scheduling=False)
    # A near tie may fall differently, and the rest of that text with it.
    assert sum(a == b for a, b in zip(replayed, launched, strict=True)) >= len(rules) - 1


@pytest.mark.parametrize("rule", ["typical", "penalties", "masks"])
def test_rules_on_the_device_are_those_of_the_host(rule: str) -> None:
    """Log-probabilities bring the logits to the host, where the same rules apply."""
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "async_scheduling": False}
    given = SamplingParams(max_tokens=30, **RULES[rule])
    with closing(LLM(MODEL, **options)) as llm:
        on_device = llm.generate(PROMPTS[:1], given)[0].outputs[0].token_ids
        on_host = llm.generate(PROMPTS[:1], replace(given, logprobs=1))[0].outputs[0].token_ids
    assert list(on_device) == list(on_host)


def test_recordings_take_no_more_than_the_largest(loaded: LoadedModel) -> None:
    steps = runner(loaded, eager=False)
    assert steps.gpu is not None
    graphs = steps.gpu.graphs
    assert graphs is not None
    graphs.record_largest()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for count in (1, 3, 8, 30):
        steps.run(batch([([5], 0, [row]) for row in range(count)]))
    torch.cuda.empty_cache()
    # A page of the allocator's for what each is launched with.
    assert torch.cuda.memory_reserved() - before <= 4 * 2**21


def test_seeded_text_is_drawn_on_the_device_as_on_the_host() -> None:
    """Log-probabilities bring the logits to the host, where the same number draws."""
    given = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=3, max_tokens=30)
    with_logprobs = replace(given, logprobs=1)
    with closing(LLM(MODEL, device="cuda", dtype="bfloat16")) as llm:
        on_device = llm.generate(PROMPTS[:1], given)[0].outputs[0].text
        on_host = llm.generate(PROMPTS[:1], with_logprobs)[0].outputs[0].text
    assert on_device == on_host


@pytest.mark.parametrize("n_gpu_layers", [1, 4, 8])
def test_layers_on_both_sides_write_the_cpus_text(n_gpu_layers: int) -> None:
    """Of eight blocks and the head: the head alone, half of the model, all but one block."""
    expected = texts("cpu", dtype="float32", activations="bf16")
    found = texts("cuda", dtype="float32", activations="bf16", n_gpu_layers=n_gpu_layers)
    assert found == expected


def test_layers_on_both_sides_by_the_kernels_of_each() -> None:
    """In bfloat16 the GPU's part is fused."""
    whole = texts("cuda", dtype="bfloat16")
    divided = texts("cuda", dtype="bfloat16", n_gpu_layers=5)
    assert sum(a == b for a, b in zip(divided, whole, strict=True)) >= 1


def test_as_many_layers_as_fit_are_all_of_a_small_model() -> None:
    with closing(LLM(MODEL, device="cuda", n_gpu_layers="auto")) as llm:
        assert llm.loaded.decoder.device.type == "cuda"
        assert isinstance(llm.loaded.decoder, Decoder)


# The machines that run the other tests of this folder have one GPU more often than two.
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="ranks need a GPU each")
def test_two_ranks_write_what_one_gpu_does_recorded_or_not() -> None:
    one = texts("cuda", dtype="bfloat16")
    for enforce_eager in (False, True):
        found = texts("cuda", dtype="bfloat16", tensor_parallel_size=2, enforce_eager=enforce_eager)
        assert sum(a == b for a, b in zip(found, one, strict=True)) >= len(PROMPTS) - 1
