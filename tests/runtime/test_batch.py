"""Rows of a step: where each sequence's tokens and logits lie."""

import torch

from qtool.runtime.engine.batch import make_batch
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.scheduler import Scheduled
from qtool.runtime.engine.sequence import GenerationRequest, Sequence


def sequence(name: str, prompt: list[int], computed: int, **sampling: int) -> Sequence:
    request = GenerationRequest(name, tuple(prompt), SamplingParams(**sampling))  # type: ignore[arg-type]
    made = Sequence(request, seed=0, stop_token_ids=frozenset(), max_total_tokens=100)
    made.num_computed_tokens = computed
    return made


def test_each_sequence_finds_its_rows_among_the_logits() -> None:
    decoding = sequence("decoding", [10, 11, 12], 2)
    chunk = sequence("chunk", [20, 21, 22, 23], 0)
    drafted = sequence("drafted", [30, 31], 1)
    drafted.draft_token_ids = [32, 33, 34]
    scored = sequence("scored", [40, 41, 42], 0, prompt_logprobs=0)
    batch = make_batch(
        [
            Scheduled.of(decoding, 1),
            Scheduled.of(chunk, 2),
            Scheduled.of(drafted, 3, num_draft_tokens=2),
            Scheduled.of(scored, 3),
        ],
        {"decoding": [5], "chunk": [6], "drafted": [7], "scored": [8]}.__getitem__,
        torch.device("cpu"),
    )
    assert batch.token_ids.tolist() == [12, 20, 21, 31, 32, 33, 40, 41, 42]
    assert batch.positions.tolist() == [2, 0, 1, 1, 2, 3, 0, 1, 2]
    assert batch.sampled_rows.tolist() == [0, 3, 4, 5, 6, 7, 8]
    assert batch.row_ranges == (range(0, 1), range(1, 1), range(1, 4), range(4, 7))
    assert [(span.num_queries, span.length) for span in batch.spans] == [
        (1, 3),
        (2, 2),
        (3, 4),
        (3, 3),
    ]
