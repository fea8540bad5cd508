"""The engine under requests that fail, stop, do not fit or come and go at random."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qtool.errors import UnknownName, UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.sequence import (
    GenerationRequest,
    PromptTooLong,
    SamplingParams,
    TokenOutput,
)
from qtool.runtime.loading import LoadedModel, load_model

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Callable[..., Path]) -> LoadedModel:
    return load_model(str(tiny_checkpoint("llama")))


def engine(loaded: LoadedModel, **options: Any) -> Engine:
    return Engine(loaded, EngineConfig(loaded.source.name, **{"block_size": 4, **options}))


def request(name: str, prompt: list[int], sampling: SamplingParams = GREEDY) -> GenerationRequest:
    return GenerationRequest(name, tuple(prompt), sampling)


def finish(made: Engine) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    while made.has_work:
        for output in made.step():
            outputs.setdefault(output.request_id, []).append(output)
        made.blocks.check()
    return outputs


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


def test_one_output_a_step_and_the_last_one_says_why(tiny: LoadedModel) -> None:
    made = engine(tiny)
    made.add(request("a", [1, 2, 3]))
    outputs = finish(made)["a"]
    assert [output.num_generated_tokens for output in outputs] == list(range(1, 11))
    assert [output.finish_reason for output in outputs] == [None] * 9 + ["length"]
    assert {output.num_prompt_tokens for output in outputs} == {3}
    stats = made.stats()
    assert (stats.prompt_tokens_total, stats.generation_tokens_total) == (3, 10)
    assert (stats.num_requests_running, stats.kv_cache_usage) == (0, 0.0)


def test_aborts_free_their_blocks_at_once(tiny: LoadedModel) -> None:
    made = engine(tiny, max_num_seqs=1)
    made.add(request("running", list(range(9))))
    made.add(request("waiting", [1]))
    made.step()
    assert made.blocks.usage > 0
    for name in ("running", "waiting"):
        (output,) = made.abort(name)
        assert output.finish_reason == "abort"
        made.blocks.check()
    assert made.blocks.usage == 0.0
    assert not made.has_work
    assert made.abort("running") == []
    assert made.step() == []


def test_a_prompt_that_leaves_no_room_is_refused_with_numbers(tiny: LoadedModel) -> None:
    made = engine(tiny, max_model_len=20)
    with pytest.raises(PromptTooLong, match="20 tokens and the context holds 20") as raised:
        made.add(request("long", [1] * 20))
    assert raised.value.hint == "shorten the prompt to at most 19 tokens"
    assert (raised.value.num_prompt_tokens, raised.value.max_model_len) == (20, 20)
    assert not made.has_work
    made.add(request("fits", [1] * 19))
    (output,) = finish(made)["fits"]
    assert (output.finish_reason, len(output.new_token_ids)) == ("length", 1)


def test_requests_that_cannot_run_are_refused(tiny: LoadedModel) -> None:
    made = engine(tiny)
    made.add(request("a", [1]))
    with pytest.raises(UsageError, match="request a is already running"):
        made.add(request("a", [2]))
    with pytest.raises(UsageError, match="token id 4096 is outside the vocabulary of 4096"):
        made.add(request("b", [1, 4096]))
    with pytest.raises(UsageError, match="token id -1 is outside"):
        made.add(request("b", [-1]))
    with pytest.raises(UsageError, match="stop_token_ids has 5000"):
        made.add(request("b", [1], SamplingParams(stop_token_ids=(5000,))))
    with pytest.raises(UsageError, match="the prompt is empty"):
        request("b", [])


def test_end_of_text_ends_unless_ignored(tiny: LoadedModel) -> None:
    made = engine(tiny)
    made.add(request("free", [1, 2, 3]))
    stop = tokens_of(finish(made)["free"])[2]
    ends = SamplingParams(temperature=0, max_tokens=10, stop_token_ids=(stop,))
    made.add(request("ends", [1, 2, 3], ends))
    outputs = finish(made)["ends"]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].new_token_ids == (stop,)
    late = SamplingParams(temperature=0, max_tokens=10, stop_token_ids=(stop,), min_tokens=8)
    made.add(request("late", [1, 2, 3], late))
    assert len(tokens_of(finish(made)["late"])) >= 8


def test_a_request_without_numbers_fails_alone_and_poisons_nobody(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Token 7 has an embedding that is not a number; its blocks are used again afterwards."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    tensors = load_file(str(folder / "model.safetensors"))
    tensors["model.embed_tokens.weight"][7] = torch.nan
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    loaded = load_model(str(folder))

    healthy = {name: [10 + i, 3, 4, 5, 6] for i, name in enumerate("abc")}
    expected = {}
    for name, prompt in healthy.items():
        alone = engine(loaded)
        alone.add(request(name, prompt))
        expected[name] = tokens_of(finish(alone)[name])

    made = engine(loaded, kv_cache_memory_bytes=24 * 4 * 2048, max_model_len=24)
    made.add(request("broken", [7, 8, 9, 10, 11]))
    for name, prompt in healthy.items():
        made.add(request(name, prompt))
    outputs = finish(made)
    assert outputs["broken"][-1].finish_reason == "error"
    assert outputs["broken"][-1].error == "the model's output is not finite"
    for _ in range(3):  # until every block has been somebody else's
        for name, prompt in healthy.items():
            assert tokens_of(outputs[name]) == expected[name]
            made.add(request(name, prompt))
        outputs = finish(made)
    assert made.blocks.usage == 0.0


def test_a_request_ends_at_its_deadline_running_or_waiting(tiny: LoadedModel) -> None:
    seconds = 0.0
    made = Engine(tiny, EngineConfig("tiny", max_num_seqs=1), clock=lambda: seconds)
    sampling = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    made.add(GenerationRequest("runs", (1, 2), sampling, timeout=5.0))
    made.add(GenerationRequest("waits", (1, 2), sampling, timeout=2.5))
    assert [output.request_id for output in made.step()] == ["runs"]
    seconds = 3.0
    waits, runs = made.step()
    assert (waits.request_id, waits.finish_reason) == ("waits", "timeout")
    assert waits.error == "the request's timeout of 2.5 s has passed"
    assert (runs.finish_reason, runs.num_generated_tokens) == (None, 2)
    seconds = 5.0
    (ended,) = made.step()
    assert (ended.finish_reason, ended.num_generated_tokens) == ("timeout", 2)
    assert not made.has_work
    assert made.blocks.usage == 0.0
    with pytest.raises(UsageError, match="timeout is 0, must be above 0 seconds"):
        GenerationRequest("never", (1,), sampling, timeout=0)


def test_an_operator_that_raises_ends_its_own_request_only(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = engine(tiny)
    alone = engine(tiny)
    alone.add(request("good", [1, 2, 3]))
    expected = tokens_of(finish(alone)["good"])
    run = made._runner.run

    def failing(batch: Batch) -> torch.Tensor:
        if (batch.token_ids == 999).any():
            raise RuntimeError("no memory for 999")
        return run(batch)

    monkeypatch.setattr(made._runner, "run", failing)
    made.add(request("bad", [999]))
    made.add(request("good", [1, 2, 3]))
    outputs = finish(made)
    assert (outputs["bad"][-1].finish_reason, outputs["bad"][-1].error) == (
        "error",
        "no memory for 999",
    )
    assert tokens_of(outputs["good"]) == expected
    assert made.blocks.usage == 0.0
    assert "request bad failed" in caplog.text


def test_the_pool_is_no_larger_than_can_be_used(tiny: LoadedModel) -> None:
    made = engine(tiny, max_num_seqs=3, max_model_len=50, block_size=16)
    assert made.info.num_kv_blocks == 3 * 4
    assert made.info.max_model_len == 50
    # 2 layers, keys and values, 2 heads of 64 in float32: 2048 bytes a token.
    assert made.info.kv_cache_bytes == 12 * 16 * 2048


def test_the_pool_takes_the_memory_it_is_given(tiny: LoadedModel) -> None:
    made = engine(tiny, kv_cache_memory_bytes=2048 * 100, block_size=32)
    assert made.info.num_kv_blocks == 3
    assert made.info.max_model_len == 96  # what one sequence can have of it
    with pytest.raises(UsageError, match="max_model_len is 97, and the KV cache has room for 96"):
        engine(tiny, kv_cache_memory_bytes=2048 * 100, block_size=32, max_model_len=97)
    with pytest.raises(UsageError, match="one block of 32 tokens takes 65,536"):
        engine(tiny, kv_cache_memory_bytes=1000, block_size=32)
    with pytest.raises(UsageError, match="the model was made for 512 tokens"):
        engine(tiny, max_model_len=513)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 1.1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", ("",)),
        ("stop", 3),
    ],
)
def test_sampling_parameters_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{field} is "):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_sampling_parameters_take_lists_and_single_strings() -> None:
    sampling = SamplingParams(stop="end", stop_token_ids=[3, 4])  # type: ignore[arg-type]
    assert (sampling.stop, sampling.stop_token_ids) == (("end",), (3, 4))


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_num_seqs", 0), ("max_num_batched_tokens", -1), ("block_size", 0), ("max_model_len", 0)],
)
def test_engine_settings_out_of_range_are_named(field: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"{field} is {value}, must be at least 1"):
        EngineConfig("model", **{field: value})  # type: ignore[arg-type]


def test_unknown_dtypes_and_devices_are_named() -> None:
    with pytest.raises(UnknownName, match="unknown dtype 'bf16'"):
        EngineConfig("model", dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="unknown device 'tpu'"):
        EngineConfig("model", device="tpu")  # type: ignore[arg-type]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 14), st.integers(1, 8)),
        st.tuples(st.just("abort"), st.integers(0, 8), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=25)
@given(actions=ACTIONS, blocks=st.integers(6, 14), budget=st.integers(1, 20))
def test_random_lives_of_an_engine_leave_nothing_behind(
    actions: list[tuple[str, int, int]],
    blocks: int,
    budget: int,
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """Every request ends exactly once, with as many tokens as asked; blocks are conserved."""
    loaded = _load_once(tiny_checkpoint("llama"))
    made = engine(
        loaded,
        max_model_len=24,
        kv_cache_memory_bytes=blocks * 4 * 2048,
        max_num_seqs=4,
        max_num_batched_tokens=budget,
    )
    asked: dict[str, int] = {}
    outputs: dict[str, list[TokenOutput]] = {}

    def collect(new: list[TokenOutput]) -> None:
        for output in new:
            outputs.setdefault(output.request_id, []).append(output)
        made.blocks.check()

    for action, first, second in actions:
        if action == "add":
            name = f"r{len(asked)}"
            asked[name] = second
            sampling = SamplingParams(temperature=0, max_tokens=second, ignore_eos=True)
            made.add(request(name, list(range(first)), sampling))
        elif action == "abort":
            collect(made.abort(f"r{first}"))
        else:
            for _ in range(first):
                collect(made.step())
    while made.has_work:
        collect(made.step())
    assert set(outputs) == set(asked)
    for name, ended in outputs.items():
        assert [output.finish_reason is not None for output in ended][-1]
        assert not any(output.finish_reason for output in ended[:-1])
        if ended[-1].finish_reason == "length":
            assert len(tokens_of(ended)) == asked[name]
    assert made.blocks.usage == 0.0


_LOADED: dict[Path, LoadedModel] = {}


def _load_once(folder: Path) -> LoadedModel:
    if folder not in _LOADED:
        _LOADED[folder] = load_model(str(folder))
    return _LOADED[folder]
