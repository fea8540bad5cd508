"""Tools over HTTP: calls always parse, whatever the model would rather write."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

QUESTION = [{"role": "user", "content": "What is the weather in Rome?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"$ref": "#/$defs/Unit"},
            },
            "required": ["city", "unit"],
            "$defs": {"Unit": {"enum": ["C", "F"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    asked = {"max_tokens": 150, "tools": [WEATHER, CLOCK], "seed": 1, **fields}
    return client.chat.completions.create(model="books-7m", messages=QUESTION, **asked)


def is_weather(arguments: str) -> bool:
    read = json.loads(arguments)
    return set(read) == {"city", "unit"} and read["unit"] in ("C", "F")


NAMED = {"type": "function", "function": {"name": "get_weather"}}


def test_a_call_that_is_asked_for_by_name_comes_and_parses(client: openai.OpenAI) -> None:
    [choice] = ask(client, tool_choice=NAMED).choices
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert is_weather(call.function.arguments)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None


def test_a_required_call_is_of_one_of_the_tools(client: openai.OpenAI) -> None:
    [choice] = ask(client, tool_choice="required", parallel_tool_calls=False).choices
    [call] = choice.message.tool_calls
    assert call.function.name in ("get_weather", "get_time")
    json.loads(call.function.arguments)


def test_streamed_arguments_add_up_to_json(client: openai.OpenAI) -> None:
    names, ids, arguments = [], [], ""
    finished = []
    for chunk in ask(client, tool_choice=NAMED, stream=True):
        [choice] = chunk.choices
        for call in choice.delta.tool_calls or ():
            assert call.index == 0
            if call.id:
                ids.append(call.id)
                names.append(call.function.name)
                assert call.type == "function"
            arguments += call.function.arguments or ""
        finished += [choice.finish_reason] if choice.finish_reason else []
    assert names == ["get_weather"]
    assert len(ids) == 1
    assert is_weather(arguments)
    assert finished == ["tool_calls"]


def test_auto_leaves_the_model_free_to_answer(client: openai.OpenAI) -> None:
    [choice] = ask(client, max_tokens=12).choices
    assert choice.message.tool_calls is None
    assert choice.message.content


def test_none_is_an_answer_in_text(client: openai.OpenAI) -> None:
    [choice] = ask(client, tool_choice="none", max_tokens=12).choices
    assert choice.message.tool_calls is None


def test_results_of_calls_are_taken_back(client: openai.OpenAI) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": ""}}
    answer = client.chat.completions.create(
        model="books-7m",
        messages=[
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
        ],
        tools=[CLOCK],
        max_tokens=4,
    )
    assert answer.choices[0].message.role == "assistant"


def test_a_schema_that_cannot_be_met_is_refused(server: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
    body = {"messages": QUESTION, "tools": [tool], "tool_choice": "required", "max_tokens": 5}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert server.complete("Once", max_tokens=1)


class Person(BaseModel):
    name: str = Field(max_length=10)
    age: int = Field(ge=0, lt=120)


def test_an_answer_is_parsed_into_a_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="books-7m",
        messages=[{"role": "user", "content": "Name a person."}],
        response_format=Person,
        max_tokens=300,
        seed=4,
    )
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Person)


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"structured_outputs": {"choice": ["red", "green"]}}, {"red", "green"}),
        ({"guided_regex": "(yes|no)"}, {"yes", "no"}),
        ({"grammar": 'root ::= "left" | "right"'}, {"left", "right"}),
    ],
)
def test_an_answer_has_the_form_that_was_asked_for(server: Any, fields: Any, texts: Any) -> None:
    body = {"messages": QUESTION, "max_tokens": 50, **fields}
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["choices"][0]["message"]["content"] in texts
    assert server.complete("Once", max_tokens=50, **fields)["choices"][0]["text"] in texts


@pytest.mark.parametrize("fields", [{"guided_regex": "(("}, {"guided_grammar": "not a grammar ("}])
def test_a_form_that_cannot_be_compiled_is_refused(server: Any, fields: Any) -> None:
    response = server.post("/v1/chat/completions", {"messages": QUESTION, **fields})
    assert response.status_code == 400, response.text
    assert server.complete("Once", max_tokens=1)
