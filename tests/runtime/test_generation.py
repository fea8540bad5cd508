"""What the engine writes: transformers' greedy text, whatever the batch, chunks or cache."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.llm import LLM

Greedy = Callable[[Path, Sequence[int], int], list[int]]

PROMPTS = [
    "It was a cold evening in November, and",
    "Once upon a time",
    "The",
    '"I do not know," said the old man, "whether the ship that left the harbour on the night of '
    "the storm was ever seen again, but I have heard it said by those who live by the sea that",
    "CHAPTER I.\n\n",
    "She opened the letter with trembling hands. It",
    "London, 1851. My dear friend,",
    "Of all the men I have known in my life he was the most",
]
GREEDY = SamplingParams(temperature=0, max_tokens=64)


def continuations(llm: LLM, prompts: Sequence[Any] = PROMPTS, **changes: Any) -> list[list[int]]:
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": 64, **changes})
    answers = llm.generate(prompts, sampling)
    llm.engine.blocks.check()
    assert llm.engine.blocks.usage == 0.0
    return [list(answer.outputs[0].token_ids) for answer in answers]


@pytest.fixture(scope="module")
def books() -> LLM:
    return LLM("builtin:books-7m", dtype="float32")


@pytest.fixture(scope="module")
def one_at_a_time(books: LLM) -> list[list[int]]:
    return [continuations(books, [prompt])[0] for prompt in PROMPTS]


def test_greedy_text_of_the_bundled_model_is_transformers_own(
    books: LLM,
    books_7m: Path,
    one_at_a_time: list[list[int]],
    transformers_greedy: Greedy,
) -> None:
    for prompt, found in zip(PROMPTS, one_at_a_time, strict=True):
        ids = books.get_tokenizer().encode(prompt)
        assert found == transformers_greedy(books_7m, ids, 64), prompt


def test_greedy_text_of_stories260k_is_transformers_own(
    stories: Path, transformers_greedy: Greedy
) -> None:
    llm = LLM(str(stories), dtype="float32")
    for prompt, found in zip(PROMPTS, continuations(llm), strict=True):
        ids = llm.get_tokenizer().encode(prompt)
        assert found == transformers_greedy(stories, ids, 64), prompt


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 24}), ("llama", {})],
)
def test_greedy_text_of_every_family_is_transformers_own(
    family: str,
    overrides: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    transformers_greedy: Greedy,
) -> None:
    folder = tiny_checkpoint(family, **overrides)
    llm = LLM(str(folder), block_size=8)
    prompts = [[5, 9, 200, 31], list(range(100, 140))]
    for prompt, found in zip(prompts, continuations(llm, prompts, max_tokens=40), strict=True):
        assert found == transformers_greedy(folder, prompt, 40)


def test_eight_streams_at_once_write_what_each_writes_alone(
    books: LLM, one_at_a_time: list[list[int]]
) -> None:
    assert continuations(books) == one_at_a_time


@pytest.mark.parametrize(
    ("budget", "max_num_seqs", "block_size"), [(1, 8, 32), (3, 2, 1), (7, 3, 5), (64, 8, 16)]
)
def test_tiny_budgets_change_nothing(
    budget: int, max_num_seqs: int, block_size: int, one_at_a_time: list[list[int]]
) -> None:
    llm = LLM(
        "builtin:books-7m",
        dtype="float32",
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        block_size=block_size,
    )
    expected = [ids[:12] for ids in one_at_a_time]
    assert continuations(llm, max_tokens=12) == expected


def test_preempted_sequences_go_on_as_if_nothing_had_happened(
    one_at_a_time: list[list[int]],
) -> None:
    # 4 KiB a token in float32: room for 160 tokens, where eight texts need 700.
    llm = LLM(
        "builtin:books-7m",
        dtype="float32",
        block_size=16,
        max_model_len=160,
        kv_cache_memory_bytes=160 * 8192,
    )
    assert llm.info.num_kv_blocks == 10
    assert continuations(llm) == one_at_a_time
    assert llm.engine.stats().num_preemptions > 0


def test_seeded_text_is_the_same_alone_and_in_company(books: LLM) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=24)
    alone = books.generate(PROMPTS[0], sampling)[0].outputs[0]
    others = [SamplingParams(temperature=1.2, seed=i, max_tokens=20) for i in range(1, 8)]
    company = books.generate(PROMPTS, [sampling, *others])[0].outputs[0]
    assert company.token_ids == alone.token_ids
    again = books.generate(PROMPTS[0], SamplingParams(temperature=0.9, seed=12, max_tokens=24))
    assert again[0].outputs[0].token_ids != alone.token_ids


def test_unseeded_texts_differ_and_repeat_with_the_engines_seed() -> None:
    sampling = SamplingParams(max_tokens=12)
    runs = [
        LLM("builtin:books-7m", seed=seed).generate([PROMPTS[0]] * 2, sampling)
        for seed in (0, 0, 1)
    ]
    texts = [[answer.outputs[0].text for answer in run] for run in runs]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_text_ends_at_the_end_of_the_context() -> None:
    llm = LLM("builtin:books-7m", max_model_len=40)
    answer = llm.generate([list(range(100, 130))], SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(answer[0].outputs[0].token_ids) == 10
    assert answer[0].outputs[0].finish_reason == "length"


def test_text_ends_at_a_stop_token(books: LLM, one_at_a_time: list[list[int]]) -> None:
    stop = one_at_a_time[0][5]
    first = one_at_a_time[0].index(stop)
    answer = books.generate(
        PROMPTS[0], SamplingParams(temperature=0, max_tokens=64, stop_token_ids=(stop,))
    )[0].outputs[0]
    assert list(answer.token_ids) == one_at_a_time[0][: first + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text == books.get_tokenizer().decode(one_at_a_time[0][:first])


def test_text_ends_before_a_stop_string(books: LLM, one_at_a_time: list[list[int]]) -> None:
    whole = books.get_tokenizer().decode(one_at_a_time[0])
    stop = whole[20:29]  # anywhere, not along tokens
    answer = books.generate(
        PROMPTS[0], SamplingParams(temperature=0, max_tokens=64, stop=("never written", stop))
    )[0].outputs[0]
    assert answer.text == whole[: whole.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert books.engine.blocks.usage == 0.0
