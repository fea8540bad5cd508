"""A real `qtool serve` in a process of its own, for as long as a `with` block lasts.

with running_server("builtin:books-7m", "--dtype", "float32") as server:
    for text in stream_chat(server.url, "Once upon a time"):
        print(text, end="")
"""

from __future__ import annotations

import re
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import httpx
import orjson

from qtool.errors import QtoolError
from qtool.settings import child_environment

READY = re.compile(r"^Serving .* at ((?:https?://|unix:)\S+?)(?:/v1)?$")
STOP_SECONDS = 30
LOG_CHARACTERS = 2000
ANSWER_SECONDS = 300.0  # between two events, a long prefill included


@dataclass(frozen=True, slots=True)
class RunningServer:
    """`url` is without /v1."""

    url: str
    process: subprocess.Popen[str]
    stderr: IO[str]

    def log(self) -> str:
        """What it has written to stderr so far."""
        self.stderr.seek(0)
        return self.stderr.read()


@contextmanager
def running_server(
    model: str, *flags: str, start_seconds: float = 120.0, verify: str | bool = True
) -> Iterator[RunningServer]:
    """`qtool serve MODEL --port 0 FLAGS`: given once it is healthy, stopped by SIGTERM after.

    verify  for TLS: the file of the certificate to trust
    """
    command = ["-m", "qtool", "serve", model, "--port", "0", *flags]
    with started_server(command, start_seconds=start_seconds, verify=verify) as server:
        yield server


@contextmanager
def started_server(
    arguments: Sequence[str], *, start_seconds: float = 120.0, verify: str | bool = True
) -> Iterator[RunningServer]:
    """The same for any command line of this Python that serves."""
    command = [sys.executable, *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            stdin=subprocess.DEVNULL,
            text=True,
            env=child_environment(PYTHONSAFEPATH="1", PYTHONUNBUFFERED="1"),
        )
        try:
            url = _wait_until_ready(process, start_seconds, verify)
            server = RunningServer(url or "", process, log)
            if url is None:
                reason = server.log()[-LOG_CHARACTERS:].strip() or "it printed nothing"
                raise QtoolError(f"`{' '.join(command[2:])}` did not start: {reason}")
            yield server
        finally:
            _stop(process)


def _wait_until_ready(
    process: subprocess.Popen[str], seconds: float, verify: str | bool
) -> str | None:
    """The URL that the server prints; None when it ends or takes too long before it does."""
    assert process.stdout is not None
    # Reading a line cannot time out; a process that is stuck is ended from beside.
    giving_up = threading.Timer(seconds, process.kill)
    giving_up.start()
    try:
        for line in process.stdout:
            if found := READY.match(line.rstrip()):
                if not found[1].startswith("unix:"):
                    health = httpx.get(f"{found[1]}/health", timeout=seconds, verify=_trust(verify))
                    health.raise_for_status()
                return found[1]
    finally:
        giving_up.cancel()
    return None


def _trust(verify: str | bool) -> ssl.SSLContext | bool:
    return ssl.create_default_context(cafile=verify) if isinstance(verify, str) else verify


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def stream_chat(url: str, question: str, **fields: object) -> Iterator[str]:
    """The texts of one streamed chat answer as they arrive; ``fields`` go into the body."""
    body = {"messages": [{"role": "user", "content": question}], "stream": True, **fields}
    endpoint, content = f"{url}/v1/chat/completions", orjson.dumps(body)
    with httpx.stream("POST", endpoint, content=content, timeout=ANSWER_SECONDS) as response:
        if response.is_error:
            raise QtoolError(f"the server answered {response.status_code}: {response.read()!r}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = orjson.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise QtoolError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    yield text
