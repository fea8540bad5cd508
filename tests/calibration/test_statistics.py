"""Moments of inputs, and where hidden states are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtool.calibration.activations import Activations, memory_budget
from qtool.calibration.statistics import Moments, total
from qtool.calibration.sums import MomentSums


def inputs(seed: int, count: int = 50, width: int = 8) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def moments(*chunks: torch.Tensor, width: int = 8) -> Moments:
    sums = MomentSums.zeros(width)
    for chunk in chunks:
        sums.add(chunk)
    return sums.moments()


def test_not_finite_inputs_are_seen() -> None:
    good = torch.tensor([[1.0, 2.0]])
    assert moments(good, width=2).is_finite
    assert not moments(good, torch.tensor([[float("inf"), 0.0]]), width=2).is_finite


def test_an_expert_with_few_tokens_borrows_what_it_lacks() -> None:
    few, many = moments(inputs(0, count=3)), moments(inputs(1, count=400))
    blended = few.blended(many)
    assert blended.count == 8
    expected = (few.gram + 5 * many.hessian) / 8
    assert torch.allclose(blended.hessian, expected, atol=1e-6)
    assert torch.linalg.matrix_rank(blended.hessian) == 8


def test_an_expert_with_enough_tokens_keeps_its_own() -> None:
    enough, many = moments(inputs(0, count=8)), moments(inputs(1))
    assert enough.blended(many) is enough


def test_totals_are_sums() -> None:
    chunks = [inputs(seed) for seed in range(3)]
    together = moments(*chunks)
    found = total(moments(chunk) for chunk in chunks)
    assert torch.allclose(found.gram, together.gram, atol=1e-4)
    assert found.count == together.count


@pytest.mark.parametrize(("budget", "on_disk"), [(10_000, False), (100, True)])
def test_hidden_states_come_back_from_memory_and_from_disk(
    tmp_path: Path, budget: int, on_disk: bool
) -> None:
    kept = Activations(3, tmp_path / "kept.bin", budget)
    assert kept.get(0) is None
    chunks = [inputs(0), inputs(1), inputs(2, count=20)]
    for index, chunk in enumerate(chunks):
        kept.put(index, chunk)
    assert kept.on_disk == on_disk
    assert (tmp_path / "kept.bin").exists() == on_disk
    kept.put(1, chunks[1] * 2)
    for index, factor in ((0, 1), (1, 2), (2, 1)):
        found = kept.get(index)
        assert found is not None
        assert torch.equal(found, chunks[index] * factor)
    kept.close()
    assert not (tmp_path / "kept.bin").exists()


def test_a_stored_chunk_is_a_copy(tmp_path: Path) -> None:
    kept = Activations(1, tmp_path / "kept.bin")
    chunk = inputs(0)
    kept.put(0, chunk)
    chunk.zero_()
    found = kept.get(0)
    assert found is not None
    assert bool((found != 0).any())


def test_the_budget_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOL_MAX_MEMORY", "12345")
    assert memory_budget() == 12345
    monkeypatch.delenv("QTOOL_MAX_MEMORY")
    assert memory_budget() > 1_000_000
