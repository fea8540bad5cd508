"""GPTQ files against a reader written from the format's description, one code at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from qtool.convert import gptq
from qtool.convert.layer import LayerSpec, dequantize_act_order
from qtool.errors import FormatError, UnsupportedModel
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

RandomWeight = Callable[..., QuantizedWeight]
OUT, IN = 64, 128


def field(words: list[int], bits: int, index: int) -> int:
    """Code `index` of a dense little-endian stream of 32-bit words."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return (stream >> (bits * index)) & (2**bits - 1)


def reference(tensors: Mapping[str, torch.Tensor], bits: int, *, zero_offset: int) -> torch.Tensor:
    """W[o, k] = scales[g_idx[k], o] * (q[o, k] - z[g_idx[k], o]), element by element."""
    g_idx = tensors["g_idx"].tolist()
    scales = tensors["scales"].float()
    qweight, qzeros = tensors["qweight"], tensors["qzeros"]
    out_features = qweight.shape[1]
    zeros = torch.tensor([
        [(field(row, bits, o) + zero_offset) % 2**bits for o in range(out_features)]
        for row in qzeros.tolist()
    ])  # fmt: skip
    weight = torch.empty(out_features, len(g_idx))
    for o in range(out_features):
        column = qweight[:, o].tolist()
        for k, group in enumerate(g_idx):
            code = field(column, bits, k)
            weight[o, k] = scales[group, o] * (code - int(zeros[group, o]))
    return weight


@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("group_size", [32, None])
def test_written_files_mean_what_an_independent_reader_finds(
    bits: int, group_size: int | None, random_weight: RandomWeight
) -> None:
    weight = random_weight(QuantScheme(bits, group_size), OUT, IN)
    tensors = gptq.pack_layer(weight, torch.float16)
    assert tensors["qweight"].shape == (IN * bits // 32, OUT)
    assert tensors["scales"].dtype == torch.float16
    assert torch.equal(reference(tensors, bits, zero_offset=1), weight.dequantize())


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_version_one_stores_symmetric_zeros_less_one(
    bits: int, word: int, random_weight: RandomWeight
) -> None:
    tensors = gptq.pack_layer(random_weight(QuantScheme(bits, 32), OUT, IN), torch.float16)
    assert {int(w) & 0xFFFFFFFF for w in tensors["qzeros"].flatten()} == {word}


def test_three_bit_zeros_are_a_stream_of_threes(random_weight: RandomWeight) -> None:
    tensors = gptq.pack_layer(random_weight(QuantScheme(3, 32), OUT, IN), torch.float16)
    row = tensors["qzeros"][0].tolist()
    assert [field(row, 3, i) for i in range(OUT)] == [3] * OUT


@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("layout", [gptq.V1, gptq.V2])
def test_asymmetric_files_of_both_versions_are_read_field_by_field(
    bits: int, layout: str, random_weight: RandomWeight
) -> None:
    scheme = QuantScheme(bits, 64, symmetric=False)
    weight = random_weight(scheme, OUT, IN)
    assert weight.zeros is not None
    weight.zeros[0] = 0  # wraps to the largest code in version 1, and must not borrow
    tensors = gptq.pack_layer(weight, torch.float16)
    if layout == gptq.V2:
        shifted = QuantizedWeight(weight.codes, weight.scales, weight.zeros + 1, scheme)
        tensors = gptq.pack_layer(shifted, torch.float16)
    read = gptq.unpack_layer(tensors, LayerSpec("layer", scheme, layout))
    assert torch.equal(read.dequantize(), weight.dequantize())
    offset = 1 if layout == gptq.V1 else 0
    assert torch.equal(reference(tensors, bits, zero_offset=offset), weight.dequantize())


def test_zeros_all_at_the_midpoint_make_a_symmetric_weight_whatever_the_config_says(
    random_weight: RandomWeight,
) -> None:
    tensors = gptq.pack_layer(random_weight(QuantScheme(4, 32), OUT, IN), torch.float16)
    read = gptq.unpack_layer(tensors, LayerSpec("layer", QuantScheme(4, 32, symmetric=False)))
    assert read.scheme == QuantScheme(4, 32, symmetric=True)


def test_act_order_groups_are_dequantized_through_their_index(random_weight: RandomWeight) -> None:
    scheme = QuantScheme(4, 32)
    weight = random_weight(scheme, OUT, IN)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(7))
    g_idx = (torch.arange(IN, dtype=torch.int32) // 32)[order]
    tensors = gptq.pack_layer(weight, torch.float16) | {"g_idx": g_idx}
    spec = LayerSpec("layer", scheme)
    with pytest.raises(FormatError, match="act-order"):
        gptq.unpack_layer(tensors, spec)
    expected = reference(tensors, 4, zero_offset=1)
    assert torch.equal(dequantize_act_order(weight, g_idx, spec), expected)
    with pytest.raises(FormatError, match=r"outside 0\.\.3"):
        dequantize_act_order(weight, g_idx + 1, spec)


def test_the_config_has_the_keys_that_loaders_read() -> None:
    config = gptq.quantization_config({"model.layers.0.up": QuantScheme(4, 128)}, ["lm_head"])
    expected = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    assert config.items() >= expected.items()
    assert "dynamic" not in config
    assert "modules_in_block_to_quantize" not in config


def test_linears_left_dense_in_every_block_are_told_by_short_names() -> None:
    quantized = {f"model.layers.{i}.mlp.{p}": QuantScheme(4, 64) for i in range(2) for p in "gu"}
    dense = [f"model.layers.{i}.mlp.down" for i in range(2)] + ["lm_head"]
    config = gptq.quantization_config(quantized, dense)
    assert config["modules_in_block_to_quantize"] == [["mlp.g", "mlp.u"]]


def test_linears_left_dense_in_some_blocks_are_told_by_full_names() -> None:
    quantized = dict.fromkeys(["m.0.up", "m.1.up", "m.1.down"], QuantScheme(4, 64))
    config = gptq.quantization_config(quantized, ["m.0.down"])
    assert config["modules_in_block_to_quantize"] == [["up", "m.1.down"]]


def test_dynamic_overrides_give_a_layer_its_own_bits() -> None:
    config = {"bits": 4, "group_size": 128, "sym": True, "dynamic": {
        "-:.*lm_head": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 64}}}  # fmt: skip
    packed = gptq.read(config, ["l.0.up_proj", "l.0.down_proj"], "config.json")
    assert packed["l.0.up_proj"].spec.scheme == QuantScheme(4, 128)
    assert packed["l.0.down_proj"].spec.scheme == QuantScheme(8, 64)


def test_layouts_of_other_writers_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="gptq_p"):
        gptq.read({"bits": 5, "checkpoint_format": "gptq_p"}, ["m"], "config.json")
    with pytest.raises(UnsupportedModel, match="int64"):
        gptq.read({"bits": 4, "pack_dtype": "int64"}, ["m"], "config.json")
    with pytest.raises(FormatError, match="5 bits"):
        gptq.read({"bits": 5}, ["m"], "config.json")
