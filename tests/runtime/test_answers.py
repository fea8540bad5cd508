"""Several answers to one prompt, log-probabilities, and the best of many."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.kv_pool import block_bytes
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest, TokenOutput
from qtool.runtime.engine.speculative_config import SpeculativeConfig
from qtool.runtime.llm import LLM
from qtool.runtime.loading import LoadedModel, load_model

PROMPT = "It was a cold evening in November, and"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("builtin:books-7m", dtype="float32")


@pytest.fixture(scope="module")
def small(tiny_checkpoint: Callable[..., Path]) -> LoadedModel:
    return load_model(str(tiny_checkpoint("llama", num_hidden_layers=1)))


def run(engine: Engine) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs.extend(engine.step())
        engine.blocks.check()
    assert engine.blocks.usage == 0.0
    return outputs


def test_answer_i_of_a_seed_is_what_the_seed_plus_i_writes(llm: LLM) -> None:
    several = SamplingParams(n=3, seed=5, max_tokens=12, temperature=0.9)
    (found,) = llm.generate(PROMPT, several)
    assert [answer.index for answer in found.outputs] == [0, 1, 2]
    alone = [
        llm.generate(PROMPT, SamplingParams(seed=5 + i, max_tokens=12, temperature=0.9))[0]
        for i in range(3)
    ]
    assert [answer.token_ids for answer in found.outputs] == [
        answer.outputs[0].token_ids for answer in alone
    ]
    assert len({answer.token_ids for answer in found.outputs}) == 3


def test_the_prompt_is_computed_once_and_its_blocks_are_shared(llm: LLM) -> None:
    prompt = tuple(range(100, 200))  # three blocks of 32, and four tokens of a fourth
    rows: list[int] = []
    forward = llm.engine._runner.run
    try:
        llm.engine._runner.run = lambda batch: (  # type: ignore[method-assign]
            rows.append(len(batch.token_ids)) or forward(batch)  # type: ignore[func-returns-value]
        )
        llm.engine.add(GenerationRequest("r", prompt, SamplingParams(n=4, max_tokens=5, seed=1)))
        llm.engine.step()
        # One table of four blocks; three more that share its three full ones.
        assert round(llm.engine.blocks.usage * llm.info.num_kv_blocks) == 4 + 3
        outputs = run(llm.engine)
    finally:
        llm.engine._runner.run = forward  # type: ignore[method-assign]
    assert rows == [100, 4, 4, 4, 4]
    assert {output.index for output in outputs} == {0, 1, 2, 3}


def test_answers_that_find_no_seat_wait_for_one() -> None:
    few = LLM("builtin:books-7m", dtype="float32", max_num_seqs=2)
    sampling = SamplingParams(n=5, seed=3, max_tokens=6)
    (found,) = few.generate(PROMPT, sampling)
    wide = LLM.from_loaded(few.loaded, replace(few.config, max_num_seqs=8)).generate(
        PROMPT, sampling
    )
    assert [answer.token_ids for answer in found.outputs] == [
        answer.token_ids for answer in wide[0].outputs
    ]
    assert few.engine.blocks.usage == 0.0


def test_one_answer_can_end_before_the_others(llm: LLM) -> None:
    (plain,) = llm.generate(PROMPT, SamplingParams(n=3, seed=5, max_tokens=20))
    stop = plain.outputs[1].text[8:12]
    (found,) = llm.generate(PROMPT, SamplingParams(n=3, seed=5, max_tokens=20, stop=(stop,)))
    assert found.outputs[1].text == plain.outputs[1].text.partition(stop)[0]
    assert found.outputs[1].stop_reason == stop
    for index in (0, 2):
        assert found.outputs[index].text == plain.outputs[index].text.partition(stop)[0]
    assert llm.engine.blocks.usage == 0.0


def test_aborting_the_first_answer_leaves_the_others(llm: LLM) -> None:
    engine = llm.engine
    sampling = SamplingParams(n=3, seed=5, max_tokens=4)
    ids = tuple(llm.get_tokenizer().encode(PROMPT))
    engine.add(GenerationRequest("early", ids, sampling))
    (ended,) = engine.abort("early", 0)  # before its prompt is computed
    assert (ended.index, ended.finish_reason) == (0, "abort")
    outputs = run(engine)
    assert {output.index for output in outputs if output.finish_reason == "length"} == {1, 2}
    engine.add(GenerationRequest("all", ids, sampling))
    assert [output.index for output in engine.abort("all")] == [0, 1, 2]
    assert not engine.has_work
    assert engine.blocks.usage == 0.0


def test_a_prompt_that_fails_ends_all_its_answers(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: object) -> Tensor:
        raise MemoryError("no memory left")

    monkeypatch.setattr(llm.engine._runner, "run", fail)
    llm.engine.add(GenerationRequest("r", (5, 6), SamplingParams(n=3)))
    outputs = llm.engine.step()
    assert [(output.index, output.finish_reason) for output in outputs] == [
        (0, "error"), (1, "error"), (2, "error"),
    ]  # fmt: skip
    assert not llm.engine.has_work


def test_best_of_returns_the_likeliest_answers_a_token(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPT, SamplingParams(n=6, seed=2, max_tokens=10, logprobs=0))
    (best,) = llm.generate(PROMPT, SamplingParams(n=2, best_of=6, seed=2, max_tokens=10))
    ranked = sorted(whole.outputs, key=lambda a: -(a.cumulative_logprob or 0) / len(a.token_ids))
    assert [a.token_ids for a in best.outputs] == [a.token_ids for a in ranked[:2]]
    assert [a.index for a in best.outputs] == [0, 1]
    assert best.outputs[0].logprobs is None


Logits = Callable[[Path, Tensor], Tensor]


@pytest.mark.parametrize("budget", [512, 7])
def test_logprobs_of_prompt_and_answer_are_transformers_own(
    budget: int, books_7m: Path, transformers_logits: Logits
) -> None:
    llm = LLM("builtin:books-7m", dtype="float32", max_num_batched_tokens=budget)
    sampling = SamplingParams(seed=4, max_tokens=12, logprobs=3, prompt_logprobs=2)
    (found,) = llm.generate(PROMPT, sampling)
    answer = found.outputs[0]
    assert answer.logprobs is not None
    assert found.prompt_logprobs is not None
    text = torch.tensor([[*found.prompt_token_ids, *answer.token_ids]])
    expected = transformers_logits(books_7m, text)[0].log_softmax(-1)
    assert found.prompt_logprobs[0] is None
    positions = [*found.prompt_logprobs[1:], *answer.logprobs]
    assert len(positions) == text.shape[1] - 1
    for row, (position, token) in enumerate(zip(positions, text[0, 1:].tolist(), strict=True)):
        assert position is not None
        num_top = 2 if row < len(found.prompt_token_ids) - 1 else 3
        best = expected[row].topk(num_top).indices.tolist()
        assert set(position) == {*best, token}
        for token_id, entry in position.items():
            assert entry.logprob == pytest.approx(float(expected[row, token_id]), abs=1e-4)
            assert entry.decoded_token == llm.get_tokenizer().decode([token_id], False)
        assert position[token].rank == int((expected[row] > expected[row, token]).sum()) + 1
    total = sum(p[t].logprob for p, t in zip(answer.logprobs, answer.token_ids, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)


def test_prompt_logprobs_survive_a_preemption() -> None:
    sampling = SamplingParams(temperature=0, max_tokens=60, prompt_logprobs=0, ignore_eos=True)
    prompts = [list(range(100 * n, 100 * n + 40)) for n in range(1, 4)]
    tight = LLM(
        "builtin:books-7m",
        dtype="float32",
        block_size=16,
        max_model_len=112,
        kv_cache_memory_bytes=160 * 8192,
    )
    found = tight.generate(prompts, sampling)
    assert tight.engine.stats().num_preemptions > 0
    roomy = LLM.from_loaded(tight.loaded, EngineConfig("builtin:books-7m"))
    for one, other in zip(found, roomy.generate(prompts, sampling), strict=True):
        assert one.prompt_logprobs is not None
        assert other.prompt_logprobs is not None
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        for position, (left, right) in enumerate(
            zip(one.prompt_logprobs, other.prompt_logprobs, strict=True)
        ):
            token = one.prompt_token_ids[position]
            if position:
                assert left is not None
                assert right is not None
                assert left[token].logprob == pytest.approx(right[token].logprob, abs=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 3), st.integers(1, 8)),
            st.tuples(st.just("abort"), st.integers(0, 5), st.sampled_from([None, 0, 1, 2])),
            st.tuples(st.just("step"), st.integers(1, 3), st.none()),
        ),
        max_size=20,
    ),
    blocks=st.integers(7, 20),
    guesses=st.sampled_from([None, 2]),
)
def test_every_answer_ends_once_whatever_is_aborted_or_guessed(
    small: LoadedModel, actions: list[tuple[str, int, int | None]], blocks: int, guesses: int | None
) -> None:
    speculation = guesses and SpeculativeConfig(
        num_speculative_tokens=guesses, prompt_lookup_min=1, adaptive=False
    )
    config = EngineConfig(
        "small",
        block_size=4,
        max_model_len=24,
        max_num_seqs=4,
        max_num_batched_tokens=11,
        kv_cache_memory_bytes=blocks * block_bytes(small.decoder, 4, "auto"),
        speculative_config=speculation or None,
    )
    made = Engine(small, config)
    asked: dict[str, int] = {}
    ended: dict[tuple[str, int], str] = {}

    def collect(outputs: list[TokenOutput]) -> None:
        for output in outputs:
            assert (output.request_id, output.index) not in ended
            if output.finish_reason is not None:
                ended[output.request_id, output.index] = output.finish_reason
        made.blocks.check()

    for action, first, second in actions:
        if action == "add":
            name = f"r{len(asked)}"
            asked[name] = first
            prompt = tuple(n % 3 for n in range(6 + len(asked)))
            sampling = SamplingParams(n=first, max_tokens=second, ignore_eos=True, seed=len(asked))
            made.add(GenerationRequest(name, prompt, sampling))
        elif action == "abort":
            collect(made.abort(f"r{first}", second))
        else:
            for _ in range(first):
                collect(made.step())
    while made.has_work:
        collect(made.step())
    assert set(ended) == {(name, index) for name, n in asked.items() for index in range(n)}
    assert set(ended.values()) <= {"length", "abort"}
    assert made.blocks.usage == 0.0
    assert not made._sequences
    assert not made._prompted_by
