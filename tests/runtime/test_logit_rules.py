"""Rules on logits: transformers' own processors, and what happens as a text grows."""

from collections.abc import Sequence as Series

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from qtool.errors import UsageError
from qtool.runtime.engine.logit_rules import LogitRules
from qtool.runtime.engine.penalties import Penalties
from qtool.runtime.engine.sampling_params import SamplingParams

VOCAB = 60


def logits(seed: int = 0) -> Tensor:
    return 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def changed(
    sampling: SamplingParams,
    prompt: Series[int],
    answer: Series[int],
    stop: frozenset[int] = frozenset(),
    accepted: Series[int] = (),
) -> Tensor:
    rules = LogitRules.for_request(sampling, prompt, stop)
    assert rules is not None
    row = logits()
    rules.apply(row, [*prompt, *answer], accepted)
    return row


def test_most_requests_have_no_rules() -> None:
    plain = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, stop=("x",), seed=3)
    assert LogitRules.for_request(plain, (1, 2), (0,)) is None
    # Nothing to withhold where nothing ends the text.
    assert LogitRules.for_request(SamplingParams(min_tokens=3), (1, 2), ()) is None


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=40)


@settings(deadline=None, max_examples=60)
@given(prompt=tokens, answer=tokens, penalty=st.floats(0.5, 2))
def test_repetition_is_transformers_own(
    prompt: list[int], answer: list[int], penalty: float
) -> None:
    text = [7, *prompt, *answer]
    sampling = SamplingParams(repetition_penalty=penalty)
    if penalty == 1:
        return
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([text]), logits()[None])[0]
    torch.testing.assert_close(changed(sampling, [7, *prompt], answer), expected, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=60)
@given(answer=tokens, frequency=st.floats(-2, 2), presence=st.floats(-2, 2))
def test_frequency_and_presence_are_openai_s_formula(
    answer: list[int], frequency: float, presence: float
) -> None:
    sampling = SamplingParams(frequency_penalty=frequency, presence_penalty=presence)
    if sampling == SamplingParams():
        return
    expected = logits().double()
    for token in range(VOCAB):
        expected[token] -= answer.count(token) * frequency + (token in answer) * presence
    found = changed(sampling, [1, 2, 3], answer)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


def test_a_text_counted_token_by_token_is_the_text_counted_at_once() -> None:
    sampling = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.2)
    # More distinct tokens than the arrays begin with.
    text = [(7 * n) % 500 for n in range(600)]
    growing, at_once = (Penalties(sampling, text[:20]) for _ in range(2))
    for end in range(20, len(text)):
        growing.count(text[end])
        row = torch.linspace(-3, 3, 500)
        growing.apply(row)  # may not depend on having been applied before
    for token in text[20:]:
        at_once.count(token)
    rows = torch.linspace(-3, 3, 500).repeat(2, 1)
    growing.apply(rows[0])
    at_once.apply(rows[1])
    assert torch.equal(rows[0], rows[1])


def test_accepted_drafts_count_as_if_they_stood_in_the_text() -> None:
    sampling = SamplingParams(frequency_penalty=1.0, bad_words=((4, 5, 6),), min_tokens=4)
    stop = frozenset({9})
    in_text = changed(sampling, [1, 2], [3, 4, 5], stop)
    assert torch.equal(changed(sampling, [1, 2], [3], stop, accepted=[4, 5]), in_text)
    assert torch.equal(changed(sampling, [1, 2], [], stop, accepted=[3, 4, 5]), in_text)


def test_a_repeated_step_counts_nothing_twice() -> None:
    sampling = SamplingParams(frequency_penalty=1.0)
    rules = LogitRules.for_request(sampling, [1], ())
    assert rules is not None
    rows = logits().repeat(2, 1)
    for row in rows:
        rules.apply(row, [1, 2, 2, 3])
    assert torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("text", [[1, 2, 3], [1, 2, 4, 5], [5], [9, 8, 4, 5]])
def test_bad_words_are_transformers_own(text: list[int]) -> None:
    words = [[7], [4, 5, 6], [5, 11], [1, 2, 3, 12]]
    sampling = SamplingParams(bad_words=tuple(tuple(word) for word in words))
    processor = NoBadWordsLogitsProcessor(words)
    expected = processor(torch.tensor([text]), logits()[None])[0]
    assert torch.equal(changed(sampling, text, []), expected)
    assert torch.equal(changed(sampling, text[:1], text[1:]), expected)


def test_logit_bias_is_transformers_own() -> None:
    bias = {3: 2.5, 4: -1.0, 50: -100.0}
    processor = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    expected = processor(torch.tensor([[1]]), logits()[None])[0]
    torch.testing.assert_close(changed(SamplingParams(logit_bias=bias), [1], []), expected)


@pytest.mark.parametrize("length", [0, 2, 3, 5])
def test_min_tokens_is_transformers_min_length(length: int) -> None:
    stop = frozenset({5, 8})
    processor = MinLengthLogitsProcessor(3, sorted(stop))
    expected = processor(torch.zeros(1, length, dtype=torch.int64), logits()[None])[0]
    assert torch.equal(changed(SamplingParams(min_tokens=3), [1, 2], [6] * length, stop), expected)


def test_only_allowed_tokens_keep_their_logits() -> None:
    row = changed(SamplingParams(allowed_token_ids=(3, 59)), [1], [])
    assert row.isfinite().nonzero().flatten().tolist() == [3, 59]
    assert torch.equal(row[[3, 59]], logits()[[3, 59]])


def test_the_order_is_masks_then_bias_then_penalties() -> None:
    # A bias lifts a token above zero, so the repetition penalty divides instead of multiplying.
    row = logits()
    token = int(row.argmin())
    sampling = SamplingParams(logit_bias={token: 100.0}, repetition_penalty=2.0)
    assert float(changed(sampling, [token], [])[token]) == pytest.approx(
        (float(row[token]) + 100) / 2
    )
    # And no bias brings back what is ruled out.
    ruled_out = SamplingParams(logit_bias={4: 100.0}, bad_words=((4,),))
    assert float(changed(ruled_out, [1], [])[4]) == -torch.inf


def test_bad_words_as_text_are_not_for_the_engine() -> None:
    with pytest.raises(UsageError, match="takes token ids"):
        LogitRules.for_request(SamplingParams(bad_words=("word",)), (1,), ())
