"""Every linear kernel computes what `reference.linear` says, on shapes that fit and that do not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qtool import grid
from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS
from qtool.kernels import reference
from qtool.kernels.cpu import torch_ops
from qtool.kernels.dispatch import KERNELS, LinearKernel, NoKernel, choose, describe
from qtool.scheme import QuantScheme
from qtool.weights import BlockWeight, DenseWeight, QuantizedWeight

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operators; the compiled linears have tests of their own."""
    monkeypatch.setenv("QTOOL_ACTIVATIONS", "bf16")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(out_features: int, in_features: int, scheme: str) -> QuantizedWeight:
    parsed = QuantScheme.parse(scheme)
    weight = random(out_features, in_features) * 0.1
    found = grid.fit(weight, parsed)
    zeros = None if found.zeros is None else found.zeros.to(torch.uint8)
    return QuantizedWeight(grid.codes(weight, found, parsed), found.scales, zeros, parsed)


def _unpacked(dtype: torch.dtype) -> str:
    """What multiplies by a weight that was unpacked; oneDNN has no bfloat16 before AVX-512."""
    fast = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "onednn" if fast else "dequantized"


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm())


# Rows: below, at and above the number from which kernels unpack; columns: several groups.
@pytest.mark.parametrize("tokens", [1, 3, 12, 13, 64, 65, 130])
@pytest.mark.parametrize(
    ("scheme", "shape", "kernel"),
    [
        ("int4-g128-sym", (256, 512), "int4pack"),
        ("int4-g32-sym", (64, 96), "int4pack"),
        ("int4-g64-asym", (192, 128), "int4pack"),
        ("int4-g32-sym", (172, 64), "int4pack"),  # 172 rows are no multiple of the packing's 64
        ("int4-g32-asym", (7, 64), "int4pack"),
        ("int8-row-sym", (96, 176), "int8pack"),
        # 172 columns are no multiple of 16: torch's operator would read past the end.
        ("int8-row-sym", (96, 172), "unpacked"),
        ("int8-row-sym", (5, 64), "int8pack"),
        ("int8-g32-sym", (64, 64), "unpacked"),
        ("int3-g32-asym", (64, 64), "unpacked"),
    ],
)
def test_quantized_linears_equal_the_reference(
    scheme: str, shape: tuple[int, int], kernel: str, tokens: int
) -> None:
    weight = quantized(*shape, scheme)
    choice = choose(weight, torch.bfloat16, CPU)
    assert choice.kernel.name == (_unpacked(torch.bfloat16) if kernel == "unpacked" else kernel)
    x = random(tokens, shape[1], seed=1).bfloat16()
    bias = random(shape[0], seed=2).bfloat16()
    packed = choice.kernel.pack(weight, torch.bfloat16, CPU)
    found = choice.kernel.matmul(x, packed, bias)
    assert found.shape == (tokens, shape[0])
    assert found.dtype == torch.bfloat16
    expected = reference.linear(x.float(), weight, bias)
    # bfloat16 keeps 8 bits: half a unit in the last place of the output is 2e-3.
    assert relative_error(found, expected) < 5e-3


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int8-row-asym"])
def test_float32_activations_are_exact(scheme: str) -> None:
    weight = quantized(64, 128, scheme)
    choice = choose(weight, torch.float32, CPU)
    assert choice.kernel.name == "dequantized"
    x = random(5, 128, seed=1)
    found = choice.kernel.matmul(x, choice.kernel.pack(weight, torch.float32, CPU), None)
    assert relative_error(found, reference.linear(x, weight)) < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (172, 64), (256, 512)])
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_weights_laid_out_once_give_the_bits_of_an_ordinary_product(
    shape: tuple[int, int], tokens: int
) -> None:
    weight = DenseWeight(random(*shape).bfloat16())
    choice = choose(weight, torch.bfloat16, CPU)
    if choice.kernel.name != "onednn":
        pytest.skip(f"oneDNN has no bfloat16 on this CPU: {choice.reason}")
    packed = choice.kernel.pack(weight, torch.bfloat16, CPU)
    both = random(tokens, 2 * shape[1], seed=1).bfloat16()
    bias = random(shape[0], seed=2).bfloat16()
    for x in (both[:, : shape[1]].contiguous(), both[:, shape[1] :]):  # the second has strides
        expected = torch.nn.functional.linear(x, weight.values, bias)
        assert torch.equal(choice.kernel.matmul(x, packed, bias), expected)


def test_block_weights_are_dequantized() -> None:
    codec = BLOCK_CODECS["Q8_0"]
    data = torch.randint(0, 100, (4, 2 * codec.block_bytes), dtype=torch.uint8)
    weight = BlockWeight(data, 2 * codec.block_size, codec)
    for dtype in (torch.bfloat16, torch.float32):
        choice = choose(weight, dtype, CPU)
        assert choice.kernel.name == _unpacked(dtype)
        assert "unpacked at load" in choice.reason
        packed = choice.kernel.pack(weight, dtype, CPU)
        x = random(3, 64).to(dtype)
        found = choice.kernel.matmul(x, packed, None)
        assert relative_error(found, reference.linear(x.float(), weight)) < 1e-2


def test_the_unpacked_int4_product_runs_in_slices_of_the_scratch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = quantized(320, 128, "int4-g64-sym")
    packed = torch_ops.int4_pack(weight, torch.bfloat16, CPU)
    x = random(100, 128, seed=1).bfloat16()
    whole = torch_ops.int4_matmul(x, packed, None)
    # Room for two of the five panels of 64 rows.
    monkeypatch.setattr(torch_ops, "SCRATCH_BYTES", 2 * 64 * 128 * 2)
    assert torch.equal(torch_ops.int4_matmul(x, packed, None), whole)


def test_a_choice_says_why_a_packed_kernel_was_passed_over() -> None:
    odd_group = choose(quantized(64, 86, "int4-g43-sym"), torch.bfloat16, CPU)
    assert odd_group.kernel.name == _unpacked(torch.bfloat16)
    assert ", unpacked at load; " in odd_group.reason
    assert "int4pack takes groups of 32, 64, 128, 256, these have 43" in odd_group.reason
    wide = choose(quantized(64, 128, "int4-g128-sym"), torch.float32, CPU)
    assert "int4pack takes bfloat16 activations, these are float32" in wide.reason
    grouped = choose(quantized(64, 128, "int8-g128-sym"), torch.bfloat16, CPU)
    assert grouped.kernel.name == "int8pack"  # one group is the whole row
    dense = choose(DenseWeight(random(4, 4)), torch.float32, CPU)
    assert (dense.kernel.name, dense.reason) == (
        "dense",
        "weights of 16 or 32 bits; onednn takes bfloat16 activations, these are float32",
    )


def test_when_no_kernel_is_left_every_candidate_says_why() -> None:
    packed_only = tuple(kernel for kernel in KERNELS if kernel.name.endswith("pack"))
    with pytest.raises(NoKernel) as raised:
        choose(quantized(64, 128, "int4-g64-asym"), torch.float16, CPU, None, packed_only)
    assert "int4-g64-asym" in raised.value.message
    assert raised.value.hint is not None
    assert "int4pack takes bfloat16 activations, these are float16" in raised.value.hint
    assert "int8pack is for 8-bit codes" in raised.value.hint


def test_a_kernel_is_one_more_row_of_the_table() -> None:
    def pack(weight: DenseWeight, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
        return (weight.values.t().contiguous(),)

    def matmul(x: Tensor, packed: tuple[Tensor], bias: Tensor | None) -> Tensor:
        return x @ packed[0]

    def refuses_large(
        weight: DenseWeight, dtype: torch.dtype, device: torch.device, activations: Any
    ) -> str | None:
        return "takes at most 8 rows" if weight.shape[0] > 8 else None

    is_for = next(kernel.is_for for kernel in KERNELS if kernel.name == "dense")
    small = LinearKernel("small", "small matrices", is_for, True, refuses_large, pack, matmul)
    kernels = (small, *KERNELS)
    assert choose(DenseWeight(random(8, 4)), torch.float32, CPU, None, kernels).kernel is small
    large = choose(DenseWeight(random(9, 4).bfloat16()), torch.bfloat16, CPU, None, kernels)
    assert large.kernel is not small
    assert "; small takes at most 8 rows" in large.reason


def test_weights_are_described_by_how_they_are_stored() -> None:
    codec = BLOCK_CODECS["Q4_K"]
    data = torch.zeros(1, codec.block_bytes, dtype=torch.uint8)
    assert describe(BlockWeight(data, codec.block_size, codec)) == "Q4_K"
    assert describe(quantized(8, 64, "int4-g32-asym")) == "int4-g32-asym"
    assert describe(DenseWeight(random(2, 2).bfloat16())) == "bfloat16"
