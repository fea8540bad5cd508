"""Files that other tools write, each against the decoder of the library that defines it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from qtool.convert import bitsandbytes, float8
from qtool.convert.formats import Held, WeightReader, open_weights
from qtool.convert.layer import FloatSpec, LayerSpec
from qtool.errors import FormatError, UnsupportedModel
from qtool.runtime.loading import load_model
from qtool.scheme import FloatScheme, QuantScheme
from qtool.source import Source
from qtool.weights import CodebookWeight, DenseWeight, Float8Weight, QuantizedWeight

Foreign = Callable[..., Path]
Parts = dict[str, torch.Tensor]
ForeignParts = Callable[[str, torch.Tensor], tuple[Parts, dict[str, Any]]]
UP = "model.layers.0.mlp.up_proj"
DATA = Path(__file__).parent / "data"

# What each file's linears are, in a word, and the library's name of its layout.
OF_COMPRESSED_TENSORS = {
    "int8": "int8-row-sym",
    "int8-asym": "int8-row-asym",
    "int4-in-bytes": "int4-g64-sym",
    "fp8-channel": "fp8-row",
    "fp8-tensor": "fp8-tensor",
    "fp8-block": "fp8-128x128",
    "mxfp8": "mxfp8-g32",
    "mxfp4": "mxfp4-g32",
    "nvfp4": "nvfp4-g16",
}
OTHERS = {
    "fine-grained-fp8": "fp8-128x128",
    "fine-grained-ue8m0": "fp8-128x128",
    "nf4": "nf4-g64",
    "nf4-nested": "nf4-g64",
    "llm-int8": "int8-row-sym",
}


def opened(folder: Path) -> WeightReader:
    return open_weights(Source(str(folder), folder))


def values(out_features: int = 256, in_features: int = 384, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator) * 0.05


def one_linear(folder: Path, parts: Parts, config: dict[str, Any]) -> WeightReader:
    folder.mkdir(exist_ok=True)
    tensors = {f"{UP}.{suffix}": part.contiguous() for suffix, part in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return opened(folder)


@pytest.mark.parametrize("kind", OF_COMPRESSED_TENSORS)
def test_every_layout_of_compressed_tensors_decodes_as_the_library_decodes_it(
    kind: str, foreign_parts: ForeignParts, tmp_path: Path
) -> None:
    parts, config = foreign_parts(kind, values())
    group = config["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    theirs = compressor.decompress(dict(parts), scheme)["weight"]
    reader = one_linear(tmp_path, parts, config)
    assert reader.describe(UP).kind == OF_COMPRESSED_TENSORS[kind]
    assert torch.equal(reader.weight(UP).dequantize(theirs.dtype), theirs)


@pytest.mark.parametrize("kind", ["fine-grained-fp8", "fine-grained-ue8m0"])
def test_fine_grained_fp8_decodes_as_transformers_decodes_it(
    kind: str, foreign_parts: ForeignParts, tmp_path: Path
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    parts, config = foreign_parts(kind, values())
    decode = Fp8Dequantize(None)._dequantize_one
    reader = one_linear(tmp_path, parts, config)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = decode(parts["weight"], parts["weight_scale_inv"], dtype)
        assert torch.equal(reader.weight(UP).dequantize(dtype), theirs)


def test_blocks_at_the_edge_may_be_cut_short() -> None:
    weight = torch.ones(200, 130).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    spec = FloatSpec("m", FloatScheme("fp8", (128, 128)))
    read = float8.unpack_layer({"weight": weight, "weight_scale_inv": scales}, spec)
    found = read.dequantize()
    assert found[127, 127] == 1
    assert found[127, 128] == found[0, 129] == 2
    assert found[128, 0] == 3
    assert found[199, 129] == 4
    some = torch.tensor([199, 3, 128])
    assert torch.equal(read.rows(some).dequantize(), found[some])


def test_one_scale_for_all_is_read_as_vllms_first_fp8_files_have_it(tmp_path: Path) -> None:
    parts = {"weight": values().to(torch.float8_e4m3fn), "weight_scale": torch.tensor(0.5),
             "input_scale": torch.tensor(1.0)}  # fmt: skip
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    reader = one_linear(tmp_path, parts, config)
    assert reader.describe(UP) == Held((256, 384), "fp8-tensor")
    assert torch.equal(reader.weight(UP).dequantize(), parts["weight"].float() * 0.5)
    assert reader.tensor_names() == []


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        ("nf4", "nf4-g64", torch.float32),
        ("nf4_nested", "nf4-g64", torch.bfloat16),
        ("nf4_blocks_of_128", "nf4-g128", torch.float16),
        ("nf4_odd", "nf4-g64", torch.float32),
        ("fp4", "fp4-g64", torch.float32),
    ],
)
def test_four_bits_decode_as_bitsandbytes_decodes_them(
    name: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    golden = load_file(DATA / "bitsandbytes.safetensors")
    decoded = golden.pop(f"{name}.decoded")
    parts = {n.removeprefix(f"{name}."): t for n, t in golden.items() if n.startswith(f"{name}.")}
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": kind[:3]}
    reader = one_linear(tmp_path, parts, config)
    assert reader.format == "bitsandbytes"
    assert reader.describe(UP) == Held(tuple(decoded.shape), kind)
    weight = reader.weight(UP)
    assert isinstance(weight, CodebookWeight)
    assert torch.equal(weight.dequantize(dtype), decoded)
    some = torch.tensor([2, 0])
    assert torch.equal(weight.rows(some).dequantize(dtype), decoded[some])


def test_bytes_stored_under_the_name_of_another_type_are_read(
    foreign_parts: ForeignParts, tmp_path: Path
) -> None:
    parts, config = foreign_parts("nf4", values())
    expected = one_linear(tmp_path, parts, config).weight(UP).dequantize()
    parts["weight"] = parts["weight"].flatten().view(torch.bfloat16).unsqueeze(1)
    assert torch.equal(one_linear(tmp_path, parts, config).weight(UP).dequantize(), expected)


def test_eight_bits_decode_as_bitsandbytes_decodes_them_but_for_one_rounding(
    tmp_path: Path,
) -> None:
    golden = load_file(DATA / "bitsandbytes.safetensors")
    decoded = golden["int8.decoded"]
    parts = {n: golden[f"int8.{n}"] for n in ("weight", "SCB", "weight_format")}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    reader = one_linear(tmp_path, parts, config)
    assert reader.describe(UP) == Held((32, 48), "int8-row-sym", QuantScheme(8, None), "float32")
    found = reader.weight(UP).dequantize()
    torch.testing.assert_close(found, decoded, rtol=2**-22, atol=0)
    assert torch.equal(found.half(), decoded.half())
    assert torch.equal(found.bfloat16(), decoded.bfloat16())


@pytest.mark.parametrize("kind", OF_COMPRESSED_TENSORS | OTHERS)
def test_a_whole_model_of_each_kind_is_read_and_near_its_original(
    kind: str, foreign_checkpoint: Foreign, tiny_checkpoint: Callable[..., Path]
) -> None:
    original = opened(tiny_checkpoint("llama", dtype="bfloat16"))
    reader = opened(foreign_checkpoint(kind))
    assert len(reader.modules()) == 14
    assert sorted(reader.tensor_names()) == sorted(
        name
        for name in original.tensor_names()
        if name.removesuffix(".weight") not in reader.modules()
    )
    for module in reader.modules():
        weight = reader.weight(module)
        assert not isinstance(weight, DenseWeight)
        assert reader.describe(module).kind == (OF_COMPRESSED_TENSORS | OTHERS)[kind]
        expected = original.tensor(f"{module}.weight").float()
        distance = (weight.dequantize() - expected).norm() / expected.norm()
        assert float(distance) < (0.02 if "8" in reader.describe(module).kind else 0.2) * 2
        assert weight.nbytes < expected.numel() * 1.2
        some = torch.tensor([5, 0, 2])
        rows = weight.rows(some).dequantize()
        assert torch.equal(rows, weight.dequantize()[some])


@pytest.mark.parametrize("kind", ["fp8-block", "nvfp4", "nf4-nested", "int8-asym"])
def test_models_of_other_tools_are_served_with_the_weights_that_they_hold(
    kind: str, foreign_checkpoint: Foreign, tiny_checkpoint: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = foreign_checkpoint(kind)
    loaded = load_model(str(folder), dtype="float32")
    stored = {(use.weight, use.kernel) for use in loaded.kernels if use.layer != "head"}
    assert {weight for weight, _ in stored} == {(OF_COMPRESSED_TENSORS | OTHERS)[kind]}
    twin = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint("llama", dtype="bfloat16"), dtype=torch.float32
    )
    reader = opened(folder)
    for module in reader.modules():
        twin.get_submodule(module).weight.data = reader.weight(module).dequantize()
    tokens = torch.arange(40).view(1, 40) * 7
    with torch.no_grad():
        expected = twin.eval()(tokens).logits
    torch.testing.assert_close(loaded.logits(tokens), expected, rtol=1e-3, atol=1e-3)


def test_scales_of_activations_and_of_the_cache_are_not_carried(
    foreign_checkpoint: Foreign, tmp_path: Path
) -> None:
    folder = foreign_checkpoint("fp8-tensor")
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.k_scale", "self_attn.v_proj.output_scale"):
        tensors[f"model.layers.0.{name}"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert not [name for name in opened(tmp_path).tensor_names() if name.endswith("_scale")]


def test_a_weight_whose_scales_are_lost_is_refused(
    foreign_checkpoint: Foreign, tmp_path: Path
) -> None:
    folder = foreign_checkpoint("fine-grained-fp8")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{UP}.weight_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(FormatError, match=r"up_proj\.weight is float8_e4m3fn and has no scales"):
        opened(tmp_path)


def test_a_lost_quantization_config_is_told(foreign_checkpoint: Foreign, tmp_path: Path) -> None:
    for kind in ("fp8-channel", "nf4", "llm-int8"):
        folder = foreign_checkpoint(kind)
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(FormatError, match="is packed, and the config says the model is dense"):
            opened(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("fp8-block", {"block_structure": [64, 128]}, r"weight_scale has shape \[2, 3\], not"),
        ("fp8-block", {"block_structure": [0, 128]}, r"block of \[0, 128\]"),
        ("fp8-channel", {"strategy": "token"}, "8-bit floats by 'token'"),
        ("fp8-channel", {"strategy": ["group"]}, "8-bit floats by"),
        ("nvfp4", {"group_size": 32}, "nvfp4 weights are 4-bit floats in groups of 16"),
        ("mxfp4", {"type": "int"}, "'int' of 4 bits"),
        ("int8", {"num_bits": 4}, "holds values beyond 4 bits"),
        ("int8", {"strategy": "group", "group_size": 64}, "weight_scale has shape"),
    ],
)
def test_a_config_that_disagrees_is_refused(
    kind: str, changes: dict[str, Any], message: str, foreign_parts: ForeignParts, tmp_path: Path
) -> None:
    parts, config = foreign_parts(kind, values())
    config = json.loads(json.dumps(config, default=str))
    config["config_groups"]["group_0"]["weights"] |= changes
    with pytest.raises((FormatError, UnsupportedModel), match=message):
        one_linear(tmp_path, parts, config).weight(UP)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"shape": [256, 385]}, "takes 49280"),
        ({"shape": [2**40, 2**40]}, "has the shape"),
        ({"shape": None}, "has the shape None"),
        ({"blocksize": 63}, "blocks of 63"),
        ({"blocksize": 128}, r"absmax has shape \[1536\], not \[768\]"),
        ({"nested_blocksize": 256}, "nested blocks of 256 from None"),
        ({"nested_blocksize": 256, "nested_offset": 0.5}, "absmax is float32, not uint8"),
    ],
)
def test_a_quant_state_that_lies_is_refused(
    state: dict[str, Any], message: str, foreign_parts: ForeignParts, tmp_path: Path
) -> None:
    parts, config = foreign_parts("nf4", values())
    name = "weight.quant_state.bitsandbytes__nf4"
    text = json.dumps(json.loads(bytes(parts[name].tolist())) | state)
    parts[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(FormatError, match=message):
        one_linear(tmp_path, parts, config)


def test_other_layouts_of_int8_rows_are_refused() -> None:
    parts = {"weight": torch.zeros(4, 8, dtype=torch.int8), "SCB": torch.ones(4),
             "weight_format": torch.tensor(1, dtype=torch.uint8)}  # fmt: skip
    with pytest.raises(FormatError, match="weight_format is not 0"):
        bitsandbytes.unpack_eight_bit(parts, LayerSpec("m", QuantScheme(8, None)))


def test_a_hostile_pattern_of_a_config_is_given_up(tmp_path: Path) -> None:
    module = "a" * 60 + "!"
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    group = {"targets": ["re:(a|aa)+$"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized",
              "config_groups": {"g": group}}  # fmt: skip
    tensors = {f"{module}.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn),
               f"{module}.weight_scale": torch.ones(2, 1)}  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(FormatError, match="takes too long"):
        opened(tmp_path)


def test_kinds_are_what_their_weights_say(foreign_parts: ForeignParts, tmp_path: Path) -> None:
    types = {"fp8-row": Float8Weight, "nvfp4-g16": CodebookWeight, "int8-row-sym": QuantizedWeight}
    for kind, type_ in types.items():
        name = {"fp8-row": "fp8-channel", "nvfp4-g16": "nvfp4", "int8-row-sym": "int8"}[kind]
        weight = one_linear(tmp_path, *foreign_parts(name, values())).weight(UP)
        assert isinstance(weight, type_)
        assert str(weight.scheme) == kind
