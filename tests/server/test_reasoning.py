"""Thoughts and calls that a model writes by itself, told apart over HTTP.

What the model writes is fixed by a regular expression, so that a small model stands for a large
one; the template, which a request may bring here, says how the family marks its thoughts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

TEMPLATE = (
    "{% if tools %}<tool_call>{% endif %}{# </think> #}{{ messages[-1]['content'] }}"
    "{% if add_generation_prompt and enable_thinking is not false %}<think>\n{% endif %}"
)
QUESTION = [{"role": "user", "content": "Well?"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": [1, "}"]}}\n</tool_call>'


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any]) -> Iterator[Any]:
    with serve(trust_request_template=True) as running:
        yield running


def ask(server: Any, text: str, **fields: Any) -> Any:
    """The model's message where all that it can write is ``text``."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    extra = {"chat_template": TEMPLATE, "structured_outputs": {"regex": re.escape(text)}}
    extra |= fields.pop("extra_body", {})
    return client.chat.completions.create(
        model="books-7m", messages=QUESTION, max_tokens=200, extra_body=extra, **fields
    )


def test_thoughts_go_into_fields_of_both_names(server: Any) -> None:
    [choice] = ask(server, "Hm, hm.\n</think>\n\nYes.").choices
    assert choice.message.reasoning == "Hm, hm."
    assert choice.message.reasoning_content == "Hm, hm."
    assert choice.message.content == "Yes."
    assert choice.finish_reason == "stop"


def test_thoughts_are_streamed_apart(server: Any) -> None:
    thoughts, text = "", ""
    for chunk in ask(server, "Hm, hm.\n</think>\n\nYes.", stream=True):
        delta = chunk.choices[0].delta
        reasoning = getattr(delta, "reasoning", None)
        assert reasoning == getattr(delta, "reasoning_content", None)
        thoughts += reasoning or ""
        text += delta.content or ""
    assert (thoughts, text) == ("Hm, hm.", "Yes.")


def test_thoughts_can_be_left_out_or_not_had(server: Any) -> None:
    [choice] = ask(server, "Hm.</think>Yes.", extra_body={"include_reasoning": False}).choices
    assert getattr(choice.message, "reasoning", None) is None
    assert choice.message.content == "Yes."
    [choice] = ask(server, "Yes.", reasoning_effort="none").choices
    assert choice.message.content == "Yes."
    [choice] = ask(
        server, "Yes.", extra_body={"chat_template_kwargs": {"enable_thinking": False}}
    ).choices
    assert choice.message.content == "Yes."


def test_a_call_that_the_model_makes_by_itself_is_read(server: Any) -> None:
    text = f"Hm.</think>Let me look.\n{CALL}"
    [choice] = ask(server, text, tools=[TOOL]).choices
    assert choice.message.content == "Let me look."
    [call] = choice.message.tool_calls
    assert call.function.name == "f"
    assert json.loads(call.function.arguments) == {"x": [1, "}"]}
    assert choice.finish_reason == "tool_calls"


def test_a_call_is_left_as_text_where_tools_are_not_to_be_used(server: Any) -> None:
    [choice] = ask(server, f"</think>{CALL}", tools=[TOOL], tool_choice="none").choices
    assert choice.message.tool_calls is None
    assert choice.message.content == CALL


def test_a_template_of_a_request_needs_the_operators_trust(serve: Callable[..., Any]) -> None:
    with serve() as server:
        body = {"messages": QUESTION, "chat_template": TEMPLATE}
        refused = server.post("/v1/chat/completions", body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "chat_template"
