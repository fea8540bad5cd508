"""One engine as it would run, second by second, without a model.

The scheduler, the block manager and the pace are the engine's own objects; only what a step
computes is replaced by how long it would take (`costs`). So what a plan says of queues, chunked
prefill, preemption and the prefix cache is what the engine does, for the lengths of the workload.

Where nothing can change but lengths (all decode, nobody can join before the next arrival or the
first end), many steps are taken at once: the outcome is the same, and a thousand engines can be
simulated in seconds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from qtool.runtime.engine.blocks import BlockManager
from qtool.runtime.engine.pace import Pace
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.scheduler import Scheduler
from qtool.runtime.engine.sequence import GenerationRequest, Sequence
from qtool.runtime.plan.costs import StepCosts, StepShape

SAMPLING = SamplingParams(temperature=0.0, ignore_eos=True)
# Of many steps taken at once, the last that the pace is told: it has forgotten what was before.
PACE_MEMORY = 48
UNIQUE_IDS = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine is started with, and the pool that its memory leaves."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    target_step_seconds: float | None


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests as they arrive, at random (Poisson).

    rate               a second; inf: all at once
    input_lens         ends of the range that prompt lengths are drawn from
    shared_prefix_len  tokens of a prompt that all begin with, part of input_lens
    """

    rate: float
    num_requests: int
    input_lens: tuple[int, int]
    output_lens: tuple[int, int]
    shared_prefix_len: int = 0
    seed: int = 0

    def arrivals(self) -> Iterator[Arrival]:
        draw = random.Random(self.seed)
        now = 0.0
        for number in range(self.num_requests):
            yield Arrival(
                number, now, draw.randint(*self.input_lens), draw.randint(*self.output_lens)
            )
            if self.rate != math.inf:
                now += draw.expovariate(self.rate)


@dataclass(frozen=True, slots=True)
class Arrival:
    number: int
    time: float
    input_len: int
    output_len: int


@dataclass(slots=True)
class Life:
    """One request's, in seconds."""

    arrival: Arrival
    first_token: float = math.nan
    end: float = math.nan

    @property
    def ttft(self) -> float:
        return self.first_token - self.arrival.time

    @property
    def tpot(self) -> float | None:
        """None of an answer of one token."""
        later = self.arrival.output_len - 1
        return (self.end - self.first_token) / later if later else None


@dataclass(slots=True)
class Engine:
    """now  when its last step ended"""

    costs: StepCosts
    limits: Limits
    shared_prefix_len: int = 0
    now: float = 0.0
    num_steps: int = 0
    _scheduler: Scheduler = field(init=False)
    _blocks: BlockManager = field(init=False)
    _lives: dict[Sequence, Life] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        limits = self.limits
        self._blocks = BlockManager(
            limits.num_blocks, limits.block_size, caching=self.shared_prefix_len > 0
        )
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            pace=Pace(limits.target_step_seconds),
        )

    @property
    def num_outstanding(self) -> int:
        """Requests that run or wait."""
        return len(self._lives)

    def add(self, arrival: Arrival) -> Life:
        """Queue a request now; the engine must have been advanced to its arrival."""
        life = Life(arrival)
        sequence = Sequence(
            request=GenerationRequest(str(arrival.number), self._prompt(arrival), SAMPLING),
            seed=0,
            stop_token_ids=frozenset(),
            max_total_tokens=arrival.input_len + arrival.output_len,
            arrival=arrival.time,
        )
        if not self._lives:
            self.now = max(self.now, arrival.time)
        self._lives[sequence] = life
        self._scheduler.add(sequence)
        return life

    def _prompt(self, arrival: Arrival) -> tuple[int, ...]:
        shared = min(self.shared_prefix_len, arrival.input_len - 1)
        unique = UNIQUE_IDS + arrival.number
        return (*range(shared), *[unique] * (arrival.input_len - shared))

    def advance(self, until: float) -> None:
        """Run the steps that begin before `until`."""
        while self._lives and self.now < until:
            if not self._leap(until):
                self._step()

    def _step(self) -> None:
        scheduled = self._scheduler.schedule(self.now)
        self._blocks.take_copies()
        num_decoding = num_drawn = num_prompt_tokens = 0
        read = pairs = 0.0
        for work in scheduled:
            num_drawn += work.samples
            if work.is_decoding:
                num_decoding += 1
                read += work.start + 1
            else:
                num_prompt_tokens += work.num_tokens
                pairs += work.num_tokens * (work.start + (work.num_tokens + 1) / 2)
        shape = StepShape(num_decoding + num_prompt_tokens, num_drawn, read, pairs)
        seconds = self.costs.seconds(shape)
        self._count(1, seconds)
        self._scheduler.pace.observe(
            seconds, num_prompt_tokens=num_prompt_tokens, num_decoding=num_decoding
        )
        for work in scheduled:
            self._scheduler.computed(work.sequence, work.num_kept_tokens)
            if work.samples:
                self._draw(work.sequence, 1)

    def _leap(self, until: float) -> bool:
        """Take the decoding steps that lie before the next change at once; False if there are
        none.
        """
        scheduler = self._scheduler
        if scheduler.num_waiting and scheduler.num_running < self.limits.max_num_seqs:
            return False
        running = list(islice(scheduler, scheduler.num_running))
        # Of a prompt, too, the last token can be left alone; its step is the one that answers.
        if any(s.num_uncomputed_tokens != 1 or not s.num_generated_tokens for s in running):
            return False
        context = sum(len(sequence.token_ids) for sequence in running)
        left = min(sequence.max_total_tokens - len(sequence.token_ids) for sequence in running)
        first, growth = self._decode_seconds(len(running), context)
        num_steps = min(left, _steps_before(until - self.now, first, growth))
        if num_steps < 2:
            return False
        more = sum(
            self._blocks.blocks_for(len(sequence.token_ids) + num_steps)
            - len(self._blocks.table(sequence.id))
            for sequence in running
        )
        if more > self._blocks.num_free_blocks:
            return False
        seconds = num_steps * first + growth * num_steps * (num_steps - 1) / 2
        self._count(num_steps, seconds)
        for step in range(max(num_steps - PACE_MEMORY, 0), num_steps):
            scheduler.pace.observe(
                first + growth * step, num_prompt_tokens=0, num_decoding=len(running)
            )
        for sequence in running:
            self._blocks.allocate(sequence.id, len(sequence.token_ids) + num_steps - 1)
            scheduler.computed(sequence, sequence.num_computed_tokens + num_steps)
            self._draw(sequence, num_steps)
        return True

    def _decode_seconds(self, batch: int, context: int) -> tuple[float, float]:
        """Of the next decoding step, and by how much each one after it takes longer."""
        first = self.costs.seconds(StepShape(batch, batch, context))
        return first, self.costs.seconds(StepShape(batch, batch, context + batch)) - first

    def _count(self, num_steps: int, seconds: float) -> None:
        self.now += seconds
        self.num_steps += num_steps

    def _draw(self, sequence: Sequence, num_tokens: int) -> None:
        life = self._lives[sequence]
        if sequence.num_generated_tokens == 0:
            life.first_token = self.now
        sequence.token_ids.extend([0] * num_tokens)
        if len(sequence.token_ids) >= sequence.max_total_tokens:
            life.end = self.now
            del self._lives[sequence]
            self._scheduler.remove(sequence)


def _steps_before(seconds: float, first: float, growth: float) -> int:
    """How many steps begin before so many seconds are over: the first takes `first`, each one after
    it `growth` longer.
    """
    if seconds == math.inf:
        return 1 << 60
    # The n-th, from 0, begins at n * first + growth * n * (n - 1) / 2.
    half = first - growth / 2
    if growth <= 0:
        return math.ceil(seconds / first)
    return math.ceil((math.sqrt(half * half + 2 * growth * seconds) - half) / growth)
