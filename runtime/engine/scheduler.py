"""What runs in the next step: vLLM V1's rules, with three of our own.

One budget of tokens a step. There are no phases: each sequence has tokens that the cache does not
hold yet, and a step computes some of them: one for a sequence that is decoding (and its guesses),
a chunk of the prompt for one that is not there yet. Running sequences come first, those that
decode before those that are prefilled, then waiting ones while seats, blocks and budget last.

Admission reserves blocks for the whole prompt, so a sequence that has begun its prefill can finish
it. Answers grow block by block. When no block is left, the sequence whose turn is last gives up its
blocks and waits again, at its old place, with the tokens it has; they are computed anew when there
is room, as far as the cache has lost them (recomputing costs less than moving a cache out and in,
and needs no second pool). A pool holds at least one sequence of full length, which the engine
ensures, so the one whose turn is first always advances and nothing can lock up.

A step may be scheduled while another runs whose tokens nobody has read. All that is known of them
here is how many there are, one at the most for each sequence: it goes on as if it had the token,
unless that is its last.

What vLLM does not do: the prompt tokens beside which others decode are bounded by how long the step
will take (`pace`); whose prompt the cache holds may go first, within bounds, and whose prompt is
being computed by another waits for it (`waiting`); and by priority, who waits also takes the place
of who runs with a worse one.

The reference is vLLM's `v1/core/sched/scheduler.py`.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qtool.runtime.engine.blocks import BlockManager, Match
from qtool.runtime.engine.pace import Pace
from qtool.runtime.engine.sequence import Sequence
from qtool.runtime.engine.waiting import Waiting

# Rows of a step that say how likely a prompt's tokens were, of all sequences together: of a
# vocabulary of 150,000 tokens each takes 0.6 MB. A CPU computes so few as fast, a row, as more.
PROMPT_ROWS = {"cpu": 64, "cuda": 512}


class Scheduled(NamedTuple):
    """A sequence and how many tokens this step computes for it.

    token_ids, then drafts:  [ computed | num_tokens ............. ]
                             [   start  | to do .. | num_draft_tokens ]

    num_tokens        rows of the step: uncomputed tokens from the left, and then drafts
    num_draft_tokens  how many of the rows are `Sequence.draft_token_ids`
    start             position of the first row
    samples           whether the step reaches the last token, so that a new one is drawn after it
    num_preemptions   the sequence's so far: with more of them, its blocks are no longer those that
                      the step writes
    """

    sequence: Sequence
    num_tokens: int
    num_draft_tokens: int
    start: int
    samples: bool
    num_preemptions: int

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int, num_draft_tokens: int = 0) -> "Scheduled":
        """As the sequence is now; it goes on while the step runs."""
        return cls(
            sequence,
            num_tokens,
            num_draft_tokens,
            start=sequence.num_computed_tokens,
            samples=num_tokens - num_draft_tokens == sequence.num_uncomputed_tokens,
            num_preemptions=sequence.num_preemptions,
        )

    @property
    def num_kept_tokens(self) -> int:
        """Tokens that the cache holds after the step, drafts not counted."""
        return self.start + self.num_tokens - self.num_draft_tokens

    @property
    def keeps_blocks(self) -> bool:
        """Whether the sequence still has the blocks that the step writes."""
        return self.sequence.num_preemptions == self.num_preemptions

    @property
    def is_decoding(self) -> bool:
        """Whether somebody who has begun to answer waits for this step."""
        return self.num_tokens - self.num_draft_tokens == 1 and self.samples

    @property
    def num_draw_rows(self) -> int:
        """Rows whose logits tokens are drawn from: the last token's, and each draft's."""
        return 1 + self.num_draft_tokens if self.samples else 0

    @property
    def num_prompt_rows(self) -> int:
        """Rows that say how likely the prompt's next token was, the first ones of the step. After
        a preemption they come a second time.
        """
        sequence = self.sequence
        if sequence.request.sampling.prompt_logprobs is None:
            return 0
        stop = min(self.start + self.num_tokens, sequence.num_prompt_tokens - 1)
        return max(stop - self.start, 0)


class Scheduler:
    """
    max_prompt_rows  of PROMPT_ROWS
    by_priority      whether requests' priorities count; else first come, first served
    pace             bounds the prompt tokens of a step beside which others decode
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prompt_rows: int = PROMPT_ROWS["cpu"],
        by_priority: bool = False,
        pace: Pace | None = None,
    ) -> None:
        self._blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_prompt_rows = max_prompt_rows
        self._by_priority = by_priority
        self.pace = pace or Pace(None)
        self._running: dict[Sequence, None] = {}
        self._waiting = Waiting(by_priority=by_priority)
        # The sequence that found no room, and how much had been freed by then.
        self._no_room: tuple[Sequence, int] | None = None
        self._now = 0.0
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def running_adapters(self) -> tuple[str, ...]:
        names = (sequence.adapter for sequence in self._running)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    @property
    def waiting_adapters(self) -> tuple[str, ...]:
        names = (sequence.adapter for sequence in self._waiting)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    @property
    def decoding(self) -> list[Sequence]:
        """Running sequences of which all but the last token are computed."""
        return [sequence for sequence in self._running if sequence.num_uncomputed_tokens == 1]

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        self._waiting.add(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Take up a further answer to the parent's prompt: with the parent's cache beside it where
        there is room, else as a sequence that waits.
        """
        num_tokens = min(parent.num_computed_tokens, len(child.token_ids) - 1)
        has_seat = len(self._running) < self._max_num_seqs
        if has_seat and self._blocks.fork(parent.id, child.id, child.token_ids, num_tokens):
            child.num_computed_tokens = child.num_cached_tokens = num_tokens
            child.queue_seconds = parent.queue_seconds
            self._waiting.know(child)
            self._running[child] = None
        else:
            self._waiting.add(child)

    def launched(self, scheduled: Iterable[Scheduled]) -> None:
        """A step runs, and the next one may be scheduled: what it computes is as good as computed
        for the sequences themselves, and for nobody else.
        """
        for work in scheduled:
            work.sequence.num_computed_tokens = work.num_kept_tokens
            work.sequence.num_unread_tokens += work.samples

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """A step is over: the cache holds the sequence's first num_tokens tokens."""
        sequence.num_computed_tokens = max(sequence.num_computed_tokens, num_tokens)
        self._blocks.computed(sequence.id, num_tokens)
        if self._blocks.window is not None:
            self._blocks.release(sequence.id)

    def remove(self, sequence: Sequence, *, failed: bool = False) -> None:
        """Forget a sequence that has ended, and free its blocks at once.

        failed  its blocks may hold what nobody should read
        """
        if failed:
            self._blocks.discard(sequence.id)
        else:
            self._blocks.free(sequence.id)
        self._running.pop(sequence, None)
        self._waiting.forget(sequence)

    def expired(self, now: float) -> list[Sequence]:
        """Sequences whose deadline has passed, each once."""
        return self._waiting.expired(now)

    def schedule(self, now: float = 0.0) -> list[Scheduled]:
        """The next step's work; empty only if there is nothing to do, or nothing before the step
        that runs has been read.

        now  in the seconds of the sequences' arrivals
        """
        self._now = now
        step = _Step(self._max_num_batched_tokens, self._max_prompt_rows)
        self._make_way()
        num_preemptions = self.num_preemptions
        prefilling = []
        for sequence in list(self._running):
            if sequence.ends_unread:
                continue
            if sequence.num_uncomputed_tokens > 1:
                prefilling.append(sequence)
            elif step.budget > 0 and sequence in self._running:
                self._decode(sequence, step)
        num_decoding = len(step.work)
        chunk = self.pace.max_prompt_tokens(step.budget, num_decoding)
        if self._by_priority:
            prefilling.sort(key=self._waiting.turn)
        for sequence in prefilling:
            if chunk > 0 and sequence in self._running:
                num_tokens = min(sequence.num_uncomputed_tokens, chunk, step.room_for(sequence))
                if num_tokens and self._place(step, sequence, num_tokens):
                    chunk -= num_tokens
        if self.num_preemptions == num_preemptions:
            self._admit(step, min(chunk, step.budget))
        return list(step.work.values())

    def _decode(self, sequence: Sequence, step: "_Step") -> None:
        room = sequence.max_total_tokens - len(sequence.token_ids) - 1
        num_drafts = max(min(len(sequence.draft_token_ids), step.budget - 1, room), 0)
        length = sequence.num_computed_tokens + 1
        # Guesses are worth a free block, and nobody's place.
        if num_drafts and not self._blocks.allocate(sequence.id, length + num_drafts):
            num_drafts = 0
        self._place(step, sequence, 1 + num_drafts, num_drafts)

    def _place(
        self, step: "_Step", sequence: Sequence, num_tokens: int, num_drafts: int = 0
    ) -> bool:
        """Make room for a sequence's tokens, if need be in place of others; False if it had to
        give up its own.
        """
        length = sequence.num_computed_tokens + num_tokens
        while not self._blocks.allocate(sequence.id, length):
            last = max(self._running, key=self._waiting.turn)
            self._preempt(last)
            step.drop(last)
            if last is sequence:
                return False
        step.add(Scheduled.of(sequence, num_tokens, num_drafts))
        return True

    def _admit(self, step: "_Step", chunk: int) -> None:
        """Let waiting sequences run while there are seats, prompt tokens and blocks for them."""
        if not self._waiting or chunk <= 0 or self._is_stuck():
            return
        matches: dict[Sequence, Match] = {}

        def look_up(sequence: Sequence) -> Match:
            if sequence not in matches:
                matches[sequence] = self._look_up(sequence)
            return matches[sequence]

        while chunk > 0 and len(self._running) < self._max_num_seqs:
            sequence = self._waiting.next(look_up)
            if sequence is None:
                return
            if step.room_for(sequence) == 0:
                return
            if matches[sequence] != (latest := self._look_up(sequence)):
                matches[sequence] = latest  # by what was admitted just now
                continue
            if not self._start(sequence, chunk):
                # A prompt that is warm and too large holds up nobody before it.
                first = self._waiting.first()
                if (
                    first is None
                    or first is sequence
                    or step.room_for(first) == 0
                    or not self._start(first, chunk)
                ):
                    self._no_room = sequence, self._blocks.num_freed_ever
                    return
                sequence = first
            num_tokens = min(sequence.num_uncomputed_tokens, chunk, step.room_for(sequence))
            step.add(Scheduled.of(sequence, num_tokens))
            chunk -= num_tokens

    def _start(self, sequence: Sequence, chunk: int) -> bool:
        """Give a waiting sequence its blocks, for all its tokens at once where each is kept.

        A block a running sequence is left free: those that run are about to grow, and whoever is
        let in only to be preempted has been computed in vain.
        """
        blocks = self._blocks
        reuse = _may_reuse(sequence)
        num_cached = blocks.admit(
            sequence.id,
            sequence.token_ids,
            sequence.cache_scope,
            num_tokens=None if blocks.window is None else chunk,
            spare_blocks=len(self._running),
            reuse=reuse,
        )
        if num_cached is None:
            return False
        self._waiting.overtake(sequence)
        self._waiting.take(sequence)
        self._running[sequence] = None
        sequence.num_computed_tokens = num_cached
        if sequence.num_preemptions == 0:
            sequence.queue_seconds = self._now - sequence.arrival
            sequence.num_cached_tokens = num_cached
            if blocks.caching and reuse:
                self.num_prefix_queries += len(sequence.token_ids)
                self.num_prefix_hits += num_cached
        return True

    def _look_up(self, sequence: Sequence) -> Match:
        if not _may_reuse(sequence):
            return Match(0)
        return self._blocks.look_up(sequence.id, sequence.token_ids, sequence.cache_scope)

    def _is_stuck(self) -> bool:
        """Whether nothing has been freed since the sequence whose turn it is found no room."""
        if self._no_room is None:
            return False
        sequence, num_freed = self._no_room
        return (
            num_freed == self._blocks.num_freed_ever
            and bool(self._running)
            and not self._by_priority
            and sequence in self._waiting
        )

    def _make_way(self) -> None:
        """By priority: who waits goes before whoever runs with a worse one."""
        while self._by_priority and self._waiting and self._running:
            first = next(iter(self._waiting))
            last = max(self._running, key=self._waiting.turn)
            if self._waiting.priority(last) <= self._waiting.priority(first):
                return
            has_seat = len(self._running) < self._max_num_seqs
            if has_seat and self._has_room(first):
                return
            self._preempt(last)

    def _has_room(self, sequence: Sequence) -> bool:
        missing = self._blocks.blocks_for(len(sequence.token_ids)) + len(self._running)
        return missing <= self._blocks.num_free_blocks

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence]
        self._blocks.free(sequence.id)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.draft_token_ids.clear()
        self._waiting.add(sequence)
        self.num_preemptions += 1


class _Step:
    """The work of a step as it is put together, and what is left of its tokens and prompt rows."""

    def __init__(self, budget: int, prompt_rows: int) -> None:
        self.budget = budget
        self.work: dict[Sequence, Scheduled] = {}
        self._prompt_rows = prompt_rows
        # A sequence that is preempted has none any more.
        self._prompt_rows_of: dict[Sequence, int] = {}

    def room_for(self, sequence: Sequence) -> int:
        """Of the sequence's next tokens, as many as the step's prompt rows reach."""
        if sequence.request.sampling.prompt_logprobs is None:
            return sequence.num_uncomputed_tokens
        judged = max(sequence.num_prompt_tokens - 1 - sequence.num_computed_tokens, 0)
        return sequence.num_uncomputed_tokens if judged <= self._prompt_rows else self._prompt_rows

    def add(self, work: Scheduled) -> None:
        self.work[work.sequence] = work
        self.budget -= work.num_tokens
        self._prompt_rows_of[work.sequence] = work.num_prompt_rows
        self._prompt_rows -= work.num_prompt_rows

    def drop(self, sequence: Sequence) -> None:
        work = self.work.pop(sequence, None)
        if work is not None:
            self.budget += work.num_tokens
            self._prompt_rows += self._prompt_rows_of.pop(sequence)


def _may_reuse(sequence: Sequence) -> bool:
    """Who asks what the model thinks of a prompt needs it computed."""
    return sequence.request.sampling.prompt_logprobs is None
