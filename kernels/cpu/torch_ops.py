"""Linears and small operations from what PyTorch's CPU build carries; always there, no compiler.

Weights are kept packed where a torch operator computes what the file says, and are dequantized
once, at load, everywhere else:

int4pack    `aten::_weight_int4pack_mm_for_cpu`: 4-bit codes in groups of 32, 64, 128 or 256, with
            bfloat16 activations; computes (code - 8) * scale + offset in float32. In float32 and
            float16 the operator is a scalar loop, 20 to 40 times slower than a dense product, so
            those are refused.
int8pack    `aten::_weight_int8pack_mm`: 8-bit codes with one scale a row, bfloat16.
onednn      a bfloat16 matrix laid out once as oneDNN wants it. `F.linear` lays it out anew on each
            call, and gives the same numbers to the last bit: one token by 9728 x 896 on one core
            takes 1.7 ms, laid out before 0.4; by a head of 151936 x 896, 31 and 15 ms.
dense       a matrix in any type, `F.linear`.

Both packed operators lose to a dense product when many tokens come at once: their cost grows with
every token, while unpacking costs once. Milliseconds on one core of Zen 5 (AVX-512, torch 2.13):

    9728 x 896 int4    64 tokens: 13.4 packed, 13.6 unpacked    512 tokens: 105 packed, 52 unpacked
    4096 x 1024 int8    8 tokens: 0.9 packed, 1.1 unpacked       16 tokens: 1.7 packed, 1.4 unpacked

So a prefill chunk unpacks each layer once, slice by slice into a scratch of SCRATCH_BYTES that
stays in the cache, and multiplies by that; a dense copy kept beside would take 44 of the 52.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.settings import Rounding
from qtool.weights import QuantizedWeight, Weight

# Rows that the layout is made for. 32 serves 1 as well as 512, a layout made for 1 does not.
ONEDNN_ROWS = 32
INT4_GROUPS = (32, 64, 128, 256)
INT4_DENSE_ABOVE = 64
INT8_DENSE_ABOVE = 12
SCRATCH_BYTES = 4 << 20
# The operator packs 64 output rows side by side; fewer at the end of a matrix have other layouts.
INT4_ROWS = 64
# The operator reads 16 columns at a time, past the end of a row that is no multiple: torch checks
# nothing and the process dies.
INT8_COLUMNS = 16


class DensePacked(NamedTuple):
    """values [out, in], the activations' dtype."""

    values: Tensor


class OneDnnPacked(NamedTuple):
    """weight [out, in] bfloat16, in a layout that only oneDNN reads."""

    weight: Tensor


class Int4Packed(NamedTuple):
    """words [out / 64, in, 32] uint8: code of row n in the low bits, of row n + 32 in the high.

    scales_and_offsets  [groups, out, 2] bfloat16: weight = (code - 8) * scale + offset
    out_features        rows before padding to a multiple of 64
    """

    words: Tensor
    scales_and_offsets: Tensor
    group_size: int
    out_features: int


class Int8Packed(NamedTuple):
    """codes [out, in] int8, scales [out] bfloat16."""

    codes: Tensor
    scales: Tensor


def dense_pack(weight: Weight, dtype: torch.dtype, device: torch.device) -> DensePacked:
    return DensePacked(weight.dequantize(dtype).to(device).contiguous())


def dense_matmul(x: Tensor, packed: DensePacked, bias: Tensor | None) -> Tensor:
    return F.linear(x, packed.values, bias)


def onednn_refuses(
    weight: Weight,
    dtype: torch.dtype,
    device: torch.device,
    activations: Rounding | None,
) -> str | None:
    refusal = _refuses_activations(dtype, device)
    if refusal is not None:
        return refusal
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "is not in this build of PyTorch"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "needs a CPU with AVX-512 or better for bfloat16"
    return None


def onednn_pack(weight: Weight, dtype: torch.dtype, device: torch.device) -> OneDnnPacked:
    values = weight.dequantize(dtype).contiguous()
    return OneDnnPacked(torch.ops.mkldnn._reorder_linear_weight(values, ONEDNN_ROWS))


def onednn_matmul(x: Tensor, packed: OneDnnPacked, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.weight, bias, "none", [], "")
    return y


def int4_refuses(
    weight: QuantizedWeight,
    dtype: torch.dtype,
    device: torch.device,
    activations: Rounding | None,
) -> str | None:
    group = weight.scheme.group_width(weight.shape[1])
    if group not in INT4_GROUPS:
        return f"takes groups of {', '.join(map(str, INT4_GROUPS))}, these have {group}"
    return _refuses_activations(dtype, device)


def _refuses_activations(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"runs on cpu, not {device.type}"
    if dtype != torch.bfloat16:
        return f"takes bfloat16 activations, these are {str(dtype).removeprefix('torch.')}"
    return None


def int4_pack(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Int4Packed:
    out_features, in_features = weight.shape
    missing = -out_features % INT4_ROWS
    codes, scales = weight.codes, weight.scales.float()
    if weight.zeros is None:
        offsets = torch.zeros_like(scales)
    else:
        offsets = (weight.scheme.midpoint - weight.zeros.float()) * scales
    if missing:
        codes, scales, offsets = (
            F.pad(part, (0, 0, 0, missing)) for part in (codes, scales, offsets)
        )
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    both = torch.stack((scales.t(), offsets.t()), dim=-1).to(dtype).contiguous()
    group = weight.scheme.group_width(in_features)
    return Int4Packed(words, both, group, out_features)


def int4_matmul(x: Tensor, packed: Int4Packed, bias: Tensor | None) -> Tensor:
    if x.shape[0] > INT4_DENSE_ABOVE and _words_lie_in_rows_of_64():
        y = _int4_through_dense(x, packed)
    else:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, packed.words, packed.group_size, packed.scales_and_offsets
        )
    y = y[:, : packed.out_features]
    return y if bias is None else y + bias


def _int4_through_dense(x: Tensor, packed: Int4Packed) -> Tensor:
    """Unpack a slice of the output rows into a dense matrix, multiply, take the next slice."""
    tokens, in_features = x.shape
    num_panels = packed.words.numel() // (in_features * INT4_ROWS // 2)
    panels = packed.words.view(num_panels, in_features, INT4_ROWS // 2)
    at_once = max(1, SCRATCH_BYTES // (in_features * INT4_ROWS * x.element_size()))
    y = x.new_empty(tokens, num_panels * INT4_ROWS)
    for start in range(0, num_panels, at_once):
        columns = slice(start * INT4_ROWS, (start + at_once) * INT4_ROWS)
        dense = _unpack_panels(
            panels[start : start + at_once],
            packed.scales_and_offsets[:, columns],
            packed.group_size,
        )
        y[:, columns] = x @ dense
    return y


def _unpack_panels(words: Tensor, scales_and_offsets: Tensor, group_size: int) -> Tensor:
    """words [panels, in, 32] uint8 -> weights [in, panels * 64], transposed and dequantized.

    Panel p holds rows 64 p .. 64 p + 63: byte j of its line i has weight [64 p + j, i] in the low
    bits and [64 p + 32 + j, i] in the high ones.
    """
    panels, in_features, half = words.shape
    dense = scales_and_offsets.new_empty(in_features, panels, 2 * half)
    lines = words.transpose(0, 1)
    dense[..., :half] = lines & 15
    dense[..., half:] = lines >> 4
    grouped = dense.view(in_features // group_size, group_size, panels * 2 * half)
    # Contiguous, or the multiplication below takes 10 times as long.
    scales, offsets = scales_and_offsets.unsqueeze(1).movedim(-1, 0).contiguous()
    grouped.sub_(8).mul_(scales)
    if offsets.any():
        grouped.add_(offsets)
    return dense.view(in_features, panels * 2 * half)


@functools.cache
def _words_lie_in_rows_of_64() -> bool:
    """Whether this CPU's operator packs as `_unpack_panels` reads; builds without AVX-512 do not.

    The layout is torch's own business, so it is asked and not assumed.
    """
    codes = torch.arange(INT4_ROWS * 32, dtype=torch.int32).mul_(7).remainder_(16).view(-1, 32)
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).view(1, 32, -1)
    if words.shape[-1] != INT4_ROWS // 2:
        return False
    plain = torch.stack((torch.ones(1, INT4_ROWS), torch.zeros(1, INT4_ROWS)), dim=-1)
    return torch.equal(_unpack_panels(words, plain, 32).t(), codes.float() - 8)


def int8_refuses(
    weight: QuantizedWeight,
    dtype: torch.dtype,
    device: torch.device,
    activations: Rounding | None,
) -> str | None:
    scheme = weight.scheme
    if not scheme.symmetric:
        return "takes symmetric codes, these have zero points"
    if scheme.num_groups(weight.shape[1]) != 1:
        return f"takes one scale a row, these have one for {scheme.group_size} columns"
    if weight.shape[1] % INT8_COLUMNS:
        return f"takes rows of a multiple of {INT8_COLUMNS}, these have {weight.shape[1]}"
    return _refuses_activations(dtype, device)


def int8_pack(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Int8Packed:
    codes = weight.codes.to(torch.int16).sub_(weight.scheme.midpoint).to(torch.int8)
    return Int8Packed(codes.contiguous(), weight.scales[:, 0].to(dtype).contiguous())


def int8_matmul(x: Tensor, packed: Int8Packed, bias: Tensor | None) -> Tensor:
    if x.shape[0] > INT8_DENSE_ABOVE:
        # Whole numbers up to 256 are exact in bfloat16, so nothing is lost before the product.
        y = F.linear(x, packed.codes.to(x.dtype)).mul_(packed.scales)
    else:
        y = torch.ops.aten._weight_int8pack_mm(x, packed.codes, packed.scales)
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., channels], weight [channels] or None for ones."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim]; cos, sin [tokens, 1, head_dim].

    The angles are repeated over both halves of a head, and the first half of sin is negated, so
    that rotating the pairs is one roll by half a head and one multiply-add.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[tokens, 2 * channels], gates first -> [tokens, channels]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
