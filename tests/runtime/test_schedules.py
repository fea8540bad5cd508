"""What a client reads does not depend on how the engine went about it.

Greedy text: alone or beside 31 others, with the cache or without, in chunks of any size, preempted
or not, guessed ahead or not. In float32 with the torch kernels, whose sums differ in the last bits
between one row and many; and in bfloat16 with the native ones, whose do not. And a life of many
requests leaves the pool whole and the process no larger.
"""

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.kv_pool import block_bytes
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest, TokenOutput
from qtool.runtime.loading import LoadedModel, load_model

NEW_TOKENS = 12
VOCAB = 512
Texts = dict[str, list[int]]


@pytest.fixture(scope="module", params=["torch", "native"])
def tiny(
    tiny_checkpoint: Callable[..., Path],
    small_native: Callable[[int], LoadedModel],
    request: pytest.FixtureRequest,
) -> LoadedModel:
    if request.param == "torch":
        return load_model(str(tiny_checkpoint("llama", vocab_size=VOCAB)))
    return small_native(VOCAB)


@pytest.fixture(scope="module")
def windowed(tiny_checkpoint: Callable[..., Path]) -> LoadedModel:
    return load_model(str(tiny_checkpoint("mistral", sliding_window=24)))


def prompts(count: int) -> list[list[int]]:
    """Of 20 to 60 tokens; pairs begin alike, in the middle of a block and at its end."""
    rng = random.Random(5)
    made: list[list[int]] = []
    for index in range(count):
        begun = made[index - 1][: rng.choice((8, 13, 16, 24))] if index % 2 else []
        made.append([*begun, *(rng.randrange(VOCAB) for _ in range(rng.randint(20, 36)))])
    return made


def run(loaded: LoadedModel, asked: Sequence[list[int]], **options: Any) -> tuple[Texts, Engine]:
    engine = Engine(loaded, EngineConfig("tiny", **{"block_size": 8, **options}))
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for index, prompt in enumerate(asked):
        engine.add(GenerationRequest(str(index), tuple(prompt), sampling))
    texts: Texts = {}
    while engine.has_work:
        for output in engine.step():
            texts.setdefault(output.request_id, []).extend(output.new_token_ids)
            assert output.finish_reason in (None, "length")
        engine.blocks.check()
    assert engine.blocks.usage == 0.0
    return texts, engine


@pytest.fixture(scope="module")
def alone(tiny: LoadedModel) -> Texts:
    """Each prompt in an engine of its own, without a cache to find anything in."""
    texts: Texts = {}
    for index, prompt in enumerate(prompts(32)):
        text, _ = run(tiny, [prompt], enable_prefix_caching=False)
        texts[str(index)] = text["0"]
    return texts


@pytest.mark.parametrize("count", [8, 32])
@pytest.mark.parametrize("caching", [True, False])
def test_greedy_text_is_that_of_a_request_alone(
    tiny: LoadedModel, alone: Texts, count: int, caching: bool
) -> None:
    texts, engine = run(tiny, prompts(count), enable_prefix_caching=caching)
    assert texts == {name: alone[name] for name in texts}
    hits = engine.stats().prefix_cache_hits_total
    assert (hits > 8 * count // 2) if caching else (hits == 0)


@pytest.mark.parametrize("budget", [1, 7, 8, 33])
def test_greedy_text_does_not_depend_on_chunks(
    tiny: LoadedModel, alone: Texts, budget: int
) -> None:
    texts, _ = run(tiny, prompts(4), max_num_batched_tokens=budget)
    assert texts == {name: alone[name] for name in texts}


@pytest.mark.parametrize("caching", [True, False])
def test_greedy_text_survives_preemption(tiny: LoadedModel, alone: Texts, caching: bool) -> None:
    texts, engine = run(
        tiny,
        prompts(8),
        block_size=4,
        enable_prefix_caching=caching,
        max_model_len=80,
        kv_cache_memory_bytes=21 * block_bytes(tiny.decoder, 4),
    )
    assert texts == {name: alone[name] for name in texts}
    assert engine.stats().num_preemptions > 0


def test_greedy_text_does_not_depend_on_guesses(tiny: LoadedModel, alone: Texts) -> None:
    texts, engine = run(
        tiny,
        prompts(8),
        speculative_config={"method": "ngram", "num_speculative_tokens": 3},
    )
    assert texts == {name: alone[name] for name in texts}
    assert engine.stats().spec_decode_num_draft_tokens > 0


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_greedy_text_of_the_same_prompts_again_comes_from_the_cache(
    tiny: LoadedModel, alone: Texts, policy: str
) -> None:
    asked = prompts(6)
    texts, engine = run(tiny, [*asked, *asked, *asked], scheduling_policy=policy)
    for name, text in texts.items():
        assert text == alone[str(int(name) % 6)]
    stats = engine.stats()
    # Nearly all but the last token of each, in blocks of 8 or copied from one.
    assert stats.prefix_cache_hits_total >= 0.95 * 2 * sum(len(prompt) - 1 for prompt in asked)


def test_a_window_gives_blocks_back_and_changes_nothing(windowed: LoadedModel) -> None:
    asked = prompts(8)
    expected = [
        run(windowed, [prompt], enable_prefix_caching=False, block_size=64)[0]["0"]
        for prompt in asked
    ]
    texts, engine = run(windowed, asked, max_num_batched_tokens=16, block_size=4)
    assert [texts[str(index)] for index in range(8)] == expected
    assert engine.blocks.window == 24
    again, _ = run(windowed, [*asked, *asked], block_size=4)
    assert [again[str(index)] for index in range(16)] == expected * 2


def test_a_cached_prompt_is_reported_as_such(tiny: LoadedModel) -> None:
    engine = Engine(tiny, EngineConfig("tiny", block_size=8))
    sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    prompt = tuple(range(40))
    seen: list[TokenOutput] = []
    for name, salt in (("a", None), ("b", None), ("c", "salt")):
        engine.add(GenerationRequest(name, prompt, sampling, cache_salt=salt))
        while engine.has_work:
            seen.extend(engine.step())
    assert [output.num_cached_tokens for output in seen] == [0, 0, 39, 39, 0, 0]
    stats = engine.stats()
    assert (stats.prefix_cache_queries_total, stats.prefix_cache_hits_total) == (120, 39)


@pytest.mark.slow
def test_two_thousand_requests_leave_the_pool_whole_and_the_process_no_larger(
    tiny: LoadedModel,
) -> None:
    rng = random.Random(11)
    engine = Engine(
        tiny,
        EngineConfig(
            "tiny",
            block_size=8,
            max_num_seqs=16,
            max_model_len=160,
            kv_cache_memory_bytes=90 * block_bytes(tiny.decoder, 8),
        ),
    )
    beginnings = [[rng.randrange(VOCAB) for _ in range(40)] for _ in range(5)]
    ended: dict[str, str] = {}
    resident: list[int] = []
    for index in range(2000):
        begun = rng.choice(beginnings)[: rng.randint(1, 40)]
        own = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
        sampling = SamplingParams(
            temperature=rng.choice((0.0, 1.0)), max_tokens=rng.randint(1, 40), seed=index
        )
        engine.add(GenerationRequest(str(index), (*begun, *own), sampling))
        if rng.random() < 0.1:
            for output in engine.abort(str(rng.randint(0, index))):
                ended[output.request_id] = str(output.finish_reason)
        while engine.stats().num_requests_waiting > 8:
            _note(engine.step(), ended)
        engine.blocks.check()
        if index % 100 == 99:
            resident.append(_resident_bytes())
    while engine.has_work:
        _note(engine.step(), ended)
    engine.blocks.check()
    assert engine.blocks.usage == 0.0
    assert len(ended) == 2000
    assert set(ended.values()) <= {"stop", "length", "abort"}
    assert engine.stats().num_preemptions > 0
    assert engine.stats().prefix_cache_hits_total > 10_000
    # From when everything has been touched once, a tenth of the way: a leak of a kilobyte a request
    # would show.
    assert max(resident[2:]) - resident[2] < 2 * 2**20


def _note(outputs: Sequence[TokenOutput], ended: dict[str, str]) -> None:
    for output in outputs:
        if output.finish_reason is not None:
            ended[output.request_id] = output.finish_reason


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
