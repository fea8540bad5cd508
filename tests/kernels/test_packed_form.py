"""Packed linears go through a file and compute the same; what would be read beyond is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtool import grid
from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS, quantize
from qtool.errors import FormatError
from qtool.kernels.cpu.native import Native, load
from qtool.kernels.cpu.native_linear import BLOCKS, NativePacked, matmul, pack_for, pack_matrix
from qtool.kernels.cpu.packed_form import freeze, thaw
from qtool.scheme import QuantScheme
from qtool.weights import BlockWeight, QuantizedWeight

OUT, IN = 70, 512


@pytest.fixture(scope="module")
def native() -> Native:
    found = load()
    if not isinstance(found, Native):
        pytest.skip(f"the library {found.reason}")
    return found


def blocks(native: Native, name: str) -> NativePacked:
    values = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    return pack_for(native, BlockWeight(quantize(name, values), IN, BLOCK_CODECS[name]))


def codes(native: Native, word: str) -> NativePacked:
    scheme = QuantScheme.parse(word)
    values = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    found = grid.fit(values, scheme)
    zeros = None if found.zeros is None else found.zeros.to(torch.uint8)
    weight = QuantizedWeight(grid.codes(values, found, scheme), found.scales, zeros, scheme)
    return pack_for(native, weight)


def same(native: Native, packed: NativePacked) -> None:
    tensors, numbers = freeze(packed)
    # As a file has them: bytes, elsewhere.
    again = thaw(native, {name: part.clone() for name, part in tensors.items()}, dict(numbers))
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    assert torch.equal(matmul(x, again, None), matmul(x, packed, None))


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_blocks_come_back_as_they_were(native: Native, name: str) -> None:
    same(native, blocks(native, name))


@pytest.mark.parametrize("word", ["int4-g128-sym", "int4-g32-asym", "int8-row-sym", "int3-g64-sym"])
def test_codes_come_back_as_they_were(native: Native, word: str) -> None:
    same(native, codes(native, word))


def test_a_rounded_head_comes_back_as_it_was(native: Native) -> None:
    values = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(4))
    same(native, pack_matrix(native, values))


@pytest.mark.parametrize(
    "lie",
    [
        {"out_features": 4096},
        {"in_features": 1024},
        {"group": 64},
        {"group": 8},
        {"bits": 8},
        {"bits": 7},
        {"scale_type": 0},
        {"scale_kind": 1},
        {"scale_kind": 99},
        {"step": 512},
        {"span": 4096},
        {"in_features": -512},
    ],
)
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_numbers_that_say_more_than_the_tensors_hold_are_refused(
    native: Native, name: str, lie: dict[str, Any]
) -> None:
    tensors, numbers = freeze(blocks(native, name))
    with pytest.raises(FormatError, match="packed linear"):
        thaw(native, tensors, numbers | lie)


@pytest.mark.parametrize("name", ["codes", "scales", "fields"])
def test_a_tensor_that_is_missing_or_short_is_refused(native: Native, name: str) -> None:
    tensors, numbers = freeze(blocks(native, "Q6_K"))
    short = tensors | {name: tensors[name].flatten()[:-1]}
    for wrong in (short, {key: part for key, part in tensors.items() if key != name}):
        with pytest.raises(FormatError, match="packed linear"):
            thaw(native, wrong, numbers)
