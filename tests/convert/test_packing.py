"""Dense bitstreams: worked words, round trips, and big integers as a second implementation."""

from __future__ import annotations

import doctest

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from qtool.convert import packing
from qtool.convert.packing import (
    AWQ_INVERSE,
    AWQ_ORDER,
    num_words,
    pack,
    reorder,
    unpack,
    unpack_padded,
)

BITS = (2, 3, 4, 5, 6, 7, 8)


def random_codes(bits: int, rows: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, count), generator=generator).to(torch.uint8)


def words(tensor: torch.Tensor) -> list[int]:
    return [int(word) & 0xFFFFFFFF for word in tensor.flatten()]


def test_four_bit_codes_fill_a_word_from_its_low_end() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert words(pack(codes, 4)) == [0x87654321]
    assert words(pack(codes, 8)) == [0x04030201, 0x08070605]


def test_three_bit_code_ten_crosses_into_the_second_word() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = 0b111
    assert words(pack(codes, 3)) == [0b11 << 30, 0b1, 0]


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(packing).failed == 0


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 4),
    count=st.integers(1, 130),
    seed=st.integers(0, 2**31),
)
def test_packing_and_unpacking_give_the_codes_back(
    bits: int, rows: int, count: int, seed: int
) -> None:
    codes = random_codes(bits, rows, count, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, num_words(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100, 344])
def test_a_row_is_one_little_endian_number(bits: int, count: int) -> None:
    codes = random_codes(bits, 3, count)
    for row, packed in zip(codes, pack(codes, bits), strict=True):
        number = sum(int(code) << (i * bits) for i, code in enumerate(row))
        expected = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(num_words(count, bits))]
        assert words(packed) == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [32, 96, 172, 257])
def test_words_are_those_of_compressed_tensors(bits: int, count: int) -> None:
    codes = random_codes(bits, 5, count)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    theirs = pack_to_int32(signed, bits)
    assert torch.equal(pack(codes, bits), theirs)
    back = unpack_from_int32(pack(codes, bits), bits, codes.shape)
    assert torch.equal(back, signed)


def test_leading_axes_and_strided_views_are_taken_as_they_are() -> None:
    codes = random_codes(4, 6, 64).view(2, 3, 64)
    assert torch.equal(pack(codes, 4)[1, 2], pack(codes[1, 2], 4))
    transposed = random_codes(4, 64, 16).t()
    assert torch.equal(pack(transposed, 4), pack(transposed.contiguous(), 4))
    single_row = random_codes(4, 64, 1).t()
    assert torch.equal(unpack(pack(single_row, 4), 4, 64), single_row)


@pytest.mark.parametrize("bits", BITS)
def test_the_padded_layout_keeps_every_code_inside_a_word(bits: int) -> None:
    codes = random_codes(bits, 2, 70)
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -70 % per_word)).view(2, -1, per_word)
    packed = [[sum(int(c) << (bits * i) for i, c in enumerate(word)) for word in row]
              for row in padded]  # fmt: skip
    stored = torch.tensor(packed, dtype=torch.int64).to(torch.int32)
    assert torch.equal(unpack_padded(stored, bits, 70), codes)


def test_the_awq_order_and_its_inverse_undo_each_other() -> None:
    codes = random_codes(4, 3, 64)
    assert torch.equal(reorder(reorder(codes, AWQ_ORDER), AWQ_INVERSE), codes)
    assert sorted(AWQ_ORDER) == list(range(8))
    first_eight = torch.arange(8, dtype=torch.uint8)
    assert words(pack(reorder(first_eight, AWQ_ORDER), 4)) == [0x75316420]
