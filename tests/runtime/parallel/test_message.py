"""What ranks tell each other comes out as it went in."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.kernels.reference import Span
from qtool.runtime.parallel.message import (
    Channel,
    ClearBlocks,
    Close,
    CopyBlocks,
    Message,
    Open,
    Pass,
    Step,
    Stop,
    Text,
    encode,
)


def passed(*messages: Message) -> list[Message | None]:
    """Through a pair of sockets, and what comes when the other end is closed."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for message in messages:
            Channel(ours).send(encode(message))
        ours.shutdown(socket.SHUT_WR)
        receiver = Channel(theirs)
        return [receiver.receive() for _ in range(len(messages) + 1)]


numbers = st.lists(st.integers(0, 2**31 - 1), max_size=20)


@given(
    token_ids=numbers,
    sampled=numbers,
    spans=st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99), numbers), max_size=5),
    adapters=st.lists(st.tuples(*[st.integers(0, 999)] * 3), max_size=5),
)
def test_a_step_comes_out_as_it_went_in(
    token_ids: list[int],
    sampled: list[int],
    spans: list[tuple[int, int, list[int]]],
    adapters: list[tuple[int, int, int]],
) -> None:
    step = Step(3, token_ids, sampled, [Span(*span) for span in spans], adapters)
    assert passed(step) == [step, None]


def test_every_message_comes_out_as_it_went_in() -> None:
    messages: list[Message] = [
        Open(1, 100, 32, int8=True, context=2048, max_num_seqs=64, eager=True, lora=False),
        CopyBlocks(1, [(5, 6, 7), (8, 9, 1)]),
        ClearBlocks(1, [4, 2]),
        Pass(2, logits=False, token_ids=[1, 2, 3, 4]),
        Close(1),
        Text("grün"),
        Stop(),
    ]
    assert passed(*messages) == [*messages, None]


def test_a_frame_is_its_numbers() -> None:
    """Length 12, kind 5, runner 1, blocks 4 and 2."""
    frame = encode(ClearBlocks(1, [4, 2]))
    assert frame == bytes([12, 0, 0, 0, 5, 1, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0])


def test_a_frame_cut_short_is_an_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode(Pass(1, logits=True, token_ids=range(100)))[:50])
        ours.shutdown(socket.SHUT_WR)
        assert Channel(theirs).receive() is None


def test_a_kind_that_there_is_not_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(bytes([0, 0, 0, 0, 77]))
        with pytest.raises(KeyError, match="77"):
            Channel(theirs).receive()
