"""AWQ's searches: by hand, never worse than doing nothing, in agreement with passes over inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qtool.quantize import awq, rtn
from qtool.quantize.solution import relative_error, row_errors
from qtool.recipe import Awq
from qtool.scheme import QuantScheme


def test_a_loud_channel_is_scaled_up() -> None:
    """Two channels: one hundred times louder, but smaller in the weight, so that rounding at the
    group's scale loses it. Scaling it up must win, and its scale must be the larger."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=generator)
    weight[:, 0] *= 0.1
    magnitude = torch.ones(32)
    magnitude[0] = 100.0
    hessian = torch.diag(magnitude.square())
    best = awq.search_channel_scales(weight, hessian, magnitude, QuantScheme(4, 32), Awq())
    assert best.changes_anything
    assert float(best.scales[0]) > 2 * float(best.scales[1:].max())
    assert best.error < 0.5 * best.identity


def test_doing_nothing_wins_where_nothing_helps() -> None:
    """A weight that is on the grid already loses nothing, and no scale can be better than that."""
    weight = torch.tensor([[-8.0, 7.0, 3.0, 1.0]]).repeat(4, 8)
    hessian = torch.diag(torch.linspace(0.1, 9.0, 32))
    found = awq.search_channel_scales(
        weight, hessian, torch.linspace(0.1, 9.0, 32), QuantScheme(4, 32), Awq()
    )
    assert not found.changes_anything
    assert found.error == found.identity == 0.0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_identity(
    make_layer: Callable[..., Any], symmetric: bool, seed: int
) -> None:
    weight, inputs, hessian = make_layer(seed=seed)
    scheme = QuantScheme(4, 32, symmetric)
    found = awq.search_channel_scales(weight, hessian, inputs.abs().mean(0), scheme, Awq())
    assert found.error <= found.identity
    back = rtn.solve(weight * found.scales, scheme).dequantized / found.scales
    plain = rtn.solve(weight, scheme).dequantized
    assert float(row_errors(weight, back, hessian).sum()) <= float(
        row_errors(weight, plain, hessian).sum() * (1 + 1e-5)
    )


def test_the_hessian_objective_is_the_error_of_the_outputs(make_layer: Callable[..., Any]) -> None:
    """What the paper measures by running the layer: mean squared output error, in float64."""
    weight, inputs, hessian = make_layer()
    scheme = QuantScheme(4, 32)
    found = awq.search_channel_scales(weight, hessian, inputs.abs().mean(0), scheme, Awq())
    scaled = weight * found.scales
    back = rtn.solve(scaled, scheme).dequantized / found.scales
    outputs = inputs.double() @ (weight - back).double().t()
    assert found.error == pytest.approx(float(outputs.square().mean(0).sum()), rel=1e-3)


def test_columns_with_one_source_get_one_scale(make_layer: Callable[..., Any]) -> None:
    weight, inputs, hessian = make_layer(columns=128)
    source = torch.arange(64).view(2, 32).repeat_interleave(2, 0).reshape(-1)
    found = awq.search_channel_scales(
        weight, hessian, inputs.abs().mean(0), QuantScheme(4, 32), Awq(), source
    )
    assert found.scales.shape == (64,)


@pytest.mark.parametrize("clip", [True, False])
def test_rounding_after_scaling_is_never_worse_than_plain(
    make_layer: Callable[..., Any], clip: bool
) -> None:
    for seed in range(4):
        weight, _, hessian = make_layer(seed=seed)
        scheme = QuantScheme(4, 32)
        solved = awq.solve(weight, hessian, scheme, Awq(clip_search=clip))
        ours = relative_error(weight, solved.dequantized, hessian)
        assert ours <= relative_error(weight, rtn.solve(weight, scheme).dequantized, hessian)


def test_clipping_helps(make_layer: Callable[..., Any]) -> None:
    weight, _, hessian = make_layer(rows=96, columns=256)
    scheme = QuantScheme(3, 128)
    clipped = awq.solve(weight, hessian, scheme, Awq())
    plain = awq.solve(weight, hessian, scheme, Awq(clip_search=False))
    assert relative_error(weight, clipped.dequantized, hessian) < 0.95 * relative_error(
        weight, plain.dequantized, hessian
    )
