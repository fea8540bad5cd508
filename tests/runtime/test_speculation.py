"""Speculation: the same text with it as without, guesses that are kept, and when they pay."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.errors import UnknownName, UsageError
from qtool.kernels.cpu.native import load as load_native
from qtool.native_build import Missing
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.ngram import NgramIndex
from qtool.runtime.engine.sampling_params import SamplingParams, StructuredOutputsParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.engine.speculation import Acceptance, Worth
from qtool.runtime.engine.speculative_config import SpeculativeConfig
from qtool.runtime.llm import LLM

PROMPTS = [
    "the cat sat on the mat. the cat sat on the mat. the cat",
    "It was a cold evening in November, and",
    "1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9 1 2 3",
]
SAMPLINGS = [
    SamplingParams(temperature=0, max_tokens=32),
    SamplingParams(temperature=0.7, top_p=0.9, seed=5, max_tokens=32),
    SamplingParams(temperature=1.2, seed=9, max_tokens=24, frequency_penalty=0.7, min_tokens=20),
    SamplingParams(temperature=0.3, seed=1, max_tokens=16, n=3, logprobs=2),
    SamplingParams(
        temperature=0.8,
        seed=2,
        max_tokens=24,
        structured_outputs=StructuredOutputsParams(regex="([a-z]{3} ){4}end"),
    ),
]


def llm(speculation: dict[str, Any] | None, **options: Any) -> LLM:
    if speculation is not None:
        speculation = {"adaptive": False, "num_speculative_tokens": 4, **speculation}
    return LLM("builtin:books-7m", dtype="float32", speculative_config=speculation, **options)


def texts_of(made: LLM, sampling: SamplingParams) -> list[tuple[int, ...]]:
    return [one.token_ids for found in made.generate(PROMPTS, sampling) for one in found.outputs]


def texts(made: LLM, samplings: Sequence[SamplingParams] = SAMPLINGS) -> list[Any]:
    found = [texts_of(made, sampling) for sampling in samplings]
    made.engine.blocks.check()
    assert made.engine.blocks.usage == 0.0
    return found


@pytest.fixture(scope="module")
def plain() -> list[list[tuple[int, ...]]]:
    return texts(llm(None))


def test_prompt_lookup_changes_no_text(plain: list[list[tuple[int, ...]]]) -> None:
    made = llm({"method": "ngram"})
    assert texts(made) == plain
    stats = made.engine.stats()
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens
    per_position = stats.spec_decode_num_accepted_tokens_per_pos
    assert sum(per_position) == stats.spec_decode_num_accepted_tokens
    assert list(per_position) == sorted(per_position, reverse=True)


def test_a_draft_model_changes_no_text(plain: list[list[tuple[int, ...]]]) -> None:
    made = llm({"method": "draft", "model": "builtin:books-7m"})
    assert texts(made, SAMPLINGS[:2]) == plain[:2]
    stats = made.engine.stats()
    # The model itself as its draft: what it guesses by the rules of no request is nearly always so.
    share = stats.spec_decode_num_accepted_tokens / stats.spec_decode_num_draft_tokens
    assert share > 0.7


def test_the_bits_of_the_native_path_are_the_same_with_guesses() -> None:
    """In bfloat16, where any other order of a sum would show."""
    if isinstance(missing := load_native(), Missing):
        pytest.skip(f"native {missing.reason}")
    found = []
    for speculation in (None, {"method": "ngram", "adaptive": False, "num_speculative_tokens": 4}):
        made = LLM("builtin:books-7m", speculative_config=speculation)
        found.append([texts_of(made, sampling) for sampling in SAMPLINGS[:2]])
    assert found[0] == found[1]
    assert made.engine.stats().spec_decode_num_accepted_tokens > 0


@pytest.mark.slow
def test_a_draft_model_that_knows_nothing_changes_no_text(
    plain: list[list[tuple[int, ...]]], tiny_checkpoint: Callable[..., Path]
) -> None:
    draft = tiny_checkpoint("llama", max_position_embeddings=512)
    assert texts(llm({"method": "draft", "model": str(draft)})) == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "speculation", [{"method": "ngram"}, {"method": "draft", "model": "builtin:books-7m"}]
)
def test_preemption_small_budgets_and_adaptation_change_no_text(
    speculation: dict[str, Any], plain: list[list[tuple[int, ...]]]
) -> None:
    pools = 2 if speculation["method"] == "draft" else 1
    tight = llm(
        speculation | {"adaptive": True},
        block_size=16,
        max_model_len=96,
        kv_cache_memory_bytes=pools * 128 * 8192,
        max_num_batched_tokens=24,
    )
    assert texts(tight) == plain
    assert tight.engine.stats().num_preemptions > 0


def request(made: LLM, max_tokens: int) -> GenerationRequest:
    ids = tuple(made.get_tokenizer().encode("The sea"))
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return GenerationRequest("r", ids, sampling)


def test_right_guesses_save_steps() -> None:
    made = llm({"method": "draft", "model": "builtin:books-7m"})
    made.engine.add(request(made, 41))
    num_steps = 0
    while made.engine.has_work:
        made.engine.step()
        num_steps += 1
    assert num_steps == 1 + 40 / 5  # the prompt's token, then four guesses and one more a step


# Prompt lookup


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("the cat sat on the cat", "sat on the cat sat"),
        ("a b c", ""),
        ("a b a b a b", "a b a b a"),
        ("x y z q x y w x y z", "q x y w x"),
        ("x y 1 x y 2 x y", "2 x y 2 x"),
        ("", ""),
    ],
)
def test_guesses_follow_the_latest_place_of_the_longest_run(text: str, guess: str) -> None:
    words = {word: number for number, word in enumerate(dict.fromkeys(text.split()))}
    ids = [words[word] for word in text.split()]
    assert NgramIndex(2, 4).guess(ids, 5) == [words[word] for word in guess.split()]


@settings(deadline=None, max_examples=150)
@given(
    text=st.lists(st.integers(0, 2), max_size=40),
    longest=st.integers(1, 4),
    cuts=st.lists(st.integers(1, 5), max_size=30),
)
def test_an_index_that_grows_with_the_text_finds_what_a_search_finds(
    text: list[int], longest: int, cuts: list[int]
) -> None:
    index = NgramIndex(1, longest)
    end = 0
    for cut in [*cuts, 40]:
        end = min(end + cut, len(text))
        assert index.guess(text[:end], 6) == _search(text[:end], longest, 6)


def _search(text: Sequence[int], longest: int, count: int) -> list[int]:
    for length in range(longest, 0, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if length <= len(text) and text[start : start + length] == text[-length:]:
                whole = list(text)
                for offset in range(count):
                    whole.append(whole[start + length + offset])
                return whole[len(text) :]
    return []


# Whether it pays


def chosen(step_seconds: Callable[[int], float], guess: float, share: float, batch: int = 1) -> int:
    worth = Worth()
    for _ in range(40):
        count = worth.choose([share] * batch, 5)
        rows = batch * (count + 1)
        worth.observe_step(rows, step_seconds(rows))
        if count:
            worth.observe_guesses(count, guess * count)
    return worth.choose([share] * batch, 5)


def test_free_rows_and_good_guesses_are_used_to_the_limit() -> None:
    assert chosen(lambda rows: 0.010, guess=0.0, share=0.8) == 5


def test_rows_that_cost_what_a_step_costs_are_not_guessed_for() -> None:
    assert chosen(lambda rows: 0.010 * rows, guess=0.0, share=0.7) == 0


def test_guesses_that_are_never_right_or_too_dear_are_not_made() -> None:
    assert chosen(lambda rows: 0.010 + 0.001 * rows, guess=0.0, share=0.01) == 0
    assert chosen(lambda rows: 0.010 + 0.001 * rows, guess=0.02, share=0.8) == 0


def test_between_them_the_best_number_is_found() -> None:
    def cost(rows: int) -> float:
        return 0.010 + 0.002 * rows

    speed = {
        count: sum(0.6**i for i in range(count + 1)) / (cost(count + 1) + 0.001 * count)
        for count in range(6)
    }
    assert chosen(cost, guess=0.001, share=0.6) == max(speed, key=lambda count: speed[count])


def test_a_gain_within_the_noise_is_not_taken() -> None:
    # 1.5 tokens in 1.45 times the time.
    assert chosen(lambda rows: 0.010 * (0.55 + 0.45 * rows), guess=0.0, share=0.5) == 0
    assert chosen(lambda rows: 0.010 * (0.75 + 0.25 * rows), guess=0.0, share=0.5) > 0


def test_sequences_are_judged_by_their_own_guesses() -> None:
    right, wrong = Acceptance(0.6), Acceptance(0.6)
    for _ in range(6):
        right.judge(True)
        wrong.judge(False)
    assert right.share > 0.85
    assert wrong.share < 0.2
    for _ in range(30):
        wrong.judge(True)
    assert wrong.share > 0.9


def test_a_batch_that_fills_the_machine_stops_guessing() -> None:
    def cost(rows: int) -> float:
        return 0.010 if rows <= 4 else 0.0025 * rows

    assert chosen(cost, guess=0.0, share=0.7, batch=1) > 0
    assert chosen(cost, guess=0.0, share=0.7, batch=16) == 0


# What is asked for


def test_configs_are_read_as_vllm_users_write_them() -> None:
    read = SpeculativeConfig.parse
    assert read('{"method": "ngram", "num_speculative_tokens": 3}').num_speculative_tokens == 3
    assert read({"model": "m"}) == SpeculativeConfig("draft", "m")
    assert read({"method": "draft_model", "model": "m"}) == SpeculativeConfig("draft", "m")
    assert read({"model": "[ngram]", "num_speculative_tokens": 5}) == SpeculativeConfig()
    config = EngineConfig("m", speculative_config={"method": "ngram"})  # type: ignore[arg-type]
    assert config.speculative_config == SpeculativeConfig()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be an object"),
        ({"method": "draft"}, "needs a model"),
        ({"method": "ngram", "model": "m"}, "takes no model"),
        ({"num_speculative_tokens": 0}, "must be at least 1"),
        ({"prompt_lookup_max": 1}, "prompt_lookup_max is 1"),
    ],
)
def test_configs_that_make_no_sense_are_refused(value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SpeculativeConfig.parse(value)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(UnknownName) as raised:
        SpeculativeConfig.parse({"num_speculative_token": 3})
    assert "num_speculative_tokens" in str(raised.value.hint)
    with pytest.raises(UnknownName, match="eagle"):
        SpeculativeConfig.parse({"method": "eagle"})


def test_a_draft_model_of_another_vocabulary_is_refused(stories: Path) -> None:
    with pytest.raises(UsageError, match="another vocabulary"):
        llm({"method": "draft", "model": str(stories)})
