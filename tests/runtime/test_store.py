"""Names made from Modelfiles, and files of requests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from qtool.cli import qtool
from qtool.errors import FormatError, UsageError
from qtool.runtime.batch_command import read_requests
from qtool.runtime.config import EngineConfig
from qtool.runtime.modelfile import Modelfile, parse_modelfile
from qtool.runtime.server.made_models import with_adapter
from qtool.runtime.store import Store, store

MODELFILE = '''
# A comment
FROM builtin:books-7m
ADAPTER ./rhymes
SYSTEM """You are
a poet."""
PARAMETER temperature 0.3
PARAMETER top_p 0.9
PARAMETER num_ctx 256
PARAMETER stop "END"
PARAMETER stop STOP
PARAMETER num_gpu 20
MESSAGE user Hello
MESSAGE assistant "Good day."
TEMPLATE chatml
'''
MADE = Modelfile(
    "builtin:books-7m",
    adapter="./rhymes",
    system="You are\na poet.",
    template="chatml",
    parameters={"temperature": 0.3, "top_p": 0.9, "num_ctx": 256, "stop": ["END", "STOP"]},
    messages=(
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": '"Good day."'},
    ),
)


def test_a_modelfile_is_read() -> None:
    assert parse_modelfile(MODELFILE) == MADE
    assert MADE.sampling == {"temperature": 0.3, "top_p": 0.9}


def test_a_modelfile_is_written_as_it_is_read() -> None:
    assert parse_modelfile(MADE.text()) == MADE
    assert Modelfile.from_dict(json.loads(json.dumps(MADE.as_dict()))) == MADE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("SYSTEM Hello", "no FROM"),
        ("FROM a\nFORM b", "FORM"),
        ("FROM a\nPARAMETER temprature 1", "temprature"),
        ("FROM a\nPARAMETER top_k many", "many"),
        ("FROM a\nMESSAGE robot Hi", "robot"),
        ('FROM a\nSYSTEM """never', "never closed"),
        ("FROM a\nTEMPLATE {{ .Prompt }}", "Go"),
    ],
)
def test_a_modelfile_with_a_mistake_is_refused_by_line(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_modelfile(text)
    assert "Modelfile" in caught.value.message


def test_names_are_kept_found_and_removed(tmp_path: Path) -> None:
    names = Store(tmp_path / "models")
    assert names.find("poet") is None
    names.keep("poet:small", MADE)
    assert names.find("poet:small") == MADE
    names.keep("plain:latest", Modelfile("x"))
    assert names.find("plain") == Modelfile("x")
    assert [entry.name for entry in names.listed()] == ["plain", "poet:small"]
    assert names.remove("poet:small")
    assert not names.remove("poet:small")
    with pytest.raises(UsageError):
        names.keep("../escape", MADE)
    (tmp_path / "models" / "bad.json").write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        names.find("bad")


def test_a_model_is_made_listed_shown_copied_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    path = tmp_path / "Modelfile"
    path.write_text(MODELFILE.replace("ADAPTER ./rhymes", ""))

    def qtool_says(*words: str) -> str:
        result = CliRunner().invoke(qtool, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "made from builtin:books-7m" in qtool_says("create", "poet", "-f", str(path))
    assert "poet" in qtool_says("cp", "poet", "bard")
    names = {entry["name"] for entry in json.loads(qtool_says("list", "--json"))}
    assert {"poet", "bard"} <= names
    assert parse_modelfile(qtool_says("show", "poet", "--modelfile")) == replace(MADE, adapter=None)
    assert qtool_says("pull", "poet").strip().endswith("books-7m")
    with pytest.raises(UsageError, match="no model at 'nobody'"):
        CliRunner().invoke(qtool, ["cp", "nobody", "x"], catch_exceptions=False)
    assert "x" not in qtool_says("list").split()
    qtool_says("rm", "bard")
    assert "bard" not in qtool_says("list")
    with pytest.raises(UsageError) as error:
        CliRunner().invoke(qtool, ["rm", "poets"], catch_exceptions=False)
    assert "did you mean poet" in (error.value.hint or "")
    result = CliRunner().invoke(qtool, ["show", str(tmp_path / "nowhere")])
    assert result.exit_code != 0
    assert not result.stdout
    words = qtool_says("run", "poet", "-n", "5", "--seed", "1", "Tell me a story.")
    assert words.strip()


def test_an_adapter_is_found_beside_its_modelfile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    path = tmp_path / "Modelfile"
    path.write_text(MODELFILE)
    words = ["create", "poet", "-f", str(path)]
    with pytest.raises(UsageError, match=r"ADAPTER \./rhymes"):
        CliRunner().invoke(qtool, words, catch_exceptions=False)
    (tmp_path / "rhymes").mkdir()
    assert CliRunner().invoke(qtool, words, catch_exceptions=False).exit_code == 0
    made = store().find("poet")
    assert made is not None
    assert made.adapter == str(tmp_path / "rhymes")
    config = with_adapter(EngineConfig(made.base), made)
    assert config.lora_modules == ((made.adapter, made.adapter),)


def test_a_name_made_from_a_name_says_what_it_does_not_say(tmp_path: Path) -> None:
    names = Store(tmp_path)
    names.keep("poet", MADE)
    names.keep("bard", Modelfile("poet", system="A bard.", parameters={"temperature": 1.0}))
    parameters = {**MADE.parameters, "temperature": 1.0}
    assert names.find("bard") == replace(MADE, system="A bard.", parameters=parameters)


def test_a_file_of_requests_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    requests = [
        {"custom_id": "a", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 2}},
        {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": ""}},
        {"custom_id": "d", "url": "/v1/embeddings", "body": {"input": "the sea"}},
    ]
    source.write_text("\n".join(map(json.dumps, requests)))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    store().keep("poet", Modelfile("builtin:books-7m", system="A poet."))
    words = ["run-batch", "poet", "-i", str(source), "-o", str(target)]
    result = CliRunner().invoke(qtool, words, catch_exceptions=False)
    assert "4 answers" in result.stdout
    assert "1 failed" in result.stdout
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["a", "b", "c", "d"]
    assert [answer["response"]["status_code"] for answer in answers] == [200, 200, 400, 200]
    assert answers[0]["response"]["body"]["usage"]["completion_tokens"] == 3
    assert answers[0]["response"]["body"]["model"] == "poet"
    assert answers[2]["error"]["message"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "valid JSON"),
        ('{"custom_id": "a"}', "body"),
        ('{"custom_id": "a", "url": "/v1/nope", "body": {}}', "/v1/nope"),
        ('{"url": "/v1/completions", "body": {}}', "custom_id"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}', "stream"),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(UsageError, match=words) as caught:
        read_requests(path)
    assert ":2" in caught.value.message
