"""The scale search: a hand-worked case, never worse than absmax, and a slow search that agrees."""

from __future__ import annotations

import pytest
import torch

from qtool.grid import codes, dequantize, fit, round_scales
from qtool.quantize.scales import search
from qtool.scheme import QuantScheme

SCHEMES = [
    QuantScheme(4, 32),
    QuantScheme(3, 64),
    QuantScheme(8, None),
    QuantScheme(4, 32, symmetric=False),
]


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    return 0.02 * values * torch.exp(0.5 * torch.randn(rows, 1, generator=generator))


def weighted_error(weight, grid, scheme, importance):  # type: ignore[no-untyped-def]
    back = dequantize(codes(weight, grid, scheme), grid.scales, grid.zeros, scheme)
    return ((back - weight).square() * importance).reshape(*grid.scales.shape, -1).sum(-1)


def test_an_unimportant_outlier_gives_its_range_to_the_rest() -> None:
    """Two bits hold -2 -1 0 1 times the scale. Absmax takes s = -4 from the outlier 8, and 1 and -1
    round to 0. With no weight on the outlier s = 1 is exact for the rest."""
    scheme = QuantScheme(2, 4)
    weight = torch.tensor([[8.0, 1.0, -1.0, -2.0]])
    importance = torch.tensor([0.0, 1.0, 1.0, 1.0])
    plain = fit(weight, scheme)
    assert plain.scales.tolist() == [[-4.0]]
    found = search(weight, scheme, importance, lowest=0.125, highest=1.0, points=8)
    assert found.scales.abs().tolist() == [[1.0]]
    assert weighted_error(weight, found, scheme, importance).item() == 0.0


def test_the_sign_puts_the_extra_code_where_it_is_needed() -> None:
    """-8 .. 7: a group that reaches +8 wants a negative scale, one that reaches -8 a positive."""
    scheme = QuantScheme(4, 4)
    weight = torch.tensor([[8.0, -7.0, 3.0, 1.0], [-8.0, 7.0, 3.0, 1.0]])
    found = search(weight, scheme)
    assert found.scales.tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_never_worse_than_the_absmax_grid(scheme: QuantScheme) -> None:
    weight = heavy_tailed(24, 128)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) ** 4
    found = search(weight, scheme, importance)
    plain = weighted_error(weight, fit(weight, scheme), scheme, importance)
    ours = weighted_error(weight, found, scheme, importance)
    assert bool((ours <= plain * (1 + 1e-6)).all())
    if scheme.bits < 8:
        assert float(ours.sum()) < 0.9 * float(plain.sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scales_are_what_files_store(scheme: QuantScheme) -> None:
    found = search(heavy_tailed(8, 128), scheme)
    assert torch.equal(found.scales, round_scales(found.scales))
    if found.zeros is not None:
        assert torch.equal(found.zeros, found.zeros.round().clamp(0, scheme.num_codes - 1))


def test_agrees_with_a_plain_loop_in_float64() -> None:
    scheme = QuantScheme(4, 32)
    weight, importance = heavy_tailed(6, 64), torch.linspace(0.1, 2.0, 64)
    found = search(weight, scheme, importance, points=24)
    got = weighted_error(weight, found, scheme, importance).double()
    for row in range(6):
        for group in range(2):
            part = slice(32 * group, 32 * (group + 1))
            w, h = weight[row, part].double(), importance[part].double()
            extreme = w[w.abs().argmax()]
            best = float("inf")
            for factor in [1.0, *torch.linspace(0.45, 1.15, 24).tolist()]:
                for sign in (1.0, -1.0):
                    base = round_scales((extreme / -8).float())
                    scale = round_scales(base * sign * factor).double()
                    steps = torch.round(w / scale).clamp(-8, 7)
                    best = min(best, float(((steps * scale - w).square() * h).sum()))
            assert float(got[row, group]) == pytest.approx(best, rel=1e-4)


def test_the_square_of_the_hessian_can_stand_in_for_its_diagonal() -> None:
    scheme = QuantScheme(3, 32)
    weight = heavy_tailed(16, 64)
    inputs = torch.randn(256, 64, generator=torch.Generator().manual_seed(2)) @ torch.randn(
        64, 64, generator=torch.Generator().manual_seed(3)
    )
    hessian = inputs.t() @ inputs / 256
    blocks = torch.stack([hessian[:32, :32], hessian[32:, 32:]])

    def block_error(grid) -> float:  # type: ignore[no-untyped-def]
        back = dequantize(codes(weight, grid, scheme), grid.scales, grid.zeros, scheme)
        d = (back - weight).reshape(16, 2, 32)
        return float(torch.einsum("rgw,gwv,rgv->", d, blocks, d))

    by_diagonal = search(weight, scheme, hessian.diagonal())
    by_blocks = search(weight, scheme, blocks=blocks)
    assert block_error(by_blocks) < block_error(by_diagonal)
