"""The command as a user runs it, and artifacts made by it once a session."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qtool.cli import main


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


Qtool = Callable[..., Run]


@pytest.fixture(scope="session")
def qtool() -> Qtool:
    """`qtool("quantize", model, "--out", out)`: the command in this process, and what it printed.

    In this process, for a process of its own spends seconds on importing torch; that the installed
    command works is shown by the tests that serve.
    """

    def run(*arguments: object) -> Run:
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([str(argument) for argument in arguments])
            except SystemExit as ended:
                code = int(ended.code or 0)
        return Run(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def done(qtool: Qtool) -> Qtool:
    """The command, which must succeed."""

    def run(*arguments: object) -> Run:
        ended = qtool(*arguments)
        assert ended.code == 0, ended.err
        return ended

    return run


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def small_int4(done: Qtool, tiny_checkpoint: Callable[..., Path], work: Path) -> Path:
    """A two-block model quantized to int4 with little calibration: seconds, for the quick tests."""
    out = work / "tiny-int4"
    few = ("--num-samples", 8, "--sequence-length", 128)
    done("quantize", tiny_checkpoint("llama"), "--recipe", "int4", *few, "--out", out)
    return out


@pytest.fixture(scope="session")
def awq(done: Qtool, work: Path) -> Path:
    """The bundled model by AWQ in the AWQ layout."""
    out = work / "A"
    done("quantize", "builtin:books-7m", "--recipe", "awq", "--format", "awq", "--out", out)
    return out


@pytest.fixture(scope="session")
def gptq(done: Qtool, work: Path) -> Path:
    """The bundled model by GPTQ in the GPTQ layout."""
    out = work / "G"
    done("quantize", "builtin:books-7m", "--recipe", "gptq", "--format", "gptq", "--out", out)
    return out


def curl(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed `curl -d BODY URL`: no header given, so that curl says the body is a
    form.
    """
    executable = shutil.which("curl")
    if executable is None:
        pytest.skip("curl is not installed")
    command = [executable, "--silent", "--show-error", "--no-buffer", "--max-time", "120"]
    done = subprocess.run(
        [*command, "-d", json.dumps(body), url], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines, done.stderr
    assert lines[-1] == "data: [DONE]", done.stdout
    for line in lines[:-1]:
        yield json.loads(line.removeprefix("data: "))


@pytest.fixture(scope="session")
def streamed() -> Callable[[str], str]:
    """The text of a chat answer streamed by `curl -d` from a server's URL."""

    def ask(url: str) -> str:
        body = {
            "messages": [{"role": "user", "content": "Once upon a time"}],
            "max_tokens": 12,
            "temperature": 0,
            "stream": True,
        }
        choices = [
            choice
            for event in curl(f"{url}/v1/chat/completions", body)
            for choice in event["choices"]
        ]
        assert choices[-1]["finish_reason"] in ("length", "stop")
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    return ask
