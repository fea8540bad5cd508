"""TQ1_0, TQ2_0 (ternary) and MXFP4: blocks whose scale follows from their largest weight alone.

    type   block  bytes                    weight
    TQ1_0  256    qs[48] qh[4] d h         d (t - 1), five trits t a byte (qh: four)
    TQ2_0  256    qs[64] d h               d (q - 1), four q of two bits a byte
    MXFP4  32     e qs[16]                 2**(e - 128) times 0 1 2 3 4 6 8 12 or a negative of it

A byte of trits b is the fraction b / 256 of t0/3 + t1/9 + .. rounded up, so that a trit is the
integer part of three times what is left (ggml-quants.c). A ternary scale is the largest magnitude,
which suits weights that are ternary already and no others. The exponent of MXFP4 is that of the
largest magnitude less two, 6 being the largest value of E2M1 (OCP Microscaling formats 1.0).
Importance is not used, as in the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.convert.gguf.blocks.lanes import finite_inverse, half_bytes, round_away

SUPER = 256
_MXFP4_BLOCK = 32
# Twice the values of E2M1, by code.
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def quantize_tq1_0(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """[rows, columns] float32 -> [rows, bytes] uint8. So are the others."""
    trits, scale = _trits(rows)
    first = _trit_bytes(trits[:, :160].view(-1, 5, 32))
    second = _trit_bytes(trits[:, 160:240].view(-1, 5, 16))
    last = trits[:, 240:].view(-1, 4, 4)
    third = _trit_bytes(torch.cat([last, torch.zeros_like(last[:, :1])], 1))
    return torch.cat([first, second, third, scale], 1).view(rows.shape[0], -1)


def quantize_tq2_0(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    trits, scale = _trits(rows)
    q = trits.to(torch.uint8).view(-1, 2, 4, 32)
    packed = q[:, :, 0] | (q[:, :, 1] << 2) | (q[:, :, 2] << 4) | (q[:, :, 3] << 6)
    return torch.cat([packed.flatten(1), scale], 1).view(rows.shape[0], -1)


def quantize_mxfp4(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    x = rows.reshape(-1, _MXFP4_BLOCK)
    peak = x.abs().amax(1)
    # float32 of the exact logarithm, which is what a good log2f gives just below a power of two
    exponent = torch.log2(torch.where(peak > 0, peak, 1.0).double()).float().floor().to(torch.int32)
    exponent = torch.where(peak > 0, exponent - 2 + 127, 0).clamp_(0, 254)
    # 2**(e - 128) by its bits; the two smallest are subnormal
    bits = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    scale = bits.view(torch.float32)
    values = torch.tensor(MXFP4_VALUES, dtype=torch.float32)
    distance = (values * scale[:, None, None] - x.unsqueeze(-1)).abs_()
    codes = _first_least(distance).to(torch.uint8)
    packed = codes[:, :16] | (codes[:, 16:] << 4)
    return torch.cat([exponent.to(torch.uint8)[:, None], packed], 1).view(rows.shape[0], -1)


def _first_least(values: Tensor) -> Tensor:
    """Along the last dimension, the index of the least, the first of equals."""
    best, found = values[..., 0], torch.zeros(values.shape[:-1], dtype=torch.int32)
    for index in range(1, values.shape[-1]):
        closer = values[..., index] < best
        best = torch.where(closer, values[..., index], best)
        found = torch.where(closer, index, found)
    return found


def _trits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """0, 1 or 2 of each weight, int32 [blocks, 256]; the scales' bytes [blocks, 2]."""
    x = rows.reshape(-1, SUPER)
    peak = x.abs().amax(1)
    empty = peak == 0
    inverse = torch.ones(()) / torch.where(empty, 1.0, peak)
    inverse = finite_inverse(torch.where(empty, 0.0, inverse))
    return (round_away(x * inverse[:, None]) + 1).to(torch.int32), half_bytes(peak)


def _trit_bytes(trits: Tensor) -> Tensor:
    """[blocks, 5, n] -> [blocks, n] uint8, the first trit the most significant."""
    number = trits[:, 0]
    for place in range(1, 5):
        number = number * 3 + trits[:, place]
    return ((number * 256 + 242) // 243).to(torch.uint8)
