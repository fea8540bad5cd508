"""A step launched before the tokens of the one before it are read changes nothing that is read.

The device is a CPU whose tokens are drawn by `kernels.reference_sampling`: everything but the
streams of a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from qtool.kernels import reference_sampling
from qtool.kernels.cuda import sampling
from qtool.kernels.cuda.sampling import Draw
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine import engine as engine_module
from qtool.runtime.engine.assembly import make_runner
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.device_draw import DeviceDraw, Kernels
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.kv_pool import block_bytes
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.engine.sampling_params import SamplingParams, StructuredOutputsParams
from qtool.runtime.engine.sequence import GenerationRequest, TokenOutput
from qtool.runtime.loading import LoadedModel, load_model
from qtool.runtime.models.decoder import Decoder

KERNELS = Kernels(reference_sampling.apply_rules, reference_sampling.draw_tokens)
VOCAB = 4096


class PlainSteps:
    """A runner's steps, drawn from by the reference."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def logits(self, batch: Batch) -> Tensor:
        return self._runner.run(batch)

    def draw(self, batch: Batch, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        logits = self._runner.run(batch)
        return KERNELS.draw_tokens(logits, sampling.on_device(draws, logits.device))


@pytest.fixture
def draws_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines draw where their model computes, as on a GPU."""

    def make(loaded: LoadedModel, model: Any, *rest: Any) -> ModelRunner:
        runner = make_runner(loaded, model, *rest)
        assert isinstance(runner, ModelRunner)
        steps = PlainSteps(runner)
        runner.device_draw = DeviceDraw(steps, model.vocab_size, loaded.device, KERNELS)
        return runner

    monkeypatch.setattr(engine_module, "make_runner", make)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Callable[..., Path]) -> LoadedModel:
    return load_model(str(tiny_checkpoint("llama")))


@pytest.fixture(scope="module")
def exact(small_native: Callable[[int], LoadedModel]) -> LoadedModel:
    """A model whose logits have the same bits whatever else is in a step."""
    return small_native(VOCAB)


def make_engine(loaded: LoadedModel, *, ahead: bool, **options: Any) -> Engine:
    # No target: how prompts are cut must not depend on the clock.
    given = {"block_size": 4, "target_itl_ms": 0.0, "async_scheduling": ahead, **options}
    return Engine(loaded, EngineConfig("tiny", **given))


def request(name: str, prompt: Sequence[int], **sampling: Any) -> GenerationRequest:
    asked = {"temperature": 0.0, "max_tokens": 10, "ignore_eos": True, **sampling}
    return GenerationRequest(name, tuple(prompt), SamplingParams(**asked))


Answer = tuple[tuple[int, ...], str | None, int]


class Answers:
    """What is read of requests."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], str] = {}

    def take(self, outputs: Sequence[TokenOutput]) -> None:
        for output in outputs:
            name = output.request_id, output.index
            assert name not in self.ends, "an answer goes on after its end"
            text = self.tokens.setdefault(name, [])
            text.extend(output.new_token_ids)
            assert output.num_generated_tokens == len(text)
            if output.finish_reason is not None:
                self.ends[name] = output.finish_reason

    def whole(self) -> dict[tuple[str, int], tuple[list[int], str]]:
        return {name: (self.tokens[name], end) for name, end in self.ends.items() if end != "abort"}


def run(engine: Engine, asked: Sequence[GenerationRequest]) -> Answers:
    answers = Answers()
    for one in asked:
        engine.add(one)
    while engine.has_work:
        answers.take(engine.step())
        engine.blocks.check()
    assert engine.blocks.usage == 0.0
    assert not engine.has_work
    return answers


@pytest.mark.usefixtures("draws_on_device")
def test_outputs_come_one_step_late_and_the_device_never_waits(tiny: LoadedModel) -> None:
    engine = make_engine(tiny, ahead=True)
    engine.add(request("a", range(5), max_tokens=4))
    seen = []
    while engine.has_work:
        seen.append([len(output.new_token_ids) for output in engine.step()])
    assert seen == [[], [1], [1], [1], [1]]
    # The prompt's step was the first, and of four tokens none was computed for nothing.
    stats = engine.stats()
    assert (stats.steps_launched_ahead_total, stats.step_tokens_total) == (3, 5 + 3)


@pytest.mark.usefixtures("draws_on_device")
def test_a_stop_is_found_a_step_late_and_its_token_thrown_away(tiny: LoadedModel) -> None:
    free = run(make_engine(tiny, ahead=False), [request("a", range(5))]).tokens["a", 0]
    stop = next(token for token in free[2:] if token not in free[:2])
    length = free.index(stop) + 1
    asked = [request("a", range(5), stop_token_ids=(stop,))]
    engine = make_engine(tiny, ahead=True)
    answers = run(engine, asked)
    assert answers.whole() == {("a", 0): (free[:length], "stop")}
    stats = engine.stats()
    assert stats.generation_tokens_total == length
    assert stats.step_tokens_total == 5 + length - 1 + 1


@pytest.mark.usefixtures("draws_on_device")
def test_an_abort_leaves_nothing_behind(tiny: LoadedModel) -> None:
    engine = make_engine(tiny, ahead=True)
    engine.add(request("a", range(9)))
    assert engine.step() == []
    (output,) = engine.abort("a")
    assert (output.finish_reason, output.num_generated_tokens) == ("abort", 0)
    assert engine.blocks.usage == 0.0
    # The name may be used again while its step still runs.
    engine.add(request("a", range(3), max_tokens=2))
    answers = Answers()
    while engine.has_work:
        answers.take(engine.step())
    expected = run(make_engine(tiny, ahead=False), [request("a", range(3), max_tokens=2)])
    assert answers.whole() == expected.whole()
    engine.blocks.check()


def followed_up(engine: Engine) -> list[tuple[list[int], int]]:
    """Tokens after a prompt that begins with another and its answer, and how many it found."""
    text = list(range(11))
    answers = run(engine, [request("first", text, max_tokens=7)])
    text = [*text, *answers.tokens["first", 0], 5]
    engine.add(request("second", text, max_tokens=3))
    seen = []
    while engine.has_work:
        seen += [(list(one.new_token_ids), one.num_cached_tokens) for one in engine.step()]
    return seen


@pytest.mark.usefixtures("draws_on_device")
def test_the_cache_holds_what_it_held_with_steps_that_wait(tiny: LoadedModel) -> None:
    """All of the answer but its last token, the end of a block among them."""
    found = followed_up(make_engine(tiny, ahead=True))
    assert found == followed_up(make_engine(tiny, ahead=False))
    assert [cached for _, cached in found] == [17] * 3


@pytest.mark.usefixtures("draws_on_device")
def test_who_computes_no_numbers_fails_alone(tiny: LoadedModel) -> None:
    """The answers of others, and of who has its blocks later, are what they are without it."""
    expected = run(make_engine(tiny, ahead=True), [request("b", range(20, 29))]).whole()
    with pytest.MonkeyPatch.context() as patch:
        broken, embed = 7, Decoder.embed

        def spoil(self: Decoder, token_ids: Tensor) -> Tensor:
            rows = embed(self, token_ids).clone()
            rows[token_ids == broken] = float("nan")
            return rows

        patch.setattr(Decoder, "embed", spoil)
        engine = make_engine(tiny, ahead=True)
        answers = run(engine, [request("a", [1, 2, broken]), request("b", range(20, 29))])
        assert answers.ends["a", 0] == "error"
        again = run(engine, [request("b", range(20, 29))])
    assert {("b", 0): answers.whole()["b", 0]} == expected == again.whole()


# Few to draw from: of thousands that are nearly as likely, some are as likely but for rounding.
FEW = tuple(range(100, 130))
RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {
        **{"temperature": 0.9, "top_p": 0.9, "top_k": 20, "seed": 5},
        "allowed_token_ids": FEW,
    },
    "min_p": {"temperature": 0.2, "min_p": 0.05, "seed": 6, "allowed_token_ids": FEW},
    "typical": {"temperature": 1.0, "typical_p": 0.6, "seed": 7, "allowed_token_ids": FEW},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.4,
        "temperature": 0.7,
        "seed": 1,
        "allowed_token_ids": FEW,
    },
    "repetition": {"repetition_penalty": 2.0},
    "bias": {"logit_bias": {3: 4.0, 9: -100.0}},
    "allowed": {"allowed_token_ids": tuple(range(20, 40)), "temperature": 1.0, "seed": 2},
    "bad words": {"bad_words": ((7,), (30, 31)), "allowed_token_ids": (7, 30, 31)},
    "min_tokens": {"allowed_token_ids": (4, 5), "stop_token_ids": (4,), "min_tokens": 5},
    "grammar": {
        "structured_outputs": StructuredOutputsParams(regex="[a-c]{4,6}"),
        "ignore_eos": False,
    },
    "logprobs": {"logprobs": 2},
    "two answers": {"n": 2, "temperature": 1.0, "seed": 8, "allowed_token_ids": FEW},
}


@pytest.mark.usefixtures("draws_on_device")
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_what_the_engine_gives_without_a_device(
    rule: str, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request(str(i), range(i, i + 6 + i), **RULES[rule]) for i in range(3)]
    found = run(make_engine(tiny, ahead=True), asked)
    monkeypatch.setattr(engine_module, "make_runner", make_runner)
    assert found.whole() == run(make_engine(tiny, ahead=False), asked).whole()


@pytest.mark.usefixtures("draws_on_device")
def test_only_what_reads_the_last_token_waits_for_it(tiny: LoadedModel) -> None:
    for rule in ("greedy", "penalties", "min_tokens", "bad words", "grammar", "logprobs"):
        asked = RULES[rule]
        engine = make_engine(tiny, ahead=True)
        run(engine, [request("a", range(6), **asked)])
        waits = rule in ("bad words", "grammar", "logprobs")
        ahead = engine.stats().steps_launched_ahead_total
        assert (ahead == 0) if waits else (ahead >= 5), rule
    with_guesses = make_engine(
        tiny, ahead=True, speculative_config={"method": "ngram", "num_speculative_tokens": 2}
    )
    run(with_guesses, [request("a", range(6))])
    assert with_guesses.stats().steps_launched_ahead_total == 0


def schedule(seed: int, loaded: LoadedModel, *, ahead: bool) -> tuple[Answers, Engine]:
    """A life of requests that come, stop, are aborted and preempted, in a pool for few."""
    rng = random.Random(seed)
    engine = make_engine(
        loaded,
        ahead=ahead,
        max_num_seqs=4,
        max_model_len=60,
        max_num_batched_tokens=rng.choice((5, 16, 64)),
        scheduling_policy=rng.choice(("fcfs", "priority")),
        enable_prefix_caching=rng.random() < 0.8,
        kv_cache_memory_bytes=rng.choice((15, 18)) * block_bytes(loaded.decoder, 4),
    )
    begun = [rng.randrange(VOCAB) for _ in range(20)]
    answers = Answers()
    for index in range(20):
        sampling = RULES[rng.choice([name for name in RULES if name != "grammar"])]
        prompt = [*begun[: rng.randrange(1, 20)], *(rng.randrange(VOCAB) for _ in range(5))]
        one = request(
            str(index),
            prompt,
            **{
                "max_tokens": rng.randint(8, 30),
                "stop_token_ids": tuple(rng.sample(range(VOCAB), VOCAB // 20)),
                **sampling,
            },
        )
        engine.add(replace(one, priority=rng.randrange(3)))
        # Drawn whether there is anything to abort or not: both engines are asked the same.
        doomed = str(rng.randrange(40))
        for _ in range(rng.choice((0, 1, 2, 4))):
            answers.take(engine.step())
            engine.blocks.check()
        answers.take(engine.abort(doomed))
        engine.blocks.check()
    while engine.has_work:
        answers.take(engine.step())
        engine.blocks.check()
    assert engine.blocks.usage == 0.0
    return answers, engine


@pytest.mark.usefixtures("draws_on_device")
@pytest.mark.parametrize("first", [0, 5])
def test_random_schedules_give_the_answers_of_the_engine_that_waits(
    first: int, exact: LoadedModel
) -> None:
    num_preemptions = num_ahead = num_whole = 0
    for seed in range(first, first + 5):
        found, engine = schedule(seed, exact, ahead=True)
        expected, waiting = schedule(seed, exact, ahead=False)
        num_ahead += engine.stats().steps_launched_ahead_total
        num_preemptions += engine.stats().num_preemptions
        assert waiting.stats().steps_launched_ahead_total == 0
        assert found.ends.keys() == expected.ends.keys()
        both = found.whole().keys() & expected.whole().keys()
        num_whole += len(both)
        for name in both:
            assert found.whole()[name] == expected.whole()[name], (seed, name)
        for name, tokens in found.tokens.items():
            # Who was aborted got less of the same.
            shorter, longer = sorted((tokens, expected.tokens[name]), key=len)
            assert longer[: len(shorter)] == shorter, (seed, name)
    assert num_preemptions > 0
    assert num_ahead > 20
    assert num_whole > 40
