"""README cannot rot: its commands run, in its order, and print what it says they print.

The blocks marked `console` are one session in one folder. A line that begins with `$ ` is a command
(a trailing backslash continues it), what follows is its output. Every pasted line must be among
those that the command prints, numbers aside; `...` stands for any number of lines. The blocks
marked `python` are run in their place. What is not run is named in NOT_RUN, with the reason.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from qtool.cli import COMMANDS, qtool

README = Path(__file__).parent.parent / "README.md"

# Commands that are not run here, by how they begin or what they hold.
NOT_RUN = {
    r"^(git|make|pip|python3? -m venv|\. )": "sets up the checkout, from a registry",
    r"^pytest |--device cuda": "needs a GPU",
    r"\b(Qwen|meta-llama)/": "reads a model from the Hub",
    r"^vllm ": "another program",
    r"^qtool push ": "writes to the Hub",
}
# Commands whose text is a model's: it differs between CPUs, so that they only must succeed.
GENERATES = r"\b(curl|qtool chat|qtool run)\b"
DEFAULT_PORT = "8000"


@dataclass(frozen=True, slots=True)
class Step:
    """A command with its pasted output, or a Python program."""

    language: str
    text: str
    output: tuple[str, ...] = ()

    def skipped_because(self) -> str | None:
        for pattern, reason in NOT_RUN.items():
            if self.language == "console" and re.search(pattern, self.text):
                return reason
        return None


def steps() -> Iterator[Step]:
    blocks = re.findall(r"^```(console|python)\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)
    for language, body in blocks:
        if language == "python":
            yield Step(language, body)
            continue
        joined = re.sub(r"\\\n\s*", " ", body)
        for chunk in re.split(r"^\$ ", joined, flags=re.M)[1:]:
            command, *output = chunk.rstrip("\n").split("\n")
            yield Step(language, re.sub(r"\s+#.*$", "", command), tuple(output))


STEPS = tuple(steps())


def normalised(line: str) -> str:
    """Without what differs from run to run: numbers, and the widths that follow from them."""
    line = re.sub(r"\d+(?:[.,:]\d+)*(?:e[+-]?\d+)?", "N", line)
    return re.sub(r"[\s─━═-]+", " ", line).strip()


def missing_lines(expected: tuple[str, ...], printed: str) -> list[str]:
    found = {normalised(line) for line in printed.splitlines()}
    return [
        line
        for line in expected
        if line.strip() not in ("", "...") and normalised(line) not in found
    ]


def test_readme_has_a_session_to_check() -> None:
    assert sum(step.skipped_because() is None for step in STEPS) >= 10
    shown = {name for name in COMMANDS if any(f"qtool {name}" in step.text for step in STEPS)}
    assert shown >= set(COMMANDS) - {"demo"}


def test_the_pasted_help_is_the_help() -> None:
    (pasted,) = (step for step in STEPS if step.text == "qtool --help")
    shown = CliRunner().invoke(qtool, ["--help"], prog_name="qtool", terminal_width=80)
    assert "\n".join(pasted.output).strip() == shown.output.strip()


@pytest.mark.parametrize(
    "command",
    [step.text for step in STEPS if re.match(r"qtool (?!-)", step.text)],
)
def test_every_command_in_readme_has_flags_that_exist(command: str) -> None:
    """Also those that need the Hub and are not run."""
    simple = re.split(r"[|>&;]", command)[0]
    name, *arguments = shlex.split(simple)[1:]
    subcommand = qtool.get_command(click.Context(qtool), name)
    if isinstance(subcommand, click.Group):
        name, *arguments = arguments
        subcommand = subcommand.get_command(click.Context(subcommand), name)
    assert subcommand is not None
    known = {flag for parameter in subcommand.params for flag in parameter.opts}
    used = {argument.split("=")[0] for argument in arguments if argument.startswith("-")}
    assert used <= known


@pytest.mark.slow
def test_the_session_in_readme_runs(tmp_path: Path) -> None:
    session = Session(tmp_path)
    with session.stopping_servers():
        for step in STEPS:
            if step.skipped_because() is None:
                session.run(step)


class Session:
    """README's commands, one after the other, in one folder; `... &` stays until the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: list[subprocess.Popen[str]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        scripts = str(Path(sys.executable).parent)
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
            "COLUMNS": "80",
            "HF_HUB_OFFLINE": "1",
            "XDG_DATA_HOME": str(folder / "data"),
        }

    def run(self, step: Step) -> None:
        text = step.text.replace(f":{DEFAULT_PORT}", f":{self.port}")
        if step.language == "python":
            self.finish([sys.executable, "-c", text], step)
        elif text.endswith("&"):
            self.start_server(text.removesuffix("&").strip(), step)
        elif text.startswith("kill "):
            self.stop_server()
        else:
            if "curl" in text and shutil.which("curl") is None:
                return
            self.finish(["bash", "-c", f"set -o pipefail; {text}"], step)

    def finish(self, command: list[str], step: Step) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{step.text}\n{done.stdout}"
        assert done.stdout.strip() or not step.output, step.text
        if "curl" in step.text:  # which calls an error's answer a success
            assert '{"error"' not in done.stdout, f"$ {step.text}\n{done.stdout}"
        if step.language == "console" and not re.search(GENERATES, step.text):
            missing = missing_lines(step.output, done.stdout)
            assert not missing, f"$ {step.text}\n{missing}\nnot among:\n{done.stdout}"

    def start_server(self, command: str, step: Step) -> None:
        log = self.folder / "serve.log"
        with log.open("w") as out:
            server = subprocess.Popen(
                [*shlex.split(command), "--port", self.port],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.servers.append(server)
        for _ in range(600):
            if server.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health") as answer:
                    if answer.status == 200:
                        break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        assert server.poll() is None, f"{command}\n{log.read_text()}"
        missing = missing_lines(step.output, log.read_text())
        assert not missing, f"$ {command}\n{missing}\nnot among:\n{log.read_text()}"

    def stop_server(self) -> None:
        server = self.servers.pop()
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0

    @contextmanager
    def stopping_servers(self) -> Iterator[None]:
        try:
            yield
        finally:
            for server in self.servers:
                server.kill()
                server.wait()
