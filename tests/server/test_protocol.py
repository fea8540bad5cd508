"""Request bodies: what is read, what is ignored, what is refused and in which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qtool.runtime.server.chat_protocol import ChatBody, ToolChoice
from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.parsing import parse
from qtool.runtime.server.protocol import CompletionBody
from qtool.runtime.server.structured import structured_outputs

USER = {"role": "user", "content": "Hello"}


def completion(**fields: Any) -> CompletionBody:
    raw = json.dumps({"prompt": "Once", **fields}).encode()
    return parse(CompletionBody, raw)


def chat(**fields: Any) -> ChatBody:
    return parse(ChatBody, json.dumps({"messages": [USER], **fields}).encode())


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
    names = (*ChatBody.unsupported, *(name for name in ChatBody.model_fields if name != "messages"))
    assert chat(**dict.fromkeys(names)) == chat()


@pytest.mark.parametrize(("name", "values"), ChatBody.unsupported.items())
def test_neutral_values_of_fields_not_offered_are_accepted(name: str, values: Any) -> None:
    for value in values:
        assert chat(**{name: value}) == chat()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("use_beam_search", True),
    ],
)
def test_fields_that_would_change_a_chat_answer_are_refused(name: str, value: Any) -> None:
    error = refusal(chat, **{name: value})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert "not supported" in error.message


def test_a_suffix_is_refused_by_name() -> None:
    assert refusal(completion, suffix="end").param == "suffix"
    assert completion(suffix="").prompt == ("Once",)


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("choice", "read"),
    [
        (None, ToolChoice("auto", ("look_up", "add"))),
        ("none", ToolChoice("none", ("look_up", "add"))),
        ("auto", ToolChoice("auto", ("look_up", "add"))),
        ("required", ToolChoice("required", ("look_up", "add"))),
        ({"type": "function", "function": {"name": "add"}}, ToolChoice("required", ("add",))),
        ({"type": "function", "name": "add"}, ToolChoice("required", ("add",))),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [OTHER]}},
            ToolChoice("auto", ("add",)),
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"name": "look_up"}]},
            ToolChoice("required", ("look_up",)),
        ),
    ],
)
def test_tool_choice_comes_in_many_forms(choice: Any, read: ToolChoice) -> None:
    assert chat(tools=[TOOL, OTHER], tool_choice=choice).choice_of_tools == read


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": "maybe"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "nope"}}},
        {"tools": [TOOL], "tool_choice": {"type": "custom"}},
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": []}},
    ],
)
def test_a_tool_choice_that_fits_no_tool_is_refused(fields: Any) -> None:
    assert refusal(chat, **fields).param == "tool_choice"


def test_a_tool_needs_a_name_that_can_be_called() -> None:
    error = refusal(chat, tools=[{"type": "function", "function": {"name": "look up!"}}])
    assert error.param == "tools[0].function.name"


def test_calls_and_their_results_are_messages() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    answered = {"role": "tool", "tool_call_id": "1", "content": "4"}
    messages = chat(messages=[USER, asked, answered]).messages
    assert messages[1].tool_calls is not None
    assert messages[1].tool_calls[0].function.arguments == '{"x": 1}'
    assert messages[2].tool_call_id == "1"


@pytest.mark.parametrize("arguments", ["{", "[1]", "5"])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    asked = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
    }
    error = refusal(chat, messages=[USER, asked])
    assert error.param == "messages[1].tool_calls[0].function.arguments"


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", True),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "json",
            json.dumps(SCHEMA),
        ),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            "json",
            json.dumps(SCHEMA),
        ),
        ({"response_format": {"type": "regex", "value": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ("a", "b")),
        ({"guided_json": SCHEMA}, "json", json.dumps(SCHEMA)),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a"]}, "choice", ("a",)),
        ({"regex": "a+"}, "regex", "a+"),
        ({"ebnf": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"json_schema": SCHEMA}, "json", json.dumps(SCHEMA)),
    ],
)
def test_the_form_of_an_answer_is_asked_for_in_many_dialects(
    fields: Any, kind: str, value: Any
) -> None:
    asked = structured_outputs(chat(**fields))
    assert asked is not None
    assert getattr(asked, kind) == value


def test_text_is_no_form() -> None:
    assert structured_outputs(chat(response_format={"type": "text"})) is None
    assert structured_outputs(chat(response_format=None, guided_regex=None)) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"structured_outputs": {"shape": 1}}, "structured_outputs"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ],
)
def test_a_form_that_cannot_be_understood_is_refused(fields: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        structured_outputs(chat(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)


def test_scoring_alone_needs_echo() -> None:
    assert completion(max_tokens=0, echo=True).max_tokens == 0
    assert refusal(completion, max_tokens=0).param == "max_tokens"


def test_best_of_is_at_least_n_and_is_not_streamed() -> None:
    assert completion(n=2, best_of=3).num_generated_choices == 3
    assert refusal(completion, n=3, best_of=2).param == "best_of"
    assert refusal(completion, n=1, best_of=2, stream=True).param == "best_of"


def test_a_body_nested_too_deep_is_refused() -> None:
    deep = "x"
    for _ in range(300):
        deep = [deep]  # type: ignore[assignment]
    with pytest.raises(ApiError) as caught:
        chat(metadata=deep)
    assert "levels deep" in caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
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
        ("n", 0),
        ("n", 129),
        ("logprobs", 21),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"5": 101}),
        ("presence_penalty", 2.5),
        ("repetition_penalty", 0),
        ("allowed_token_ids", []),
        ("request_id", "two words"),
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
        parse(CompletionBody, raw)
    assert caught.value.status == 400
    assert words in caught.value.message


def test_a_byte_order_mark_is_skipped() -> None:
    raw = b'\xef\xbb\xbf{"prompt": "Once"}'
    assert parse(CompletionBody, raw).prompt == ("Once",)


def test_a_misspelt_required_field_is_guessed() -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionBody, b'{"promt": "Once"}')
    assert "`promt`: did you mean `prompt`?" in caught.value.message
