"""Sampling: exact sets, exact distribution, and a seed that means the same in any company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.runtime.engine.sampler import NotFinite, nucleus_bound, sample, uniform
from qtool.runtime.engine.sequence import GenerationRequest, SamplingParams, Sequence


def sequence(
    sampling: SamplingParams, *, seed: int = 0, prompt: int = 1, stop: frozenset[int] = frozenset()
) -> Sequence:
    request = GenerationRequest("r", tuple(range(prompt)), sampling)
    return Sequence(request, seed=seed, stop_token_ids=stop, max_total_tokens=1000)


def draw(logits: Tensor, sampling: SamplingParams, count: int = 2000) -> Tensor:
    """Counts of the tokens drawn with seeds 0, 1, ..."""
    sequences = [sequence(sampling, seed=seed) for seed in range(count)]
    tokens = sample(logits.expand(count, -1).clone(), sequences)
    return torch.bincount(torch.tensor(tokens), minlength=logits.numel())


LOGITS = torch.tensor([0.0, 2.0, -1.0, 1.0, 1.5])


def test_temperature_zero_takes_the_likeliest() -> None:
    (token,) = sample(LOGITS[None].clone(), [sequence(SamplingParams(temperature=0))])
    assert token == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    counts = draw(LOGITS, SamplingParams(temperature=temperature), count=4000)
    expected = (LOGITS / temperature).softmax(-1) * 4000
    # Three standard deviations of a binomial count; the seeds are fixed, so this never flickers.
    deviation = (expected * (1 - expected / 4000)).sqrt()
    assert bool(((counts - expected).abs() < 3 * deviation).all()), (counts, expected)


def test_top_k_keeps_the_k_likeliest() -> None:
    counts = draw(LOGITS, SamplingParams(top_k=2))
    assert counts.nonzero().flatten().tolist() == [1, 4]


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert torch.equal(draw(LOGITS, SamplingParams(top_k=50)), draw(LOGITS, SamplingParams()))


def test_min_p_is_relative_to_the_likeliest() -> None:
    # exp(1.5 - 2) = 0.61 and exp(1 - 2) = 0.37.
    counts = draw(LOGITS, SamplingParams(min_p=0.5))
    assert counts.nonzero().flatten().tolist() == [1, 4]


def test_top_p_keeps_the_smallest_set_that_holds_its_share() -> None:
    # Probabilities 0.063, 0.463, 0.023, 0.170, 0.281: the two likeliest hold 0.744.
    assert draw(LOGITS, SamplingParams(top_p=0.74)).nonzero().flatten().tolist() == [1, 4]
    assert draw(LOGITS, SamplingParams(top_p=0.75)).nonzero().flatten().tolist() == [1, 3, 4]
    assert draw(LOGITS, SamplingParams(top_p=0.01)).nonzero().flatten().tolist() == [1]


def test_top_p_counts_among_what_top_k_left() -> None:
    # Of 1, 4 and 3 the first holds 0.51: top_p 0.5 leaves it alone.
    counts = draw(LOGITS, SamplingParams(top_k=3, top_p=0.5))
    assert counts.nonzero().flatten().tolist() == [1]


@settings(deadline=None, max_examples=200)
@given(
    logits=st.lists(st.floats(-12, 12, width=32), min_size=1, max_size=60),
    top_p=st.floats(0.01, 0.999),
)
def test_the_nucleus_is_what_sorting_finds(logits: list[float], top_p: float) -> None:
    probabilities = torch.tensor(logits).softmax(-1)
    kept = probabilities >= nucleus_bound(probabilities, top_p)
    ordered = probabilities.double().sort(descending=True).values
    needed = int((ordered.cumsum(0) < top_p - 1e-6).sum()) + 1
    # Rounding may move the cut by one; ties with the last one kept all belong.
    last = float(ordered[min(needed, len(logits)) - 1])
    assert int(kept.sum()) >= min(needed, len(logits))
    just_more = float(ordered[: int(kept.sum())].sum()) - float(probabilities[kept].min())
    ties = int((probabilities == probabilities[kept].min()).sum())
    assert ties > 1 or just_more < top_p + 1e-6
    assert float(probabilities[kept].min()) <= last


def test_the_same_seed_draws_the_same_tokens_in_any_company() -> None:
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    plain = SamplingParams(seed=7)
    alone = [
        sample(rows[i : i + 1].clone(), [sequence(plain, seed=7, prompt=i + 1)])[0]
        for i in range(6)
    ]
    company = [sequence(plain, seed=7, prompt=i + 1) for i in range(6)]
    assert sample(rows.clone(), company) == alone
    order = [4, 1, 5, 0, 2, 3]
    shuffled = sample(rows[order].clone(), [company[i] for i in order])
    assert shuffled == [alone[i] for i in order]


def test_numbers_differ_by_seed_and_position_and_cover_the_interval() -> None:
    numbers = torch.tensor(
        [[uniform(seed, position) for position in range(64)] for seed in range(64)]
    )
    assert numbers.unique().numel() == 64 * 64
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.02
    shares = torch.histc(numbers, bins=8, min=0, max=1) / numbers.numel()
    assert bool(((shares - 1 / 8).abs() < 0.02).all())


def test_stop_tokens_cannot_come_before_min_tokens() -> None:
    early = sequence(SamplingParams(temperature=0, min_tokens=2), stop=frozenset({1, 4}))
    assert sample(LOGITS[None].clone(), [early]) == [3]
    early.token_ids += [3, 3]
    assert sample(LOGITS[None].clone(), [early]) == [1]


def test_a_row_without_numbers_fails_alone() -> None:
    rows = LOGITS.repeat(3, 1)
    rows[1, 2] = torch.nan
    greedy = sequence(SamplingParams(temperature=0))
    tokens = sample(rows, [greedy, sequence(SamplingParams()), greedy])
    assert tokens[0] == tokens[2] == 1
    assert isinstance(tokens[1], NotFinite)


@pytest.mark.parametrize(
    ("number", "expected"), [(0.0, 1), (0.49, 1), (0.51, 3), (1 - 2.0**-48, 3)]
)
def test_excluded_tokens_are_never_drawn_at_the_ends_of_the_interval(
    number: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    monkeypatch.setattr("qtool.runtime.engine.sampler.uniform", lambda seed, position: number)
    assert sample(logits, [sequence(SamplingParams())]) == [expected]
