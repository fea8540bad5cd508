"""Tensors as bitsandbytes stores them, and what it decodes them to: `python FILE OUT`.

Four bits are decoded by its portable implementation. The compiled one for CPUs (0.50.2) gives the
same but for rows such as 80 weights, where it takes the scale of a neighbouring block.
"""

import sys

import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as decode
from safetensors.torch import save_file

out: dict[str, torch.Tensor] = {}


def four_bits(name, shape, dtype, quant_type="nf4", nested=False, blocksize=64):
    weight = (torch.randn(shape) * 0.05).to(dtype)
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    out[f"{name}.weight"] = packed
    for suffix, tensor in state.as_dict(packed=True).items():
        out[f"{name}.weight.{suffix}"] = tensor
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    out[f"{name}.decoded"] = decode(
        packed.reshape(-1), absmax, state.code, blocksize, state.shape, dtype
    )


torch.manual_seed(0)
four_bits("nf4", (24, 80), torch.float32)
four_bits("nf4_nested", (128, 136), torch.bfloat16, nested=True)
four_bits("nf4_blocks_of_128", (8, 128), torch.float16, blocksize=128)
four_bits("fp4", (16, 64), torch.float32, quant_type="fp4")
four_bits("nf4_odd", (3, 21), torch.float32)
weight = (torch.randn(32, 48) * 0.05).half()
codes, scales, _ = functional.int8_vectorwise_quant(weight)
out["int8.weight"], out["int8.SCB"] = codes, scales
out["int8.weight_format"] = torch.tensor(0, dtype=torch.uint8)
out["int8.decoded"] = functional.int8_vectorwise_dequant(codes, scales)
save_file({name: tensor.contiguous() for name, tensor in out.items()}, sys.argv[1])
