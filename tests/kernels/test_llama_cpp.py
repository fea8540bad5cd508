"""Inputs rounded as ggml rounds them, beside its definitions written out number by number."""

import math
import struct

import pytest
import torch
from torch import Tensor

from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS, can_write, quantize
from qtool.kernels import llama_cpp
from qtool.kernels.dispatch import NoKernel, choose
from qtool.scheme import QuantScheme
from qtool.weights import BlockWeight, DenseWeight, QuantizedWeight

CPU = torch.device("cpu")


def half(value: float) -> float:
    return float(struct.unpack("<e", struct.pack("<e", value))[0])


def single(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def blocks(type: str, rows: int, columns: int) -> BlockWeight:
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return BlockWeight(quantize(type, weights), columns, BLOCK_CODECS[type])


def inputs(tokens: int, columns: int) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2))
    x[:, 3] *= 30  # one loud channel, that sets the scale of all that share it
    return x


def test_a_block_of_32_by_hand() -> None:
    # d = 254 / 127 = 2; 3 / 2 = 1.5 rounds to the even 2, 5 / 2 = 2.5 to the even 2.
    x = torch.zeros(1, 64)
    x[0, :4] = torch.tensor([254.0, 3.0, 5.0, -7.0])
    x[0, 40] = 0.1
    found = llama_cpp.round_inputs(x, "Q8_0").values[0]
    assert found[:4].tolist() == [254.0, 4.0, 4.0, -8.0]
    assert found[40] == 127 * half(single(0.1) / 127)
    assert found.count_nonzero() == 5


def test_a_block_of_256_has_one_scale_and_it_is_not_cut_to_16_bits() -> None:
    x = torch.zeros(1, 512)
    x[0, 0], x[0, 255], x[0, 256] = 127.0, 0.4, 0.4
    found = llama_cpp.round_inputs(x, "Q8_K").values[0]
    assert found[0] == 127.0
    assert found[255] == 0.0, "0.4 of a step of 1 is rounded away"
    assert float(found[256]) == pytest.approx(0.4, rel=1e-6), "another block"
    kept = llama_cpp.round_inputs(x, "Q8_0").values[0]
    assert float(kept[255]) != pytest.approx(0.4, rel=1e-6), "its scale is a float16"


def test_sums_of_q8_1_are_rounded_from_the_unrounded_scale() -> None:
    x = inputs(1, 32)
    rounded = llama_cpp.round_inputs(x, "Q8_1")
    values = [float(value) for value in x[0]]
    scale = single(max(abs(value) for value in values) / 127)
    codes = [round(value * single(127 / single(127 * scale))) for value in values]
    assert rounded.surplus is not None
    wanted = half(single(scale * sum(codes))) - half(scale) * sum(codes)
    assert float(rounded.surplus) == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("kind", ["Q8_0", "Q8_K"])
def test_no_input_is_moved_by_more_than_half_a_step(kind: llama_cpp.Inputs) -> None:
    x = inputs(4, 512)
    size = 256 if kind == "Q8_K" else 32
    step = x.view(4, -1, size).abs().amax(dim=-1, keepdim=True) / 127
    moved = (llama_cpp.round_inputs(x, kind).values - x).view(4, -1, size).abs()
    # A float16 scale moves the largest by another 127 / 2048 of a step.
    assert bool((moved <= step * (0.5 + (127 / 2048 if kind == "Q8_0" else 1e-4))).all())


def dot_of_whole_numbers(x: list[float], row: bytes) -> float:
    """`ggml_vec_dot_q4_1_q8_1`, of Q4_1: d and m in float16, then codes i and i + 16 in a byte."""
    total = 0.0
    for block in range(len(x) // 32):
        part = x[32 * block : 32 * block + 32]
        d_weight, minimum = struct.unpack_from("<2e", row, 20 * block)
        packed = row[20 * block + 4 : 20 * block + 20]
        codes = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
        largest = max(abs(value) for value in part)
        d = single(largest / 127)
        q = [round(single(value * single(127 / largest))) for value in part]
        whole = sum(code * value for code, value in zip(codes, q, strict=True))
        total += whole * d_weight * half(d) + minimum * half(single(d * sum(q)))
    return total


def test_a_product_is_that_of_whole_numbers() -> None:
    weight, x = blocks("Q4_1", 5, 128), inputs(3, 128)
    found = llama_cpp.matmul(x, llama_cpp.pack(weight, torch.float32, CPU), None)
    for token in range(3):
        for row in range(5):
            wanted = dot_of_whole_numbers(x[token].tolist(), bytes(weight.data[row].tolist()))
            assert math.isclose(float(found[token, row]), wanted, rel_tol=1e-5, abs_tol=1e-4)


def test_every_type_that_is_read_has_its_inputs() -> None:
    packed = {name for name, codec in BLOCK_CODECS.items() if codec.block_size > 1}
    assert packed <= set(llama_cpp.INPUTS_OF_TYPE)


@pytest.mark.parametrize(
    "type", [name for name in BLOCK_CODECS if can_write(name) and BLOCK_CODECS[name].block_size > 1]
)
def test_rounding_moves_a_product_by_as_much_as_8_bits_do(type: str) -> None:
    weight, x = blocks(type, 8, 512), inputs(2, 512)
    bias = torch.arange(8.0)
    kernel = choose(weight, torch.float32, CPU, "llama.cpp").kernel
    assert kernel.name == "llama_cpp"
    found = kernel.matmul(x, kernel.pack(weight, torch.float32, CPU), bias)
    exact = x @ weight.dequantize().t() + bias
    assert not torch.equal(found, exact)
    # The loud channel sets the scale of 255 others where 256 share one.
    most = 0.05 if llama_cpp.inputs_of(weight) == "Q8_K" else 0.02
    assert float((found - exact).norm() / exact.norm()) < most


def test_codes_in_groups_of_32_are_blocks_and_others_are_nothing_that_it_has() -> None:
    def codes(word: str) -> QuantizedWeight:
        scheme = QuantScheme.parse(word)
        groups = scheme.num_groups(128)
        zeros = None if scheme.symmetric else torch.zeros(2, groups, dtype=torch.uint8)
        packed = torch.zeros(2, 128, dtype=torch.uint8)
        return QuantizedWeight(packed, torch.ones(2, groups), zeros, scheme)

    assert llama_cpp.inputs_of(codes("int4-g32-sym")) == "Q8_0"
    for word in ("int4-g128-sym", "int4-g32-asym"):
        with pytest.raises(NoKernel, match="no kernel multiplies"):
            choose(codes(word), torch.float32, CPU, "llama.cpp")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_weights_take_inputs_of_their_own_type(dtype: torch.dtype) -> None:
    weight, x = DenseWeight(torch.eye(64).to(dtype)), inputs(2, 64)
    kernel = choose(weight, torch.float32, CPU, "llama.cpp").kernel
    found = kernel.matmul(x, kernel.pack(weight, torch.float32, CPU), None)
    assert torch.equal(found, x.to(dtype).float())


def test_nothing_else_is_computed_so_in_half_precision() -> None:
    with pytest.raises(NoKernel, match="no kernel") as caught:
        choose(blocks("Q4_0", 4, 64), torch.bfloat16, CPU, "llama.cpp")
    assert "computes in float32, not bfloat16" in (caught.value.hint or "")
