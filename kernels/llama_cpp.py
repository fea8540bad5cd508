"""Linears on inputs rounded as llama.cpp's CPU backend rounds them, for evaluation.

ggml multiplies each weight type by one type of inputs (`vec_dot_type` of ggml-cpu.c), into which it
rounds every row first; so two programs give the same perplexity of one file only if they round
alike. Of one row of inputs x:

    Q8_0   blocks of 32:  d = max |x| / 127,  q = round(x / d); d is kept in float16
    Q8_1   the same, and s = d * sum q, rounded to float16 from d before it was: what a weight
           d_w * code + m has in m is multiplied by s, not by the q
    Q8_K   blocks of 256: d = max |x| / 127, kept in float32
    F16, BF16, F32   x in that type

`quantize_row_q8_0`, `_q8_1` and `_q8_K` of ggml. The products are those of float32 here, ggml's are
of integers, which are the same up to the order of sums. Blocks stay packed and are unpacked at each
call, some rows at a time: several times slower than the kernels that serve, and as small.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.scheme import QuantScheme
from qtool.settings import Rounding
from qtool.weights import BlockWeight, DenseWeight, QuantizedWeight, Weight

Inputs = Literal["Q8_0", "Q8_1", "Q8_K", "F16", "BF16", "F32"]

INPUTS_OF_TYPE: dict[str, Inputs] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"), "Q8_0"),
    **dict.fromkeys(("Q4_1", "Q5_1"), "Q8_1"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0", "TQ2_0"), "Q8_K"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "Q8_K"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S"), "Q8_K"),
}
INPUTS_OF_DTYPE: dict[torch.dtype, Inputs] = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
BLOCK, SUPER_BLOCK = 32, 256
# Weights that are unpacked at a time: 64 MB in float32.
SLAB_WEIGHTS = 1 << 24


class Packed(NamedTuple):
    """The weight as it is stored, and what its inputs are rounded to.

    minima  [out, blocks] float32, m of Q4_1 and Q5_1; None for other types
    """

    weight: Weight
    inputs: Inputs
    minima: Tensor | None


class RoundedInputs(NamedTuple):
    """values [tokens, in] float32; surplus: of Q8_1, s - d * sum q, [tokens, blocks] float32."""

    values: Tensor
    surplus: Tensor | None


def inputs_of(weight: Weight) -> Inputs | None:
    """What ggml rounds the inputs of such a weight to; None for what it has no type for."""
    if isinstance(weight, DenseWeight):
        return INPUTS_OF_DTYPE.get(weight.values.dtype)
    if isinstance(weight, BlockWeight):
        return INPUTS_OF_TYPE.get(weight.codec.name)
    # Q4_0 and Q8_0, read as codes.
    if isinstance(weight, QuantizedWeight) and isinstance(weight.scheme, QuantScheme):
        is_block = weight.scheme.group_size == BLOCK and weight.scheme.symmetric
        return "Q8_0" if is_block else None
    return None


def takes(weight: Weight) -> bool:
    return inputs_of(weight) is not None


def refuses(
    weight: Weight, dtype: torch.dtype, device: torch.device, activations: Rounding | None
) -> str | None:
    if dtype != torch.float32:
        return f"computes in float32, not {str(dtype).removeprefix('torch.')}"
    return None


def pack(weight: Weight, dtype: torch.dtype, device: torch.device) -> Packed:
    inputs = inputs_of(weight)
    assert inputs is not None, "takes() said that it is"
    minima = None
    if isinstance(weight, BlockWeight):
        if inputs == "Q8_1":
            blocks = weight.data.view(weight.shape[0], -1, weight.codec.block_bytes)
            minima = blocks[..., 2:4].contiguous().view(torch.float16)[..., 0].float().to(device)
        weight = BlockWeight(weight.data.to(device), weight.columns, weight.codec)
    elif isinstance(weight, DenseWeight):
        weight = DenseWeight(weight.values.to(device))
    return Packed(weight, inputs, minima)


def matmul(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [tokens, in] float32 -> [tokens, out] float32."""
    out_features, in_features = packed.weight.shape
    rounded = round_inputs(x, packed.inputs)
    y = x.new_empty(x.shape[0], out_features)
    height = max(1, SLAB_WEIGHTS // in_features)
    for first in range(0, out_features, height):
        rows = torch.arange(first, min(first + height, out_features), device=x.device)
        values = packed.weight.rows(rows).dequantize(torch.float32).to(x.device)
        y[:, first : first + height] = F.linear(rounded.values, values)
    if rounded.surplus is not None and packed.minima is not None:
        y += F.linear(rounded.surplus, packed.minima)
    return y if bias is None else y + bias


def round_inputs(x: Tensor, inputs: Inputs) -> RoundedInputs:
    """x [tokens, in] float32."""
    match inputs:
        case "F32":
            return RoundedInputs(x, None)
        case "F16":
            return RoundedInputs(x.half().float(), None)
        case "BF16":
            return RoundedInputs(x.bfloat16().float(), None)
        case "Q8_K":
            codes, scales = _codes_and_scales(x, SUPER_BLOCK)
            return RoundedInputs((codes * scales).view(x.shape), None)
        case "Q8_0" | "Q8_1":
            codes, scales = _codes_and_scales(x, BLOCK)
            kept = scales.half().float()
            surplus = None
            if inputs == "Q8_1":
                sums = codes.sum(dim=-1, keepdim=True)
                surplus = ((scales * sums).half().float() - kept * sums)[..., 0]
            return RoundedInputs((codes * kept).view(x.shape), surplus)


def _codes_and_scales(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[tokens, blocks, size] whole numbers and [tokens, blocks, 1], both float32."""
    blocks = x.reshape(x.shape[0], -1, size)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    # Multiplied by the inverse, as ggml's code for x86 does: a tie may fall otherwise.
    inverse = torch.where(largest > 0, 127 / largest, torch.zeros_like(largest))
    return (blocks * inverse).round(), largest / 127
