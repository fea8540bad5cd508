"""Moments of inputs, and where hidden states are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtool.calibration.activations import Activations, memory_budget
from qtool.calibration.runner import Bfloat16Products
from qtool.calibration.statistics import Moments, total


def inputs(seed: int, count: int = 50, width: int = 8) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_two_vectors_by_hand() -> None:
    seen = Moments.zeros(2)
    seen.add(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    assert seen.count == 2
    assert seen.hessian.tolist() == [[5.0, -1.0], [-1.0, 2.0]]
    assert seen.mean_magnitude.tolist() == [2.0, 1.0]
    assert seen.mean_square.tolist() == [5.0, 2.0]


def test_chunks_add_up_to_the_whole() -> None:
    whole, parts = Moments.zeros(8), Moments.zeros(8)
    data = inputs(0)
    whole.add(data)
    for chunk in data.view(2, 25, 8):
        parts.add(chunk.unsqueeze(0))
    expected = data.double().t() @ data.double() / 50
    assert torch.allclose(whole.hessian.double(), expected, atol=1e-5)
    assert torch.allclose(parts.hessian, whole.hessian, atol=1e-5)
    assert torch.allclose(parts.mean_magnitude, data.abs().mean(0), atol=1e-6)
    assert parts.count == whole.count == 50


def test_the_same_chunks_give_the_same_bits() -> None:
    def run() -> torch.Tensor:
        seen = Moments.zeros(8)
        for seed in range(5):
            seen.add(inputs(seed).to(torch.bfloat16))
        return seen.gram

    assert torch.equal(run(), run())


def test_not_finite_inputs_are_seen() -> None:
    seen = Moments.zeros(2)
    seen.add(torch.tensor([[1.0, 2.0]]))
    assert seen.is_finite
    seen.add(torch.tensor([[float("inf"), 0.0]]))
    assert not seen.is_finite


def test_an_expert_with_few_tokens_borrows_what_it_lacks() -> None:
    few, many = Moments.zeros(8), Moments.zeros(8)
    few.add(inputs(0, count=3))
    many.add(inputs(1, count=400))
    blended = few.blended(many)
    assert blended.count == 8
    expected = (few.gram + 5 * many.hessian) / 8
    assert torch.allclose(blended.hessian, expected, atol=1e-6)
    assert torch.linalg.matrix_rank(blended.hessian) == 8


def test_an_expert_with_enough_tokens_keeps_its_own() -> None:
    enough, many = Moments.zeros(8), Moments.zeros(8)
    enough.add(inputs(0, count=8))
    many.add(inputs(1))
    assert enough.blended(many) is enough


def test_totals_are_sums() -> None:
    parts = [Moments.zeros(8) for _ in range(3)]
    together = Moments.zeros(8)
    for seed, part in enumerate(parts):
        part.add(inputs(seed))
        together.add(inputs(seed))
    found = total(parts)
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


def test_a_wide_gram_computed_by_halves_is_the_gram() -> None:
    vectors = torch.randn(50, 515, generator=torch.Generator().manual_seed(0))
    seen = Moments.zeros(515)
    seen.add(vectors[:20])
    seen.add(vectors[20:])
    assert torch.allclose(seen.gram, vectors.t() @ vectors, atol=1e-4)
    assert torch.equal(seen.gram, seen.gram.t())


def test_products_in_bfloat16_are_added_in_float32() -> None:
    """A sum of ones in bfloat16 would stay at 256; what each term is rounded to stays so."""
    seen = Moments.zeros(256)
    ones = torch.ones(5000, 256)
    with Bfloat16Products():
        for _ in range(3):
            seen.add(ones)
    assert seen.count == 15000
    assert bool((seen.gram == 15000).all())
    assert bool((seen.magnitude == 15000).all())
