"""What holds of every packed format: round trips, moves between formats, configs read back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.convert.formats import FORMATS
from qtool.convert.layer import LayerSpec
from qtool.convert.sources import SOURCES
from qtool.errors import FormatError, QtoolError, UsageError
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

RandomWeight = Callable[..., QuantizedWeight]
SCHEMES = [
    QuantScheme(bits, group_size, symmetric)
    for bits in range(2, 9)
    for group_size in (32, 64, 128, None)
    for symmetric in (True, False)
]
HELD = [
    (name, scheme)
    for name, layout in FORMATS.items()
    for scheme in SCHEMES
    if layout.refuses(scheme, 192, 384) is None
]


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    zeros_match = (one.zeros is None) == (other.zeros is None)
    if one.zeros is not None and other.zeros is not None:
        zeros_match = torch.equal(one.zeros, other.zeros)
    return (
        one.scheme == other.scheme
        and torch.equal(one.codes, other.codes)
        and torch.equal(one.scales.float(), other.scales.float())
        and zeros_match
    )


@pytest.mark.parametrize(("name", "scheme"), HELD, ids=lambda value: str(value))
def test_what_a_format_takes_it_gives_back(
    name: str, scheme: QuantScheme, random_weight: RandomWeight
) -> None:
    layout = FORMATS[name]
    weight = random_weight(scheme, 192, 384, seed=scheme.bits)
    tensors = layout.pack(weight, torch.bfloat16)
    assert set(tensors) <= set(layout.suffixes)
    assert layout.suffixes[0] in tensors
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    spec = LayerSpec("layer", scheme)
    assert layout.layout.shape_of(tensors, spec) == (192, 384)
    assert same(layout.unpack(tensors, spec), weight)


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("compressed-tensors", {*SCHEMES}),
        ("gptq", {s for s in SCHEMES if s.symmetric and s.bits in (2, 3, 4, 8)}),
        ("awq", {s for s in SCHEMES if s.bits == 4}),
        ("marlin", {s for s in SCHEMES if s.bits == 4 or (s.bits == 8 and s.symmetric)}),
    ],
)
def test_each_format_holds_just_the_schemes_its_readers_know(
    name: str, held: set[QuantScheme]
) -> None:
    assert {s for s in SCHEMES if FORMATS[name].refuses(s, 192, 384) is None} == held


@pytest.mark.parametrize(
    ("name", "out_features", "in_features", "scheme", "reason"),
    [
        ("gptq", 100, 128, "int4-g64-sym", "by 32"),
        ("gptq", 128, 128, "int4-g43-sym", "groups of 32, 64, 128"),
        ("gptq", 128, 192, "int4-g128-sym", "not a multiple of group size 128"),
        ("awq", 12, 128, "int4-g128-asym", "by 8"),
        ("awq", 64, 128, "int8-g128-sym", "4 bits"),
        ("marlin", 64, 192, "int4-g64-sym", "multiple of 128"),
        ("marlin", 96, 128, "int4-g64-sym", "outputs of 64"),
        ("marlin", 64, 128, "int3-g64-sym", "4 or 8 bits"),
        ("marlin", 64, 128, "int8-g64-asym", "zero points with 4 bits"),
        ("compressed-tensors", 64, 172, "int4-g128-sym", "not a multiple"),
    ],
)
def test_a_refusal_names_the_rule(
    name: str, out_features: int, in_features: int, scheme: str, reason: str
) -> None:
    refusal = FORMATS[name].refuses(QuantScheme.parse(scheme), out_features, in_features)
    assert refusal is not None
    assert reason in refusal


@given(
    names=st.sampled_from(list(itertools.permutations(FORMATS, 2))),
    group_size=st.sampled_from([32, 64, 128, None]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_symmetric_int4_moves_between_formats_without_a_change(
    random_weight: RandomWeight,
    names: tuple[str, str],
    group_size: int | None,
    rows: int,
    columns: int,
    seed: int,
) -> None:
    scheme = QuantScheme(4, group_size)
    weight = random_weight(scheme, 64 * rows, 128 * columns, seed)
    spec = LayerSpec("layer", scheme)
    moved = weight
    for name in names:
        packed = FORMATS[name].pack(moved, torch.bfloat16)
        moved = FORMATS[name].unpack(packed, spec)
    assert same(moved, weight)
    assert torch.equal(moved.dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_a_config_read_back_gives_every_layer_its_scheme(name: str) -> None:
    layout = FORMATS[name]
    modules = [f"model.layers.{i}.mlp.{p}_proj" for i in range(3) for p in ("up", "down")]
    schemes = dict.fromkeys(modules, QuantScheme(4, 128))
    if not layout.single_scheme:
        schemes["model.layers.1.mlp.down_proj"] = QuantScheme(4, 64)
        schemes["model.layers.2.mlp.up_proj"] = QuantScheme(8, None)
    config = json.loads(json.dumps(layout.quantization_config(schemes, ["lm_head"])))
    read = SOURCES[name].read(config, modules, "config.json")
    found = {module: packed.spec.scheme for module, packed in read.items()}
    assert {m: (s.bits, s.group_size) for m, s in found.items()} == {
        m: (s.bits, s.group_size) for m, s in schemes.items()
    }


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_formats_of_one_scheme_refuse_two_and_name_both_layers(name: str) -> None:
    schemes = {"a.up": QuantScheme(4, 128), "a.down": QuantScheme(4, 64)}
    with pytest.raises(UsageError, match=r"a\.up is int4-g128-sym and a\.down is int4-g64-sym"):
        FORMATS[name].quantization_config(schemes, [])


@pytest.mark.parametrize("name", ["gptq", "awq", "marlin"])
def test_a_scale_beyond_fp16_is_refused_and_not_written_as_infinity(
    name: str, random_weight: RandomWeight
) -> None:
    weight = random_weight(QuantScheme(4, 128), 64, 128)
    weight.scales[0, 0] = 1e5
    with pytest.raises(QtoolError, match="65504"):
        FORMATS[name].pack(weight, torch.bfloat16)


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_that_disagree_with_the_config_are_refused_with_their_name(
    name: str, random_weight: RandomWeight
) -> None:
    layout, scheme = FORMATS[name], QuantScheme(4, 64)
    tensors = layout.pack(random_weight(scheme, 128, 256), torch.bfloat16)
    spec = LayerSpec("model.layers.0.up", scheme, file="model.safetensors")
    for suffix, tensor in tensors.items():
        for bad in (tensor[:-1], tensor[..., :-1], tensor.bool(), tensor.unsqueeze(0)):
            with pytest.raises(FormatError, match=r"model\.safetensors: model\.layers\.0\.up\."):
                layout.unpack(tensors | {suffix: bad}, spec)
    with pytest.raises(FormatError, match="is missing"):
        layout.unpack({}, spec)
    wrong_group = LayerSpec("model.layers.0.up", QuantScheme(4, 128), file="model.safetensors")
    with pytest.raises(FormatError, match="has shape"):
        layout.unpack(tensors, wrong_group)
