"""The engine in its thread: many streams at once, aborts, draining, failures, and rest."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.async_engine import AsyncEngine, EngineStopped
from qtool.runtime.engine.client import EngineClient, QueueFull
from qtool.runtime.engine.sequence import (
    GenerationRequest,
    PromptTooLong,
    SamplingParams,
    TokenOutput,
)
from qtool.runtime.llm import LLM
from qtool.runtime.loading import LoadedModel, load_model

PROMPTS = [[10 + i, 5, 9 + i, 33][: 1 + i % 4] for i in range(8)]


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Callable[..., Path]) -> LoadedModel:
    return load_model(str(tiny_checkpoint("qwen3")))


def request(name: str, prompt: list[int], max_tokens: int | None = 12) -> GenerationRequest:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return GenerationRequest(name, tuple(prompt), sampling)


def with_engine(
    loaded: LoadedModel,
    work: Callable[[AsyncEngine], Coroutine[Any, Any, None]],
    **options: Any,
) -> None:
    """Run `work` on a started engine, stop it, and see that nothing is left."""

    async def run() -> None:
        engine = AsyncEngine.from_loaded(loaded, EngineConfig("tiny", **options))
        await engine.start()
        try:
            async with asyncio.timeout(120):
                await work(engine)
        finally:
            await engine.stop()
        assert not engine.healthy()
        assert engine.stats().num_requests_running == 0
        assert engine.stats().kv_cache_usage == 0.0

    asyncio.run(run())


async def collect(outputs: AsyncIterator[TokenOutput]) -> list[TokenOutput]:
    return [output async for output in outputs]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_eight_streams_at_once_give_the_texts_of_each_alone(loaded: LoadedModel) -> None:
    llm = LLM.from_loaded(loaded, EngineConfig("tiny"))
    expected = [
        list(llm.generate([prompt], request("", prompt).sampling)[0].outputs[0].token_ids)
        for prompt in PROMPTS
    ]

    async def work(engine: AsyncEngine) -> None:
        client: EngineClient = engine
        assert client.healthy()
        streams = [
            collect(client.generate(request(str(i), prompt))) for i, prompt in enumerate(PROMPTS)
        ]
        for outputs, tokens in zip(await asyncio.gather(*streams), expected, strict=True):
            assert [token for output in outputs for token in output.new_token_ids] == tokens
            assert outputs[-1].finish_reason == "length"
        assert client.stats().generation_tokens_total == 8 * 12

    with_engine(loaded, work)


def test_leaving_a_stream_aborts_its_request(loaded: LoadedModel) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with aclosing(engine.generate(request("a", [1], None))) as outputs:  # type: ignore[type-var]
            async for _ in outputs:
                break
        await until(lambda: engine.stats().num_requests_running == 0)
        assert engine.stats().kv_cache_usage == 0.0
        # The name is free again.
        assert len(await collect(engine.generate(request("a", [1], 2)))) == 2

    with_engine(loaded, work)


def test_a_cancelled_task_aborts_its_request(loaded: LoadedModel) -> None:
    async def work(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine.generate(request("a", [1], None))))
        await until(lambda: engine.stats().num_requests_running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats().num_requests_running == 0)

    with_engine(loaded, work)


def test_an_aborted_stream_ends_with_that_reason(loaded: LoadedModel) -> None:
    async def work(engine: AsyncEngine) -> None:
        reasons = []
        async for output in engine.generate(request("a", [1], None)):
            reasons.append(output.finish_reason)
            engine.abort("a")
        assert reasons[-1] == "abort"
        assert not any(reasons[:-1])
        engine.abort("never heard of")

    with_engine(loaded, work)


def test_a_request_that_cannot_run_is_refused_by_the_call(loaded: LoadedModel) -> None:
    async def work(engine: AsyncEngine) -> None:
        with pytest.raises(PromptTooLong):
            engine.generate(request("a", [1] * 512))
        first = engine.generate(request("a", [1], None))
        await anext(first)
        with pytest.raises(UsageError, match="request a is already running"):
            engine.generate(request("a", [1]))
        assert engine.stats().num_requests_running == 1

    with_engine(loaded, work)


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(loaded: LoadedModel) -> None:
    async def work(engine: AsyncEngine) -> None:
        streams = [engine.generate(request(name, [1], None)) for name in "abc"]
        for stream in streams[:2]:
            await anext(stream)
        late = asyncio.ensure_future(anext(streams[2]))  # type: ignore[arg-type]
        await until(lambda: engine.stats().num_requests_waiting == 1)
        with pytest.raises(QueueFull, match="3 sequences run or wait, and at most 3 may") as raised:
            engine.generate(request("d", [1]))
        assert "--max-num-queued-reqs" in str(raised.value.hint)
        engine.abort("a")
        await collect(streams[0])
        fourth = engine.generate(request("d", [1], 1))
        await late
        for stream in streams[1:]:
            await stream.aclose()  # type: ignore[attr-defined]
        assert len(await collect(fourth)) == 1

    with_engine(loaded, work, max_num_seqs=2, max_num_waiting=1)


def test_a_stream_that_begins_late_finds_the_queue_as_it_is_then(loaded: LoadedModel) -> None:
    async def work(engine: AsyncEngine) -> None:
        first, second = (engine.generate(request(name, [1], None)) for name in "ab")
        await anext(first)
        with pytest.raises(QueueFull):
            await anext(second)

    with_engine(loaded, work, max_num_seqs=1, max_num_waiting=0)


def test_a_stream_that_begins_after_the_stop_is_refused(loaded: LoadedModel) -> None:
    async def work(engine: AsyncEngine) -> None:
        stream = engine.generate(request("a", [1]))
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0)  # it has been told, and its thread may still be there
        with pytest.raises(EngineStopped, match="not taking requests"):
            await anext(stream)
        await stopping

    with_engine(loaded, work)


def test_stopping_drains_what_runs_and_refuses_what_comes(loaded: LoadedModel) -> None:
    async def work(engine: AsyncEngine) -> None:
        running = asyncio.create_task(collect(engine.generate(request("a", [1], 40))))
        await until(lambda: engine.stats().num_requests_running == 1)
        stopping = asyncio.create_task(engine.stop(drain_seconds=100))
        await asyncio.sleep(0)
        with pytest.raises(EngineStopped):
            engine.generate(request("b", [1]))
        outputs = await running
        assert outputs[-1].finish_reason == "length"
        await stopping

    with_engine(loaded, work)


def test_stopping_without_time_aborts_what_runs(loaded: LoadedModel) -> None:
    async def work(engine: AsyncEngine) -> None:
        running = asyncio.create_task(collect(engine.generate(request("a", [1], None))))
        await until(lambda: engine.stats().num_requests_running == 1)
        await engine.stop()
        assert (await running)[-1].finish_reason == "abort"

    with_engine(loaded, work)


def test_an_engine_that_breaks_leaves_nobody_waiting(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("a bug")

    async def work(engine: AsyncEngine) -> None:
        stream = engine.generate(request("a", [1], None))
        await anext(stream)
        monkeypatch.setattr("qtool.runtime.engine.scheduler.Scheduler.schedule", broken)
        outputs = await collect(stream)
        assert outputs[-1].finish_reason == "error"
        assert outputs[-1].error == "the engine has failed; see its log"
        await until(lambda: not engine.healthy())
        with pytest.raises(EngineStopped, match="ended after an error"):
            engine.generate(request("b", [1]))

    with_engine(loaded, work)


def test_a_model_that_cannot_be_loaded_fails_the_start() -> None:
    async def run() -> None:
        engine = AsyncEngine(EngineConfig("./no-such-model"))
        with pytest.raises(UsageError, match="no-such-model"):
            await engine.start()
        assert not engine.healthy()
        await engine.stop()

    asyncio.run(run())


def test_the_engine_loads_by_name_in_its_own_thread() -> None:
    async def run() -> None:
        engine = AsyncEngine(EngineConfig("builtin:books-7m", max_model_len=64))
        with pytest.raises(RuntimeError, match="not been started"):
            _ = engine.info
        await engine.start()
        assert (engine.info.name, engine.info.max_model_len) == ("builtin:books-7m", 64)
        assert len(await collect(engine.generate(request("a", [40, 41], 3)))) == 3
        await engine.stop()

    asyncio.run(run())


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_an_idle_engine_uses_no_cpu(loaded: LoadedModel) -> None:
    async def work(engine: AsyncEngine) -> None:
        await collect(engine.generate(request("a", [1], 3)))
        assert engine._thread is not None
        stat = Path(f"/proc/self/task/{engine._thread.native_id}/stat")

        def ticks() -> int:
            fields = stat.read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])  # user and system, hundredths of a second

        await until(lambda: engine.stats().num_requests_running == 0)
        before = ticks()
        await asyncio.sleep(0.5)
        assert ticks() - before <= 1

    with_engine(loaded, work)
