"""Gradient steps on a block: the gradients, what is stored, and that held-out error decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtool.grid import round_scales
from qtool.quantize import rtn
from qtool.quantize.pipeline import quantize_model
from qtool.quantize.solution import Solution
from qtool.quantize.tuning import Start, _Place
from qtool.recipe import Gptq, Recipe
from qtool.scheme import QuantScheme


def solved(scheme: QuantScheme) -> tuple[torch.Tensor, Solution]:
    weight = 0.02 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    return weight, rtn.solve(weight, scheme)


def test_what_is_tuned_starts_at_what_was_solved() -> None:
    for scheme in (QuantScheme(3, 32), QuantScheme(4, 64, symmetric=False)):
        weight, start = solved(scheme)
        place = _Place.of(Start(start, weight))
        assert torch.equal(place.weight().detach(), start.dequantized)
        again = place.copy().solution(start)
        assert torch.equal(again.weight.codes, start.weight.codes)
        assert torch.equal(again.dequantized, start.dequantized)


def test_gradients_pass_through_rounding_and_stop_at_the_ends_of_the_grid() -> None:
    scheme = QuantScheme(2, 64)
    weight, start = solved(scheme)
    place = _Place.of(Start(start, weight))
    with torch.no_grad():
        place.places[0, 0, :2] = torch.tensor([5.0, -7.0])  # past 1 and past -2
    given = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    (place.weight() * given).sum().backward()  # type: ignore[no-untyped-call]
    assert place.places.grad is not None
    assert place.scales.grad is not None
    expected = (given * place.scales.detach()).view(8, 1, 64)
    assert place.places.grad[0, 0, :2].tolist() == [0.0, 0.0]
    assert torch.allclose(place.places.grad[1:], expected[1:])
    codes = torch.round(place.places.detach()).clamp(-2, 1)
    assert torch.allclose(place.scales.grad, (given.view(8, 1, 64) * codes).sum(-1))


@pytest.mark.slow
def test_a_tuned_block_is_kept_only_where_held_out_error_falls(
    books_7m: Path, tmp_path: Path
) -> None:
    method = Gptq(correction=True, refine_rounds=1, tuning_steps=32)
    recipe = Recipe("tuned", "for this test", method, bits=3)
    recipe = recipe.with_options(num_samples=32, sequence_length=256)
    manifest = quantize_model(str(books_7m), recipe, out=tmp_path / "out")
    tuned = [step for layer in manifest.layers for step in layer.steps if "tuning" in step]
    assert tuned
    for step in tuned:
        before, after = (float(word) for word in step.split("block error ")[1].split(" -> "))
        assert after <= before


def test_scales_that_moved_are_rounded_as_they_are_stored() -> None:
    scheme = QuantScheme(4, 32)
    weight, start = solved(scheme)
    place = _Place.of(Start(start, weight))
    (place.weight() * weight).sum().backward()  # type: ignore[no-untyped-call]
    place.move(0.1)
    found = place.solution(start)
    assert torch.equal(found.weight.scales, round_scales(found.weight.scales))
    assert torch.equal(found.dequantized, place.weight().detach())
