"""Operations and bytes of steps, by hand for a tiny model and by the shapes of real families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.engine.work import LinearSizes, sizes_of, tokens_seen
from qtool.runtime.loading import load_model

# tests/conftest.py's TINY llama: hidden 256, 4 query and 2 key heads of 64, inner 512, two blocks.
BLOCK = 256 * 256 * 2 + 2 * 256 * 128 + 3 * 256 * 512
HEAD = 4096 * 256


@given(st.integers(0, 40), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 60)))
def test_tokens_seen_are_those_of_each_row(start: int, count: int, window: int | None) -> None:
    stop = start + count
    by_row = [min(row + 1, window or row + 1) for row in range(start, stop)]
    assert tokens_seen(start, stop, window) == sum(by_row)


def test_a_prompt_and_two_tokens_by_hand(tiny_checkpoint: Callable[..., Path]) -> None:
    loaded = load_model(str(tiny_checkpoint("llama")), dtype="float32")
    engine = Engine(loaded, EngineConfig("tiny", dtype="float32", kv_cache_memory_bytes=2**22))
    sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    engine.add(GenerationRequest("one", tuple(range(3, 13)), sampling))
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    # 10 rows and one judged, then one row and one judged; rows see 1 + ... + 10, then 11 tokens.
    linear = 2 * (2 * BLOCK * 11 + HEAD * 2)
    attention = 2 * (2 * 4 * (64 + 64)) * (55 + 11)
    assert stats.operations_total == linear + attention
    cached = 2 * 2 * (64 + 64) * 4  # layers, heads, channels, bytes
    assert stats.bytes_written_total == 11 * cached
    weights = loaded.nbytes - HEAD * 4  # the embedding, of which rows are looked up
    assert stats.bytes_read_total == pytest.approx(2 * weights + (10 + 11) * cached)
    assert stats.step_seconds_total > 0
    # One step of a token, and one of ten, which is more than 8 and at most 16.
    assert stats.step_tokens_total == 11
    assert stats.steps_by_size == (1, 0, 1, *[0] * 11)


def test_experts_count_by_the_share_that_a_row_uses(tiny_checkpoint: Callable[..., Path]) -> None:
    model = load_model(str(tiny_checkpoint("mixtral")), dtype="float32").decoder
    sizes = sizes_of(model)
    router = 2 * 4 * 256
    assert sizes.block == 2 * (256 * 256 * 2 + 2 * 256 * 128) + router
    assert (sizes.experts, sizes.experts_used) == (2 * 4 * 3 * 256 * 512, 0.5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_transformers_code_is_counted_by_its_linears(
    tied: bool, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint("cohere", tie_word_embeddings=tied)
    loaded = load_model(str(folder), dtype="float32")
    assert sizes_of(loaded.decoder) == LinearSizes(block=2 * BLOCK, head=HEAD)
