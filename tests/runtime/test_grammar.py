"""Answers that must match a grammar do, whatever the model would rather write."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qtool.builtin import builtin_model
from qtool.errors import UsageError
from qtool.runtime.engine.grammar import GrammarCompiler
from qtool.runtime.engine.sampling_params import SamplingParams, StructuredOutputsParams
from qtool.runtime.llm import LLM
from qtool.runtime.outputs import CompletionOutput

PROMPTS = ["It was a cold evening", "Once upon a time", "The sea"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["man", "woman", "ship"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("builtin:books-7m", dtype="float32")


def answers(llm: LLM, wanted: StructuredOutputsParams, **options: object) -> list[CompletionOutput]:
    sampling = SamplingParams(
        **{"structured_outputs": wanted, "max_tokens": 80, "seed": 3, **options}  # type: ignore[arg-type]
    )
    return [found.outputs[0] for found in llm.generate(PROMPTS, sampling)]


def test_json_of_a_schema(llm: LLM) -> None:
    wanted = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)  # type: ignore[arg-type]
    for answer in answers(llm, wanted):
        assert answer.finish_reason == "stop"
        document = json.loads(answer.text)
        assert set(document) == {"name", "age", "kind"}
        assert 0 <= document["age"] <= 150
        assert document["kind"] in ("man", "woman", "ship")
        assert len(document["name"]) <= 12


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        (StructuredOutputsParams(regex=r"[0-9]{4}-[0-9]{2}x"), r"[0-9]{4}-[0-9]{2}x"),
        (StructuredOutputsParams(choice=("yes", 'nö "q"')), 'yes|nö "q"'),
        (StructuredOutputsParams(grammar='root ::= "a" [b-d]{2,5} ("x" | "y")'), "a[b-d]{2,5}[xy]"),
        (StructuredOutputsParams(grammar='start: "a" /[b-d]{2,5}/ ("x" | "y")'), "a[b-d]{2,5}[xy]"),
        (
            StructuredOutputsParams(json={"enum": [1, 22]}),  # type: ignore[arg-type]
            "1|22",
        ),
    ],
    ids=["regex", "choice", "gbnf", "lark", "enum"],
)
def test_every_kind_of_grammar(llm: LLM, wanted: StructuredOutputsParams, pattern: str) -> None:
    for temperature in (0.0, 1.5):
        for answer in answers(llm, wanted, temperature=temperature):
            assert re.fullmatch(pattern, answer.text), answer.text
            assert (answer.finish_reason, answer.stop_reason) == ("stop", 0)


def test_any_object_opens_as_one(llm: LLM) -> None:
    for answer in answers(llm, StructuredOutputsParams(json_object=True), max_tokens=12):
        assert answer.text.lstrip().startswith("{")


def test_each_answer_follows_the_grammar_by_itself(llm: LLM) -> None:
    wanted = StructuredOutputsParams(regex="[a-z]{3} [a-z]{3}")
    sampling = SamplingParams(structured_outputs=wanted, n=4, seed=1, temperature=1.5)
    (found,) = llm.generate(PROMPTS[0], sampling)
    texts = [answer.text for answer in found.outputs]
    assert all(re.fullmatch("[a-z]{3} [a-z]{3}", text) for text in texts)
    assert len(set(texts)) > 1


def test_stop_strings_and_length_still_end_an_answer(llm: LLM) -> None:
    wanted = StructuredOutputsParams(regex="(abc)*")
    stopped = answers(llm, wanted, stop=("bcab",), logit_bias={0: -100.0})
    assert {(answer.text, answer.stop_reason) for answer in stopped} == {("a", "bcab")}
    cut = answers(llm, wanted, max_tokens=4, min_tokens=4)
    assert {answer.finish_reason for answer in cut} == {"length"}
    assert all(re.fullmatch("(abc)*a?b?", answer.text) for answer in cut)


def test_a_finished_grammar_ends_before_min_tokens(llm: LLM) -> None:
    wanted = StructuredOutputsParams(choice=("a",))
    assert {answer.text for answer in answers(llm, wanted, min_tokens=30)} == {"a"}


def test_preemption_does_not_lose_the_place(llm: LLM) -> None:
    wanted = StructuredOutputsParams(regex="[a-z]+( [a-z]+){20}!")
    tight = LLM(
        "builtin:books-7m",
        dtype="float32",
        block_size=16,
        max_model_len=112,
        kv_cache_memory_bytes=112 * 8192,
    )
    expected = answers(llm, wanted, ignore_eos=True)
    assert answers(tight, wanted, ignore_eos=True) == expected
    assert tight.engine.stats().num_preemptions > 0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"regex": "a("}, "unclosed group"),
        ({"json": {"type": "nonsense"}}, "Invalid type: nonsense"),
        ({"json": {"$ref": "http://nowhere.example/x"}}, "cannot be used"),
        ({"json": "{"}, "not valid JSON"),
        ({"json": "[1]"}, "must be a JSON schema"),
        ({"grammar": "start: missing"}, "unknown name"),
        ({"grammar": "root ::= ("}, "GBNF"),
        ({"choice": ()}, "choice is empty"),
        ({}, "asks for nothing"),
        ({"regex": "a", "choice": ("b",)}, "regex and choice"),
    ],
)
def test_a_bad_grammar_is_refused_before_anything_runs(
    llm: LLM, wanted: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        llm.generate(
            "x",
            SamplingParams(structured_outputs=StructuredOutputsParams(**wanted)),  # type: ignore[arg-type]
        )
    assert not llm.engine.has_work


def test_an_error_is_one_line(llm: LLM) -> None:
    with pytest.raises(UsageError) as raised:
        llm.engine.grammars.check(StructuredOutputsParams(regex="a("))
    assert "\n" not in raised.value.message
    assert raised.value.message.endswith("error: unclosed group")


def test_a_grammar_that_compiles_holds_up_no_other() -> None:
    started, go_on = threading.Event(), threading.Event()
    tokenizer_json = (builtin_model("books-7m") / "tokenizer.json").read_text()

    def slowly() -> str:
        started.set()
        assert go_on.wait(60)
        return tokenizer_json

    compiler = GrammarCompiler(slowly, 4096, (0,))
    asked = StructuredOutputsParams(regex="a")
    with ThreadPoolExecutor(2) as others:
        waiting = [others.submit(compiler.check, asked) for _ in range(2)]
        assert started.wait(60)
        # The books of the cache are open meanwhile: a failure there would wait for ever.
        assert compiler._lock.acquire(timeout=60)
        compiler._lock.release()
        go_on.set()
        for one in waiting:
            one.result(60)
    compiler.check(asked)


def test_a_model_without_the_means_says_so() -> None:
    wanted = StructuredOutputsParams(regex="a")
    with pytest.raises(UsageError, match="no tokenizer"):
        GrammarCompiler(None, 10, (0,)).check(wanted)
    with pytest.raises(UsageError, match="no end-of-text token"):
        GrammarCompiler(lambda: "", 10, ()).check(wanted)


def test_masks_along_drafts_are_those_of_each_step(llm: LLM) -> None:
    compiler = llm.engine.grammars
    wanted = StructuredOutputsParams(regex="[0-9]+x")
    vocab = llm.info.vocab_size
    encode = llm.get_tokenizer().encode
    one, x, word = (encode(text, add_special_tokens=False)[0] for text in ("1", "x", "the"))

    def allowed(grammar: object, accepted: list[int]) -> list[int]:
        row = torch.zeros(vocab)
        grammar.restrict(row, [5, 6], accepted)  # type: ignore[attr-defined]
        return row.isfinite().nonzero().flatten().tolist()

    for drafts, num_valid in (([one, one, x], 3), ([one, word, one], 1), ([word], 0)):
        drafting, stepping = (compiler.grammar(wanted, 2) for _ in range(2))
        assert drafting.num_valid([5, 6], drafts) == num_valid
        with ThreadPoolExecutor(1) as worker:
            drafting.prepare(worker, [5, 6], drafts)
            for count in range(num_valid + 1):
                accepted = drafts[:count]
                assert allowed(drafting, accepted) == allowed(stepping, accepted)
    # Having walked along drafts that were not taken, a parser stands where it stood.
    drafting = compiler.grammar(wanted, 2)
    with ThreadPoolExecutor(1) as worker:
        drafting.prepare(worker, [5, 6], [one, x])
        assert allowed(drafting, []) == allowed(compiler.grammar(wanted, 2), [])
        assert allowed(drafting, [one, one]) == allowed(compiler.grammar(wanted, 2), [one, one])
