"""`qtool serve` as a process: what it prints, how it stops, how it fails."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from click.testing import CliRunner

from qtool.cli import main
from qtool.errors import QtoolError
from qtool.runtime.command import serve
from qtool.runtime.config import EngineConfig
from qtool.runtime.server.process import RunningServer, running_server, stream_chat
from qtool.runtime.server.serve import bind, url_of

MODEL = "builtin:books-7m"
EXIT_SECONDS = 60


@contextmanager
def stream(server: RunningServer, max_tokens: int) -> Iterator[Iterator[str]]:
    body = {"prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=EXIT_SECONDS) as response:
        yield response.iter_lines()


def wait_until_refused(client: httpx.Client) -> None:
    """The listening socket is open a moment longer than the server, and says 503."""
    while True:
        client.get("/health")


def test_sigterm_lets_a_stream_finish_and_refuses_what_is_new() -> None:
    with running_server(MODEL, "--dtype", "float32") as server:
        assert "".join(stream_chat(server.url, "Tell me a story.", max_tokens=8, temperature=0))
        with stream(server, 200) as lines, httpx.Client(base_url=server.url) as idle:
            assert idle.get("/health").is_success
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):
                wait_until_refused(idle)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert (
            json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        )
        assert len(rest) == 200
        assert server.process.wait(EXIT_SECONDS) == 0
        log = server.log()
        for word in (MODEL, "float32 on cpu", "kernel", "head", "KV cache", "blocks", "plain"):
            assert word in log
        assert "Traceback" not in log


def test_what_runs_longer_than_the_shutdown_timeout_ends_with_an_error_event() -> None:
    with running_server(MODEL, "--shutdown-timeout", "0", "--disable-log-requests") as server:
        with stream(server, 500) as lines:
            next(lines)
            server.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "aborted"
        assert server.process.wait(EXIT_SECONDS) == 0
        assert "cmpl-" not in server.log()


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    return caught.value.code, output.err


def test_a_port_in_use_is_said_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, text = fails(capsys, "serve", "no-such-model", "--port", port)
    assert code == 2
    assert f"port {port} on 127.0.0.1 is in use" in text
    assert "hint: " in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], "no-such-model"),
        (["builtin:book-7m"], "books-7m"),
        ([MODEL, "--port", "70000"], "70000"),
        ([MODEL, "--host", "no.such.host.invalid"], "no.such.host.invalid"),
        ([MODEL, "--dtype", "int3"], "int3"),
        ([MODEL, "--max-num-seqs", "0"], "max-num-seqs"),
        ([MODEL, "--api-key", ""], "API key"),
        ([MODEL, "--allowed-origins", "[5]"], "--allowed-origins"),
        ([MODEL, "--tensor-parallel-size", "0"], "--tensor-parallel-size"),
        ([MODEL, "--tensor-parallel-size", "3"], "4 attention heads cannot be shared by 3 ranks"),
        ([MODEL, "--pipeline-parallel-size", "2"], "--pipeline-parallel-size"),
        ([MODEL, "--speculative-config", "{"], "not valid JSON"),
        ([MODEL, "--speculative-config", "{}", "--speculative-model", "m"], "says it all"),
        ([MODEL, "--num-speculative-tokens", "3"], "--speculative-model"),
    ],
)
def test_wrong_flags_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, text = fails(capsys, "serve", "--port", "0", *arguments)
    assert code in (1, 2)
    assert words in text


def test_a_server_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(QtoolError, match="max-num-seqs"),
        running_server(MODEL, "--max-num-seqs", "0"),
    ):
        raise AssertionError("it started")


def test_a_free_port_is_picked_and_named() -> None:
    with bind("127.0.0.1", 0) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
        # asyncio turns Nagle's algorithm off only on sockets that say they are TCP.
        assert bound.proto == socket.IPPROTO_TCP
    with bind("0.0.0.0", 0) as everywhere:
        assert url_of(everywhere).startswith("http://127.0.0.1:")


def test_help_shows_the_defaults() -> None:
    text = " ".join(CliRunner().invoke(serve, ["--help"]).stdout.split())
    for words in ("--max-model-len", "[default: 8000]", "[default: 127.0.0.1]", "curl "):
        assert words in text
    assert f"Sequences in one step. [default: {EngineConfig(MODEL).max_num_seqs};" in text


def test_conversations_that_come_before_the_server_is_warm_are_answered() -> None:
    """What renders them is loaded at the start by a thread of its own."""
    with running_server(MODEL, "--dtype", "float32") as server:
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}

        def ask(number: int) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=EXIT_SECONDS)

        with ThreadPoolExecutor(4) as several:
            answers = list(several.map(ask, range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4, answers[0].text
