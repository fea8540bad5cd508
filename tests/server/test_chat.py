"""`qtool chat`: with a server, with a model in the process, from a pipe and by hand."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qtool.errors import QtoolError, UsageError
from qtool.runtime.command import chat
from qtool.runtime.config import EngineConfig
from qtool.runtime.server.chat_backends import AnswerEnd
from qtool.runtime.server.chat_history import PromptHistory
from qtool.runtime.server.chat_local import LocalChat
from qtool.runtime.server.chat_remote import RemoteChat
from qtool.settings import child_environment

MODEL = "builtin:books-7m"
FLAGS = ["--temperature", "0", "--max-tokens", "8"]
QUESTION = [{"role": "user", "content": "Tell me a story."}]


def type_in(text: str, *arguments: str) -> Result:
    return CliRunner().invoke(chat, [*arguments, *FLAGS], input=text, catch_exceptions=False)


@pytest.fixture(scope="module")
def local() -> Iterator[LocalChat]:
    with closing(LocalChat(EngineConfig(MODEL, dtype="float32"))) as backend:
        yield backend


def test_answers_go_to_stdout_and_the_rest_to_stderr(server: Any) -> None:
    result = type_in("Tell me a story.\n/system Be kind.\n/system\n", server.url)
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 8}
    answer = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert result.stdout == answer.lstrip() + "\n"
    assert "Be kind." in result.stderr
    assert result.exit_code == 0


def test_a_local_model_answers_as_a_server_does(server: Any) -> None:
    lines = "Tell me a story.\nAnd then?\n"
    ours = type_in(lines, MODEL, "--dtype", "float32")
    assert ours.exit_code == 0
    assert ours.stdout == type_in(lines, server.url).stdout
    assert len(ours.stdout.strip()) > 10


def test_the_conversation_is_remembered_saved_and_forgotten(server: Any, tmp_path: Path) -> None:
    saved, after = tmp_path / "saved.json", tmp_path / "after.json"
    lines = f"One?\nTwo?\n/save {saved}\n/reset\n/save {after}\n/save {after}\n"
    result = type_in(lines, server.url, "--system", "Be brief.")
    document = json.loads(saved.read_text())
    assert document["model"] == MODEL
    roles = [message["role"] for message in document["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert document["messages"][3]["content"] == "Two?"
    assert [m["role"] for m in json.loads(after.read_text())["messages"]] == ["system"]
    assert "exists already" in result.stderr


def test_a_message_can_have_several_lines(server: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    type_in(f'"""one\n  /exit\ntwo"""\n\n/save {saved}\n/exit\nnot read\n', server.url)
    question = json.loads(saved.read_text())["messages"][0]["content"]
    assert question == "one\n  /exit\ntwo"


def test_sampling_values_are_set_and_an_answer_is_given_again(server: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    commands = ["/retry", "One?", "/set max_tokens 3", "/set", "/retry", "/set temperatur 1"]
    lines = "\n".join([*commands, "/set seed x", f"/save {saved}", ""])
    result = type_in(lines, server.url)
    for words in ("no question yet", "max_tokens 3", "Did you mean temperature", "is a number"):
        assert words in result.stderr
    document = json.loads(saved.read_text())
    assert [message["role"] for message in document["messages"]] == ["user", "assistant"]
    first, again = result.stdout.strip().split("\n", 1)
    assert len(again) < len(first)
    assert document["messages"][1]["content"].strip() == again.strip()


def test_an_unknown_command_is_guessed_and_not_sent(server: Any) -> None:
    result = type_in("/rest\n/what\n/help\n", server.url)
    assert result.stdout == ""
    assert "Did you mean /reset?" in result.stderr
    assert "Try /help." in result.stderr
    assert "Ctrl-C" in result.stderr


def test_a_failed_turn_is_told_and_the_next_goes_on(server: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    result = type_in(f"One?\n{'word ' * 600}\nTwo?\n/save {saved}\n", server.url)
    assert "maximum context length" in result.stderr
    assert "hint: /reset" in result.stderr
    questions = [m["content"] for m in json.loads(saved.read_text())["messages"][::2]]
    assert questions == ["One?", "Two?"]
    assert result.exit_code == 1, "a script must see that a turn failed"


@pytest.mark.parametrize("backend_name", ["local", "remote"])
def test_a_stopped_answer_ends_in_the_engine(
    backend_name: str, server: Any, local: LocalChat
) -> None:
    backend = local if backend_name == "local" else RemoteChat(server.url)
    client = (local._service if backend_name == "local" else server.service).client
    sampling = {"ignore_eos": True, "seed": 1}
    with closing(backend.answer(QUESTION, sampling)) as pieces:
        assert isinstance(next(pieces), str)
        assert client.stats().num_requests_running == 1
    deadline = time.monotonic() + 60
    while client.stats().num_requests_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    *_, end = backend.answer(QUESTION, {"max_tokens": 2})
    assert isinstance(end, AnswerEnd)
    assert end.num_generated_tokens == 2


def test_where_no_server_answers_the_error_says_how_to_start_one() -> None:
    with pytest.raises(QtoolError, match="no server answers") as caught:
        RemoteChat("http://127.0.0.1:9")
    assert caught.value.hint == "start one with: qtool serve MODEL"


def test_a_url_that_is_no_api_or_lacks_the_model_is_told_apart(server: Any) -> None:
    with pytest.raises(QtoolError, match="404"):
        RemoteChat(f"{server.url}/elsewhere")
    with pytest.raises(UsageError, match="gpt-4o"):
        RemoteChat(server.url, model="gpt-4o")
    with pytest.raises(UsageError, match="--model"):
        type_in("", MODEL, "--model", "x")


def _as_a_terminal_starts_it() -> None:
    """Interrupts are heard, also where the tests run in the background of a shell, which ignores
    them for all it starts; and the terminal becomes the controlling one.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.close(os.open(os.ttyname(0), os.O_RDWR))


@contextmanager
def at_a_terminal(*arguments: str, state: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`qtool chat` on a pseudo-terminal that plays the keyboard and the screen."""
    keyboard, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "qtool", "chat", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=child_environment(TERM="dumb", XDG_STATE_HOME=str(state)),
        start_new_session=True,
        preexec_fn=_as_a_terminal_starts_it,
    )
    os.close(theirs)
    try:
        yield process, keyboard
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def read_until(screen: int, words: bytes) -> bytes:
    seen = b""
    while words not in seen:
        seen += os.read(screen, 4096)
    return seen


def test_what_was_typed_is_there_the_next_time(server: Any, tmp_path: Path) -> None:
    with at_a_terminal(server.url, state=tmp_path) as (process, keyboard):
        for line in (b"/set max_tokens 3\n", b"\n", b"/exit\n"):
            read_until(keyboard, b"> ")
            os.write(keyboard, line)
        assert process.wait(60) == 0
    kept = tmp_path / "qtool" / "chat_history"
    assert kept.read_text().splitlines() == ["/set max_tokens 3", "/exit"]
    assert kept.stat().st_mode & 0o077 == 0
    with at_a_terminal(server.url, state=tmp_path) as (process, keyboard):
        read_until(keyboard, b"> ")
        os.write(keyboard, b"\x10\x10\n")  # Ctrl-P: one line up
        read_until(keyboard, b"> ")
        os.write(keyboard, b"/set\n")
        assert b"max_tokens 3" in read_until(keyboard, b"\nmax_tokens")
        os.write(keyboard, b"/exit\n")
        assert process.wait(60) == 0


def test_a_history_that_cannot_be_kept_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    history = PromptHistory(tmp_path / "file" / "chat_history")
    readline = pytest.importorskip("readline", reason="Python without readline")
    readline.add_history("a line")
    history.remember()
    history.remember()
    assert (tmp_path / "file").read_text() == ""


def test_ctrl_c_stops_the_answer_and_not_the_program(server: Any, tmp_path: Path) -> None:
    with at_a_terminal(server.url, "--temperature", "0", state=tmp_path) as (process, keyboard):
        read_until(keyboard, b"> ")
        os.write(keyboard, b"Tell me a story.\n")
        server.wait_for_metric("vllm:num_requests_running", lambda value: value == 1)
        os.write(keyboard, b"\x03")
        assert b"(stopped)" in read_until(keyboard, b"> ")
        server.wait_for_metric("vllm:num_requests_running", lambda value: value == 0)
        os.write(keyboard, b"\x03")
        assert b"Ctrl-D leaves" in read_until(keyboard, b"> ")
        os.write(keyboard, b"/exit\n")
        assert process.wait(60) == 0
