"""AWQ GEMM files against a reader written from the format's description, one nibble at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from qtool.convert import awq
from qtool.convert.layer import LayerSpec
from qtool.errors import UnsupportedModel
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

RandomWeight = Callable[..., QuantizedWeight]
# Output 8c + j lies in this nibble of word c.
NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """[n, out / 8] int32 -> [n, out], by reading each output's nibble."""
    rows, columns = words.shape
    values = torch.empty(rows, columns * 8, dtype=torch.int64)
    for output in range(columns * 8):
        shift = 4 * NIBBLE_OF_OUTPUT[output % 8]
        values[:, output] = (words[:, output // 8].long() >> shift) & 0xF
    return values


def reference(tensors: Mapping[str, torch.Tensor], group_size: int) -> torch.Tensor:
    """W[o, k] = (q[k, o] - z[k // g, o]) * scales[k // g, o]."""
    codes, zeros = nibbles(tensors["qweight"]), nibbles(tensors["qzeros"])
    group = torch.arange(codes.shape[0]) // group_size
    return ((codes - zeros[group]).float() * tensors["scales"].float()[group]).t()


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "int4-g128-asym", "int4-g64-sym"])
def test_written_files_mean_what_an_independent_reader_finds(
    scheme: str, random_weight: RandomWeight
) -> None:
    parsed = QuantScheme.parse(scheme)
    weight = random_weight(parsed, 40, 256)
    tensors = awq.pack_layer(weight, torch.float16)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "qweight": (256, 5),
        "qzeros": (parsed.num_groups(256), 5),
        "scales": (parsed.num_groups(256), 40),
    }
    assert torch.equal(reference(tensors, parsed.group_width(256)), weight.dequantize())


def test_outputs_zero_to_seven_make_the_interleaved_word() -> None:
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(1).expand(8, 32).contiguous()
    weight = QuantizedWeight(codes, torch.ones(8, 1), None, QuantScheme(4, 32))
    tensors = awq.pack_layer(weight, torch.float16)
    assert {int(w) & 0xFFFFFFFF for w in tensors["qweight"].flatten()} == {0x75316420}
    assert {int(w) & 0xFFFFFFFF for w in tensors["qzeros"].flatten()} == {0x88888888}


def test_a_symmetric_weight_comes_back_symmetric(random_weight: RandomWeight) -> None:
    weight = random_weight(QuantScheme(4, 128), 64, 128)
    read = awq.unpack_layer(
        awq.pack_layer(weight, torch.float16),
        LayerSpec("layer", QuantScheme(4, 128, symmetric=False)),
    )
    assert read.zeros is None
    assert read.scheme == weight.scheme


def test_the_config_names_what_is_not_converted_in_full() -> None:
    config = awq.quantization_config(
        {"model.layers.0.up": QuantScheme(4, 128, symmetric=False)}, ["model.layers.0.down"]
    )
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["model.layers.0.down", "lm_head"],
    }


def test_autoawqs_own_spellings_are_read_and_other_versions_refused() -> None:
    spec = awq.read({"w_bit": 4, "q_group_size": 64, "version": "GEMM"}, ["m"], "c")["m"].spec
    assert (spec.scheme.bits, spec.scheme.group_size) == (4, 64)
    with pytest.raises(UnsupportedModel, match="gemv"):
        awq.read({"bits": 4, "group_size": 64, "version": "gemv"}, ["m"], "config.json")
