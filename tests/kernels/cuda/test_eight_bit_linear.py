"""Products in 8 bits differ from the reference by the rounding of their inputs and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool.kernels import reference
from qtool.kernels.cuda import eight_bit_linear, fused
from qtool.scheme import FloatScheme
from qtool.weights import Float8Weight, QuantizedWeight

Random = Callable[..., Tensor]
Quantized = Callable[..., QuantizedWeight]
Error = Callable[[Tensor, Tensor], float]


@pytest.mark.parametrize("rows", [1, 17, 40])
def test_whole_numbers_are_multiplied_exactly(
    rows: int, device: torch.device, quantized: Quantized, random: Random, relative_error: Error
) -> None:
    weight = quantized(48, 64, "int8-row-sym")
    x, bias = random(rows, 64, seed=1), random(48, seed=2)
    packed = eight_bit_linear.int8_pack(weight, torch.float32, device)
    found = eight_bit_linear.int8_matmul(x, packed, bias)
    codes, scales = fused.quantize_rows(x, torch.int8)
    rounded = codes.float() * scales[:, None]
    expected = reference.linear(rounded.cpu(), weight, bias.cpu())
    assert relative_error(found, expected) < 1e-6
    assert relative_error(found, reference.linear(x.cpu(), weight, bias.cpu())) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("scales", [(64, 1), (1, 1)])
@pytest.mark.parametrize("rows", [1, 40])
def test_8_bit_floats(
    rows: int, scales: tuple[int, int], device: torch.device, random: Random, relative_error: Error
) -> None:
    values = random(64, 128).to(torch.float8_e4m3fn)
    scheme = FloatScheme("fp8", (1, None) if scales[0] > 1 else (None, None))
    weight = Float8Weight(values, random(*scales, seed=1).abs() + 0.1, scheme)
    x = random(rows, 128, seed=2).bfloat16()
    packed = eight_bit_linear.fp8_pack(weight, torch.bfloat16, device)
    found = eight_bit_linear.fp8_matmul(x, packed, None)
    assert relative_error(found, x.float() @ weight.dequantize().t()) < 4e-2


def test_refusals_say_why(quantized: Quantized) -> None:
    values = torch.zeros(64, 256).to(torch.float8_e4m3fn)
    blocks = Float8Weight(values, torch.ones(1, 2), FloatScheme("fp8", (128, 128)))
    refuses = eight_bit_linear.fp8_refuses_weight
    assert refuses(blocks, torch.bfloat16) == (
        "takes a scale a row or one in all, this is fp8-128x128"
    )
    rows = Float8Weight(values, torch.ones(64, 1), FloatScheme("fp8", (1, None)))
    assert refuses(rows, torch.bfloat16) is None
    assert refuses(rows, torch.float16) == "gives bfloat16, activations are float16"
    groups = eight_bit_linear.int8_refuses_weight(quantized(64, 64, "int8-g32-sym"), torch.bfloat16)
    assert groups == "takes one scale a row, these have one for 32 columns"
    odd = eight_bit_linear.int8_refuses_weight(quantized(8, 64, "int8-row-sym"), torch.bfloat16)
    assert odd == "takes sizes that are multiples of 16, this is 8 x 64"
    for device_refuses, weight in (
        (eight_bit_linear.int8_refuses, quantized(64, 64, "int8-row-sym")),
        (eight_bit_linear.fp8_refuses, rows),
    ):
        found = device_refuses(weight, torch.bfloat16, torch.device("cpu"), "int8")  # type: ignore[operator]
        assert found == "runs on cuda, not cpu"
