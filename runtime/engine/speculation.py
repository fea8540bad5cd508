"""Guessing ahead, verified at once: how many tokens to guess, for whom, and what came of it.

A step that verifies k guesses beside a sequence's next token computes k + 1 rows. On a GPU, or
where weights come slowly from memory, that takes hardly longer than one; on a CPU that is busy
computing it takes nearly k + 1 times as long. So nothing is assumed: `Worth` keeps what steps of so
many rows took here, how often guesses were right for each sequence, and what guessing itself took,
and chooses the k with the most tokens a second. Zero is one of the choices.

    tokens a step    sum over sequences of 1 + a + a^2 + ... + a^k     a: share of right guesses
    seconds a step   step(rows) + k * guess

Whatever is chosen, the text is the same: see `runtime.engine.sampler`.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from typing import Protocol

from qtool.runtime.engine.scheduler import Scheduled
from qtool.runtime.engine.sequence import Sequence

# A new measurement's share of an average, at least.
NEW_STEP = 0.2
NEW_GUESS = 0.1
# What is assumed of guesses before any has been judged.
FIRST_ACCEPTANCE = 0.6
# Measurements flicker: guessing has to be faster by so much.
MARGIN = 1.1
# One step in so many tries another number of guesses, none and each in turn: is it still worse?
PROBE_EVERY = 48


class Proposer(Protocol):
    """Guesses at what follows the texts of sequences."""

    def prepare(self, sequences: Series[Sequence], counts: Series[int]) -> None:
        """What has to be done once for a text and not for each guess."""
        ...

    def propose(self, sequences: Series[Sequence], counts: Series[int]) -> list[list[int]]:
        """For each sequence at most so many tokens; none where it has no idea."""
        ...

    def forget(self, sequence_id: str) -> None: ...


class Worth:
    """What guesses cost and bring, by measurement."""

    def __init__(self) -> None:
        self._rows: list[int] = []  # rising, with the seconds a step of so many took
        self._seconds: list[float] = []
        self._guess_seconds = 0.0

    def observe_step(self, rows: int, seconds: float) -> None:
        place = bisect_left(self._rows, rows)
        if place == len(self._rows) or self._rows[place] != rows:
            self._rows.insert(place, rows)
            self._seconds.insert(place, seconds)
        else:
            self._seconds[place] += NEW_STEP * (seconds - self._seconds[place])

    def observe_guesses(self, rounds: int, seconds: float) -> None:
        """One call that guessed up to so many tokens for each of its sequences."""
        self._guess_seconds += NEW_STEP * (seconds / rounds - self._guess_seconds)

    def step_seconds(self, rows: int) -> float:
        """Between what was measured: in proportion; beyond it: as the nearest, which is taken to
        be as good until it is tried.
        """
        place = bisect_left(self._rows, rows)
        if place == len(self._rows):
            return self._seconds[-1] if self._seconds else 0.0
        if self._rows[place] == rows or place == 0:
            return self._seconds[place]
        low, high = self._rows[place - 1 : place + 1]
        share = (rows - low) / (high - low)
        return self._seconds[place - 1] * (1 - share) + self._seconds[place] * share

    def choose(self, acceptance: Series[float], limit: int) -> int:
        """How many tokens to guess for each of these sequences, given how often its guesses were
        right.
        """
        best, best_speed = 0, 0.0
        for count in range(limit + 1):
            tokens = sum(_expected(share, count) for share in acceptance)
            rows = len(acceptance) * (count + 1)
            seconds = self.step_seconds(rows) + count * self._guess_seconds
            if seconds <= 0:
                return 0  # nothing is known yet
            speed = tokens / seconds / (MARGIN if count else 1.0)
            if speed > best_speed:
                best, best_speed = count, speed
        return best


def _expected(share: float, count: int) -> float:
    """Tokens of a step with so many guesses, each right with this share given those before it."""
    return float(count + 1) if share >= 1 else (1 - share ** (count + 1)) / (1 - share)


@dataclass(slots=True)
class Acceptance:
    """How often guesses were right: of all sequences lately, or of one."""

    share: float
    num_judged: int = 0

    def judge(self, was_right: bool) -> None:
        self.num_judged += 1
        self.share += max(NEW_GUESS, 1 / (self.num_judged + 2)) * (was_right - self.share)


@dataclass(slots=True)
class SpeculationCounts:
    """Since the start. by_position: accepted first, second, ... guesses."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    by_position: list[int] = field(default_factory=list)


class Speculation:
    """Puts guesses on the sequences that decode, and learns from each step."""

    def __init__(
        self,
        proposer: Proposer,
        num_tokens: int,
        *,
        adaptive: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._proposer = proposer
        self._num_tokens = num_tokens
        self._adaptive = adaptive
        self._clock = clock
        self._worth = Worth()
        self._usual = Acceptance(FIRST_ACCEPTANCE)
        self._acceptance: dict[str, Acceptance] = {}
        self._num_until_probe = PROBE_EVERY
        self._probe = num_tokens
        self.counts = SpeculationCounts(by_position=[0] * num_tokens)

    def propose(self, decoding: Series[Sequence]) -> None:
        """Guess for sequences of which only the last token is not computed yet."""
        if not decoding:
            return
        count = self._choose(decoding)
        if count == 0:
            return
        room = [
            min(count, sequence.max_total_tokens - len(sequence.token_ids) - 1)
            for sequence in decoding
        ]
        self._proposer.prepare(decoding, room)
        started = self._clock()
        guesses = self._proposer.propose(decoding, room)
        self._worth.observe_guesses(count, self._clock() - started)
        for sequence, guessed in zip(decoding, guesses, strict=True):
            if guessed and sequence.grammar is not None:
                guessed = guessed[: sequence.grammar.num_valid(sequence.token_ids, guessed)]
            sequence.draft_token_ids = guessed

    def observe(self, scheduled: Series[Scheduled], seconds: float) -> None:
        """A step is over. Steps with prompts in them say little about what a row costs."""
        if scheduled and all(work.samples and work.is_decoding for work in scheduled):
            self._worth.observe_step(sum(work.num_tokens for work in scheduled), seconds)

    def judge(self, work: Scheduled, num_accepted: int) -> None:
        """Of a sequence's guesses, the first so many were right."""
        if work.num_draft_tokens == 0:
            return
        counts, name = self.counts, work.sequence.id
        counts.num_drafts += 1
        counts.num_draft_tokens += work.num_draft_tokens
        counts.num_accepted_tokens += num_accepted
        for position in range(num_accepted):
            counts.by_position[position] += 1
        own = self._acceptance.setdefault(name, Acceptance(self._usual.share))
        for position in range(min(num_accepted + 1, work.num_draft_tokens)):
            own.judge(position < num_accepted)
            self._usual.judge(position < num_accepted)

    def forget(self, sequence_id: str) -> None:
        self._acceptance.pop(sequence_id, None)
        self._proposer.forget(sequence_id)

    def _choose(self, decoding: Series[Sequence]) -> int:
        """What is worth most; now and then something else, to see whether it still is."""
        if not self._adaptive:
            return self._num_tokens
        acceptance = [self._acceptance.get(one.id, self._usual).share for one in decoding]
        count = self._worth.choose(acceptance, self._num_tokens)
        self._num_until_probe -= 1
        if self._num_until_probe > 0:
            return count
        self._num_until_probe = PROBE_EVERY
        self._probe = (self._probe + 1) % (self._num_tokens + 1)
        return self._probe
