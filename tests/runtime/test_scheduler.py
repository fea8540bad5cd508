"""The scheduler's rules, without a model: what runs, in which order, and that nothing locks up."""

import random
from typing import Any

import pytest

from qtool.runtime.engine.blocks import BlockManager
from qtool.runtime.engine.pace import AIM, Pace
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.scheduler import Scheduled, Scheduler
from qtool.runtime.engine.sequence import GenerationRequest, Sequence
from qtool.runtime.engine.waiting import MAX_OVERTAKEN


def sequence(
    name: str,
    prompt: int | list[int],
    new: int = 100,
    *,
    index: int = 0,
    prompt_logprobs: int | None = None,
    **request: Any,
) -> Sequence:
    """A prompt of its own of so many tokens, or these tokens."""
    # Prompts of different names have no token in common.
    first = 1000 * sum(map(ord, name))
    token_ids = tuple(range(first, first + prompt)) if isinstance(prompt, int) else tuple(prompt)
    sampling = SamplingParams(max_tokens=new, prompt_logprobs=prompt_logprobs)
    made = Sequence(
        GenerationRequest(name, token_ids, sampling, **request),
        seed=0,
        stop_token_ids=frozenset(),
        max_total_tokens=len(token_ids) + new,
    )
    made.index = index
    return made


def scheduler(
    num_blocks: int = 100,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 16,
    *,
    caching: bool = True,
    window: int | None = None,
    **options: Any,
) -> tuple[Scheduler, BlockManager]:
    blocks = BlockManager(num_blocks, block_size, caching=caching, window=window)
    made = Scheduler(blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, **options)
    return made, blocks


def advance(scheduler: Scheduler, batch: list[Scheduled], token_id: int = 0) -> None:
    """What the engine does after a step: a token for each sequence that reached its end."""
    for work in batch:
        sequence = work.sequence
        num_computed = sequence.num_computed_tokens + work.num_tokens - work.num_draft_tokens
        ended = work.samples and sequence.append(token_id) is not None
        scheduler.computed(sequence, num_computed)
        sequence.draft_token_ids.clear()
        if ended:
            scheduler.remove(sequence)


def run(scheduler: Scheduler, steps: int = 1) -> list[list[tuple[str, int, bool]]]:
    """So many steps: what was scheduled in each."""
    seen = []
    for _ in range(steps):
        batch = scheduler.schedule()
        seen.append(summary(batch))
        advance(scheduler, batch)
    return seen


def summary(batch: list[Scheduled]) -> list[tuple[str, int, bool]]:
    return [(work.sequence.id, work.num_tokens, work.samples) for work in batch]


def names(batch: list[tuple[str, int, bool]]) -> list[str]:
    return [name for name, _, _ in batch]


def test_a_long_prompt_is_prefilled_in_chunks_beside_decoding() -> None:
    made, _ = scheduler(budget=8)
    made.add(sequence("short", 3))
    made.add(sequence("long", 12))
    batch = made.schedule()
    assert summary(batch) == [("short", 3, True), ("long", 5, False)]
    advance(made, batch)
    batch = made.schedule()
    assert summary(batch) == [("short", 1, True), ("long", 7, True)]
    advance(made, batch)
    assert summary(made.schedule()) == [("short", 1, True), ("long", 1, True)]


def test_running_sequences_come_before_waiting_ones() -> None:
    made, _ = scheduler(budget=4)
    made.add(sequence("first", 10))
    made.add(sequence("second", 2))
    for expected in ([("first", 4, False)], [("first", 4, False)]):
        batch = made.schedule()
        assert summary(batch) == expected
        advance(made, batch)
    assert summary(made.schedule()) == [("first", 2, True), ("second", 2, True)]


def test_no_more_sequences_run_than_allowed() -> None:
    made, _ = scheduler(max_num_seqs=2)
    for name in "abc":
        made.add(sequence(name, 1, new=2))
    assert [name for name, _, _ in summary(made.schedule())] == ["a", "b"]
    assert (made.num_running, made.num_waiting) == (2, 1)


def test_a_prompt_is_admitted_only_if_all_of_it_fits_and_nobody_overtakes() -> None:
    made, blocks = scheduler(num_blocks=4)
    made.add(sequence("large", 12))
    made.add(sequence("larger", 8))
    made.add(sequence("small", 1))
    assert [name for name, _, _ in summary(made.schedule())] == ["large"]
    assert made.num_waiting == 2
    assert len(blocks.table("large")) == 3  # reserved whole, though the budget may cut it


def test_the_last_to_come_is_preempted_and_goes_on_where_it_stopped() -> None:
    made, blocks = scheduler(num_blocks=5, block_size=2, caching=False)
    old, young = sequence("old", 3), sequence("young", 3)
    made.add(old)
    made.add(young)
    for _ in range(2):
        advance(made, made.schedule())  # both now hold 5 tokens, 4 of them in 2 full blocks
    assert blocks.num_free_blocks == 1
    batch = made.schedule()
    assert summary(batch) == [("old", 1, True)]
    assert made.num_preemptions == 1
    assert young.num_computed_tokens == 0
    assert len(young.token_ids) == 5
    assert list(blocks.table("young")) == []
    made.remove(old)
    assert summary(made.schedule()) == [("young", 5, True)]


def test_a_removed_sequence_leaves_nothing_behind() -> None:
    made, blocks = scheduler()
    running, waiting = sequence("running", 5), sequence("waiting", 5)
    made.add(running)
    made.schedule()
    made.add(waiting)
    made.remove(waiting)
    made.remove(running)
    assert not made.has_work
    assert blocks.usage == 0.0
    assert made.schedule() == []


def test_a_further_answer_starts_from_the_cache_of_the_first() -> None:
    made, blocks = scheduler(max_num_seqs=2)
    first, second, third = (sequence("a", 6, index=index) for index in range(3))
    made.add(first)
    advance(made, made.schedule())
    for child in (second, third):
        child.append(1)
        made.fork(first, child)
    assert list(blocks.table("a#1"))[:1] == list(blocks.table("a"))[:1]
    assert summary(made.schedule()) == [("a", 1, True), ("a#1", 1, True)]
    assert (made.num_waiting, third.num_computed_tokens) == (1, 0)  # no seat for a third


def test_drafts_are_computed_with_the_tokens_before_them() -> None:
    one = sequence("a", 3)
    one.num_computed_tokens = 2
    one.draft_token_ids = [7, 8]
    work = Scheduled.of(one, num_tokens=3, num_draft_tokens=2)
    assert (work.samples, work.num_draw_rows, work.num_prompt_rows) == (True, 3, 0)


def test_prompt_rows_are_those_that_foretell_the_prompt() -> None:
    asked = SamplingParams(max_tokens=9, prompt_logprobs=0)
    one = Sequence(GenerationRequest("a", (1, 2, 3, 4), asked), 0, frozenset(), 13)
    chunks = []
    for computed, num_tokens in ((0, 2), (2, 2), (0, 4)):
        one.num_computed_tokens = computed
        work = Scheduled.of(one, num_tokens)
        chunks.append((work.num_prompt_rows, work.num_draw_rows))
    assert chunks == [(2, 0), (1, 1), (3, 1)]


def test_the_latest_preempted_uses_what_the_cache_kept() -> None:
    made, _ = scheduler(num_blocks=5, block_size=2)
    old, young = sequence("old", 3), sequence("young", 3)
    made.add(old)
    made.add(young)
    run(made, 3)
    assert made.num_preemptions == 1
    made.remove(old)
    # Of its five tokens, the four in full blocks are still there.
    assert run(made) == [[("young", 1, True)]]
    assert (young.num_cached_tokens, young.num_preemptions) == (0, 1)


def test_prompts_that_begin_alike_and_come_together_are_computed_once() -> None:
    made, blocks = scheduler(num_blocks=200, budget=64, max_num_seqs=40)
    shared = list(range(30))
    sequences = [sequence(f"s{i}", [*shared, 100 + i, 100 + i]) for i in range(32)]
    for one in sequences:
        made.add(one)
    num_prefilled = 0
    while any(one.num_generated_tokens == 0 for one in sequences):
        batch = made.schedule()
        num_prefilled += sum(work.num_tokens for work in batch if not work.is_decoding)
        advance(made, batch)
    # 28 tokens are full blocks that all share; two more are copied from the first one's next block.
    assert num_prefilled == 32 + 31 * 2
    assert [one.num_cached_tokens for one in sequences] == [0] + [30] * 31
    assert (made.num_prefix_queries, made.num_prefix_hits) == (32 * 32, 31 * 30)
    blocks.check()


def test_others_go_first_while_a_prompt_waits_for_its_beginning() -> None:
    made, _ = scheduler(budget=8)
    made.add(sequence("first", list(range(20))))
    made.add(sequence("alike", list(range(21))))
    made.add(sequence("other", 2))
    assert run(made, 4) == [
        [("first", 8, False)],
        [("first", 8, False)],
        [("first", 4, True), ("other", 2, True)],
        [("first", 1, True), ("other", 1, True), ("alike", 1, True)],
    ]


def test_a_prompt_does_not_wait_for_a_beginning_that_will_not_come() -> None:
    made, blocks = scheduler(budget=8)
    first = sequence("first", list(range(20)))
    made.add(first)
    made.add(sequence("alike", list(range(21))))
    assert names(run(made)[0]) == ["first"]
    made.remove(first)
    assert run(made) == [[("alike", 8, False)]]
    assert made.num_prefix_hits == 8
    blocks.check()


def test_a_warm_prompt_goes_before_a_cold_one_but_not_for_ever() -> None:
    made, _ = scheduler(budget=100, max_num_seqs=1)
    shared = list(range(40))
    made.add(sequence("warm", shared, new=1))
    run(made)
    made.add(sequence("cold", 40, new=1))
    order = []
    for i in range(MAX_OVERTAKEN + 3):
        made.add(sequence(f"w{i}", [*shared, i], new=1))
        made.add(sequence(f"v{i}", [*shared, i], new=1))
        order.extend(names(run(made)[0]))
    assert order.index("cold") == MAX_OVERTAKEN


def test_a_warm_prompt_that_does_not_fit_holds_up_nobody() -> None:
    made, _ = scheduler(num_blocks=12, budget=100)
    made.add(sequence("old", list(range(8)), new=1))
    run(made)
    made.add(sequence("runs", 20))
    run(made)
    made.add(sequence("cold", 4))
    made.add(sequence("warm", [*range(8), *range(500, 530)]))
    assert names(run(made)[0]) == ["runs", "cold"]


def test_those_who_run_are_left_room_to_grow() -> None:
    made, blocks = scheduler(num_blocks=4, budget=100)
    made.add(sequence("a", 4))
    run(made)
    made.add(sequence("b", 12))
    assert names(run(made)[0]) == ["a"]  # three blocks would be free, and "a" needs one next
    assert blocks.num_free_blocks == 2


def test_a_salt_keeps_prompts_apart() -> None:
    made, _ = scheduler(budget=100)
    prompt = list(range(20))
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        made.add(sequence(name, prompt, cache_salt=salt))
        run(made)
    assert made.num_prefix_hits == 19


def test_prompts_whose_logprobs_are_asked_for_are_computed_whole() -> None:
    made, _ = scheduler(budget=100)
    made.add(sequence("a", list(range(20))))
    run(made)
    asking = sequence("b", list(range(20)))
    object.__setattr__(asking.request.sampling, "prompt_logprobs", 1)
    made.add(asking)
    assert run(made)[0][1] == ("b", 20, True)
    assert made.num_prefix_hits == 0


def test_by_priority_lower_goes_first_and_takes_the_place_of_higher() -> None:
    made, blocks = scheduler(max_num_seqs=2, by_priority=True)
    made.add(sequence("later", 4, priority=5))
    made.add(sequence("latest", 4, priority=7))
    made.add(sequence("soon", 4, priority=1))
    assert names(run(made)[0]) == ["soon", "later"]
    made.add(sequence("now", 4, priority=0))
    made.add(sequence("never", 4, priority=9))
    assert names(run(made)[0]) == ["soon", "now"]
    assert (made.num_preemptions, made.num_waiting) == (1, 3)
    blocks.check()


def test_without_priority_the_policy_is_first_come_first_served() -> None:
    made, _ = scheduler(max_num_seqs=1)
    made.add(sequence("first", 4, priority=5))
    made.add(sequence("second", 4, priority=1))
    assert names(run(made)[0]) == ["first"]


def test_by_priority_blocks_are_taken_from_the_worst() -> None:
    made, blocks = scheduler(num_blocks=5, block_size=2, by_priority=True)
    worse, better = sequence("worse", 4, priority=2), sequence("better", 4, priority=1)
    made.add(worse)
    run(made)
    made.add(better)
    seen = run(made, 4)
    assert ["better"] in [names(step) for step in seen]
    assert worse.num_preemptions == 1
    assert better.num_preemptions == 0
    blocks.check()


def test_the_pace_bounds_prompts_beside_which_others_decode() -> None:
    pace = Pace(0.2)
    pace.observe(0.1, num_prompt_tokens=0, num_decoding=1)
    pace.observe(0.6, num_prompt_tokens=500, num_decoding=0)  # a millisecond each
    made, _ = scheduler(num_blocks=300, budget=512, pace=pace)
    made.add(sequence("talks", 2))
    run(made)
    made.add(sequence("long", 700))
    assert run(made, 2)[-1] == [
        ("talks", 1, True),
        ("long", round(1000 * (AIM * 0.2 - 0.1)), False),
    ]


def test_deadlines_pass_once_and_only_for_those_who_are_here() -> None:
    made, _ = scheduler(max_num_seqs=1)
    runs, waits, gone, patient = (sequence(name, 4) for name in ("r", "w", "g", "p"))
    for one, deadline in ((runs, 2.0), (waits, 1.0), (gone, 1.5), (patient, None)):
        one.deadline = deadline
        made.add(one)
    run(made)
    made.remove(gone)
    assert made.expired(0.9) == []
    assert made.expired(1.7) == [waits]
    assert made.expired(5.0) == [runs]
    assert made.expired(9.0) == []


def test_drafts_take_no_blocks_from_others_and_no_room_beyond_the_end() -> None:
    made, blocks = scheduler(num_blocks=3, block_size=2)
    one = sequence("a", 3, new=4)
    made.add(one)
    run(made)
    one.draft_token_ids = [1, 2, 3, 4, 5]
    batch = made.schedule()
    # Two more tokens are drawn at most before the last one: three drafts would never count.
    assert [(work.num_tokens, work.num_draft_tokens) for work in batch] == [(3, 2)]
    advance(made, batch)
    made.add(sequence("b", 1))
    one.draft_token_ids = [1]
    blocks.admit("c", [1])
    blocks.free("c")


def test_blocks_behind_the_window_make_room_for_others() -> None:
    made, blocks = scheduler(num_blocks=6, block_size=2, window=4, budget=4)
    one = sequence("a", 30, new=20)
    made.add(one)
    for _ in range(25):
        run(made)
        blocks.check()
        assert len([block for block in blocks._tables["a"].held]) <= 4
    assert one.num_generated_tokens > 10
    assert made.num_preemptions == 0


class Simulation:
    """Requests that come, end and are given up at random, on a pool that stores in each slot what
    a key depends on: the scope, and the tokens up to it.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.size = rng.randint(1, 5)
        self.window = rng.choice((None, None, rng.randint(2, 12)))
        self.longest = 24
        least = -(-self.longest // self.size) + 1
        self.budget = rng.randint(1, 20)
        self.seats = rng.randint(1, 6)
        self.scheduler, self.blocks = scheduler(
            least + rng.randint(0, 8),
            self.size,
            self.seats,
            self.budget,
            caching=rng.random() < 0.85,
            window=self.window,
            by_priority=rng.random() < 0.4,
        )
        self.slots: list[object] = [None] * (self.blocks.num_blocks * self.size)
        self.alive: list[Sequence] = []
        self.ended = 0
        self.num_hits = 0

    def add(self, name: str) -> None:
        rng = self.rng
        prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, 16))]
        if self.alive and rng.random() < 0.7:
            other = rng.choice(self.alive).token_ids
            prompt = [*other[: rng.randint(1, len(other))], *prompt][:16]
        one = sequence(
            name,
            prompt,
            rng.randint(1, self.longest - len(prompt)),
            priority=rng.randint(0, 2),
            cache_salt=rng.choice((None, None, "salt")),
        )
        self.alive.append(one)
        self.scheduler.add(one)

    def fork(self, parent: Sequence, index: int) -> None:
        child = sequence(
            parent.request.request_id,
            list(parent.request.prompt_token_ids),
            parent.max_total_tokens - parent.num_prompt_tokens,
            index=index,
            cache_salt=parent.request.cache_salt,
        )
        if child.append(1) is None:
            self.alive.append(child)
            self.scheduler.fork(parent, child)

    def end(self, one: Sequence, *, failed: bool = False) -> None:
        self.alive.remove(one)
        self.scheduler.remove(one, failed=failed)
        self.ended += 1

    def content(self, one: Sequence, token_ids: list[int]) -> object:
        return one.cache_scope, tuple(token_ids)

    def step(self) -> None:
        for one in self.alive:
            if one.num_uncomputed_tokens == 1:
                one.draft_token_ids = [
                    self.rng.randint(0, 1) for _ in range(self.rng.randint(0, 3))
                ]
        before = {one: len(one.token_ids) for one in self.alive}
        batch = self.scheduler.schedule()
        self.blocks.check()
        assert bool(batch) == self.scheduler.has_work
        assert sum(work.num_tokens for work in batch) <= self.budget
        assert len({work.sequence for work in batch}) == len(batch) <= self.seats
        for block in self.blocks.take_dirty():
            self.slots[block * self.size : (block + 1) * self.size] = [None] * self.size
        for source, target, count in self.blocks.take_copies():
            first, second = source * self.size, target * self.size
            self.slots[second : second + count] = self.slots[first : first + count]
        for work in batch:
            self.compute(work)
        failing = self.rng.choice(batch).sequence if batch and self.rng.random() < 0.03 else None
        for index, work in enumerate(batch):
            if work.sequence is failing:
                self.end(work.sequence, failed=True)
            else:
                self.advance(work, index)
            self.blocks.check()
        for one in self.alive:
            assert len(one.token_ids) >= before.get(one, 0)

    def compute(self, work: Scheduled) -> None:
        one = work.sequence
        start = one.num_computed_tokens
        stop = start + work.num_tokens
        token_ids = [*one.token_ids, *one.draft_token_ids][:stop]
        assert len(token_ids) == stop
        assert work.samples or work.num_draft_tokens == 0
        table = self.blocks.table(one.id)
        slots = [table[t // self.size] * self.size + t % self.size for t in range(stop)]
        for position in range(start, stop):
            self.slots[slots[position]] = self.content(one, token_ids[: position + 1])
        first_seen = 0 if self.window is None else max(start - self.window + 1, 0)
        for position in range(first_seen, stop):
            assert self.slots[slots[position]] == self.content(one, token_ids[: position + 1])

    def advance(self, work: Scheduled, index: int) -> None:
        one = work.sequence
        computed = one.num_computed_tokens + work.num_tokens - work.num_draft_tokens
        drawn: list[int] = []
        ended = False
        if work.samples:
            right = self.rng.randint(0, work.num_draft_tokens)
            first = one.num_generated_tokens == 0
            for token in [*one.draft_token_ids[:right], self.rng.randint(0, 1)]:
                drawn.append(token)
                ended = one.append(token) is not None
                if ended:
                    break
        self.scheduler.computed(one, computed + max(len(drawn) - 1, 0))
        one.draft_token_ids.clear()
        if ended:
            self.end(one)
        elif drawn and first and one.index == 0 and self.rng.random() < 0.2:
            self.fork(one, 1)


@pytest.mark.parametrize("seed", range(6))
def test_random_schedules_conserve_blocks_and_come_to_an_end(seed: int) -> None:
    """The pool holds one sequence of full length and little more, so preemption is common."""
    rng = random.Random(seed)
    num_preemptions = num_hits = 0
    for _ in range(25):
        made = Simulation(rng)
        for turn in range(30):
            for _ in range(rng.choice((0, 0, 1, 3))):
                made.add(f"s{turn}.{len(made.alive)}.{rng.random()}")
            if made.alive and rng.random() < 0.1:
                made.end(rng.choice(made.alive))
                made.blocks.check()
            made.step()
        for _ in range(3000):
            if not made.scheduler.has_work:
                break
            made.step()
        assert not made.scheduler.has_work
        assert not made.alive
        assert made.blocks.usage == 0.0
        num_preemptions += made.scheduler.num_preemptions
        num_hits += made.scheduler.num_prefix_hits
    assert num_preemptions > 50
    assert num_hits > 500


def test_prompts_that_are_judged_share_the_rows_of_a_step() -> None:
    """Logits of 10 rows a step; the last token of a prompt judges nothing."""
    made, _ = scheduler(budget=100, max_prompt_rows=10)
    for name in ("a", "b"):
        made.add(sequence(name, 14, prompt_logprobs=0))
    made.add(sequence("c", 30))
    assert run(made, 4) == [
        [("a", 10, False)],
        [("a", 4, True), ("b", 7, False), ("c", 30, True)],
        [("a", 1, True), ("c", 1, True), ("b", 7, True)],
        [("a", 1, True), ("b", 1, True), ("c", 1, True)],
    ]


@pytest.mark.parametrize("seed", range(20))
def test_no_step_judges_more_rows_than_its_logits_have_room_for(seed: int) -> None:
    """With preemptions: the pool holds two of six such sequences."""
    rng = random.Random(seed)
    made, blocks = scheduler(num_blocks=24, budget=40, max_prompt_rows=12)
    for name in "abcdef":
        asked = 0 if rng.random() < 0.6 else None
        made.add(sequence(name, rng.randrange(1, 40), rng.randrange(1, 30), prompt_logprobs=asked))
    steps = 0
    while made.has_work:
        batch = made.schedule()
        assert batch, "nothing runs"
        assert sum(work.num_prompt_rows for work in batch) <= 12
        assert all(work.num_tokens > 0 for work in batch)
        advance(made, batch)
        blocks.check()
        steps += 1
        assert steps < 2000
