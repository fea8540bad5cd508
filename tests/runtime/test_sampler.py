"""Sampling: exact sets, exact distribution, and a seed that means the same in any company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.runtime.engine.sampler import (
    NotFinite,
    NothingAllowed,
    Sampled,
    candidates,
    nucleus_bound,
    pick,
    sample,
    uniform,
)
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest, Sequence


def sequence(
    sampling: SamplingParams, *, seed: int = 0, prompt: int = 1, stop: frozenset[int] = frozenset()
) -> Sequence:
    request = GenerationRequest("r", tuple(range(prompt)), sampling)
    return Sequence(request, seed=seed, stop_token_ids=stop, max_total_tokens=1000)


def sample_ids(logits: Tensor, sequences: list[Sequence]) -> list[int | Exception]:
    """The one token that each sequence gets."""
    return [
        found.token_ids[0] if isinstance(found, Sampled) else found
        for found in sample(logits, sequences)
    ]


def draw(logits: Tensor, sampling: SamplingParams, count: int = 2000) -> Tensor:
    """Counts of the tokens drawn with seeds 0, 1, ..."""
    sequences = [sequence(sampling, seed=seed) for seed in range(count)]
    tokens = sample_ids(logits.expand(count, -1).clone(), sequences)
    return torch.bincount(torch.tensor(tokens), minlength=logits.numel())


LOGITS = torch.tensor([0.0, 2.0, -1.0, 1.0, 1.5])


def test_temperature_zero_takes_the_likeliest() -> None:
    (token,) = sample_ids(LOGITS[None].clone(), [sequence(SamplingParams(temperature=0))])
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
    kept = probabilities >= nucleus_bound(probabilities.numpy(), top_p)
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
        sample_ids(rows[i : i + 1].clone(), [sequence(plain, seed=7, prompt=i + 1)])[0]
        for i in range(6)
    ]
    company = [sequence(plain, seed=7, prompt=i + 1) for i in range(6)]
    assert sample_ids(rows.clone(), company) == alone
    order = [4, 1, 5, 0, 2, 3]
    shuffled = sample_ids(rows[order].clone(), [company[i] for i in order])
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
    assert sample_ids(LOGITS[None].clone(), [early]) == [3]
    early.token_ids += [3, 3]
    assert sample_ids(LOGITS[None].clone(), [early]) == [1]


def test_a_row_without_numbers_fails_alone() -> None:
    rows = LOGITS.repeat(3, 1)
    rows[1, 2] = torch.nan
    greedy = sequence(SamplingParams(temperature=0))
    tokens = sample_ids(rows, [greedy, sequence(SamplingParams()), greedy])
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
    assert sample_ids(logits, [sequence(SamplingParams())]) == [expected]


# What follows compares whole distributions, not samples of them.


def kept(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """[vocab] float64: the probability of each token once everything has been cut."""
    found = candidates(logits, sampling)
    whole = torch.zeros(logits.numel(), dtype=torch.float64)
    ids = slice(None) if found.token_ids is None else torch.from_numpy(found.token_ids)
    whole[ids] = torch.from_numpy(found.probabilities).double()
    return whole / whole.sum()


def by_sorting(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """The same in float64, sorting the vocabulary at each step."""
    p = (logits.double() / sampling.temperature).softmax(-1)

    def cut(keep: Tensor) -> Tensor:
        left = torch.where(keep, p, 0.0)
        return left / left.sum()

    p = cut(p >= sampling.min_p * p.max())
    if sampling.top_k > 0:
        p = cut(p >= p.sort(descending=True).values[min(sampling.top_k, p.numel()) - 1])
    if sampling.top_p < 1:
        ordered, order = p.sort(descending=True)
        number = int((ordered.cumsum(0) < sampling.top_p).sum()) + 1
        p = cut(torch.zeros(p.numel(), dtype=torch.bool).index_fill(0, order[:number], True))
    if sampling.typical_p < 1:
        surprise = -p.log()
        far = (surprise - (p * surprise).nansum()).abs()
        order = far.sort().indices
        number = int((p[order].cumsum(0) < sampling.typical_p).sum()) + 1
        p = cut(torch.zeros(p.numel(), dtype=torch.bool).index_fill(0, order[:number], True))
    return p


def by_transformers(logits: Tensor, sampling: SamplingParams) -> Tensor:
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.typical_p < 1:
        warpers.append(TypicalLogitsWarper(sampling.typical_p))
    scores = logits.double()[None]
    for warper in warpers:
        scores = warper(torch.zeros(1, 0, dtype=torch.int64), scores)
    return scores[0].softmax(-1)


CUTS = [
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.6),
    SamplingParams(min_p=0.1),
    SamplingParams(typical_p=0.5),
    SamplingParams(temperature=1.5, top_k=40, top_p=0.9, min_p=0.02),
    SamplingParams(temperature=0.3, top_p=0.95, typical_p=0.8),
    SamplingParams(top_k=30, top_p=0.999, min_p=0.001, typical_p=0.2),
]


@pytest.mark.parametrize("sampling", CUTS, ids=[str(number) for number in range(len(CUTS))])
@pytest.mark.parametrize("vocab", [7, 300, 32000])
def test_the_distribution_is_that_of_sorting_and_of_transformers(
    sampling: SamplingParams, vocab: int
) -> None:
    # Numbers that differ in float64 but for all that is cut between two of them.
    logits = 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    found = kept(logits, sampling)
    for expected in (by_sorting(logits, sampling), by_transformers(logits, sampling)):
        assert torch.equal(found > 0, expected > 0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@settings(deadline=None, max_examples=100)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=40, unique=True),
    temperature=st.floats(0.2, 3),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.5),
    typical_p=st.floats(0.05, 1),
)
def test_cut_tokens_never_hold_more_than_was_to_be_cut(
    logits: list[float], temperature: float, top_p: float, min_p: float, typical_p: float
) -> None:
    row = torch.tensor(logits)
    loose = SamplingParams(temperature=temperature, min_p=min_p)
    nucleus = SamplingParams(temperature=temperature, min_p=min_p, top_p=top_p)
    typical = SamplingParams(temperature=temperature, min_p=min_p, top_p=top_p, typical_p=typical_p)
    before, middle, after = (kept(row, sampling) for sampling in (loose, nucleus, typical))
    assert float(before[middle > 0].sum()) >= top_p - 1e-5
    assert float(middle[after > 0].sum()) >= typical_p - 1e-5
    assert int(before.argmax()) == int(middle.argmax())


def test_each_token_owns_an_interval_as_long_as_its_probability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = SamplingParams(temperature=0.8, top_p=0.9)
    edges = kept(LOGITS, sampling).cumsum(0)
    for token in kept(LOGITS, sampling).nonzero().flatten().tolist():
        start = float(edges[token - 1]) if token else 0.0
        for number in (start + 1e-6, float(edges[token]) - 1e-6):
            monkeypatch.setattr("qtool.runtime.engine.sampler.uniform", lambda s, p, n=number: n)
            assert sample_ids(LOGITS[None].clone(), [sequence(sampling)]) == [token]


@pytest.mark.parametrize("items", [60, 4096, 4097, 10_000, 33_333])
def test_picking_by_blocks_is_picking_from_one_sum(items: int) -> None:
    generator = torch.Generator().manual_seed(items)
    masses = torch.rand(items, generator=generator) ** 8
    masses[torch.rand(items, generator=generator) < 0.5] = 0
    masses[-3:] = 0
    cumulated = masses.double().cumsum(0)
    for number in (0.0, 1 - 2.0**-48, *torch.rand(200, generator=generator).tolist()):
        found = pick(masses, number)
        assert float(masses[found]) > 0
        below = float(cumulated[found] - masses[found])
        target = number * float(cumulated[-1])
        assert below - 1e-9 <= target <= float(cumulated[found]) + 1e-9


# Drafts are verified by drawing what would have been drawn without them.


def text_after(rows: Tensor, drafts: list[int], sampling: SamplingParams) -> tuple[int, ...]:
    drafting = sequence(sampling, seed=5, stop=frozenset({3}))
    drafting.draft_token_ids = drafts
    (found,) = sample(rows[: len(drafts) + 1].clone(), [drafting], [len(drafts) + 1])
    assert isinstance(found, Sampled)
    return found.token_ids


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(frequency_penalty=1.5, bad_words=((2, 7),), min_tokens=6),
    ],
    ids=["greedy", "nucleus", "rules"],
)
def test_drafts_that_are_right_are_taken_and_the_first_wrong_one_ends_them(
    sampling: SamplingParams,
) -> None:
    rows = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    expected: list[int] = []
    stepping = sequence(sampling, seed=5, stop=frozenset({3}))
    for row in rows:
        (token,) = sample_ids(row[None].clone(), [stepping])
        assert isinstance(token, int)
        stepping.append(token)
        expected.append(token)
    assert 3 not in expected
    assert text_after(rows, expected[:5], sampling) == tuple(expected)
    for wrong in range(5):
        drafts = expected[:5]
        drafts[wrong] = (drafts[wrong] + 1) % 12
        assert text_after(rows, drafts, sampling) == tuple(expected[: wrong + 1])


def test_nothing_is_accepted_after_a_stop_token() -> None:
    rows = torch.zeros(4, 12)
    rows[:, 3] = 9
    assert text_after(rows, [3, 3, 3], SamplingParams(temperature=0)) == (3,)


def test_rules_that_leave_nothing_fail_their_own_request_only() -> None:
    nothing = SamplingParams(allowed_token_ids=(2,), bad_words=((2,),))
    found = sample_ids(LOGITS.repeat(2, 1), [sequence(nothing), sequence(SamplingParams(seed=1))])
    assert isinstance(found[0], NothingAllowed)
    assert isinstance(found[1], int)
