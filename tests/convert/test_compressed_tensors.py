"""compressed-tensors files against the library's own compressor, and loaded by transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from qtool.convert import compressed_tensors, pack_quantized
from qtool.convert.compressed_tensors import target_patterns
from qtool.convert.formats import open_weights
from qtool.convert.layer import LayerSpec
from qtool.errors import FormatError, UnsupportedModel
from qtool.json_files import read_json
from qtool.scheme import QuantScheme
from qtool.source import Source
from qtool.weights import QuantizedWeight

RandomWeight = Callable[..., QuantizedWeight]
BITS = (2, 3, 4, 5, 6, 7, 8)


def their_scheme(scheme: QuantScheme) -> QuantizationScheme:
    strategy = "channel" if scheme.group_size is None else "group"
    weights = QuantizationArgs(
        num_bits=scheme.bits, symmetric=scheme.symmetric, strategy=strategy,
        group_size=scheme.group_size,
    )  # fmt: skip
    return QuantizationScheme(targets=["Linear"], weights=weights)


def their_compressor() -> type[BaseCompressor]:
    found = BaseCompressor.get_value_from_registry("pack-quantized")
    assert isinstance(found, type)
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", ["g32", "row"])
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_their_decompressor_finds_our_weights_and_their_compressor_writes_our_bytes(
    bits: int, group: str, kind: str, random_weight: RandomWeight
) -> None:
    scheme = QuantScheme.parse(f"int{bits}-{group}-{kind}")
    weight = random_weight(scheme, 48, 96)
    ours = pack_quantized.pack_layer(weight, torch.float32)
    found = their_compressor().decompress(dict(ours), their_scheme(scheme))["weight"]
    assert torch.equal(found, weight.dequantize())

    uncompressed = {"weight": weight.dequantize(), "weight_scale": weight.scales}
    if weight.zeros is not None:
        signed = weight.zeros.to(torch.int16) - scheme.midpoint
        uncompressed["weight_zero_point"] = signed.to(torch.int8)
    theirs = their_compressor().compress(uncompressed, their_scheme(scheme))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model, torch.nn.Module)
    return model.eval()


def dense_logits(folder: Path, source: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the source model with the weights that our reader finds in `folder`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    reader = open_weights(Source(str(folder), folder))
    for module in reader.modules():
        model.get_submodule(module).weight.data = reader.weight(module).dequantize()
    with torch.no_grad():
        logits = model(tokens).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def mixed(module: str) -> QuantScheme | None:
    """Four schemes in one model, one of them in some blocks only, and a linear left dense."""
    if ".layers." not in module or module.endswith("0.self_attn.o_proj"):
        return None
    if "self_attn" in module:
        return QuantScheme(8, None)
    if module.endswith("1.mlp.down_proj"):
        return QuantScheme(4, 32)
    return QuantScheme(3, 64) if "gate" in module else QuantScheme(4, 128)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True)])
def test_transformers_loads_one_scheme_bit_for_bit(
    family: str,
    tied: bool,
    packed_checkpoint: Callable[..., Path],
    tiny_checkpoint: Callable[..., Path],
) -> None:
    settings = {"dtype": "float32", "tie_word_embeddings": tied}
    folder = packed_checkpoint("compressed-tensors", "int4-g128-sym", family, **settings)
    config = read_json(folder / "config.json")["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    tokens = torch.arange(24).view(2, 12) * 7
    with torch.no_grad():
        found = load(folder)(tokens).logits
    source = tiny_checkpoint(family, **settings)
    assert torch.equal(found, dense_logits(folder, source, tokens))


def test_transformers_loads_mixed_widths_bit_for_bit(
    tmp_path: Path, write_packed: Callable[..., Path], tiny_checkpoint: Callable[..., Path]
) -> None:
    source = tiny_checkpoint("llama", dtype="float32")
    folder = write_packed(source, tmp_path / "mixed", "compressed-tensors", mixed)
    config = read_json(folder / "config.json")["quantization_config"]
    assert len(config["config_groups"]) == 4
    tokens = torch.arange(24).view(2, 12) * 7
    with torch.no_grad():
        found = load(folder)(tokens).logits
    assert torch.equal(found, dense_logits(folder, source, tokens))


def test_patterns_match_their_modules_and_no_others() -> None:
    modules = ["m.layers.0.up", "m.layers.1.up", "m.layers.11.down"]
    others = ["m.layers.1.down", "m.layers.111.down", "lm_head", "m.layers.0.up_more"]
    patterns = target_patterns(modules, others)
    assert patterns == [r"re:m\.layers\.\d+\.up$", r"re:m\.layers\.(11)\.down$"]
    matched = [
        name
        for name in (*modules, *others)
        if any(re.match(pattern.removeprefix("re:"), name) for pattern in patterns)
    ]
    assert matched == modules


def padded_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The layout of before 0.18: floor(32 / bits) codes a word."""
    per_word = 32 // bits
    split = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per_word))
    split = split.view(codes.shape[0], -1, per_word)
    packed = sum(split[..., i] << (bits * i) for i in range(per_word))
    assert isinstance(packed, torch.Tensor)
    return packed.to(torch.int32)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_the_old_padded_layout_is_read_where_the_shapes_tell_it(
    bits: int, random_weight: RandomWeight
) -> None:
    weight = random_weight(QuantScheme(bits, 64), 32, 128)
    tensors = pack_quantized.pack_layer(weight, torch.bfloat16)
    tensors["weight_packed"] = padded_words(weight.codes, bits)
    spec = LayerSpec("layer", weight.scheme, layout="0.17.1")
    assert torch.equal(pack_quantized.unpack_layer(tensors, spec).codes, weight.codes)


def test_the_old_layout_is_refused_where_the_shapes_do_not_tell(
    random_weight: RandomWeight,
) -> None:
    weight = random_weight(QuantScheme(5, None), 32, 12)
    tensors = pack_quantized.pack_layer(weight, torch.bfloat16)
    assert tensors["weight_packed"].shape[1] == padded_words(weight.codes, 5).shape[1]
    with pytest.raises(FormatError, match=r"written by compressed-tensors 0\.17\.1"):
        pack_quantized.unpack_layer(tensors, LayerSpec("m", weight.scheme, layout="0.17.1"))
    read = pack_quantized.unpack_layer(tensors, LayerSpec("m", weight.scheme, layout="0.20.0"))
    assert torch.equal(read.codes, weight.codes)


def test_files_with_one_scale_for_all_or_unpacked_zeros_are_read(
    random_weight: RandomWeight,
) -> None:
    weight = random_weight(QuantScheme(4, None), 32, 64)
    weight.scales[:] = 0.5
    tensors = pack_quantized.pack_layer(weight, torch.bfloat16)
    tensors["weight_scale"] = torch.tensor([0.5])
    read = pack_quantized.unpack_layer(tensors, LayerSpec("m", weight.scheme))
    assert torch.equal(read.dequantize(), weight.dequantize())

    weight = random_weight(QuantScheme(4, 32, symmetric=False), 32, 64)
    assert weight.zeros is not None
    tensors = pack_quantized.pack_layer(weight, torch.bfloat16)
    tensors["weight_zero_point"] = (weight.zeros.to(torch.int16) - 8).to(torch.int8)
    read = pack_quantized.unpack_layer(tensors, LayerSpec("m", weight.scheme))
    assert torch.equal(read.dequantize(), weight.dequantize())


def group(**weights: object) -> dict[str, object]:
    defaults = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                "group_size": 64}  # fmt: skip
    return {"targets": ["Linear"], "weights": defaults | weights}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "float-quantized", "config_groups": {"g": group(type="float")}}, "of 4 bits"),
        ({"format": "mxfp6-pack-quantized", "config_groups": {"g": group()}}, "mxfp6"),
        ({"format": "pack-quantized", "config_groups": {"g": group(strategy="block")}}, "'block'"),
        ({"config_groups": {"g": group()}, "transform_config": {"r1": {}}}, "rotates"),
        ({"config_groups": {"g": group()}, "sparsity_config": {"format": "24"}}, "sparse"),
    ],
)
def test_what_is_not_read_is_refused_by_name(config: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        compressed_tensors.read(config, ["m"], "config.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no config_groups"),
        ({"config_groups": {"g": {"targets": "Linear"}}}, "no list of targets"),
        ({"config_groups": {"g": {"targets": ["re:("]}}}, "no regular expression"),
        ({"config_groups": {"g": {"targets": ["other"]}}}, "no config group targets m"),
        ({"format": "pack-quantized", "config_groups": {"g": group(num_bits=9)}}, "of 9 bits"),
        ({"format": "pack-quantized", "config_groups": {"g": group(group_size=0)}}, "size 0"),
    ],
)
def test_a_malformed_config_is_refused_by_key(config: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        compressed_tensors.read(config, ["m"], "config.json")
