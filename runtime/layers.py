"""Linears as the decoder calls them: packed by the kernel that was chosen, fused where one input
feeds several.

Fusing q, k and v (and gate and up) into one matrix saves two calls a block and lets the kernel see
more rows at once. It needs weights that one kernel takes in one layout; where a file mixes them
(mixed widths, K-quant mixes, a layer left in 16 bit), those that need unpacking anyway are unpacked
and fused, and the rest are called one by one.

A head in 16 bits is more than half of the bytes that a token of a 0.5B model in 4 bits reads. In 8
bits, one scale a row, it is half of that, and costs a KL divergence of 0.8e-4 on the bundled model,
as much as computing in bfloat16 does; in 4 bits (groups of 32) 50e-4. So 8 bits are the default
beside quantized layers (`lm_head`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtool import grid
from qtool.kernels.cpu import native_linear
from qtool.kernels.cpu.native import Native, load
from qtool.kernels.dispatch import KERNELS, Choice, LinearKernel, choose
from qtool.runtime.config import LmHead
from qtool.scheme import QuantScheme
from qtool.settings import Rounding
from qtool.weights import BlockWeight, DenseWeight, QuantizedWeight, Weight


class PackingRules(NamedTuple):
    """What the user asked of packed layers.

    activations  "int8": quantized layers may round their inputs to 8 bits, also in float32;
                 "bf16": they may not; "llama.cpp": as that does; None: by default
    lm_head      bits that a head in floating point is rounded to; auto: int8 beside layers that
                 round their inputs to 8 bits, else as it is
    """

    activations: Rounding | None = None
    lm_head: LmHead = "auto"


DEFAULT_RULES = PackingRules()


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """x [tokens, in] -> [tokens, out], by one kernel."""

    kernel: LinearKernel
    packed: Any
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernel.matmul(x, self.packed, self.bias)

    @property
    def nbytes(self) -> int:
        tensors = [part for part in (*self.packed, self.bias) if isinstance(part, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    def shares(self, tensor: Tensor) -> bool:
        """Whether the weight is that very tensor, as a tied head's can be, also a wrapped one's."""
        return any(
            part is tensor or (isinstance(part, Linear) and part.shares(tensor))
            for part in self.packed
        )


@dataclass(frozen=True, slots=True, eq=False)
class Linears:
    """Several linears of one input, side by side: [tokens, out of the first + second + ...]."""

    parts: tuple[Linear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Fused:
    """A packed layer and the choice made for each of the weights in it."""

    layer: Linear | Linears
    choices: tuple[Choice, ...]


def pack(
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    device: torch.device,
    rules: PackingRules = DEFAULT_RULES,
) -> Fused:
    """One layer from weights [out_i, in] that share an input."""
    choices = tuple(choose(weight, dtype, device, rules.activations) for weight in weights)
    if len(weights) > 1 and not any(choice.kernel.keeps_packed for choice in choices):
        dense = torch.cat([weight.dequantize(dtype) for weight in weights])
        whole: Weight | None = DenseWeight(dense)
    else:
        whole = concatenate(weights)
    if whole is not None:
        bias = _concatenate_biases(weights, biases, dtype, device)
        return Fused(_pack_one(whole, choices[0].kernel, bias, dtype, device), choices)
    parts = [
        _pack_one(
            weight,
            choice.kernel,
            None if bias is None else bias.to(device, dtype),
            dtype,
            device,
        )
        for weight, choice, bias in zip(weights, choices, biases, strict=True)
    ]
    return Fused(Linears(tuple(parts)), choices)


def pack_head(
    weight: Weight,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    rules: PackingRules,
    *,
    beside_native: bool,
) -> tuple[Linear, Choice]:
    """The head [vocab, in]; beside_native: the other layers round their inputs to 8 bits."""
    asked = rules.lm_head
    fits = weight.shape[1] % native_linear.STRIP == 0
    refusal = native_linear.refuses_any(dtype, device, rules.activations)
    native = load() if refusal is None and fits else None
    if not isinstance(weight, DenseWeight) or asked == "bf16":
        pass
    elif isinstance(native, Native) and (asked == "int8" or (asked == "auto" and beside_native)):
        packed = native_linear.pack_matrix(native, weight.values.to(dtype))
        kernel = next(row for row in KERNELS if row.name == "native_w4a8")
        bias = None if bias is None else bias.to(device, dtype)
        return Linear(kernel, packed, bias), Choice(kernel, "rounded to 8 bits a row at load")
    elif asked in ("int8", "int4"):
        word = "int8-row-sym" if asked == "int8" else "int4-g32-sym"
        weight = _round_to_nearest(weight.values, word)
    fused = pack([weight], [bias], dtype, device, rules)
    assert isinstance(fused.layer, Linear)
    return fused.layer, fused.choices[0]


def _round_to_nearest(values: Tensor, word: str) -> QuantizedWeight:
    scheme = QuantScheme.parse(word)
    codes, scales = [], []
    for first in range(0, len(values), 4096):
        rows = values[first : first + 4096]
        found = grid.fit(rows.float(), scheme)
        codes.append(grid.codes(rows.float(), found, scheme))
        scales.append(found.scales)
    return QuantizedWeight(torch.cat(codes), torch.cat(scales), None, scheme)


def _pack_one(
    weight: Weight,
    kernel: LinearKernel,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Linear:
    return Linear(kernel, kernel.pack(weight, dtype, device), bias)


def concatenate(weights: Sequence[Weight]) -> Weight | None:
    """[out_1 + out_2 + ..., in] stored as each of them is, or None where they differ."""
    first = weights[0]
    if len(weights) == 1:
        return first
    dense = [weight for weight in weights if isinstance(weight, DenseWeight)]
    codes = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    blocks = [weight for weight in weights if isinstance(weight, BlockWeight)]
    if len(dense) == len(weights) and len({weight.values.dtype for weight in dense}) == 1:
        return DenseWeight(torch.cat([weight.values for weight in dense]))
    if len(codes) == len(weights) and len({weight.scheme for weight in codes}) == 1:
        zeros = [weight.zeros for weight in codes if weight.zeros is not None]
        return QuantizedWeight(
            torch.cat([weight.codes for weight in codes]),
            torch.cat([weight.scales for weight in codes]),
            torch.cat(zeros) if zeros else None,
            codes[0].scheme,
        )
    if len(blocks) == len(weights) and len({weight.codec.name for weight in blocks}) == 1:
        data = torch.cat([weight.data for weight in blocks])
        return BlockWeight(data, blocks[0].columns, blocks[0].codec)
    return None


def _concatenate_biases(
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    parts = [
        torch.zeros(weight.shape[0]) if bias is None else bias.float()
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return torch.cat(parts).to(device, dtype)
