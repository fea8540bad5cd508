"""AsyncLLMEngine: cumulative text, many requests at once, answers left early."""

import asyncio
from collections.abc import Coroutine
from itertools import pairwise
from typing import Any

import pytest

import qtool
from qtool import AsyncEngineArgs, AsyncLLMEngine, SamplingParams
from qtool.errors import UnknownName, UsageError
from qtool.runtime.llm import LLM
from qtool.runtime.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(120):
            await work

    asyncio.run(limited())


def engine() -> AsyncLLMEngine:
    args = AsyncEngineArgs(
        model="builtin:books-7m", dtype="float32", max_model_len=256, gpu_memory_utilization=0.9
    )
    return AsyncLLMEngine.from_engine_args(args)


async def collect(
    made: AsyncLLMEngine, prompt: Any, sampling: SamplingParams, name: str
) -> list[RequestOutput]:
    return [output async for output in made.generate(prompt, sampling, request_id=name)]


def test_each_output_holds_all_of_the_text_so_far() -> None:
    async def work() -> None:
        made = engine()
        outputs = await collect(made, "The sea", GREEDY, "req1")
        texts = [output.outputs[0].text for output in outputs]
        assert all(after.startswith(before) for before, after in pairwise(texts))
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert {output.request_id for output in outputs} == {"req1"}
        expected = LLM("builtin:books-7m", dtype="float32").generate("The sea", GREEDY)[0]
        assert outputs[-1].outputs == expected.outputs
        assert outputs[-1].prompt_token_ids == expected.prompt_token_ids
        await made.shutdown()

    run(work())


def test_requests_run_beside_each_other_and_can_be_left() -> None:
    async def work() -> None:
        made = engine()
        several = SamplingParams(n=3, seed=1, max_tokens=10, stop=(" the", ","))
        best = SamplingParams(n=1, best_of=3, seed=1, max_tokens=6)
        ids = (await made.get_tokenizer()).encode("The sea")  # type: ignore[union-attr]

        async def left() -> None:
            forever = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
            generating = made.generate("Once", forever, request_id="left")
            async for output in generating:
                if len(output.outputs[0].token_ids) == 5:
                    break
            await generating.aclose()

        alone = await collect(made, "The sea", GREEDY, "alone")
        results = await asyncio.gather(
            collect(made, "The sea", GREEDY, "text"),
            collect(made, ids, GREEDY, "ids"),
            collect(made, {"prompt_token_ids": ids}, several, "several"),
            collect(made, {"prompt": "The sea"}, best, "best"),
            left(),
        )
        assert results[0][-1].outputs == results[1][-1].outputs == alone[-1].outputs
        (found,) = LLM("builtin:books-7m", dtype="float32").generate([ids], several)
        assert [a.text for a in results[2][-1].outputs] == [a.text for a in found.outputs]
        assert len(results[3]) == 1
        assert len(results[3][0].outputs) == 1
        while made.stats().num_requests_running:
            await asyncio.sleep(0.01)
        assert made.stats().kv_cache_usage == 0.0
        await made.check_health()
        await made.shutdown()

    run(work())


def test_an_aborted_request_yields_what_there_is() -> None:
    async def work() -> None:
        made = engine()
        forever = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        last = None
        async for output in made.generate("Once", forever, request_id="a"):
            last = output
            if len(output.outputs[0].token_ids) == 3:
                await made.abort("a")
        assert last is not None
        assert last.outputs[0].finish_reason == "abort"
        bad = SamplingParams(structured_outputs={"regex": "a("})  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="regex parse error"):
            await collect(made, "x", bad, "bad")
        await made.shutdown()

    run(work())


def test_arguments_are_checked_by_name() -> None:
    assert AsyncEngineArgs("m", dtype="half", tensor_parallel_size=1).config.dtype == "float16"
    with pytest.raises(UnknownName, match="max_model_length") as raised:
        AsyncEngineArgs("m", max_model_length=5)
    assert "max_model_len" in str(raised.value.hint)
    with pytest.raises(UsageError, match="pipeline_parallel_size is 2"):
        AsyncEngineArgs("m", pipeline_parallel_size=2)


def test_the_package_offers_all_of_it_by_name() -> None:
    for name in qtool.__all__:
        assert getattr(qtool, name) is not None
