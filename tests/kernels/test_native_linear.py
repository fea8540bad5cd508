"""The compiled linears: exact where they are whole numbers, the same bits at any batch size."""

import ctypes
import math

import pytest
import torch
from torch import Tensor

from qtool import grid
from qtool.kernels import reference
from qtool.kernels.cpu import native_linear
from qtool.kernels.cpu.native import Native
from qtool.kernels.dispatch import choose
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

CPU = torch.device("cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def quantized(out_features: int, in_features: int, word: str) -> QuantizedWeight:
    """A Gaussian weight on its grid."""
    scheme = QuantScheme.parse(word)
    weight = random(out_features, in_features) * 0.1
    found = grid.fit(weight, scheme)
    zeros = None if found.zeros is None else found.zeros.to(torch.uint8)
    return QuantizedWeight(grid.codes(weight, found, scheme), found.scales, zeros, scheme)


def whole_numbers(out_features: int, in_features: int, word: str) -> QuantizedWeight:
    """Any codes and zeros; scales are signed powers of two, so that products stay exact."""
    scheme = QuantScheme.parse(word)
    groups = scheme.num_groups(in_features)

    def draw(low: int, high: int, columns: int, seed: int) -> Tensor:
        return torch.randint(low, high, (out_features, columns), generator=generator(seed))

    codes = draw(0, scheme.num_codes, in_features, 3).to(torch.uint8)
    scales = 2.0 ** draw(-4, 1, groups, 4).float() * (1 - 2 * draw(0, 2, groups, 5))
    zeros = None if scheme.symmetric else draw(0, scheme.num_codes, groups, 6).to(torch.uint8)
    return QuantizedWeight(codes, scales, zeros, scheme)


def exact_activations(tokens: int, in_features: int) -> Tensor:
    """Whole numbers -127 .. 127 whose every 32 contain a 127: rounding changes nothing."""
    x = torch.randint(-127, 128, (tokens, in_features), generator=generator(7)).float()
    x[:, ::32] = 127.0
    return x


def rounded(x: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """What the kernel does to activations: (q [tokens, units, unit], scales [tokens, units])."""
    grouped = x.float().view(x.shape[0], -1, unit)
    top = grouped.abs().amax(-1)
    inverse = torch.where(top < 1e-30, 0.0, 127.0 / top)
    return torch.round(grouped * inverse[..., None]), torch.where(top < 1e-30, 0.0, top / 127.0)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


WORDS = [
    f"int{bits}-{group}-{kind}"
    for bits in (4, 8)
    for group in ("g32", "g64", "g128", "row")
    for kind in ("sym", "asym")
]
# Rows below, at and past a panel of 32; 96 inputs make units of 32, 256 of 128.
SHAPES = [(1, 128), (5, 256), (31, 128), (32, 384), (33, 128), (100, 256)]


@pytest.mark.parametrize("word", [*WORDS, "int2-g32-sym", "int3-g64-asym", "int6-g32-asym"])
def test_whole_numbers_give_the_bits_of_the_reference(
    native: Native, threads: int, word: str
) -> None:
    for out_features, in_features in SHAPES:
        weight = whole_numbers(out_features, in_features, word)
        x = exact_activations(11, in_features)
        bias = torch.randint(-9, 9, (out_features,), generator=generator(8)).float()
        found = native_linear.matmul(x, native_linear.pack_for(native, weight), bias)
        assert torch.equal(found, reference.linear(x, weight, bias)), (out_features, in_features)


@pytest.mark.parametrize("in_features", [32, 64, 96, 160, 192, 352])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_any_32_inputs_are_taken_whole(native: Native, bits: int, in_features: int) -> None:
    weight = whole_numbers(7, in_features, f"int{bits}-row-asym")
    x = exact_activations(3, in_features)
    found = native_linear.matmul(x, native_linear.pack_for(native, weight), None)
    assert torch.equal(found, reference.linear(x, weight))


@pytest.mark.parametrize(("bits", "zero"), [(4, 0), (4, 15), (8, 0), (8, 128), (8, 255)])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_extreme_codes_and_activations_do_not_saturate(
    native: Native, bits: int, zero: int, sign: float
) -> None:
    scheme = QuantScheme(bits, 128, symmetric=False)
    codes = torch.zeros(6, 256, dtype=torch.uint8)
    codes[:2] = scheme.num_codes - 1
    codes[2, 1::2] = scheme.num_codes - 1
    codes[3] = scheme.midpoint
    codes[4] = scheme.midpoint + 1
    zeros = torch.full((6, 2), zero, dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.ones(6, 2), zeros, scheme)
    x = torch.full((9, 256), 127.0 * sign)
    x[1, 1::2] *= -1
    found = native_linear.matmul(x, native_linear.pack_for(native, weight), None)
    assert torch.equal(found, reference.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_rounded_as_described(native: Native, dtype: torch.dtype) -> None:
    x = random(1, 384, seed=2).to(dtype)
    x[0, 128:256] = 0.0
    x[0, 256] = 1e-33
    for unit in (32, 64, 128):
        packed = native_linear.pack_for(native, quantized(4, 384, f"int4-g{unit}-asym"))
        record = ctypes.addressof(packed.record)
        scratch = torch.empty(native.library.qtool_linear_scratch(record, 1), dtype=torch.uint8)
        kind = native_linear.ELEMENT_TYPES[dtype]
        native.library.qtool_round_row(record, x.data_ptr(), kind, scratch.data_ptr())
        q, rest = scratch[:384].view(torch.int8), scratch[384:]
        size = 384 // unit * 4
        scales, sums = rest[:size].view(torch.float32), rest[size : 2 * size].view(torch.int32)
        expected_q, expected_scales = rounded(x, unit)
        assert torch.equal(q.view(-1, unit).float(), expected_q[0])
        assert torch.equal(scales, expected_scales[0])
        assert torch.equal(sums, expected_q[0].sum(-1).int())


@pytest.mark.parametrize("word", ["int4-g64-asym", "int8-row-sym"])
def test_units_are_added_in_order_by_fused_multiply_adds(native: Native, word: str) -> None:
    weight = quantized(40, 512, word)
    packed = native_linear.pack_for(native, weight)
    x = random(5, 512, seed=1)
    q, token_scales = rounded(x, packed.record.span)
    zeros = torch.full_like(weight.scales, weight.scheme.midpoint)
    if weight.zeros is not None:
        zeros = weight.zeros.float()
    repeat = 512 // packed.record.span // weight.scales.shape[1]
    zeros = zeros.repeat_interleave(repeat, dim=1)
    scales = weight.scales.repeat_interleave(repeat, dim=1)
    whole = weight.codes.float().view(40, -1, packed.record.span) - zeros[..., None]
    sums = torch.einsum("tui,oui->uto", q.double(), whole.double())
    expected = torch.zeros(5, 40)
    for unit, total in enumerate(sums):
        # float64 holds the product exactly, so this rounds once, as a fused multiply-add does.
        step = scales[:, unit][None, :] * token_scales[:, unit][:, None]
        expected = (total * step.double() + expected.double()).float()
    assert torch.equal(native_linear.matmul(x, packed, None), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("word", ["int4-g32-asym", "int4-g128-sym", "int8-row-sym"])
def test_a_token_has_the_same_bits_in_any_batch(
    native: Native, threads: int, word: str, dtype: torch.dtype
) -> None:
    packed = native_linear.pack_for(native, quantized(70, 256, word))
    x = random(64, 256, seed=1).to(dtype)
    bias = random(70, seed=2).to(dtype)
    alone = torch.cat([native_linear.matmul(row[None], packed, bias) for row in x])
    for tokens in range(1, 65):
        assert torch.equal(native_linear.matmul(x[:tokens], packed, bias), alone[:tokens]), tokens


def test_many_tokens_go_in_chunks_without_a_seam(native: Native) -> None:
    # 2048 inputs: a chunk of 256 KB is 128 tokens or less.
    packed = native_linear.pack_for(native, quantized(40, 2048, "int4-g128-sym"))
    x = random(301, 2048, seed=1)
    parts = torch.cat([native_linear.matmul(part, packed, None) for part in x.split(7)])
    assert torch.equal(native_linear.matmul(x, packed, None), parts)


@pytest.mark.parametrize("word", ["int4-g32-asym", "int4-row-sym", "int8-g128-asym"])
def test_all_instruction_sets_give_the_same_bits(natives: list[Native], word: str) -> None:
    weight = quantized(70, 512, word)
    x = random(13, 512, seed=1)
    first, *others = (
        native_linear.matmul(x, native_linear.pack_for(native, weight), None) for native in natives
    )
    for found in others:
        assert torch.equal(found, first)


@pytest.mark.parametrize("word", WORDS)
def test_rounding_activations_costs_less_than_one_percent(natives: list[Native], word: str) -> None:
    for seed, (out_features, in_features) in enumerate([(64, 256), (96, 1024), (48, 4864)]):
        weight = quantized(out_features, in_features, word)
        x = random(16, in_features, seed=seed + 1)
        expected = reference.linear(x, weight)
        found = native_linear.matmul(x, native_linear.pack_for(natives[0], weight), None)
        # A unit's step is max / 127, uniform error step / sqrt(12): about 0.65 % for 128 Gaussians.
        assert 1e-3 < relative_error(found, expected) < 1e-2


def test_bfloat16_results_are_the_float32_ones_rounded(native: Native) -> None:
    packed = native_linear.pack_for(native, quantized(50, 128, "int4-g32-sym"))
    x = random(6, 128, seed=1).bfloat16()
    wide = native_linear.matmul(x.float(), packed, None)
    assert torch.equal(native_linear.matmul(x, packed, None), wide.bfloat16())


def test_scales_that_float16_cannot_hold_stay_float32(native: Native) -> None:
    weight = quantized(33, 64, "int4-g32-sym")
    fine = QuantizedWeight(weight.codes, weight.scales * 1.0001, None, weight.scheme)
    packed = native_linear.pack_for(native, fine)
    assert packed.scales.dtype == torch.float32
    x = random(2, 64, seed=1)
    q, scales = rounded(x, packed.record.span)
    expected = reference.linear((q * scales[..., None]).view(2, 64), fine)
    torch.testing.assert_close(
        native_linear.matmul(x, packed, None), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("word", ["int4-g128-sym", "int4-g32-asym", "int8-row-sym"])
def test_a_packed_layer_takes_the_bytes_of_its_file(natives: list[Native], word: str) -> None:
    weight = quantized(512, 512, word)
    packed = native_linear.pack_for(natives[0], weight)
    held = sum(part.nbytes for part in packed if isinstance(part, Tensor))
    # Zeros take a byte each instead of half of one.
    assert weight.nbytes <= held <= 1.03 * weight.nbytes


def test_a_nan_in_a_token_reaches_its_outputs_only(native: Native) -> None:
    packed = native_linear.pack_for(native, quantized(33, 256, "int4-g128-sym"))
    x = random(4, 256, seed=1)
    expected = native_linear.matmul(x, packed, None)
    x[2, 130] = math.nan
    found = native_linear.matmul(x, packed, None)
    assert bool(found[2].isnan().all())
    keep = [0, 1, 3]
    assert torch.equal(found[keep], expected[keep])


def test_no_tokens_give_no_rows(native: Native) -> None:
    packed = native_linear.pack_for(native, quantized(33, 64, "int4-g32-sym"))
    assert native_linear.matmul(torch.empty(0, 64), packed, None).shape == (0, 33)


@pytest.mark.usefixtures("natives")
def test_the_choice_of_activations_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantized(64, 128, "int4-g32-sym")
    monkeypatch.delenv("QTOOL_ACTIVATIONS", raising=False)
    assert choose(weight, torch.bfloat16, CPU).kernel.name == "native_w4a8"
    exact = choose(weight, torch.float32, CPU)
    assert exact.kernel.name == "dequantized"
    assert "which float32 is there to avoid" in exact.reason
    assert choose(weight, torch.float32, CPU, "int8").kernel.name == "native_w4a8"
    asked = choose(weight, torch.bfloat16, CPU, "bf16")
    assert asked.kernel.name == "int4pack"
    assert "bf16 was asked for" in asked.reason
    monkeypatch.setenv("QTOOL_ACTIVATIONS", "bf16")
    assert "bf16 was asked for" in choose(weight, torch.bfloat16, CPU).reason
    assert choose(weight, torch.bfloat16, CPU, "int8").kernel.name == "native_w4a8"
    monkeypatch.setenv("QTOOL_ACTIVATIONS", "int8")
    assert choose(weight, torch.float32, CPU).kernel.name == "native_w4a8"


def test_refusals_say_what_would_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOL_ACTIVATIONS", "int8")
    refuses = native_linear.refuses
    odd = refuses(quantized(4, 86, "int4-g43-sym"), torch.bfloat16, CPU, None)
    assert odd == "takes groups of a multiple of 32 inputs, these have 43"
    fine = quantized(4, 64, "int4-g32-sym")
    assert refuses(fine, torch.float16, CPU, None) == (
        "takes bfloat16 or float32 activations, these are float16"
    )
    assert refuses(fine, torch.bfloat16, torch.device("cuda"), None) == "runs on cpu, not cuda"


@pytest.mark.usefixtures("natives")
def test_the_dispatch_table_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOL_ACTIVATIONS", "int8")
    weight = quantized(100, 192, "int4-g64-asym")
    kernel = choose(weight, torch.bfloat16, CPU).kernel
    x, bias = random(3, 192, seed=1).bfloat16(), random(100, seed=2).bfloat16()
    found = kernel.matmul(x, kernel.pack(weight, torch.bfloat16, CPU), bias)
    assert relative_error(found, reference.linear(x.float(), weight, bias)) < 1e-2
