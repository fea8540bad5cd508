"""Answers read by the rules that a tokenizer brings, beside transformers' own reading of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers.utils.chat_parsing import parse_response

from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.async_engine import AsyncEngine
from qtool.runtime.server.launch import load
from qtool.runtime.server.message_parser import ParsedMessage
from qtool.runtime.server.response_template import ResponseReader, usable_template

# A syntax that none of this server's own tables has.
RULES: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "[assistant]",
    "fields": {
        "reasoning_content": {"open": "((", "close": "))", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*!do (?P<name>\w+) ",
            "close": "!done",
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"content": "text"},
    },
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
    },
}
PROMPT = "[user]How much?[assistant]"
ANSWERS = [
    "Just text.",
    "((Hm, hm.\n))\n\nTwo.",
    '((Hm.))Let me see.\n!do add {"x": 1}!done\n!do add {"x": "2"}!done',
    "((never closed",
    " leading and trailing ",
    "!do nothing",
]


def read(text: str, step: int, prompt: str = PROMPT, **options: Any) -> ParsedMessage:
    reader = ResponseReader(RULES, prompt, **{"tools": [TOOL], **options})
    message = ParsedMessage()
    for start in range(0, len(text), step):
        for part in reader.push(text[start : start + step]):
            message.add(part)
    for part in reader.finish():
        message.add(part)
    return message


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_read_as_transformers_reads_it_whole(answer: str) -> None:
    theirs = parse_response(answer, RULES, prefix=PROMPT, tools=[TOOL])
    for step in (1, 3, len(answer)):
        ours = read(answer, step)
        assert ours.content == theirs.get("content", "").strip()
        assert ours.reasoning == theirs.get("reasoning_content", "").strip()
        calls = [call["function"] for call in theirs.get("tool_calls", [])]
        assert [(call.name, json.loads(call.arguments)) for call in ours.calls] == [
            (call["name"], call["arguments"]) for call in calls
        ]


def test_a_prompt_may_have_opened_the_thoughts() -> None:
    message = read("Hm.))Two.", 1, prompt=f"{PROMPT}((\n")
    assert (message.reasoning, message.content) == ("Hm.", "Two.")


def test_a_call_that_cannot_be_read_stays_text() -> None:
    text = "So: !do add {x!done and on"
    assert read(text, 4).content.replace("So:", "").strip() == text.removeprefix("So:").strip()
    assert read(text, 4).calls == []


def test_without_tools_a_call_is_text_and_more_than_asked_for_are_dropped() -> None:
    text = '!do add {"x": 1}!done!do add {"x": 2}!done'
    assert read(text, 5, tools=[]).content == text
    assert len(read(text, 5, max_calls=1).calls) == 1


def test_rules_that_cannot_be_read_are_said_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    assert usable_template(None) is None
    assert usable_template({"fields": {}}) is None
    assert "response_template is not used" in caplog.text
    assert usable_template(RULES) is RULES


@pytest.fixture(scope="module")
def server(
    serve: Callable[..., Any], books_7m: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The bundled model, whose tokenizer brings a chat template and rules for its answers."""
    folder = tmp_path_factory.mktemp("with-rules") / "model"
    shutil.copytree(books_7m, folder)
    path = folder / "tokenizer_config.json"
    template = (
        "{% if tools %}tools{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    config = {**json.loads(path.read_text()), "chat_template": template, "response_template": RULES}
    path.write_text(json.dumps(config))
    engine = EngineConfig(str(folder), dtype="float32", kv_cache_memory_bytes=2**24)
    loaded = load(engine)
    client = partial(AsyncEngine.from_loaded, loaded, engine)
    with serve(client=client, tokenizer=loaded.tokenizer) as running:
        yield running


def test_the_rules_are_used_over_http(server: Any) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)

    def ask(answer: str, **fields: Any) -> Any:
        words = {"structured_outputs": {"choice": [answer]}}
        question: list[Any] = [{"role": "user", "content": "How much?"}]
        return client.chat.completions.create(
            model="books-7m", messages=question, max_tokens=120, extra_body=words, **fields
        )

    message = ask(ANSWERS[1]).choices[0].message
    assert (message.reasoning, message.content) == ("Hm, hm.", "Two.")
    [choice] = ask(ANSWERS[2], tools=[TOOL]).choices
    assert choice.finish_reason == "tool_calls"
    calls = [json.loads(call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [{"x": 1}, {"x": 2}]
    names: list[str] = []
    for chunk in ask(ANSWERS[2], tools=[TOOL], stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            names += [call.function.name] if call.function.name else []
    assert names == ["add", "add"]
    assert "!do add" in ask(ANSWERS[2], tools=[TOOL], tool_choice="none").choices[0].message.content
