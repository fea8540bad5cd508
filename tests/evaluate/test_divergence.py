"""KL divergence: cases worked by hand, llama-perplexity's sums written out again in float64, and
invariants.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch

from qtool.runtime.evaluate.divergence import (
    TokenDivergence,
    compare,
    join,
    percentile,
    summarize,
)
from qtool.runtime.evaluate.perplexity import SLICE_ELEMENTS


def made_up(
    rows: int, vocab: int, noise: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(rows, vocab, generator=generator) * 3
    logits = reference + noise * torch.randn(rows, vocab, generator=generator)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    return logits, reference, targets


def test_two_tokens_worked_by_hand() -> None:
    reference = torch.tensor([[0.75, 0.25]]).log()
    candidate = torch.tensor([[0.5, 0.5]]).log()
    tokens = compare(candidate, reference, torch.tensor([0]))
    assert tokens.kld.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)
    assert tokens.delta_p.item() == pytest.approx(-0.25, abs=1e-7)
    assert tokens.nll.item() == pytest.approx(math.log(2), abs=1e-6)
    assert tokens.reference_nll.item() == pytest.approx(-math.log(0.75), abs=1e-6)


def test_divergence_is_of_the_candidate_from_the_original_and_not_the_other_way() -> None:
    # KL(p || q) with p = (1, 0) and q = (1/2, 1/2) is ln 2; the other way round it is infinite.
    reference = torch.tensor([[0.0, -math.inf]])
    candidate = torch.tensor([[0.0, 0.0]])
    assert compare(candidate, reference, torch.tensor([0])).kld.item() == pytest.approx(
        math.log(2), abs=1e-7
    )
    assert compare(reference, candidate, torch.tensor([0])).kld.item() == math.inf


def test_equal_logits_diverge_by_exactly_nothing() -> None:
    logits, _, targets = made_up(300, 513, 0.0)
    result = summarize(compare(logits, logits.clone(), targets))
    assert result.kld == (0.0, 0.0)
    assert (result.kld_max, result.kld_min) == (0.0, 0.0)
    assert result.same_top == (1.0, 0.0)
    assert result.ln_perplexity_ratio == (0.0, 0.0)
    assert result.delta_p_rms == (0.0, 0.0)


def test_a_shift_of_all_logits_changes_nothing() -> None:
    logits, reference, targets = made_up(200, 300, 0.2)
    plain = compare(logits, reference, targets).kld
    assert torch.allclose(compare(logits + 7, reference - 3, targets).kld, plain, atol=2e-6)


def test_equals_the_sums_of_llama_perplexity_in_float64() -> None:
    logits, reference, targets = made_up(700, 1009, 0.3)
    q, p = (_log_softmax64(x) for x in (logits, reference))
    rows = np.arange(700)
    nll, nll_base = -q[rows, targets.numpy()], -p[rows, targets.numpy()]
    kld = (np.exp(p) * (p - q)).sum(axis=1)
    delta = np.exp(-nll) - np.exp(-nll_base)
    n = 700

    def mean_and_uncertainty(total: float, total2: float) -> tuple[float, float]:
        mean = total / n
        return mean, math.sqrt((total2 / n - mean * mean) / (n - 1))

    log_ppl = mean_and_uncertainty(nll.sum(), (nll * nll).sum())
    log_base = mean_and_uncertainty(nll_base.sum(), (nll_base * nll_base).sum())
    covariance = ((nll * nll_base).sum() / n - nll.mean() * nll_base.mean()) / (n - 1)
    ratio_error = math.sqrt(log_ppl[1] ** 2 + log_base[1] ** 2 - 2 * covariance)
    mse = mean_and_uncertainty((delta**2).sum(), (delta**4).sum())
    same = float((q.argmax(1) == p.argmax(1)).mean())
    difference = math.exp(log_ppl[0]) - math.exp(log_base[0])
    difference_error = math.sqrt(
        (math.exp(log_ppl[0]) * log_ppl[1]) ** 2
        + (math.exp(log_base[0]) * log_base[1]) ** 2
        - 2 * math.exp(log_ppl[0]) * math.exp(log_base[0]) * covariance
    )

    result = summarize(compare(logits, reference, targets))
    close = partial(pytest.approx, rel=2e-5, abs=1e-6)
    assert result.perplexity == close((math.exp(log_ppl[0]), math.exp(log_ppl[0]) * log_ppl[1]))
    assert result.reference_perplexity == close(
        (math.exp(log_base[0]), math.exp(log_base[0]) * log_base[1])
    )
    assert result.ln_perplexity_correlation == close(covariance / (log_ppl[1] * log_base[1]))
    assert result.ln_perplexity_ratio == close((log_ppl[0] - log_base[0], ratio_error))
    assert result.perplexity_difference == close((difference, difference_error))
    assert result.kld == close(mean_and_uncertainty(kld.sum(), (kld * kld).sum()))
    assert result.kld_max == close(kld.max())
    assert result.delta_p == close(mean_and_uncertainty(delta.sum(), (delta * delta).sum()))
    assert result.delta_p_rms == close((math.sqrt(mse[0]), 0.5 / math.sqrt(mse[0]) * mse[1]))
    assert result.same_top == close((same, math.sqrt(same * (1 - same) / (n - 1))))
    for percent, value in result.kld_percentiles.items():
        assert value == close(percentile_of_llama_cpp(kld, percent))
    for percent, value in result.delta_p_percentiles.items():
        assert value == close(percentile_of_llama_cpp(delta, percent))


def _log_softmax64(logits: torch.Tensor) -> np.ndarray:  # type: ignore[type-arg]
    wide = logits.numpy().astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


def test_slices_and_batches_do_not_change_the_numbers() -> None:
    vocab = SLICE_ELEMENTS // 20  # twenty rows a slice
    logits, reference, targets = made_up(50, vocab, 0.1)
    whole = compare(logits, reference, targets)
    rows = join(
        [compare(logits[i : i + 1], reference[i : i + 1], targets[i : i + 1]) for i in range(50)]
    )
    for name in TokenDivergence._fields:
        assert torch.allclose(
            getattr(whole, name).double(), getattr(rows, name).double(), atol=1e-6
        ), name


def test_more_noise_diverges_more() -> None:
    means = [summarize(compare(*made_up(200, 400, noise))).kld.value for noise in (0.01, 0.1, 0.5)]
    assert means == sorted(means)
    assert means[0] > 0


def test_not_a_number_in_either_model_shows() -> None:
    logits, reference, targets = made_up(3, 10, 0.1)
    for broken in (0, 1):
        pair = [logits.clone(), reference.clone()]
        pair[broken][1, 4] = float("nan")
        assert compare(pair[0], pair[1], targets).kld.isnan().tolist() == [False, True, False]


def percentile_of_llama_cpp(values: np.ndarray, percent: float) -> float:
    """perplexity.cpp: `float p = fraction*(values.size() - 1)`."""
    place = np.float32(percent / 100) * np.float32(len(values) - 1)
    below = int(place)
    part = float(place - np.float32(below))
    first, second = np.sort(values)[[below, min(below + 1, len(values) - 1)]]
    return (1 - part) * first + part * second


def test_percentiles_are_linear_between_neighbours() -> None:
    ordered = torch.tensor([0.0, 10.0, 20.0], dtype=torch.float64)
    assert [percentile(ordered, p) for p in (0, 25, 50, 75, 100)] == [0, 5, 10, 15, 20]
    assert percentile(ordered[:1], 99.9) == 0
