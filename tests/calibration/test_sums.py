"""Sums of calibration data: right, and the same whatever the order and the parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.calibration.runner import Bfloat16Products
from qtool.calibration.sums import DriftSums, MomentSums, Squares


def chunks(count: int, width: int, tokens: int = 40) -> list[Tensor]:
    """Of sizes and signs that do not cancel evenly."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-2, 2, count)
    return [scale * torch.randn(tokens, width, generator=generator) + 0.3 for scale in scales]


def test_two_vectors_by_hand() -> None:
    sums = MomentSums.zeros(2)
    sums.add(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    seen = sums.moments()
    assert seen.count == 2
    assert seen.hessian.tolist() == [[5.0, -1.0], [-1.0, 2.0]]
    assert seen.mean_magnitude.tolist() == [2.0, 1.0]
    assert seen.mean_square.tolist() == [5.0, 2.0]
    assert seen.peak.tolist() == [3.0, 2.0]


# Above 256 they are kept in strips, the last of them narrower.
@pytest.mark.parametrize("width", [8, 511, 515, 1200])
def test_second_moments_are_those_of_all_vectors_at_once(width: int) -> None:
    sums = MomentSums.zeros(width)
    data = chunks(3, width)
    for chunk in data:
        sums.add(chunk.unsqueeze(0))
    seen = sums.moments()
    whole = torch.cat(data).double()
    expected = (whole.t() @ whole).float()
    # Terms of one product are added in float32, so small sums of large terms are less exact.
    close = 1e-6 * float(expected.diagonal().max())
    torch.testing.assert_close(seen.gram, expected, rtol=1e-5, atol=close)
    torch.testing.assert_close(seen.magnitude, whole.abs().sum(0).float())
    assert torch.equal(seen.gram, seen.gram.t())
    assert seen.count == len(whole)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_what_ranks_saw_adds_up_to_the_bits_of_one_process(ranks: int) -> None:
    data = chunks(12, 600)
    alone = MomentSums.zeros(600)
    for chunk in data:
        alone.add(chunk)
    shares = [MomentSums.zeros(600) for _ in range(ranks)]
    for number, chunk in enumerate(data):
        shares[number % ranks].add(chunk)
    together = MomentSums.zeros(600)
    for share in reversed(shares):
        together.include(share)
    one, other = alone.moments(), together.moments()
    assert torch.equal(one.gram, other.gram)
    assert torch.equal(one.magnitude, other.magnitude)
    assert torch.equal(one.peak, other.peak)
    assert one.count == other.count
    # The test is one of order only where float32 sums would know it.
    products = [chunk.t() @ chunk for chunk in data]
    assert not torch.equal(sum(products), sum(reversed(products)))


def test_drift_does_not_know_the_order_of_chunks() -> None:
    data = chunks(8, 16)
    differences = [chunk.roll(1, 0)[:, :4] for chunk in data]

    def drift(order: list[int]) -> DriftSums:
        sums = DriftSums.zeros(4, 16)
        for number in order:
            sums.add(differences[number], data[number], held_out=number % 4 == 3)
        return sums

    one, other = drift(list(range(8))).drift(), drift(list(range(8))[::-1]).drift()
    assert torch.equal(one.cross, other.cross)
    assert torch.equal(one.held_cross, other.held_cross)
    assert torch.equal(one.held.gram, other.held.gram)
    assert one.held.count == 80
    for cross, held in ((one.cross, False), (one.held_cross, True)):
        numbers = [number for number in range(8) if (number % 4 == 3) == held]
        expected = sum(differences[n].double().t() @ data[n].double() for n in numbers)
        torch.testing.assert_close(cross, expected.float(), rtol=1e-5, atol=1e-2)


def test_the_same_chunks_give_the_same_bits() -> None:
    def run() -> Tensor:
        sums = MomentSums.zeros(8)
        for chunk in chunks(5, 8):
            sums.add(chunk.to(torch.bfloat16))
        return sums.moments().gram

    assert torch.equal(run(), run())


def test_wide_sums_take_little_more_memory_than_a_float32_matrix() -> None:
    width = 4096
    assert Squares.zeros(width).flat.nbytes < 1.1 * 4 * width**2


def test_no_vectors_change_nothing() -> None:
    sums = MomentSums.zeros(8)
    sums.add(torch.zeros(0, 8))
    seen = sums.moments()
    assert seen.count == 0
    assert not seen.gram.any()


def test_products_in_bfloat16_are_added_in_float32() -> None:
    """A sum of ones in bfloat16 would stay at 256; what each term is rounded to stays so."""
    sums = MomentSums.zeros(256)
    ones = torch.ones(5000, 256)
    with Bfloat16Products():
        for _ in range(3):
            sums.add(ones)
    seen = sums.moments()
    assert seen.count == 15000
    assert bool((seen.gram == 15000).all())
    assert bool((seen.magnitude == 15000).all())
