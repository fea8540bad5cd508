"""Llama, as programs written for llama-cpp-python use it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool import Llama
from qtool.convert.run import convert_model
from qtool.errors import QtoolError, UsageError
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.llm import LLM

MESSAGES = [{"role": "user", "content": "Who goes there?"}]


@pytest.fixture(scope="module")
def llama(books_7m: Path) -> Llama:
    return Llama(model_path=str(books_7m), n_ctx=256, n_gpu_layers=0, verbose=False)


def test_a_completion_has_the_fields_that_programs_read(llama: Llama) -> None:
    found = llama("The sea", max_tokens=8, temperature=0.0)
    (expected,) = LLM("builtin:books-7m").generate(
        "The sea", SamplingParams(temperature=0, max_tokens=8)
    )
    assert found["object"] == "text_completion"
    assert found["id"].startswith("cmpl-")
    assert found["choices"] == [
        {"index": 0, "text": expected.outputs[0].text, "logprobs": None, "finish_reason": "length"}
    ]
    prompt = len(expected.prompt_token_ids)
    assert found["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8,
    }  # fmt: skip
    echoed = llama.create_completion("The sea", max_tokens=8, temperature=0.0, echo=True)
    assert echoed["choices"][0]["text"] == "The sea" + expected.outputs[0].text
    ids = llama.tokenize(b"The sea")
    assert llama(ids, max_tokens=8, temperature=0.0)["choices"] == found["choices"]


def test_a_chat_answer_has_the_fields_that_programs_read(llama: Llama) -> None:
    found = llama.create_chat_completion(messages=MESSAGES, max_tokens=20, seed=3)
    assert found["object"] == "chat.completion"
    message = found["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert found["choices"][0]["finish_reason"] in ("stop", "length")
    again = llama.create_chat_completion(messages=MESSAGES, max_tokens=20, seed=3)
    assert again["choices"] == found["choices"]


def test_pieces_add_up_to_the_whole(llama: Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 16, "seed": 5, "logprobs": 2}
    whole = llama("The sea", stop=["zzz"], **options)["choices"][0]
    pieces = [p["choices"][0] for p in llama("The sea", stop="zzz", stream=True, **options)]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    tokens = [token for p in pieces if p["logprobs"] for token in p["logprobs"]["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]
    offsets = [place for p in pieces if p["logprobs"] for place in p["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]

    chat = {"messages": MESSAGES, "max_tokens": 12, "seed": 5}
    whole = llama.create_chat_completion(**chat)["choices"][0]
    deltas = [
        chunk["choices"][0]["delta"] for chunk in llama.create_chat_completion(stream=True, **chat)
    ]
    assert deltas[0] == {"role": "assistant"}
    assert deltas[-1] == {}
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == whole["message"]["content"]


def test_logprobs_of_a_chat_answer(llama: Llama) -> None:
    found = llama.create_chat_completion(
        messages=MESSAGES, max_tokens=4, temperature=0.0, logprobs=True, top_logprobs=2
    )
    for entry in found["choices"][0]["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == 2
        best = max(other["logprob"] for other in entry["top_logprobs"])
        assert entry["logprob"] == best
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_answers_in_json_and_by_grammar(llama: Llama) -> None:
    number = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {
        "type": "object",
        "properties": {"n": number},
        "required": ["n"],
        "additionalProperties": False,
    }
    found = llama.create_chat_completion(
        messages=MESSAGES,
        response_format={"type": "json_object", "schema": schema},
        logit_bias={str(t): -100.0 for t in llama.tokenize(b"\n\n \n\t", add_bos=False)},
    )
    assert set(json.loads(found["choices"][0]["message"]["content"])) == {"n"}
    text = llama("Answer:", grammar='root ::= "yes" | "no"', max_tokens=8)["choices"][0]["text"]
    assert text in ("yes", "no")


@pytest.mark.parametrize("text", ["The sea, the sea!", "naïve café 漢字", "", " leading", "a\nb"])
def test_text_survives_tokenize_and_detokenize(llama: Llama, text: str) -> None:
    ids = llama.tokenize(text.encode(), add_bos=False)
    assert llama.detokenize(ids).decode() == text
    middle = len(ids) // 2
    if text.isascii():
        rest = llama.detokenize(ids[middle:], prev_tokens=ids[:middle])
        assert llama.detokenize(ids[:middle]) + rest == text.encode()


def test_names_of_special_tokens_are_text_unless_asked(llama: Llama) -> None:
    name = llama.detokenize([llama.token_eos()], special=True)
    assert llama.tokenize(name, add_bos=False, special=True) == [llama.token_eos()]
    assert llama.tokenize(name, add_bos=False) != [llama.token_eos()]
    assert llama.detokenize([llama.token_eos()]) == b""


def test_sizes_and_limits(llama: Llama, books_7m: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (llama.n_ctx(), llama.n_vocab()) == (256, 4096)
    with pytest.raises(QtoolError, match="300 tokens and the context holds 256"):
        llama([5] * 300)
    long = Llama(str(books_7m), n_ctx=100_000)
    assert long.n_ctx() == 512
    assert "made for 512 tokens" in capsys.readouterr().err
    long.close()


def test_what_is_not_offered_is_named(llama: Llama) -> None:
    with pytest.raises(UsageError, match="mirostat_mode is not offered"):
        llama("x", mirostat_mode=2)
    with pytest.raises(UsageError, match="temprature is not a parameter"):
        llama("x", temprature=1)
    assert llama("x", max_tokens=1, mirostat_mode=0, tfs_z=1.0)["choices"]


def test_a_stream_left_early_leaves_nothing_behind(llama: Llama) -> None:
    stream = llama("The sea", max_tokens=None, stream=True)
    next(stream)
    stream.close()
    assert not llama._llm.engine.has_work
    assert llama("The sea", max_tokens=2)["choices"]


def test_gguf_files_are_what_it_is_for(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = convert_model(
        str(tiny_checkpoint("llama")), to="gguf", type="Q8_0", out=tmp_path / "tiny.gguf"
    )
    llm = Llama(model_path=str(out), n_ctx=64, n_threads=1, verbose=False)
    assert llm("The sea", max_tokens=3)["usage"]["completion_tokens"] <= 3
