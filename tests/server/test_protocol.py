"""Request bodies: what is read, what is ignored, what is refused and in which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.protocol import (
    UNSUPPORTED_IN_CHAT,
    UNSUPPORTED_IN_COMPLETIONS,
    ChatBody,
    CompletionBody,
    parse,
)

USER = {"role": "user", "content": "Hello"}


def completion(**fields: Any) -> CompletionBody:
    raw = json.dumps({"prompt": "Once", **fields}).encode()
    return parse(CompletionBody, raw, UNSUPPORTED_IN_COMPLETIONS)


def chat(**fields: Any) -> ChatBody:
    return parse(ChatBody, json.dumps({"messages": [USER], **fields}).encode(), UNSUPPORTED_IN_CHAT)


def refusal(parser: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parser(**fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("Once", ("Once",)),
        (["Once", "Twice"], ("Once", "Twice")),
        ([5, 6, 7], ((5, 6, 7),)),
        ([[5, 6], [7]], ((5, 6), (7,))),
    ],
)
def test_a_prompt_comes_in_four_forms(prompt: Any, read: Any) -> None:
    assert completion(prompt=prompt).prompt == read


@pytest.mark.parametrize(
    "prompt", [[], [[]], [[5], []], 5, None, [5, "a"], [True], [5.5], {}, [[5, "a"]]]
)
def test_other_forms_of_prompt_are_refused(prompt: Any) -> None:
    assert refusal(completion, prompt=prompt).param == "prompt"


def test_text_parts_of_a_message_are_joined_by_line_breaks() -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    body = chat(messages=[{"role": "user", "content": parts}])
    assert body.messages[0].content == "One\ntwo"


def test_other_parts_of_a_message_are_refused_by_name() -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "image_url", "image_url": {"url": "x"}}]
    error = refusal(chat, messages=[USER, {"role": "user", "content": parts}])
    assert error.param == "messages[1].content"
    assert "image_url" in error.message


def test_unknown_fields_are_ignored() -> None:
    assert chat(user="me", store=True, something_new={"deep": [1]}).messages[0].content == "Hello"


def test_null_is_the_same_as_leaving_a_field_out() -> None:
    names = (*UNSUPPORTED_IN_CHAT, *(name for name in ChatBody.model_fields if name != "messages"))
    assert chat(**dict.fromkeys(names)) == chat()


NEUTRAL = {
    **{name: values for name, values in UNSUPPORTED_IN_CHAT.items() if values},
    "n": (1, 1.0),
    "frequency_penalty": (0, 0.0),
}


@pytest.mark.parametrize(("name", "values"), NEUTRAL.items())
def test_neutral_values_of_unsupported_fields_are_accepted(name: str, values: Any) -> None:
    for value in values:
        assert chat(**{name: value}) == chat()


MEANINGFUL_IN_CHAT = {
    "n": 2,
    "logprobs": True,
    "top_logprobs": 5,
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": -100},
    "skip_special_tokens": False,
    "guided_regex": "a*",
}


@pytest.mark.parametrize(("name", "value"), MEANINGFUL_IN_CHAT.items())
def test_fields_that_would_change_a_chat_answer_are_refused(name: str, value: Any) -> None:
    error = refusal(chat, **{name: value})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert "not supported" in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [("echo", True), ("best_of", 4), ("suffix", "end"), ("logprobs", 0), ("logprobs", 5), ("n", 3)],
)
def test_fields_that_would_change_a_completion_are_refused(name: str, value: Any) -> None:
    assert refusal(completion, **{name: value}).param == name


def test_tool_messages_are_refused_and_not_dropped() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    assert refusal(chat, messages=[USER, asked]).param == "messages[1].tool_calls"
    answered = {"role": "tool", "tool_call_id": "1", "content": "4"}
    assert refusal(chat, messages=[USER, answered]).param == "messages[1].role"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", "ten"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", 2**31),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 2),
        ("seed", 2**64),
        ("stop", 5),
        ("stop", ["a", 5]),
        ("stop", ""),
        ("stop", ["a"] * 129),
        ("stop_token_ids", ["a"]),
        ("stream", "yes"),
        ("stream_options", []),
        ("ignore_eos", 1),
        ("model", 5),
    ],
)
def test_values_out_of_range_or_of_a_wrong_type_are_refused(name: str, value: Any) -> None:
    error = refusal(completion, **{name: value})
    assert error.param is not None
    assert error.param.startswith(name)
    assert f"`{error.param}`" in error.message
    assert "got" in error.message


def test_a_whole_float_is_an_integer() -> None:
    assert completion(max_tokens=512.0).max_tokens == 512


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).max_new_tokens == 7
    assert chat(max_tokens=5).max_new_tokens == 5


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b"prompt=Once", "prompt=Once"),
        (b"{'prompt': 1}", "not valid JSON"),
        (b'{"prompt": "a"', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b"[" * 5000, "not valid JSON"),
        (b'["prompt"]', "an array"),
        (b'"prompt"', "a string"),
        (b"null", "null"),
        (b"5", "a number"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionBody, raw, UNSUPPORTED_IN_COMPLETIONS)
    assert caught.value.status == 400
    assert words in caught.value.message


def test_a_byte_order_mark_is_skipped() -> None:
    raw = b'\xef\xbb\xbf{"prompt": "Once"}'
    assert parse(CompletionBody, raw, UNSUPPORTED_IN_COMPLETIONS).prompt == ("Once",)


def test_a_misspelt_required_field_is_guessed() -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionBody, b'{"promt": "Once"}', UNSUPPORTED_IN_COMPLETIONS)
    assert "`promt`: did you mean `prompt`?" in caught.value.message
