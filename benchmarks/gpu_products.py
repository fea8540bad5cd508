"""One product on a GPU by each kernel that benchmarks/gpu.py sets side by side.

A contender is made for a shape, with as many copies of the weight as outgrow the caches; each call
takes the next.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from qtool.kernels.cuda import marlin_linear
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

SCHEME = "int4-g128-sym"
GROUP = 128
# Copies of a weight that are used in turn: several times any L2.
COLD_BYTES = 400 << 20
CUDA = torch.device("cuda")

# (x [tokens, in], which copy of the weight) -> the product
Product = Callable[[torch.Tensor, int], object]


def contenders_of(out: int, inputs: int) -> dict[str, Product]:
    """qtool's own first, by name."""
    certain = {"qtool": _ours(out, inputs), "cublas_bf16": _dense(out, inputs)}
    return {**certain, **_optional(out, inputs)}


def _ours(out: int, inputs: int) -> Product:
    scheme = QuantScheme.parse(SCHEME)
    codes = torch.randint(0, 16, (out, inputs), dtype=torch.uint8, device=CUDA)
    scales = (torch.rand(out, inputs // GROUP, device=CUDA) * 0.01).bfloat16()
    first = marlin_linear.pack(QuantizedWeight(codes, scales, None, scheme), torch.bfloat16, CUDA)
    copies = [
        first._replace(words=first.words.clone())
        for _ in range(max(2, COLD_BYTES // first.words.nbytes))
    ]
    return lambda x, index: marlin_linear.matmul(x, copies[index % len(copies)], None)


def _dense(out: int, inputs: int) -> Product:
    count = max(2, COLD_BYTES // (2 * out * inputs))
    copies = [torch.randn(out, inputs, device=CUDA).bfloat16() for _ in range(count)]
    return lambda x, index: F.linear(x, copies[index % count])


def _optional(out: int, inputs: int) -> dict[str, Product]:
    """Contenders that this build or environment has; the others are named on stderr."""
    found = {}
    for name, make in (("torch_int4", _torch_int4), ("gemlite", _gemlite)):
        try:
            found[name] = make(out, inputs)
            found[name](torch.randn(1, inputs, device=CUDA).bfloat16(), 0)
        except Exception as error:
            found.pop(name, None)
            print(f"{name} was not measured: {str(error)[:120]}", file=sys.stderr)
    return found


def _torch_int4(out: int, inputs: int) -> Product:
    pairs = torch.randint(0, 256, (out, inputs // 2), dtype=torch.uint8, device=CUDA)
    count = max(2, COLD_BYTES // (out * inputs // 2))
    packed = torch._convert_weight_to_int4pack(pairs, 8)
    copies = [packed.clone() for _ in range(count)]
    scales = torch.rand(inputs // GROUP, out, 2, device=CUDA).bfloat16()
    return lambda x, index: torch._weight_int4pack_mm(x, copies[index % count], GROUP, scales)


def _gemlite(out: int, inputs: int) -> Product:
    from gemlite.core import DType, GemLiteLinear

    count = max(2, COLD_BYTES // (out * inputs // 2))
    layers = []
    for _ in range(count):
        codes = torch.randint(0, 16, (out, inputs), dtype=torch.uint8, device=CUDA)
        scales = torch.rand(out, inputs // GROUP, device=CUDA).bfloat16()
        layer = GemLiteLinear(
            W_nbits=4,
            group_size=GROUP,
            in_features=inputs,
            out_features=out,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        layer.pack(codes, scales, torch.full_like(scales, 8.0), None)
        layers.append(layer)
    return lambda x, index: layers[index % count](x)
