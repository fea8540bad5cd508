"""What runs in the next step: vLLM V1's rules.

One budget of tokens a step, spent on running sequences first, in the order they came, then on
waiting ones. There are no phases: each sequence has tokens that the cache does not hold yet, and a
step computes some of them: one for a sequence that is decoding, a chunk of the prompt for one that
is not there yet. A long prompt is thus prefilled beside the others' decoding and stalls nobody for
longer than one budget.

Admission reserves blocks for the whole prompt, so a sequence that has begun its prefill can finish
it. Answers grow block by block. When no block is left, the sequence that came last gives up its
blocks and waits again at the head of the queue with the tokens it has; they are computed anew when
there is room (recomputing costs less than moving a cache out and in, and needs no second pool). A
pool holds at least one sequence of full length, which the engine ensures, so the first to come
always advances and nothing can lock up.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from qtool.runtime.engine.blocks import BlockManager
from qtool.runtime.engine.sequence import Sequence


class Scheduled(NamedTuple):
    """A sequence and how many tokens this step computes for it.

    token_ids, then drafts:  [ computed | num_tokens ............. ]
                             [          | to do .. | num_draft_tokens ]

    num_tokens        rows of the step: uncomputed tokens from the left, and then drafts
    num_draft_tokens  how many of the rows are `Sequence.draft_token_ids`
    """

    sequence: Sequence
    num_tokens: int
    num_draft_tokens: int = 0

    @property
    def samples(self) -> bool:
        """Whether the step reaches the last token, so that a new one is drawn after it."""
        return self.num_tokens - self.num_draft_tokens == self.sequence.num_uncomputed_tokens

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
        start = sequence.num_computed_tokens
        stop = min(start + self.num_tokens, sequence.num_prompt_tokens - 1)
        return max(stop - start, 0)


class Scheduler:
    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self._blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Take up a further answer to the parent's prompt: with the parent's cache beside it where
        there is room, else as a sequence that waits.
        """
        num_tokens = min(parent.num_computed_tokens, len(child.token_ids) - 1)
        has_seat = len(self._running) < self._max_num_seqs
        if has_seat and self._blocks.fork(parent.id, child.id, num_tokens):
            child.num_computed_tokens = num_tokens
            self._running.append(child)
        else:
            self.add(child)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, and free its blocks at once."""
        self._blocks.free(sequence.id)
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step's work; empty only if there is nothing to do."""
        batch: list[Scheduled] = []
        budget = self._max_num_batched_tokens
        preempted = False
        index = 0
        # Preemption takes from the end of this list, so it is walked by index.
        while index < len(self._running) and budget > 0:
            sequence = self._running[index]
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            while not self._blocks.allocate(sequence.id, sequence.num_computed_tokens + num_tokens):
                preempted = True
                self._preempt(self._running[-1])
                if index == len(self._running):
                    break  # it was the last to come, and gave up its own blocks
            else:
                batch.append(Scheduled(sequence, num_tokens))
                budget -= num_tokens
                index += 1
        if not preempted:
            self._admit(batch, budget)
        return batch

    def _admit(self, batch: list[Scheduled], budget: int) -> None:
        while self._waiting and budget > 0 and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            if not self._blocks.allocate(sequence.id, len(sequence.token_ids)):
                return  # first come, first served: nobody overtakes it
            self._waiting.popleft()
            self._running.append(sequence)
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            batch.append(Scheduled(sequence, num_tokens))
            budget -= num_tokens

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._blocks.free(sequence.id)
        sequence.num_computed_tokens = 0
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1
