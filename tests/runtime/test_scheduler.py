"""The scheduler's rules, without a model: what runs, in which order, and that nothing locks up."""

from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.runtime.engine.blocks import BlockManager
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.scheduler import Scheduled, Scheduler
from qtool.runtime.engine.sequence import GenerationRequest, Sequence


def sequence(name: str, prompt: int, new: int = 100) -> Sequence:
    request = GenerationRequest(name, tuple(range(prompt)), SamplingParams(max_tokens=new))
    return Sequence(request, seed=0, stop_token_ids=frozenset(), max_total_tokens=prompt + new)


def scheduler(
    num_blocks: int = 100, block_size: int = 4, max_num_seqs: int = 8, budget: int = 16
) -> tuple[Scheduler, BlockManager]:
    blocks = BlockManager(num_blocks, block_size)
    made = Scheduler(blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    return made, blocks


def advance(scheduler: Scheduler, batch: list[Scheduled]) -> None:
    """What the engine does after a step: a token for each sequence that reached its end."""
    for work in batch:
        samples = work.samples
        work.sequence.num_computed_tokens += work.num_tokens
        if samples and work.sequence.append(0) is not None:
            scheduler.remove(work.sequence)


def summary(batch: list[Scheduled]) -> list[tuple[str, int, bool]]:
    return [(work.sequence.id, work.num_tokens, work.samples) for work in batch]


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
    made, blocks = scheduler(num_blocks=4, block_size=2)
    old, young = sequence("old", 3), sequence("young", 3)
    made.add(old)
    made.add(young)
    for _ in range(2):
        advance(made, made.schedule())  # both now hold 5 tokens, 4 of them in 2 full blocks
    assert blocks.num_free_blocks == 0
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
    first, second, third = (sequence("a", 6) for _ in range(3))
    second.index, third.index = 1, 2
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
    work = Scheduled(one, num_tokens=3, num_draft_tokens=2)
    assert (work.samples, work.num_draw_rows, work.num_prompt_rows) == (True, 3, 0)


def test_prompt_rows_are_those_that_foretell_the_prompt() -> None:
    asked = SamplingParams(max_tokens=9, prompt_logprobs=0)
    one = Sequence(GenerationRequest("a", (1, 2, 3, 4), asked), 0, frozenset(), 13)
    chunks = []
    for computed, num_tokens in ((0, 2), (2, 2), (0, 4)):
        one.num_computed_tokens = computed
        work = Scheduled(one, num_tokens)
        chunks.append((work.num_prompt_rows, work.num_draw_rows))
    assert chunks == [(2, 0), (1, 1), (3, 1)]


@settings(deadline=None, max_examples=120)
@given(
    requests=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=10),
    arrivals=st.lists(st.integers(0, 3), min_size=10, max_size=10),
    aborts=st.lists(st.integers(0, 60), max_size=4),
    block_size=st.integers(1, 5),
    spare_blocks=st.integers(0, 6),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 12),
)
def test_random_schedules_conserve_blocks_and_come_to_an_end(
    requests: list[tuple[int, int]],
    arrivals: list[int],
    aborts: list[int],
    block_size: int,
    spare_blocks: int,
    max_num_seqs: int,
    budget: int,
) -> None:
    """The pool holds one sequence of full length and little more, so preemption is common."""
    longest = max(prompt + new for prompt, new in requests)
    made, blocks = scheduler(
        -(-longest // block_size) + spare_blocks, block_size, max_num_seqs, budget
    )
    sequences = [sequence(f"s{i}", prompt, new) for i, (prompt, new) in enumerate(requests)]
    upcoming = list(sequences)
    total = sum(prompt + new for prompt, new in requests)
    for step in range(40 * total):
        for _ in range(arrivals[step] if step < len(arrivals) else 1):
            if upcoming:
                made.add(upcoming.pop(0))
        if step in aborts and made.has_work:
            made.remove(next(iter(made)))
        before = {s.id: list(s.token_ids) for s in sequences}
        batch = made.schedule()
        blocks.check()
        assert bool(batch) == made.has_work
        assert sum(work.num_tokens for work in batch) <= budget
        assert len({work.sequence.id for work in batch}) == len(batch) <= max_num_seqs
        for work in batch:
            assert 1 <= work.num_tokens <= work.sequence.num_uncomputed_tokens
            held = len(blocks.table(work.sequence.id)) * block_size
            assert held >= work.sequence.num_computed_tokens + work.num_tokens
        advance(made, batch)
        blocks.check()
        for s in sequences:
            assert s.token_ids[: len(before[s.id])] == before[s.id]
        if not upcoming and not made.has_work:
            break
    assert not made.has_work
    assert blocks.usage == 0.0
