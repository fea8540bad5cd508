"""Linears that multiply in 8 bits on a GPU: rows of activations are rounded, then PyTorch's own
products run at twice the rate of 16 bits.

fp8   weights in e4m3 with a scale a row or one in all; activations in e4m3, a scale a token.
      `torch._scaled_mm`, from compute capability 8.9 on.
int8  weights in int8 with a scale a row; activations in int8, a scale a token. `torch._int_mm`
      wants more than 16 rows: fewer are padded.

An fp8 checkpoint is meant to be run so. Codes of 8 bits are multiplied by activations in 16 bits
(`marlin_linear`) unless the user asks for int8: a few rows take as long either way, as they wait
for the same bytes of weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.kernels.cuda.fused import quantize_rows
from qtool.kernels.cuda.launch import FLOAT8_CAPABILITY, has_float8, obstacle
from qtool.settings import Rounding
from qtool.weights import Float8Weight, QuantizedWeight, Weight

# What `torch._scaled_mm` wants inputs and outputs to be a multiple of; `torch._int_mm` wants 8.
MULTIPLE = 16
INT8_LEAST_ROWS = 32


class EightBitPacked(NamedTuple):
    """values [out, in] float8_e4m3fn or int8; scales [1, out] float32."""

    values: Tensor
    scales: Tensor


def fp8_takes(weight: Weight) -> bool:
    return isinstance(weight, Float8Weight)


def fp8_refuses(
    weight: Float8Weight,
    dtype: torch.dtype,
    device: torch.device,
    activations: Rounding | None,
) -> str | None:
    found = obstacle(device)
    if found is not None:
        return found
    if activations == "bf16":
        return "rounds activations to 8 bits, and bf16 was asked for"
    if not has_float8(device):
        least, has = FLOAT8_CAPABILITY, torch.cuda.get_device_capability(device)
        return "needs compute capability {}.{}, this GPU has {}.{}".format(*least, *has)
    return fp8_refuses_weight(weight, dtype)


def fp8_refuses_weight(weight: Float8Weight, dtype: torch.dtype) -> str | None:
    if weight.values.dtype != torch.float8_e4m3fn:
        return f"takes e4m3, this is {str(weight.values.dtype).removeprefix('torch.')}"
    if weight.scheme.block not in ((1, None), (None, None)):
        return f"takes a scale a row or one in all, this is {weight.scheme}"
    return _refuses_sizes(weight.shape, dtype)


def _refuses_sizes(shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"gives bfloat16, activations are {str(dtype).removeprefix('torch.')}"
    if shape[0] % MULTIPLE or shape[1] % MULTIPLE:
        return f"takes sizes that are multiples of {MULTIPLE}, this is {shape[0]} x {shape[1]}"
    return None


def fp8_pack(weight: Float8Weight, dtype: torch.dtype, device: torch.device) -> EightBitPacked:
    scales = weight.scales.float().expand(weight.shape[0], 1).t()
    return EightBitPacked(weight.values.to(device).contiguous(), scales.to(device).contiguous())


def fp8_matmul(x: Tensor, packed: EightBitPacked, bias: Tensor | None) -> Tensor:
    codes, scales = quantize_rows(x, torch.float8_e4m3fn)
    y: Tensor = torch._scaled_mm(
        codes, packed.values.t(), scales[:, None], packed.scales, out_dtype=x.dtype
    )
    return y if bias is None else y + bias


def int8_takes(weight: Weight) -> bool:
    return isinstance(weight, QuantizedWeight) and weight.scheme.bits == 8


def int8_refuses(
    weight: QuantizedWeight,
    dtype: torch.dtype,
    device: torch.device,
    activations: Rounding | None,
) -> str | None:
    found = obstacle(device)
    if found is not None:
        return found
    if activations != "int8":
        return "rounds activations to 8 bits, which was not asked for"
    return int8_refuses_weight(weight, dtype)


def int8_refuses_weight(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    if not weight.scheme.symmetric:
        return "takes symmetric codes, these have zero points"
    if weight.scheme.num_groups(weight.shape[1]) != 1:
        return f"takes one scale a row, these have one for {weight.scheme.group_size} columns"
    return _refuses_sizes(weight.shape, dtype)


def int8_pack(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> EightBitPacked:
    codes = weight.codes.to(device).to(torch.int16).sub_(weight.scheme.midpoint).to(torch.int8)
    return EightBitPacked(codes.contiguous(), weight.scales.float().t().to(device).contiguous())


def int8_matmul(x: Tensor, packed: EightBitPacked, bias: Tensor | None) -> Tensor:
    codes, scales = quantize_rows(x, torch.int8)
    rows = len(codes)
    padded = F.pad(codes, (0, 0, 0, max(0, INT8_LEAST_ROWS - rows)))
    sums = torch._int_mm(padded, packed.values.t())[:rows]
    y = (sums.float() * scales[:, None] * packed.scales).to(x.dtype)
    return y if bias is None else y + bias
