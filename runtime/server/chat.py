"""`qtool chat`: a conversation in the terminal.

Answers go to stdout and everything else to stderr, so that `echo question | qtool chat MODEL` gives
the answer alone. From a pipe each line is one message, and the commands work as they do by hand.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click
import orjson

from qtool.errors import QtoolError, closest
from qtool.runtime.server.chat_backends import AnswerEnd, ChatBackend, Message
from qtool.runtime.server.chat_history import PromptHistory
from qtool.settings import settings

PROMPT = "> "
CONTINUED = "... "
MULTILINE = '"""'
COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation, keep the system prompt",
    "/system [TEXT]": "set the system prompt and start over; without TEXT show it",
    "/set NAME VALUE": "a sampling value, as /set temperature 0.3; alone it shows them",
    "/retry": "answer the last question again",
    "/save FILE": "write the conversation as JSON",
    "/exit": "leave; Ctrl-D does the same",
}
SETTABLE: Mapping[str, type[int] | type[float]] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "max_tokens": int,
    "seed": int, "presence_penalty": float, "frequency_penalty": float, "repetition_penalty": float,
}  # fmt: skip
SETTABLE_TEXT = f"There are: {', '.join(SETTABLE)}."
HELP = "\n".join(
    [
        *(f"  {name:<16} {text}" for name, text in COMMANDS.items()),
        f"  {MULTILINE:<16} begins and ends a message of several lines",
        f"  {'Ctrl-C':<16} stops the answer, not the program",
        f"  {'Up, Ctrl-R':<16} what was typed before, in earlier sessions too",
    ]
)


@dataclass(slots=True)
class Conversation:
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def with_question(self, question: str) -> list[Message]:
        return [*self.all_messages(), {"role": "user", "content": question}]

    def all_messages(self) -> list[Message]:
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        return opening + self.messages

    def add(self, question: str, answer: str) -> None:
        self.messages.append({"role": "user", "content": question})
        self.messages.append({"role": "assistant", "content": answer})


class Terminal:
    """Reads messages, runs commands, prints answers."""

    def __init__(
        self, backend: ChatBackend, sampling: Mapping[str, Any], *, system: str | None = None
    ) -> None:
        self._backend = backend
        self._sampling = dict(sampling)
        self._conversation = Conversation(system)
        self.is_interactive = sys.stdin.isatty()
        self.failed = False
        self._history: PromptHistory | None = None

    def run(self) -> None:
        """Until /exit or the end of the input."""
        if self.is_interactive:
            self._history = PromptHistory(settings().state_dir / "chat_history")
            say(f"Chatting with {self._backend.name}. /help lists the commands, /exit leaves.")
        for message in self._messages():
            if not message.startswith("/"):
                self._turn(message)
            elif self._command(message):
                return

    def _messages(self) -> Iterator[str]:
        """Messages as they are typed or piped; empty ones are passed over."""
        while (line := self._line(PROMPT)) is not None:
            message = line.strip()
            if message.startswith(MULTILINE):
                message = self._rest_of(message.removeprefix(MULTILINE))
            if message:
                yield message

    def _rest_of(self, message: str) -> str:
        lines = [message]
        while not lines[-1].rstrip().endswith(MULTILINE):
            line = self._line(CONTINUED)
            if line is None:
                break
            lines.append(line)
        return "\n".join(lines).rstrip().removesuffix(MULTILINE).strip()

    def _line(self, prompt: str) -> str | None:
        """One line without its end; None when there are no more."""
        if not self.is_interactive:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        while True:
            try:
                line = input(prompt)
            except EOFError:
                say("")
                return None
            except KeyboardInterrupt:
                say("\n(Ctrl-C stops an answer; /exit or Ctrl-D leaves)")
            else:
                if self._history is not None:
                    self._history.remember()
                return line

    def _turn(self, question: str) -> None:
        answer = ""
        end: AnswerEnd | None = None
        try:
            with noticing_interrupts() as check, closing(self._answer(question)) as pieces:
                for piece in pieces:
                    check()
                    if isinstance(piece, AnswerEnd):
                        end = piece
                        continue
                    # The space after "Assistant:" is the template's business, not the reader's.
                    text = piece if answer else piece.lstrip()
                    answer += text
                    click.echo(text, nl=False)
        except KeyboardInterrupt:
            click.echo()
            say("(stopped)")
        except QtoolError as error:
            if answer:
                click.echo()
            self._fail(error)
            return
        else:
            click.echo()
            self._say_end(end)
        if answer:
            # A stopped answer stays as far as it went: the next question may be about it.
            self._conversation.add(question, answer)

    def _answer(self, question: str) -> Generator[str | AnswerEnd, None, None]:
        return self._backend.answer(self._conversation.with_question(question), self._sampling)

    def _fail(self, error: QtoolError) -> None:
        self.failed = True
        say(f"Error: {error.message}")
        hint = error.hint
        if (
            hint is None
            and "maximum context length" in error.message
            and self._conversation.messages
        ):
            hint = "/reset forgets the conversation so far"
        if hint:
            say(f"hint: {hint}")

    def _say_end(self, end: AnswerEnd | None) -> None:
        if end is None or not self.is_interactive:
            return
        cut = ", cut off at the token limit" if end.finish_reason == "length" else ""
        speed = f", {end.tokens_per_second:.1f} tokens/s" if end.num_generated_tokens > 1 else ""
        say(
            f"({end.num_generated_tokens} tokens, first after {end.seconds_to_first_text:.2f} s"
            f"{speed}{cut})"
        )

    def _command(self, line: str) -> bool:
        """Run a command; True: leave."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        match name:
            case "/exit" | "/quit" | "/bye":
                return True
            case "/help":
                say(HELP)
            case "/reset":
                self._conversation.messages.clear()
                say("The conversation is forgotten.")
            case "/system" if argument:
                self._conversation = Conversation(argument)
                say("The system prompt is set, the conversation starts over.")
            case "/system":
                say(self._conversation.system or "There is no system prompt.")
            case "/set":
                self._set(argument)
            case "/retry":
                self._retry()
            case "/save":
                self._save(argument)
            case _:
                guess = closest(name, [command.partition(" ")[0] for command in COMMANDS])
                say(
                    f"Unknown command {name}. "
                    + (f"Did you mean {guess}?" if guess else "Try /help.")
                )
        return False

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        if not name:
            shown = ", ".join(f"{name} {value}" for name, value in self._sampling.items())
            say(shown or "All sampling values are the model's own.")
        elif name not in SETTABLE:
            guess = closest(name, SETTABLE)
            say(f"There is no {name}. " + (f"Did you mean {guess}?" if guess else SETTABLE_TEXT))
        elif not value:
            self._sampling.pop(name, None)
            say(f"{name} is the model's own again.")
        else:
            try:
                self._sampling[name] = SETTABLE[name](value)
            except ValueError:
                say(f"{name} is a number, as in /set {name} 1")

    def _retry(self) -> None:
        messages = self._conversation.messages
        if not messages:
            say("There is no question yet.")
            return
        question = messages[-2]["content"]
        del messages[-2:]
        self._turn(question)

    def _save(self, name: str) -> None:
        if not name:
            say("Which file? /save FILE")
            return
        document = {"model": self._backend.name, "messages": self._conversation.all_messages()}
        path = Path(name).expanduser()
        try:
            with path.open("xb") as file:
                file.write(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
        except FileExistsError:
            say(f"{path} exists already; name another file.")
        except OSError as error:
            say(f"{path}: {error.strerror}")
        else:
            say(f"Saved {len(document['messages'])} messages to {path}.")


def say(text: str) -> None:
    click.echo(text, err=True)


@contextmanager
def noticing_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C raises KeyboardInterrupt at once, and again in `check()` where the first was lost.

    Python drops what is raised inside callbacks of its own (a finalizer, a weak reference's), and
    an interrupt that falls there would leave the answer running.
    """
    pressed = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
