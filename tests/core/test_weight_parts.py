"""Parts of weights hold the values of the whole, whatever they are stored as."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool import grid
from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS
from qtool.errors import UnsupportedModel
from qtool.scheme import FloatScheme, QuantScheme
from qtool.weight_parts import WHOLE, Part, take
from qtool.weights import (
    BlockWeight,
    CodebookWeight,
    DenseWeight,
    Float8Weight,
    QuantizedWeight,
    Weight,
)


def quantized(word: str, out_features: int = 6, in_features: int = 256) -> QuantizedWeight:
    scheme = QuantScheme.parse(word)
    values = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    found = grid.fit(values, scheme)
    zeros = None if found.zeros is None else found.zeros.to(torch.uint8)
    return QuantizedWeight(grid.codes(values, found, scheme), found.scales, zeros, scheme)


def float8(block: tuple[int | None, int | None]) -> Float8Weight:
    rows = 1 if block[0] is None else -(-6 // block[0])
    columns = 1 if block[1] is None else -(-256 // block[1])
    values = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    scales = torch.rand(rows, columns) + 0.5
    return Float8Weight(values.to(torch.float8_e4m3fn), scales, FloatScheme("fp8", block))


def codebook(block: int) -> CodebookWeight:
    codes = torch.randint(0, 16, (6, 256), generator=torch.Generator().manual_seed(0))
    scales = torch.rand(-(-6 * 256 // block)) + 0.5
    return CodebookWeight(
        codes.to(torch.uint8), torch.randn(16), scales, FloatScheme("nf4", (1, block))
    )


WEIGHTS: dict[str, Weight] = {
    "dense": DenseWeight(torch.randn(6, 256)),
    "int4-g128-sym": quantized("int4-g128-sym"),
    "int3-g32-asym": quantized("int3-g32-asym"),
    "int8-row-asym": quantized("int8-row-asym"),
    "fp8-tensor": float8((None, None)),
    "fp8-row": float8((1, None)),
    "fp8-128x128": float8((128, 128)),
    "fp8-4x96": float8((4, 96)),
    "nf4-g64": codebook(64),
    "nf4 across rows": codebook(96),
}


@pytest.mark.parametrize("name", WEIGHTS)
@given(
    edges=st.lists(st.integers(0, 256), min_size=2, max_size=2, unique=True).map(sorted),
    rows=st.lists(
        st.lists(st.integers(0, 6), min_size=2, max_size=2, unique=True).map(sorted),
        min_size=1,
        max_size=3,
    ),
)
def test_a_part_has_the_values_of_the_whole(
    name: str, edges: list[int], rows: list[list[int]]
) -> None:
    weight = WEIGHTS[name]
    runs = tuple(range(start, stop) for start, stop in rows)
    found = take(weight, Part(runs, range(*edges)))
    whole = weight.dequantize()
    expected = torch.cat([whole[run.start : run.stop] for run in runs])[:, slice(*edges)]
    assert found.shape == tuple(expected.shape)
    assert torch.equal(found.dequantize(), expected)


def test_a_cut_group_becomes_two_of_one_scale() -> None:
    """Columns 0 to 191 of groups of 128: groups of 64 with the scales of 0, 0, 1."""
    weight = quantized("int4-g128-sym")
    found = take(weight, Part(columns=range(192)))
    assert isinstance(found, QuantizedWeight)
    assert found.scheme == QuantScheme(4, 64)
    assert torch.equal(found.scales, weight.scales[:, [0, 0, 1]])
    whole_groups = take(weight, Part(columns=range(128, 256)))
    assert isinstance(whole_groups, QuantizedWeight)
    assert whole_groups.scheme == weight.scheme


@pytest.mark.parametrize("type", ["Q4_0", "Q6_K"])
def test_blocks_are_taken_whole(type: str) -> None:
    codec = BLOCK_CODECS[type]
    generator = torch.Generator().manual_seed(0)
    size = (4, 3 * codec.block_bytes)
    data = torch.randint(0, 60, size, generator=generator).to(torch.uint8)
    weight = BlockWeight(data, 3 * codec.block_size, codec)
    edge = codec.block_size
    found = take(weight, Part((range(1, 3),), range(edge, 3 * edge)))
    assert isinstance(found, BlockWeight)
    assert found.data.untyped_storage().nbytes() == 2 * 2 * codec.block_bytes
    assert torch.equal(found.dequantize(), weight.dequantize()[1:3, edge:])
    columns = take(weight, Part(columns=range(edge)))
    assert isinstance(columns, BlockWeight)
    assert columns.data.untyped_storage().nbytes() == 4 * codec.block_bytes
    with pytest.raises(UnsupportedModel, match=f"cut a {type} block of {edge}"):
        take(weight, Part(columns=range(edge // 2)))


def test_a_part_keeps_nothing_else_in_memory() -> None:
    values = torch.randn(100, 64)
    found = take(DenseWeight(values), Part(rows=(range(10, 20),)))
    assert isinstance(found, DenseWeight)
    assert found.values.untyped_storage().nbytes() == 10 * 64 * 4
    weight = DenseWeight(values)
    assert take(weight, WHOLE) is weight
