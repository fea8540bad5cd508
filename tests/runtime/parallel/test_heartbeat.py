"""Signs of life: counted by periods, asked of a process that is really stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from qtool.runtime.parallel.heartbeat import BEATS, Silence, beat, period, state_of


def test_a_rank_that_owes_too_many_signs_is_silent() -> None:
    silence = Silence()
    silence.heard(1)
    silence.heard(2)
    for _ in range(BEATS):
        assert silence.tick() == []
        silence.heard(2)
    assert silence.tick() == [1]
    silence.heard(1)
    assert silence.tick() == []


def test_one_that_has_not_begun_or_has_ended_owes_nothing() -> None:
    silence = Silence()
    silence.heard(1)
    silence.ended(1)
    assert [silence.tick() for _ in range(2 * BEATS)] == [[]] * 2 * BEATS


def test_signs_are_sent_until_nobody_takes_them() -> None:
    sent: list[int] = []
    ended = threading.Event()

    def send() -> None:
        sent.append(1)
        if len(sent) == 3:
            ended.set()
            raise BrokenPipeError

    beat(send, 0.01)
    assert ended.wait(60)
    assert len(sent) == 3
    assert period(60.0) == 15.0


# Elsewhere the error names no state, and ranks are given up all the same (the other tests here).
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_state_of_a_process_is_the_systems() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            os.kill(process.pid, signal.SIGSTOP)
            # Until it is stopped, for as long as that takes.
            os.waitpid(process.pid, os.WUNTRACED)
            assert state_of(process.pid) == "T (stopped)"
        finally:
            process.kill()
    assert state_of(process.pid) == ""
