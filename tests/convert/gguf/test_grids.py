"""Grids read off blocks, and blocks with other codes on the same grids."""

from __future__ import annotations

import pytest
import torch

from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS, quantize
from qtool.convert.gguf.grids import HIGHEST, read_grid, with_codes


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(24, 512, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("type", HIGHEST)
def test_the_codes_that_a_grid_gives_back_are_the_blocks_own(type: str) -> None:
    data = quantize(type, rows())
    grid = read_grid(type, data)
    values = BLOCK_CODECS[type].dequantize(data)
    safe = torch.where(grid.scales == 0, 1.0, grid.scales)
    codes = torch.round((values + grid.minima) / safe)
    assert 0 <= int(codes.min()) < int(codes.max()) <= grid.highest
    assert torch.allclose(grid.scales * codes - grid.minima, values, atol=1e-5)
    assert with_codes(type, data, codes.to(torch.uint8)).equal(data)


@pytest.mark.parametrize("type", HIGHEST)
def test_any_codes_can_be_put_in_and_scales_stay(type: str) -> None:
    data = quantize(type, rows(1))
    grid = read_grid(type, data)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, grid.highest + 1, (24, 512), generator=generator)
    changed = with_codes(type, data, codes.to(torch.uint8))
    values = BLOCK_CODECS[type].dequantize(changed)
    assert torch.allclose(values, grid.scales * codes - grid.minima, atol=1e-5)
    again = read_grid(type, changed)
    assert again.scales.equal(grid.scales)
    assert again.minima.equal(grid.minima)


def test_a_q4_0_block_by_hand() -> None:
    data = torch.zeros(1, 18, dtype=torch.uint8)
    data[0, :2] = torch.tensor([0.5]).half().view(torch.uint8)
    grid = read_grid("Q4_0", data)
    assert grid.scales.unique().tolist() == [0.5]
    assert grid.minima.unique().tolist() == [4.0]  # 8 halves below zero
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    assert with_codes("Q4_0", data, codes)[0, 2:5].tolist() == [0x00, 0x11, 0x22]
