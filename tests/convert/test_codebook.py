"""The layout of linears with a table a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtool.convert import codebook
from qtool.convert.layer import FloatSpec
from qtool.errors import FormatError, UnsupportedModel
from qtool.scheme import codebook_scheme
from qtool.weight_parts import Part, take
from qtool.weights import TableWeight


def weight_of(bits: int, out_features: int = 6, in_features: int = 37) -> TableWeight:
    generator = torch.Generator().manual_seed(bits)
    shape = out_features, in_features
    codes = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    tables = torch.randn(out_features, 2**bits, generator=generator).half()
    return TableWeight(codes, tables, codebook_scheme(bits))


def test_a_row_by_hand() -> None:
    """Codes 3 0 1 of two bits are 0b010011, and look up -1, 2 and 5."""
    tables = torch.tensor([[2.0, 5.0, 7.0, -1.0]]).half()
    codes = torch.tensor([[3, 0, 1]], dtype=torch.uint8)
    weight = TableWeight(codes, tables, codebook_scheme(2))
    packed = codebook.pack_layer(weight, torch.bfloat16)
    assert packed["weight_codes"].tolist() == [[0b010011]]
    assert packed["weight_shape"].tolist() == [1, 3]
    assert weight.dequantize().tolist() == [[-1.0, 2.0, 5.0]]


@pytest.mark.parametrize("bits", codebook.BITS)
def test_what_is_packed_is_unpacked(bits: int) -> None:
    weight = weight_of(bits)
    spec = FloatSpec("m", codebook_scheme(bits))
    tensors = codebook.pack_layer(weight, torch.bfloat16)
    found = codebook.unpack_layer(tensors, spec)
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.tables, weight.tables)
    assert found.bits == bits
    expected = torch.stack(
        [weight.tables[o, weight.codes[o].long()] for o in range(weight.shape[0])]
    )
    assert torch.equal(found.dequantize(torch.float16), expected)


def test_rows_and_columns_are_taken() -> None:
    weight = weight_of(3)
    whole = weight.dequantize()
    part = take(weight, Part(rows=(range(1, 3), range(5, 6)), columns=range(4, 20)))
    assert torch.equal(part.dequantize(), whole[[1, 2, 5]][:, 4:20])


@pytest.mark.parametrize(
    ("suffix", "broken", "message"),
    [
        ("weight_codes", torch.zeros(6, 9, dtype=torch.int32), "has shape"),
        ("weight_tables", torch.zeros(6, 8).half(), "has shape"),
        ("weight_tables", torch.zeros(6, 16, dtype=torch.int8), "is torch.int8"),
        ("weight_shape", torch.tensor([6, 2**40]), "has shape"),
        ("weight_shape", torch.tensor([0, 37]), "weight_shape is"),
    ],
)
def test_damaged_tensors_are_refused(suffix: str, broken: torch.Tensor, message: str) -> None:
    tensors = codebook.pack_layer(weight_of(4), torch.bfloat16) | {suffix: broken}
    with pytest.raises(FormatError, match=message):
        codebook.unpack_layer(tensors, FloatSpec("m", codebook_scheme(4)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 2}, UnsupportedModel, "version 2"),
        ({"layers": None}, FormatError, "no table of layers"),
        ({"layers": {"m": 7}}, FormatError, "codes of 7 bits"),
        ({"layers": {"m": 4, "other": 4}}, FormatError, "has no tensors"),
    ],
)
def test_a_config_that_says_otherwise_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = codebook.quantization_config({"m": codebook_scheme(4)}, ["lm_head"]) | change
    with pytest.raises(error, match=message):
        codebook.read(config, ["m"], "config.json")
