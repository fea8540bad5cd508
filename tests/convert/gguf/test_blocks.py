"""Block quantizers: cases worked by hand, the reference's bytes, properties of any input."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool import grid
from qtool.convert.gguf.blocks import codecs, legacy
from qtool.convert.gguf.blocks.codecs import (
    BLOCK_CODECS,
    QUANTIZERS,
    find_codec,
    quantize,
    quantize_by_torch,
)
from qtool.convert.gguf.blocks.lanes import lane_sum, round_away
from qtool.convert.gguf.blocks.legacy import pack_q4_0, pack_q8_0, unpack_q4_0
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.errors import FormatError, UnknownName
from qtool.scheme import QuantScheme
from qtool.weights import SLAB_WEIGHTS, BlockWeight, QuantizedWeight

DATA = Path(__file__).parent / "data" / "blocks.npz"
KINDS = ("normal", "heavy", "bf16", "edge")


def half(value: float) -> list[int]:
    return list(np.float16(value).tobytes())


def test_q4_0_of_a_block_worked_by_hand() -> None:
    """Peak -8 gives scale 1 and codes x + 8; byte j holds elements j and j + 16."""
    x = torch.arange(32, dtype=torch.float32).remainder(16) - 8  # -8 .. 7 twice
    data = quantize("Q4_0", x[None])
    assert data.tolist() == [half(1.0) + [code | code << 4 for code in range(16)]]
    assert BLOCK_CODECS["Q4_0"].dequantize(data).equal(x[None])


def test_q4_0_scale_takes_the_sign_of_the_peak() -> None:
    """A positive peak becomes code 0 under a negative scale: one more level on its side."""
    x = torch.zeros(1, 32)
    x[0, 3], x[0, 17] = 16.0, -4.0
    data = quantize("Q4_0", x)[0].tolist()
    assert data[:2] == half(-2.0)
    assert (data[2 + 3] & 15, data[2 + 1] >> 4, data[2]) == (0, 10, 8 | 8 << 4)


def test_q8_0_rounds_halves_away_from_zero() -> None:
    """Peak 127 gives scale 1: 2.5 becomes 3, -2.5 becomes -3."""
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([127.0, 2.5, -2.5, 0.49])
    data = quantize("Q8_0", x)
    assert data[0, :6].tolist() == [*half(1.0), 127, 3, 253, 0]


def test_q5_1_fifth_bits_are_a_little_endian_word() -> None:
    """Values 0 .. 31 have scale 1 and offset 0; elements 16 .. 31 have the fifth bit."""
    x = torch.arange(32, dtype=torch.float32)[None]
    data = quantize("Q5_1", x)[0].tolist()
    assert data[:8] == half(1.0) + half(0.0) + [0, 0, 255, 255]
    assert data[8:] == [code | code << 4 for code in range(16)]


def test_q4_k_of_a_grid_worked_by_hand() -> None:
    """Codes 0 .. 15 twice in each sub-block, at scale 2: every sub-block has the largest scale
    (63/63) and no minimum, so d = 2/63 and the values come back within half precision of d."""
    x = 2.0 * torch.arange(256, dtype=torch.float32).remainder(16)[None]
    data = quantize("Q4_K", x)[0].tolist()
    assert data[:4] == half(2 / 63) + half(0.0)
    # six-bit scales 63 and minima 0: low six bits, then top bits of scales 4..7, then nibbles
    assert data[4:16] == [0xFF] * 4 + [0] * 4 + [0x0F] * 4
    assert data[16:48] == [(lane % 16) | (lane % 16) << 4 for lane in range(32)]
    back = BLOCK_CODECS["Q4_K"].dequantize(quantize("Q4_K", x))
    assert torch.allclose(back, x, rtol=2**-11)


def test_iq4_nl_of_its_own_table_is_exact() -> None:
    table = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
    x = table.float().repeat(2)[None] * 0.5
    data = quantize("IQ4_NL", x)
    assert data[0].tolist() == half(0.5) + [code | code << 4 for code in range(16)]
    assert BLOCK_CODECS["IQ4_NL"].dequantize(data).equal(x)


def goldens(path: Path) -> list[tuple[str, str, bool]]:
    with np.load(path) as data:
        names = data.files
    cases = []
    for type in QUANTIZERS:
        for kind in KINDS:
            cases += [
                (type, kind, important)
                for important in (False, True)
                if f"{type}.{kind}" + ".imatrix" * important in names
            ]
    return cases


def assert_equals_golden(path: Path, type: str, kind: str, important: bool) -> None:
    with np.load(path) as data:
        x = torch.from_numpy(data[f"x.{kind}"])
        importance = torch.from_numpy(data[f"imatrix.{kind}"]) if important else None
        expected = torch.from_numpy(data[f"{type}.{kind}" + ".imatrix" * important])
    size = TENSOR_TYPES[type].block_bytes
    # `quantize` takes compiled code where that can be had
    for found in (quantize(type, x, importance), quantize_by_torch(type, x, importance)[0]):
        wrong = (found.view(-1, size) != expected.view(-1, size)).any(1)
        assert int(wrong.sum()) == 0, f"{int(wrong.sum())} of {wrong.numel()} blocks differ"


def test_every_type_has_reference_blocks_of_every_kind() -> None:
    cases = goldens(DATA)
    plain = {(type, kind) for type, kind, important in cases if not important}
    assert plain == {(type, kind) for type in QUANTIZERS for kind in KINDS}
    # what these do is fixed by the weights alone
    weighted = {type for type, _, important in cases if important}
    assert weighted == QUANTIZERS.keys() - {"Q8_0", "TQ1_0", "TQ2_0", "MXFP4"}
    assert len(cases) == 4 * (15 + 11)


@pytest.mark.parametrize(("type", "kind", "important"), goldens(DATA))
def test_bytes_are_those_of_the_reference(type: str, kind: str, important: bool) -> None:
    assert_equals_golden(DATA, type, kind, important)


@pytest.mark.parametrize("type", QUANTIZERS)
def test_bytes_are_those_of_the_reference_on_more_data(type: str, shared_data: Path) -> None:
    path = shared_data / "goldens" / "gguf-blocks.npz"
    for found, kind, important in goldens(path):
        if found == type:
            assert_equals_golden(path, type, kind, important)


@pytest.mark.parametrize("type", QUANTIZERS)
def test_decoding_equals_the_gguf_packages(type: str) -> None:
    """On the reference's blocks, and on random bytes with finite scales."""
    with np.load(DATA) as data:
        blocks = [data[name] for kind in KINDS if (name := f"{type}.{kind}") in data]
    size = TENSOR_TYPES[type].block_bytes
    noise = np.random.default_rng(1).integers(0, 256, (64, size), dtype=np.uint8)
    number = gguf.GGMLQuantizationType[type]
    for rows in (*blocks, noise):
        with np.errstate(invalid="ignore", over="ignore"):
            expected = gguf.quants.dequantize(rows, number)
        found = BLOCK_CODECS[type].dequantize(torch.from_numpy(rows)).numpy()
        finite = np.isfinite(expected)
        assert np.array_equal(found[finite], expected[finite])


@pytest.mark.parametrize("type", [name for name in BLOCK_CODECS if name not in QUANTIZERS])
def test_every_other_type_is_read_too(type: str) -> None:
    """Zero bytes decode to something finite of the right shape; the package has their tests."""
    kind = TENSOR_TYPES[type]
    data = torch.zeros(3, 2 * kind.block_bytes, dtype=torch.uint8)
    values = BLOCK_CODECS[type].dequantize(data)
    assert values.shape == (3, 2 * kind.block_size)
    assert values.dtype == torch.float32
    assert bool(values.isfinite().all())


def test_a_type_without_a_decoder_is_named() -> None:
    with pytest.raises(FormatError, match="Q8_K cannot be read"):
        find_codec(TENSOR_TYPES["Q8_K"])


def test_a_type_that_cannot_be_written_is_named() -> None:
    with pytest.raises(UnknownName, match="IQ2_XXS"):
        quantize("IQ2_XXS", torch.zeros(1, 256))


@pytest.mark.parametrize("type", QUANTIZERS)
def test_slabs_do_not_change_the_bytes(type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 512, generator=torch.Generator().manual_seed(1))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(2))
    whole = quantize(type, x, importance)
    values = BLOCK_CODECS[type].dequantize(whole)
    monkeypatch.setattr(codecs, "SLAB_WEIGHTS", 1024)  # two rows a slab, and one of one
    assert quantize(type, x, importance).equal(whole)
    assert BLOCK_CODECS[type].dequantize(whole).equal(values)


@pytest.mark.parametrize(
    ("searched", "plain"),
    [("Q4_K", "Q4_1"), ("Q5_K", "Q5_1"), ("Q6_K", "Q5_0"), ("IQ4_NL", "Q4_0")],
)
def test_searched_types_beat_plain_rounding_of_no_fewer_bits(searched: str, plain: str) -> None:
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3))

    def error(type: str) -> float:
        return float((BLOCK_CODECS[type].dequantize(quantize(type, x)) - x).square().mean())

    assert error(searched) < error(plain)


@pytest.mark.parametrize("type", ["Q4_K", "Q6_K", "Q4_0", "Q4_1", "Q2_K"])
def test_importance_lowers_the_error_it_weighs(type: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(32, 512, generator=generator)
    importance = torch.randn(512, generator=generator).exp().square()

    def error(weights: Tensor | None) -> float:
        back = BLOCK_CODECS[type].dequantize(quantize(type, x, weights))
        return float((importance * (back - x).square()).mean())

    assert error(importance) < error(None)


def test_lanes_are_added_left_to_right() -> None:
    """1 is lost beside 2**24 one at a time, and not when the ones are added first."""
    terms = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)])[:, None]
    assert lane_sum(terms).item() == 0.0


@settings(max_examples=200, deadline=None)
@given(st.floats(-130, 130, width=32))
def test_round_away_is_c_roundf(value: float) -> None:
    exact = np.float32(value)
    expected = np.copysign(np.floor(np.abs(np.float64(exact)) + 0.5), exact)
    assert round_away(torch.tensor([exact])).item() == expected


def int4(out_features: int, in_features: int, group: int, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out_features, in_features), generator=generator)
    scales = torch.randn(out_features, in_features // group, generator=generator).half().float()
    return QuantizedWeight(codes.to(torch.uint8), scales, None, QuantScheme(4, group))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 4), st.sampled_from([32, 64, 128]), st.integers(0, 2**32 - 1)
)
def test_symmetric_int4_is_the_same_weight_in_q4_0(
    rows: int, groups: int, group: int, seed: int
) -> None:
    weight = int4(rows, groups * group, group, seed)
    data = pack_q4_0(weight)
    assert gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType.Q4_0).tolist() == (
        weight.dequantize().tolist()
    )
    back = unpack_q4_0(BlockWeight(data, groups * group, BLOCK_CODECS["Q4_0"]))
    assert back.codes.equal(weight.codes)
    assert back.scheme == QuantScheme(4, 32)
    assert back.dequantize().equal(weight.dequantize())
    assert pack_q4_0(back).equal(data)


def test_a_row_is_one_group_where_the_scheme_says_so() -> None:
    codes = torch.arange(64, dtype=torch.uint8)[None] % 16
    weight = QuantizedWeight(codes, torch.tensor([[0.5]]), None, QuantScheme(4, None))
    assert BLOCK_CODECS["Q4_0"].dequantize(pack_q4_0(weight)).equal(weight.dequantize())


def test_symmetric_int8_is_the_same_weight_in_q8_0() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    weight = QuantizedWeight(codes, torch.full((4, 1), 0.25), None, QuantScheme(8, None))
    assert BLOCK_CODECS["Q8_0"].dequantize(pack_q8_0(weight)).equal(weight.dequantize())


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        (QuantScheme(4, 32, symmetric=False), "zero points"),
        (QuantScheme(8, 32), "8 bits"),
        (QuantScheme(5, 32), "5 bits"),
        (QuantScheme(4, 16), "groups of 16"),
    ],
)
def test_other_schemes_are_not_q4_0(scheme: QuantScheme, why: str) -> None:
    groups = scheme.num_groups(96)
    zeros = None if scheme.symmetric else torch.zeros(2, groups, dtype=torch.uint8)
    codes = torch.zeros(2, 96, dtype=torch.uint8)
    with pytest.raises(FormatError, match=why):
        pack_q4_0(QuantizedWeight(codes, torch.ones(2, groups), zeros, scheme))


def test_a_scale_that_half_precision_lacks_is_said_and_rounded_only_when_allowed() -> None:
    weight = int4(2, 64, 64)
    scales = weight.scales.clone()
    scales[1, 0] = 1 + 2**-12
    moved = QuantizedWeight(weight.codes, scales, None, weight.scheme)
    with pytest.raises(FormatError, match="half precision"):
        pack_q4_0(moved)
    error = legacy.half_scale_error(moved)
    assert 0 < error < 2**-11
    back = BLOCK_CODECS["Q4_0"].dequantize(pack_q4_0(moved, max_scale_error=2**-11))
    assert torch.allclose(back, moved.dequantize(), rtol=2**-11)
    for extreme in (1e6, 1e-9):  # infinity, and a subnormal that keeps two digits
        scales[1, 0] = extreme
        with pytest.raises(FormatError, match="half precision"):
            pack_q4_0(
                QuantizedWeight(weight.codes, scales, None, weight.scheme), max_scale_error=2**-10
            )


@pytest.mark.parametrize(("in_bfloat16", "bound"), [(True, 1e-4), (False, 3.8e-4)])
@pytest.mark.parametrize("group", [32, 128])
def test_asymmetric_int4_is_q4_1_but_for_its_minima(
    group: int, in_bfloat16: bool, bound: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    scheme = QuantScheme(4, group, symmetric=False)
    values = torch.randn(256, 512, generator=generator) * 0.02
    fitted = grid.fit(values, scheme)
    assert fitted.zeros is not None
    scales, codes = fitted.scales, grid.codes(values, fitted, scheme)
    if not in_bfloat16:
        scales = (scales * (1 + 0.01 * torch.rand(scales.shape, generator=generator))).half()
    weight = QuantizedWeight(codes, scales, fitted.zeros.to(torch.uint8), scheme)
    meant = weight.dequantize()
    found = BLOCK_CODECS["Q4_1"].dequantize(legacy.pack_q4_1(weight))
    assert 0 < float((found - meant).norm() / meant.norm()) < bound
    assert weight.zeros is not None
    steps = ((found - meant).view(256, -1, group) / scales.float().unsqueeze(-1)).abs()
    assert bool((steps <= 2**-10 * (weight.zeros.float().unsqueeze(-1) + 15)).all())
    whole = QuantizedWeight(codes, scales * 0 + 0.5, weight.zeros, scheme)
    assert BLOCK_CODECS["Q4_1"].dequantize(legacy.pack_q4_1(whole)).equal(whole.dequantize())


@pytest.mark.parametrize("group", [32, 128])
def test_any_codes_and_zero_points_are_q4_1_within_their_last_places(group: int) -> None:
    """As of AWQ: half-precision scales, any codes, any zero points."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (256, 1024), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 16, (256, 1024 // group), generator=generator).to(torch.uint8)
    scales = (torch.rand(zeros.shape, generator=generator) * 0.02 + 1e-3).half()
    weight = QuantizedWeight(codes, scales, zeros, QuantScheme(4, group, symmetric=False))
    meant = weight.dequantize()
    data = legacy.pack_q4_1(weight)
    found = BLOCK_CODECS["Q4_1"].dequantize(data)
    error = float((found - meant).norm() / meant.norm())
    assert error < 2.6e-4
    # the scales as they are, and minima to the nearest
    blocks = data.view(-1, 20).clone()
    repeats = group // 32
    halves = torch.stack((scales, -(zeros * scales.float()).half()), -1).repeat_interleave(
        repeats, 1
    )
    blocks[:, :4] = halves.view(-1, 2).view(torch.uint8)
    plain = BLOCK_CODECS["Q4_1"].dequantize(blocks.view(data.shape))
    assert error < 0.95 * float((plain - meant).norm() / meant.norm())


def test_scales_at_the_ends_of_half_precision_stay() -> None:
    codes = torch.arange(32, dtype=torch.uint8).view(1, 32) % 16
    scheme = QuantScheme(4, 32, symmetric=False)
    for scale in (0.0, 65504.0, 2.0**-24):
        weight = QuantizedWeight(codes, torch.tensor([[scale]]), codes[:, :1] * 0, scheme)
        found = BLOCK_CODECS["Q4_1"].dequantize(legacy.pack_q4_1(weight))
        assert found.equal(weight.dequantize())


def test_a_minimum_beyond_half_precision_is_refused() -> None:
    codes, zeros = torch.zeros(1, 32, dtype=torch.uint8), torch.full((1, 1), 15).to(torch.uint8)
    scheme = QuantScheme(4, 32, symmetric=False)
    weight = QuantizedWeight(codes, torch.full((1, 1), 8192.0), zeros, scheme)
    with pytest.raises(FormatError, match="no minimum of 122880"):
        legacy.pack_q4_1(weight)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_narrower_codes_are_held_exactly_by_a_wider_type(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (8, 64), generator=generator).to(torch.uint8)
    scales = torch.rand(8, 2, generator=generator).half()
    weight = QuantizedWeight(codes, scales, None, QuantScheme(bits, 32))
    name, pack = ("Q4_0", pack_q4_0) if bits < 4 else ("Q8_0", pack_q8_0)
    assert legacy.repack_type(weight.scheme, 64) == name
    assert BLOCK_CODECS[name].dequantize(pack(weight)).equal(weight.dequantize())


def test_q8_0_is_symmetric_int8_both_ways() -> None:
    generator = torch.Generator().manual_seed(0)
    data = quantize("Q8_0", torch.randn(4, 96, generator=generator))
    blocks = BlockWeight(data, 96, BLOCK_CODECS["Q8_0"])
    weight = legacy.unpack_q8_0(blocks)
    assert weight.dequantize().equal(blocks.dequantize())
    assert pack_q8_0(weight).equal(data)


def test_a_large_matrix_unpacked_in_slabs_has_the_same_bits() -> None:
    rows = 2 * SLAB_WEIGHTS // 64 + 5
    values = torch.randn(rows, 64, generator=torch.Generator().manual_seed(3))
    weight = BlockWeight(quantize("Q8_0", values), 64, BLOCK_CODECS["Q8_0"])
    whole = weight.dequantize()
    for dtype in (torch.bfloat16, torch.float16):
        assert weight.dequantize(dtype).equal(whole.to(dtype))
