"""Which kernel multiplies by a weight, and why that one.

A kernel is a row of a table: what it refuses, how it packs a weight once, how it multiplies by the
packed form. `choose` takes the first row that does not refuse. The choice carries its reason, so
that the table printed at start-up tells why a layer does not run packed; when every row refuses,
the error lists what each of them said. A new kernel is one more row, before those it beats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.errors import UnsupportedModel
from qtool.kernels import llama_cpp
from qtool.kernels.cpu import native_linear, torch_ops
from qtool.kernels.cuda import eight_bit_linear, marlin_linear
from qtool.settings import Rounding
from qtool.weights import BlockWeight, DenseWeight, QuantizedWeight, Weight


@dataclass(frozen=True, slots=True)
class LinearKernel:
    """One way to compute x [tokens, in] -> [tokens, out].

    takes         the weights it is made for, in words; `is_for` says the same of one weight
    keeps_packed  False: quantized weights are dequantized when they are packed
    refuses       (weight it is made for, activation dtype, device, what the user asked of
                  activations) -> why it cannot, or None
    pack          the weight in the kernel's own layout; called once, at load
    matmul        (x, packed, bias [out] or None) -> [tokens, out]
    device        the only type of device that it is for; None: any
    """

    name: str
    takes: str
    is_for: Callable[[Weight], bool]
    keeps_packed: bool
    refuses: Callable[[Any, torch.dtype, torch.device, Rounding | None], str | None]
    pack: Callable[[Any, torch.dtype, torch.device], Any]
    matmul: Callable[[Tensor, Any, Tensor | None], Tensor]
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    kernel: LinearKernel
    reason: str


class NoKernel(UnsupportedModel):
    """No kernel takes this weight."""


def _is_any(weight: Weight) -> bool:
    return True


def _is_dense(weight: Weight) -> bool:
    return isinstance(weight, DenseWeight)


def _is_quantized(weight: Weight) -> bool:
    return not isinstance(weight, DenseWeight)


def _has_codes_of(bits: int) -> Callable[[Weight], bool]:
    return lambda weight: isinstance(weight, QuantizedWeight) and weight.scheme.bits == bits


def _takes_all(
    weight: Weight, dtype: torch.dtype, device: torch.device, activations: Rounding | None
) -> None:
    return None


# Best first.
KERNELS: tuple[LinearKernel, ...] = (
    LinearKernel(
        "int8_w8a8",
        "8-bit codes, activations in 8",
        eight_bit_linear.int8_takes,
        True,
        eight_bit_linear.int8_refuses,
        eight_bit_linear.int8_pack,
        eight_bit_linear.int8_matmul,
        device="cuda",
    ),
    LinearKernel(
        "fp8_w8a8",
        "8-bit floats, activations in 8",
        eight_bit_linear.fp8_takes,
        True,
        eight_bit_linear.fp8_refuses,
        eight_bit_linear.fp8_pack,
        eight_bit_linear.fp8_matmul,
        device="cuda",
    ),
    LinearKernel(
        "marlin",
        "codes of 2 to 8 bits, activations in 16",
        marlin_linear.takes,
        True,
        marlin_linear.refuses,
        marlin_linear.pack,
        marlin_linear.matmul,
        device="cuda",
    ),
    LinearKernel(
        "native_w4a8",
        "codes of 2 to 8 bits and GGUF blocks, activations in 8",
        native_linear.takes,
        True,
        native_linear.refuses,
        native_linear.pack,
        native_linear.matmul,
        device="cpu",
    ),
    LinearKernel(
        "int4pack",
        "4-bit codes",
        _has_codes_of(4),
        True,
        torch_ops.int4_refuses,
        torch_ops.int4_pack,
        torch_ops.int4_matmul,
        device="cpu",
    ),
    LinearKernel(
        "int8pack",
        "8-bit codes",
        _has_codes_of(8),
        True,
        torch_ops.int8_refuses,
        torch_ops.int8_pack,
        torch_ops.int8_matmul,
        device="cpu",
    ),
    LinearKernel(
        "onednn",
        "weights in bfloat16",
        _is_any,
        False,
        torch_ops.onednn_refuses,
        torch_ops.onednn_pack,
        torch_ops.onednn_matmul,
        device="cpu",
    ),
    LinearKernel(
        "dense",
        "weights of 16 or 32 bits",
        _is_dense,
        False,
        _takes_all,
        torch_ops.dense_pack,
        torch_ops.dense_matmul,
    ),
    LinearKernel(
        "dequantized",
        "quantized weights",
        _is_quantized,
        False,
        _takes_all,
        torch_ops.dense_pack,
        torch_ops.dense_matmul,
    ),
)

# What `activations="llama.cpp"` chooses from: there is nothing to fall back on.
LIKE_LLAMA_CPP: tuple[LinearKernel, ...] = (
    LinearKernel(
        "llama_cpp",
        "types of llama.cpp, inputs rounded as it does",
        llama_cpp.takes,
        True,
        llama_cpp.refuses,
        llama_cpp.pack,
        llama_cpp.matmul,
    ),
)


def choose(
    weight: Weight,
    dtype: torch.dtype,
    device: torch.device,
    activations: Rounding | None = None,
    kernels: tuple[LinearKernel, ...] | None = None,
) -> Choice:
    """The first kernel that takes the weight with activations of `dtype` on `device`.

    activations  "int8": they may be rounded to 8 bits, also in float32; "bf16": they may not;
                 "llama.cpp": as that does it; None: as the kernels' defaults are
    kernels      None: KERNELS, or LIKE_LLAMA_CPP

    The reason of a fallback names what each kernel made for this weight had against it.
    """
    if kernels is None:
        kernels = LIKE_LLAMA_CPP if activations == "llama.cpp" else KERNELS
    refusals: list[str] = []
    for kernel in kernels:
        if not kernel.is_for(weight) or kernel.device not in (None, device.type):
            continue
        refusal = kernel.refuses(weight, dtype, device, activations)
        if refusal is None:
            unpacked = _is_quantized(weight) and not kernel.keeps_packed
            first = f"{kernel.takes}, unpacked at load" if unpacked else kernel.takes
            return Choice(kernel, "; ".join([first, *refusals]))
        refusals.append(f"{kernel.name} {refusal}")
    others = [
        f"{kernel.name} is for {kernel.takes}" for kernel in kernels if not kernel.is_for(weight)
    ]
    others += [
        f"{kernel.name} runs on {kernel.device}"
        for kernel in kernels
        if kernel.is_for(weight) and kernel.device not in (None, device.type)
    ]
    raise NoKernel(
        f"no kernel multiplies by {describe(weight)} on {device.type}",
        hint="; ".join([*refusals, *others]),
    )


def describe(weight: Weight) -> str:
    """One word on how a weight is stored: "bfloat16", "int4-g128-sym", "Q4_K"."""
    if isinstance(weight, DenseWeight):
        return str(weight.values.dtype).removeprefix("torch.")
    return weight.codec.name if isinstance(weight, BlockWeight) else str(weight.scheme)
