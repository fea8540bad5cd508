"""What rank 0 tells the others, and what they answer: frames of whole numbers, or of text.

    uint32 length of the rest | uint8 kind | int32 numbers, or UTF-8 text

Numbers are those of the message's fields, in order; a list comes behind its length. Nothing that is
received is ever run or unpickled: a frame can only name tokens, blocks and counts. A step of 64
sequences that decode at 2,000 tokens of context is a frame of 18 kB.
"""

from __future__ import annotations

import socket
import struct
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from qtool.kernels.reference import Span

_HEAD = struct.Struct("<IB")
_NUMBER = "i"
assert array(_NUMBER).itemsize == 4


@dataclass(frozen=True, slots=True)
class Open:
    """Make a runner with a KV pool, called by a number from now on.

    int8   keys and values are cached in 8 bits
    lora   requests may use adapters
    eager  steps are launched, none is recorded; else those of up to max_num_seqs sequences are
    """

    kind: ClassVar[int] = 1
    runner: int
    num_blocks: int
    block_size: int
    int8: bool
    context: int
    max_num_seqs: int
    eager: bool
    lora: bool

    def numbers(self) -> list[int]:
        sizes = [self.runner, self.num_blocks, self.block_size, self.context, self.max_num_seqs]
        return [*sizes, int(self.int8), int(self.eager), int(self.lora)]

    @classmethod
    def read(cls, numbers: Iterator[int]) -> Open:
        runner, num_blocks, block_size, context, max_num_seqs, *flags = numbers
        int8, eager, lora = map(bool, flags)
        return cls(runner, num_blocks, block_size, int8, context, max_num_seqs, eager, lora)


@dataclass(frozen=True, slots=True)
class Close:
    """Let go of a runner and its pool."""

    kind: ClassVar[int] = 2
    runner: int

    def numbers(self) -> list[int]:
        return [self.runner]

    @classmethod
    def read(cls, numbers: Iterator[int]) -> Close:
        return cls(*numbers)


@dataclass(frozen=True, slots=True)
class Step:
    """Run a batch. Positions follow from the spans.

    adapter_rows  (number of the adapter, first row, end) each; adapters are numbered as they came
    """

    kind: ClassVar[int] = 3
    runner: int
    token_ids: Sequence[int]
    sampled_rows: Sequence[int]
    spans: Sequence[Span]
    adapter_rows: Sequence[tuple[int, int, int]] = ()

    def numbers(self) -> list[int]:
        numbers = [self.runner, *_list(self.token_ids), *_list(self.sampled_rows)]
        numbers += _list([number for rows in self.adapter_rows for number in rows])
        numbers.append(len(self.spans))
        for span in self.spans:
            numbers += (span.num_queries, span.length, *_list(span.block_ids))
        return numbers

    @classmethod
    def read(cls, numbers: Iterator[int]) -> Step:
        runner = next(numbers)
        token_ids, sampled_rows = _taken(numbers), _taken(numbers)
        adapter_rows = _triples(_taken(numbers))
        spans = [Span(next(numbers), next(numbers), _taken(numbers)) for _ in range(next(numbers))]
        return cls(runner, token_ids, sampled_rows, spans, adapter_rows)


@dataclass(frozen=True, slots=True)
class CopyBlocks:
    """(source, target, number of tokens) each, one after the other."""

    kind: ClassVar[int] = 4
    runner: int
    copies: Sequence[tuple[int, int, int]]

    def numbers(self) -> list[int]:
        return [self.runner, *(number for copy in self.copies for number in copy)]

    @classmethod
    def read(cls, numbers: Iterator[int]) -> CopyBlocks:
        return cls(next(numbers), _triples(list(numbers)))


@dataclass(frozen=True, slots=True)
class ClearBlocks:
    kind: ClassVar[int] = 5
    runner: int
    block_ids: Sequence[int]

    def numbers(self) -> list[int]:
        return [self.runner, *self.block_ids]

    @classmethod
    def read(cls, numbers: Iterator[int]) -> ClearBlocks:
        return cls(next(numbers), list(numbers))


@dataclass(frozen=True, slots=True)
class Pass:
    """One full pass without a cache over `batch` texts of one length, all tokens in a row.

    logits  whether they are wanted, or the hidden states alone
    """

    kind: ClassVar[int] = 6
    batch: int
    logits: bool
    token_ids: Sequence[int]

    def numbers(self) -> list[int]:
        return [self.batch, int(self.logits), *self.token_ids]

    @classmethod
    def read(cls, numbers: Iterator[int]) -> Pass:
        return cls(next(numbers), bool(next(numbers)), list(numbers))


@dataclass(frozen=True, slots=True)
class Stop:
    kind: ClassVar[int] = 7

    def numbers(self) -> list[int]:
        return []

    @classmethod
    def read(cls, numbers: Iterator[int]) -> Stop:
        return cls(*numbers)


@dataclass(frozen=True, slots=True)
class Text:
    kind: ClassVar[int] = 8
    text: str


Message = Open | Close | Step | CopyBlocks | ClearBlocks | Pass | Stop | Text
_OF_NUMBERS = {each.kind: each for each in (Open, Close, Step, CopyBlocks, ClearBlocks, Pass, Stop)}


def encode(message: Message) -> bytes:
    if isinstance(message, Text):
        body = message.text.encode()
    else:
        body = array(_NUMBER, message.numbers()).tobytes()
    return _HEAD.pack(len(body), message.kind) + body


def decode(kind: int, body: bytes) -> Message:
    if kind == Text.kind:
        return Text(body.decode())
    return _OF_NUMBERS[kind].read(iter(array(_NUMBER, body)))


class Channel:
    """One end of a pair of connected sockets."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._sending = threading.Lock()

    def send(self, frame: bytes) -> None:
        """An encoded message; from any thread."""
        with self._sending:
            self.socket.sendall(frame)

    def receive(self) -> Message | None:
        """The next message; None when the other end is closed."""
        head = self._read(_HEAD.size)
        if head is None:
            return None
        length, kind = _HEAD.unpack(head)
        body = self._read(length)
        return None if body is None else decode(kind, body)

    def close(self) -> None:
        self.socket.close()

    def _read(self, count: int) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            try:
                found = self.socket.recv(min(count - len(data), 1 << 20))
            except ConnectionError:
                return None
            if not found:
                return None
            data += found
        return bytes(data)


def _list(numbers: Sequence[int]) -> Iterator[int]:
    yield len(numbers)
    yield from numbers


def _triples(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def _taken(numbers: Iterator[int]) -> list[int]:
    return [next(numbers) for _ in range(next(numbers))]
