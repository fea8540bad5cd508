"""The grids of quantized rows, and rows with other codes on the same grids.

A block stores scales, minima and codes; a weight is scale * code - minimum for some scale and
minimum that its sub-block shares. An algorithm that chooses codes needs no more than those two for
each weight, and a way to put its codes in the block in place of those that are there. Both are
independent of how scales are packed: the grid is read off what the decoder makes of the lowest and
the highest code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS
from qtool.convert.gguf.types import TENSOR_TYPES


class BlockGrid(NamedTuple):
    """weight = scales * code - minima, code 0 .. highest.

    scales, minima  [rows, columns] float32; a scale may be 0 or negative
    """

    scales: Tensor
    minima: Tensor
    highest: int


def read_grid(type: str, data: Tensor) -> BlockGrid:
    """The grid of rows of blocks, uint8 [rows, row_bytes]."""
    highest = HIGHEST[type]
    columns = data.shape[1] // TENSOR_TYPES[type].block_bytes * TENSOR_TYPES[type].block_size
    codes = torch.zeros(data.shape[0], columns, dtype=torch.uint8)
    read = BLOCK_CODECS[type].dequantize
    low = read(with_codes(type, data, codes))
    high = read(with_codes(type, data, codes + highest))
    return BlockGrid((high - low) / highest, -low, highest)


def with_codes(type: str, data: Tensor, codes: Tensor) -> Tensor:
    """The rows with these codes [rows, columns] uint8, their scales and minima as they were."""
    block = TENSOR_TYPES[type]
    blocks = data.reshape(-1, block.block_bytes).clone()
    _PUT[type](blocks, codes.reshape(-1, block.block_size))
    return blocks.view(data.shape)


def _put_q4_0(blocks: Tensor, codes: Tensor) -> None:
    blocks[:, 2:18] = codes[:, :16] | (codes[:, 16:] << 4)


def _put_q2_k(blocks: Tensor, codes: Tensor) -> None:
    blocks[:, 16:80] = _crumbs(codes)


def _put_q3_k(blocks: Tensor, codes: Tensor) -> None:
    blocks[:, :32] = _bit_planes((codes >> 2).view(-1, 8, 32))
    blocks[:, 32:96] = _crumbs(codes & 3)


def _put_q4_k(blocks: Tensor, codes: Tensor) -> None:
    blocks[:, 16:144] = _nibble_pairs(codes)


def _put_q5_k(blocks: Tensor, codes: Tensor) -> None:
    blocks[:, 16:48] = _bit_planes((codes >> 4).view(-1, 8, 32))
    blocks[:, 48:176] = _nibble_pairs(codes & 15)


def _put_q6_k(blocks: Tensor, codes: Tensor) -> None:
    low = (codes & 15).view(-1, 2, 4, 32)
    pairs = torch.cat([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], -1)
    blocks[:, :128] = pairs.flatten(1)
    blocks[:, 128:192] = _crumbs(codes >> 4)


def _crumbs(codes: Tensor) -> Tensor:
    """[blocks, 256] of 2 bits -> [blocks, 64]: a byte holds elements l, l+32, l+64, l+96."""
    q = codes.view(-1, 2, 4, 32)
    return (q[:, :, 0] | (q[:, :, 1] << 2) | (q[:, :, 2] << 4) | (q[:, :, 3] << 6)).flatten(1)


def _nibble_pairs(codes: Tensor) -> Tensor:
    """[blocks, 256] of 4 bits -> [blocks, 128]: a byte holds elements l and l+32."""
    q = codes.view(-1, 4, 2, 32)
    return (q[:, :, 0] | (q[:, :, 1] << 4)).flatten(1)


def _bit_planes(bits: Tensor) -> Tensor:
    """[blocks, 8, 32] of one bit -> [blocks, 32], the first group lowest."""
    planes = bits[:, 0].clone()
    for group in range(1, 8):
        planes |= bits[:, group] << group
    return planes


_PUT: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q4_0": _put_q4_0,
    "Q2_K": _put_q2_k,
    "Q3_K": _put_q3_k,
    "Q4_K": _put_q4_k,
    "Q5_K": _put_q5_k,
    "Q6_K": _put_q6_k,
}
# The highest code of each type whose codes can be replaced.
HIGHEST = {"Q4_0": 15, "Q2_K": 3, "Q3_K": 7, "Q4_K": 15, "Q5_K": 31, "Q6_K": 63}
