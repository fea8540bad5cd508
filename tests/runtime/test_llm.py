"""LLM, the offline interface: prompts of every kind, answers in order, errors without a trace."""

from pathlib import Path

import pytest

import qtool
from qtool.errors import QtoolError, UsageError
from qtool.runtime.engine.sequence import PromptTooLong, SamplingParams
from qtool.runtime.llm import LLM

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def llm() -> LLM:
    # In bfloat16 torch's products differ by a rounding between one row and two.
    return LLM("builtin:books-7m", dtype="float32")


def test_the_package_offers_it_by_name() -> None:
    assert qtool.LLM is LLM
    assert qtool.SamplingParams is SamplingParams


def test_strings_and_token_ids_are_the_same_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("The sea")
    answers = llm.generate(["The sea", ids], GREEDY)
    assert answers[0].outputs[0].text == answers[1].outputs[0].text
    assert answers[0].prompt_token_ids == answers[1].prompt_token_ids == tuple(ids)
    assert (answers[0].prompt, answers[1].prompt) == ("The sea", None)
    assert llm.generate("The sea", GREEDY)[0].outputs == answers[0].outputs
    assert llm.generate(ids, GREEDY)[0].outputs == answers[0].outputs
    assert llm.generate([]) == []


def test_each_prompt_can_have_its_own_parameters(llm: LLM) -> None:
    lengths = [3, 9, 1]
    parameters = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    answers = llm.generate(["The sea", "A man", "Once"], parameters)
    assert [len(answer.outputs[0].token_ids) for answer in answers] == lengths
    assert [answer.prompt for answer in answers] == ["The sea", "A man", "Once"]
    with pytest.raises(UsageError, match="2 prompts and 3 sampling parameters"):
        llm.generate(["a", "b"], parameters)


def test_the_text_is_what_the_ids_say(llm: LLM) -> None:
    (answer,) = llm.generate("It was a cold evening", SamplingParams(seed=3, max_tokens=40))
    completion = answer.outputs[0]
    whole = llm.get_tokenizer().decode([*answer.prompt_token_ids, *completion.token_ids])
    assert whole == f"It was a cold evening{completion.text}"


def test_a_refused_prompt_leaves_nothing_in_the_engine(llm: LLM) -> None:
    with pytest.raises(PromptTooLong, match="600 tokens and the context holds 512"):
        llm.generate(["fine", [5] * 600], GREEDY)
    assert not llm.engine.has_work
    assert llm.engine.blocks.usage == 0.0
    assert len(llm.generate("fine", GREEDY)) == 1


def test_chat_uses_the_template_and_stops_at_the_next_speaker(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    (answer,) = llm.chat(messages, SamplingParams(seed=1, max_tokens=24))
    assert answer.prompt == "User: Hello\n\nAssistant:"
    assert "\nUser:" not in answer.outputs[0].text
    assert "has no chat template" in capsys.readouterr().err.replace("\n", " ")
    several = llm.chat([messages, messages], SamplingParams(seed=1, max_tokens=24))
    assert [one.outputs for one in several] == [answer.outputs] * 2


def test_a_model_without_a_tokenizer_takes_token_ids(books_7m: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((books_7m / name).read_bytes())
    plain = LLM(str(tmp_path))
    (answer,) = plain.generate([[40, 41, 42]], GREEDY)
    assert len(answer.outputs[0].token_ids) == 6
    assert answer.outputs[0].text == ""
    with pytest.raises(UsageError, match="has no tokenizer"):
        plain.generate("text")


def test_a_failed_generation_is_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: object) -> None:
        raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine._runner, "run", fail)
        with pytest.raises(QtoolError, match="generation failed: no memory left"):
            llm.generate("The sea", GREEDY)
    assert not llm.engine.has_work
    assert len(llm.generate("The sea", GREEDY)) == 1
