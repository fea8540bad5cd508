"""Scores of tokens over HTTP are those of the model: checked against transformers on one text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

PROMPT = "The ship sailed in the morning, and"


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)


@pytest.fixture(scope="module")
def ids(tokenizer: Any) -> list[int]:
    return list(tokenizer.encode(PROMPT))


@pytest.fixture(scope="module")
def expected(books_7m: Path, ids: list[int]) -> torch.Tensor:
    """[tokens, vocab]: log-probabilities of what follows each token of the prompt."""
    model = AutoModelForCausalLM.from_pretrained(books_7m, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    return logits.float().log_softmax(-1)


def test_an_echoed_prompt_is_scored_as_transformers_scores_it(
    server: Any, ids: list[int], expected: torch.Tensor
) -> None:
    # The request that lm-eval's local-completions sends for a log-likelihood.
    answer = server.complete([ids, ids[:4]], max_tokens=1, logprobs=1, echo=True, seed=1234)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice, prompt in zip(answer["choices"], (ids, ids[:4]), strict=True):
        told = choice["logprobs"]
        assert {len(values) for values in told.values()} == {len(prompt) + 1}
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        for place in range(1, len(prompt)):
            row = expected[place - 1]
            assert told["token_logprobs"][place] == pytest.approx(
                float(row[prompt[place]]), abs=1e-3
            )
            top = told["top_logprobs"][place]
            assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-3)
            # lm-eval decides "greedy" by equality of these two floats.
            token = told["tokens"][place]
            assert top[token] == told["token_logprobs"][place]
            is_greedy = int(row.argmax()) == prompt[place]
            assert (told["token_logprobs"][place] == max(top.values())) == is_greedy


def test_the_token_that_ends_a_text_is_scored_too(server: Any, tokenizer: Any) -> None:
    [end] = tokenizer.eos_token_ids
    told = server.complete(
        "Once upon", max_tokens=1, logprobs=1, echo=True, allowed_token_ids=[end]
    )["choices"][0]
    assert told["finish_reason"] == "stop"
    assert len(told["logprobs"]["tokens"]) == len(tokenizer.encode("Once upon")) + 1


def test_a_prompt_alone_is_scored_with_no_new_token(server: Any, ids: list[int]) -> None:
    answer = server.complete(PROMPT, max_tokens=0, logprobs=1, echo=True)
    [choice] = answer["choices"]
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert answer["usage"]["completion_tokens"] == 0


def test_offsets_point_into_the_text(server: Any) -> None:
    choice = server.complete(PROMPT, max_tokens=6, logprobs=2, echo=True)["choices"][0]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_an_answer_streamed_with_scores_adds_up(server: Any) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "logprobs": 2, "echo": True, "temperature": 0}
    whole = server.complete(**body)["choices"][0]
    told: dict[str, list[Any]] = {}
    text = ""
    with server.stream(body) as lines:
        for chunk in openai_chunks(lines):
            text += chunk["choices"][0]["text"]
            for name, values in chunk["choices"][0]["logprobs"].items():
                told.setdefault(name, []).extend(values)
    assert text == whole["text"]
    assert told["tokens"] == whole["logprobs"]["tokens"]
    assert told["text_offset"] == whole["logprobs"]["text_offset"]
    assert told["token_logprobs"][1:] == pytest.approx(
        whole["logprobs"]["token_logprobs"][1:], abs=1e-4
    )


def openai_chunks(lines: Any) -> Any:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_chat_tells_tokens_with_their_bytes(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="books-7m",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    [choice] = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 5
    for entry in choice.logprobs.content:
        assert bytes(entry.bytes or []).decode("utf-8", "replace") == entry.token
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy: the likeliest
    written = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert written.decode("utf-8", "replace").strip() == (choice.message.content or "").strip()


def test_several_answers_are_told_apart(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="books-7m",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=8,
        n=3,
        seed=5,
        temperature=1,
    )
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    again = client.completions.create(model="books-7m", prompt=["One", "Two"], n=2, max_tokens=2)
    assert [choice.index for choice in again.choices] == [0, 1, 2, 3]


def test_the_best_of_several_is_the_likeliest(server: Any) -> None:
    asked = {"prompt": "Once", "max_tokens": 6, "seed": 3, "temperature": 1.0, "logprobs": 0}
    several = server.complete(**asked, n=4)["choices"]
    means = [sum(choice["logprobs"]["token_logprobs"]) / 6 for choice in several]
    [best] = server.complete(**asked, best_of=4)["choices"]
    assert best["text"] == several[means.index(max(means))]["text"]


def test_prompt_scores_come_in_vllms_form_too(server: Any, ids: list[int]) -> None:
    choice = server.complete(PROMPT, max_tokens=1, prompt_logprobs=2)["choices"][0]
    told = choice["prompt_logprobs"]
    assert len(told) == len(ids)
    assert told[0] is None
    for place, entry in enumerate(told[1:], 1):
        assert 2 <= len(entry) <= 3
        assert str(ids[place]) in entry


def test_a_bias_decides(server: Any, tokenizer: Any) -> None:
    wanted = tokenizer.encode(" ship")[-1]
    answer = server.complete("Once", max_tokens=3, logit_bias={str(wanted): 100})
    assert answer["choices"][0]["text"] == tokenizer.decode([wanted] * 3)
    told = server.complete("Once", max_tokens=2, allowed_token_ids=[wanted], return_token_ids=True)[
        "choices"
    ][0]
    assert told["token_ids"] == [wanted, wanted]
    assert told["prompt_token_ids"] == list(tokenizer.encode("Once"))
