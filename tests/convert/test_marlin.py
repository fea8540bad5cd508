"""Marlin's layout against the permutation as its authors build it: an explicit list of indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.convert import marlin
from qtool.convert.layer import LayerSpec
from qtool.errors import FormatError, UnsupportedModel
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

RandomWeight = Callable[..., QuantizedWeight]
INTERLEAVE = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}


def permutation(bits: int) -> list[int]:
    """Where each of the 1024 fields of a 16 x 64 strip comes from, thread by thread."""
    flat = []
    for thread in range(32):
        column, pair = thread // 4, 2 * (thread % 4)
        own = [
            16 * row + column + 8 * half
            for half in (0, 1)
            for row in (pair, pair + 1, pair + 8, pair + 9)
        ]
        for tile in range(4):
            flat += [entry + 256 * tile for entry in own]
    order = INTERLEAVE[bits]
    runs = [flat[i : i + len(order)] for i in range(0, 1024, len(order))]
    return [run[i] for run in runs for i in order]


def words(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Fields of a row packed low first into int32 words, by plain arithmetic."""
    per_word = 32 // bits
    split = fields.long().view(fields.shape[0], -1, per_word)
    packed = sum(split[..., i] << (bits * i) for i in range(per_word))
    assert isinstance(packed, torch.Tensor)
    return packed.to(torch.int32)


def reference(weight: QuantizedWeight) -> Mapping[str, torch.Tensor]:
    """Repack as IST-DASLab/marlin and vLLM's marlin_utils_test describe it."""
    bits = weight.scheme.bits
    codes = weight.codes.t()
    inputs, outputs = codes.shape
    tiles = codes.reshape(inputs // 16, 16, outputs // 16, 16).permute(0, 2, 1, 3)
    strips = tiles.reshape(-1, 1024)[:, permutation(bits)].reshape(inputs // 16, -1)
    by_group = [i + 8 * j for i in range(8) for j in range(8)]
    by_row = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    scales = weight.scales.half().t()
    order = by_group if scales.shape[0] > 1 else by_row
    permuted = scales.reshape(-1, len(order))[:, order].reshape(scales.shape)
    tensors = {"B": words(strips, bits), "s": permuted}
    if weight.zeros is not None:
        zeros = weight.zeros.t().reshape(-1, 64)[:, by_group]
        interleaved = zeros.reshape(-1, len(INTERLEAVE[bits]))[:, INTERLEAVE[bits]]
        tensors["z"] = words(interleaved.reshape(-1, outputs), bits)
    return tensors


@pytest.mark.parametrize("bits", [4, 8])
def test_the_reference_permutation_is_a_bijection(bits: int) -> None:
    assert sorted(permutation(bits)) == list(range(1024))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_axes_say_what_the_permutation_says(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randperm(256 * 192, generator=generator).view(192, 256)
    tiles = codes.t().reshape(16, 16, 12, 16).permute(0, 2, 1, 3)
    expected = tiles.reshape(-1, 1024)[:, permutation(bits)].reshape(16, -1)
    tiled = marlin.tile(codes, bits)
    assert torch.equal(tiled, expected)
    assert torch.equal(marlin.untile(tiled, bits, 192, 256), codes)


@pytest.mark.parametrize(
    "scheme",
    ["int4-g32-sym", "int4-g64-sym", "int4-g128-sym", "int4-row-sym", "int4-g64-asym",
     "int4-row-asym", "int8-g128-sym", "int8-row-sym"],
)  # fmt: skip
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 128), (192, 256), (256, 384)])
def test_tensors_equal_the_reference_and_come_back(
    scheme: str, out_features: int, in_features: int, random_weight: RandomWeight
) -> None:
    parsed = QuantScheme.parse(scheme)
    weight = random_weight(parsed, out_features, in_features)
    tensors = marlin.pack_layer(weight, torch.bfloat16)
    expected = reference(weight)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    read = marlin.unpack_layer(tensors, LayerSpec("layer", parsed))
    assert torch.equal(read.dequantize(), weight.dequantize())


SCHEMES = [
    QuantScheme(bits, group, symmetric=symmetric)
    for bits in (4, 8)
    for group in (*marlin.GROUP_SIZES, None)
    for symmetric in (True, False)
    if bits == 4 or symmetric
]


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    strips=st.integers(1, 9),
    tiles=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_every_legal_shape_equals_the_reference_and_comes_back(
    scheme: QuantScheme, strips: int, tiles: int, seed: int, random_weight: RandomWeight
) -> None:
    outputs, inputs = strips * marlin.OUT_MULTIPLE, tiles * marlin.IN_MULTIPLE
    assert marlin.refuses(scheme, outputs, inputs) is None
    weight = random_weight(scheme, outputs, inputs, seed)
    tensors = marlin.pack_layer(weight, torch.bfloat16)
    expected = reference(weight)
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(expected[name]) for name in tensors)
    read = marlin.unpack_layer(tensors, LayerSpec("layer", scheme))
    assert read.codes.equal(weight.codes)
    assert read.scales.float().equal(weight.scales.float())
    assert (read.zeros is None) == (weight.zeros is None)
    assert weight.zeros is None or read.zeros is None or read.zeros.equal(weight.zeros)


@given(scheme=st.sampled_from(SCHEMES), outputs=st.integers(1, 600), inputs=st.integers(1, 900))
def test_every_other_shape_is_refused(scheme: QuantScheme, outputs: int, inputs: int) -> None:
    legal = outputs % marlin.OUT_MULTIPLE == 0 and inputs % marlin.IN_MULTIPLE == 0
    assert (marlin.refuses(scheme, outputs, inputs) is None) == legal


def test_the_worked_example_of_the_module_holds() -> None:
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    codes[8, 9] = 0xF
    weight = QuantizedWeight(codes, torch.ones(64, 1), None, QuantScheme(4, 128))
    words = marlin.pack_layer(weight, torch.float16)["B"]
    assert words.shape == (128 // 16, 64 * 2)
    assert int(words[0, 0]) & 0xFFFFFFFF == 0xF << (4 * 7)
    assert int((words != 0).sum()) == 1


def test_scale_orders_undo_themselves() -> None:
    for groups in (1, 3):
        scales = torch.arange(groups * 128).view(groups, 128)
        permuted = marlin.permute_scales(scales)
        assert not torch.equal(permuted, scales)
        assert torch.equal(marlin.unpermute_scales(permuted), scales)


def test_another_version_of_the_layout_is_refused() -> None:
    config = marlin.quantization_config({"m": QuantScheme(4, 128)}, [])
    with pytest.raises(UnsupportedModel, match="version 2; this qtool reads 1"):
        marlin.read({**config, "version": 2}, ["m"], "config.json")
    with pytest.raises(FormatError, match="other is packed, and its scheme is not in the config"):
        marlin.read(config, ["m", "other"], "config.json")
    with pytest.raises(FormatError, match="m is packed by the config, and has no tensors"):
        marlin.read(config, [], "config.json")
