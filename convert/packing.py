"""Dense little-endian bitstreams: the packing under compressed-tensors, GPTQ, AWQ and Marlin.

Code i of a row of b-bit codes takes bits [i*b, (i+1)*b) of the row, and the row is cut into 32-bit
words, least significant bit first, without padding between codes. The words are stored as int32
(a bit pattern: the sign means nothing). Where b divides 32 no code crosses a word; for 3, 5, 6
and 7 bits 32 codes fill exactly b words:

    b = 3      word 0                            word 1
    bits       0-2 3-5 ... 27-29 | 30-31         0 | 1-3 ...
    code       0   1   ... 9     | 10 (low two)  10 (high one) | 11 ...

Worked: codes 1 2 3 4 5 6 7 8 in four bits give the word 0x87654321, in eight bits the two words
0x04030201 and 0x08070605; codes 7 0 5 in three bits give 0b101_000_111 = 0x147.

Why by bytes: eight codes of b bits are always b bytes, so one 64-bit accumulator per eight codes
serves every width, and the bytes of a little-endian stream *are* its words. Two, four and eight
bits never leave uint8. Peak extra memory is about one byte a code. All hosts that torch runs on
are little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32

# AWQ's GEMM kernel wants nibble i of a word to hold output 8c + AWQ_ORDER[i]; AWQ_INVERSE[j] is
# the nibble that holds output 8c + j. Marlin regroups its permutation by the same order.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)

# How the codes of a byte come to lie in bytes of their own: in a word as wide as they will be, the
# upper half is moved up, then the upper half of each half. All passes are over contiguous memory,
# three to four times as fast as writing every second or fourth byte.
_SPREADS: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
}


def num_words(count: int, bits: int) -> int:
    """32-bit words that `count` codes of `bits` bits take.

    >>> num_words(8, 4), num_words(32, 3), num_words(33, 3)
    (1, 3, 4)
    """
    return -(-count * bits // WORD_BITS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis.

    codes    [..., n] uint8, each below 2**bits
    returns  [..., ceil(n * bits / 32)] int32

    >>> hex(pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8), 4).item() & 0xFFFFFFFF)
    '0x87654321'
    """
    _check_bits(bits)
    count = codes.shape[-1]
    words = num_words(count, bits)
    padding = -count % WORD_BITS
    padded = torch.nn.functional.pad(codes, (0, padding)) if padding else codes
    if 8 % bits == 0:
        stream = _pack_within_bytes(padded, bits)
    else:
        stream = _pack_across_bytes(padded, bits)
    # Flat first: a contiguous tensor may have any stride along an axis of length one.
    rows = stream.flatten().view(torch.int32).view(*codes.shape[:-1], -1)
    return rows[..., :words].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row of packed words.

    words    [..., at least ceil(count * bits / 32)] int32
    returns  [..., count] uint8
    """
    _check_bits(bits)
    assert words.dtype == torch.int32, words.dtype
    assert words.shape[-1] >= num_words(count, bits), (tuple(words.shape), bits, count)
    padding = -words.shape[-1] % bits
    padded = torch.nn.functional.pad(words, (0, padding)) if padding else words
    stream = padded.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        codes = _unpack_within_bytes(stream, bits)
    else:
        codes = _unpack_across_bytes(stream, bits)
    return codes[..., :count].contiguous()


def unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of the padded layout: floor(32 / bits) codes a word, its top bits unused.

    Where bits divides 32 this equals `unpack`. compressed-tensors wrote 3, 5, 6 and 7 bits so
    before its 0.18.0; nothing here writes it.

    words    [..., ceil(count / floor(32 / bits))] int32
    returns  [..., count] uint8
    """
    _check_bits(bits)
    shifts = torch.arange(WORD_BITS // bits, dtype=torch.int32, device=words.device) * bits
    fields: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return fields.flatten(-2)[..., :count].to(torch.uint8).contiguous()


def reorder(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Reorder every run of len(order) entries of the last axis: out[j] = run[order[j]].

    AWQ_ORDER before packing four-bit codes gives AWQ's words; AWQ_INVERSE after unpacking undoes
    it.

    >>> reorder(torch.arange(8), AWQ_ORDER)
    tensor([0, 2, 4, 6, 1, 3, 5, 7])
    >>> reorder(reorder(torch.arange(16), AWQ_ORDER), AWQ_INVERSE).equal(torch.arange(16))
    True
    """
    assert codes.shape[-1] % len(order) == 0, (tuple(codes.shape), len(order))
    return _runs(codes, len(order))[..., list(order)].flatten(-2)


def _runs(values: Tensor, length: int) -> Tensor:
    """[..., n] -> [..., n / length, length]."""
    return values.reshape(*values.shape[:-1], -1, length)


def _check_bits(bits: int) -> None:
    assert 2 <= bits <= 8, f"codes of {bits} bits"


def _pack_within_bytes(codes: Tensor, bits: int) -> Tensor:
    """Widths that divide eight: [..., n] uint8 -> [..., n * bits / 8] uint8."""
    if bits == 8:
        return codes.contiguous()
    per_byte = 8 // bits
    fields = _runs(codes, per_byte)
    stream: Tensor = fields[..., 0].clone()
    for i in range(1, per_byte):
        stream |= fields[..., i] << (bits * i)
    return stream


def _unpack_within_bytes(stream: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return stream
    dtype, steps = _SPREADS[bits]
    # Flat: see `pack`.
    codes = stream.flatten().to(dtype)
    for shift, mask in steps:
        codes |= codes << shift
        codes &= mask
    return codes.view(torch.uint8).view(*stream.shape[:-1], stream.shape[-1] * (8 // bits))


def _pack_across_bytes(codes: Tensor, bits: int) -> Tensor:
    """Any width: eight codes gathered in an int64, whose low `bits` bytes are the stream."""
    fields = _runs(codes, 8)
    gathered: Tensor = fields[..., 0].to(torch.int64)
    for i in range(1, 8):
        gathered |= fields[..., i].to(torch.int64) << (bits * i)
    return gathered.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)


def _unpack_across_bytes(stream: Tensor, bits: int) -> Tensor:
    eight_bytes = torch.nn.functional.pad(_runs(stream, bits), (0, 8 - bits))
    gathered = eight_bytes.view(torch.int64).squeeze(-1)
    codes = stream.new_empty(*gathered.shape, 8)
    for i in range(8):
        codes[..., i] = (gathered >> (bits * i)) & (2**bits - 1)
    return codes.flatten(-2)
