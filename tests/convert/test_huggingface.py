"""Reading model folders: every packed format, mixed files, biases, and files that lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint import Checkpoint
from qtool.convert.formats import FORMATS, open_weights
from qtool.convert.huggingface import CheckpointWeights
from qtool.errors import FormatError, UnsupportedModel
from qtool.json_files import read_json, write_json
from qtool.scheme import QuantScheme
from qtool.source import Source
from qtool.weights import DenseWeight, QuantizedWeight

PackedCheckpoint = Callable[..., Path]
UP = "model.layers.0.mlp.up_proj"


def opened(folder: Path) -> CheckpointWeights:
    reader = open_weights(Source(str(folder), folder))
    assert isinstance(reader, CheckpointWeights)
    return reader


def edited(folder: Path, copy: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a model folder with another quantization_config."""
    shutil.copytree(folder, copy)
    config = read_json(copy / "config.json")
    edit(config["quantization_config"])
    write_json(copy / "config.json", config)
    return copy


def with_tensors(
    folder: Path, copy: Path, edit: Callable[[dict[str, torch.Tensor]], object]
) -> Path:
    """A copy of a model folder with other tensors."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_through_one_view(
    name: str, packed_checkpoint: PackedCheckpoint, tiny_checkpoint: Callable[..., Path]
) -> None:
    source = opened(tiny_checkpoint("llama", dtype="bfloat16"))
    reader = opened(packed_checkpoint(name, "int4-g128-sym"))
    assert reader.format == name
    assert "quantization_config" not in reader.config
    assert len(reader.modules()) == 14
    assert sorted(reader.tensor_names()) == sorted(
        n for n in source.tensor_names() if n.removesuffix(".weight") not in reader.modules()
    )
    weight = reader.weight(UP)
    assert isinstance(weight, QuantizedWeight)
    assert weight.scheme == QuantScheme(4, 128)
    assert reader.describe(UP).scheme == QuantScheme(4, 128)
    assert reader.describe(UP).shape == weight.shape == (512, 256)
    original = source.tensor(f"{UP}.weight").float()
    distance = (weight.dequantize() - original).norm() / original.norm()
    assert float(distance) < 0.15
    assert torch.equal(reader.tensor(f"{UP}.weight"), weight.dequantize())
    assert torch.equal(reader.tensor("model.norm.weight"), source.tensor("model.norm.weight"))


def test_a_plain_checkpoint_is_all_dense(books_7m: Path) -> None:
    reader = opened(books_7m)
    assert (reader.format, reader.modules()) == ("dense", [])
    assert isinstance(reader.weight(UP), DenseWeight)
    held = reader.describe(f"{UP}.weight")
    assert (held.shape, held.kind, held.scheme) == ((768, 256), "bfloat16", None)


def test_presence_is_told_for_packed_and_plain_names(packed_checkpoint: PackedCheckpoint) -> None:
    reader = opened(packed_checkpoint("gptq", "int4-g64-sym", "qwen2"))
    assert reader.has(f"{UP}.weight")
    assert reader.has("model.layers.1.self_attn.q_proj.bias")
    assert reader.has("lm_head.weight")
    assert not reader.has(f"{UP}.bias")
    with pytest.raises(FormatError, match=r"no tensor 'model\.nothing\.weight'"):
        reader.weight("model.nothing")
    with pytest.raises(FormatError, match=r"no tensor 'model\.nothing'"):
        reader.describe("model.nothing")


def test_a_tied_head_is_not_made_up(packed_checkpoint: PackedCheckpoint) -> None:
    reader = opened(packed_checkpoint("awq", "int4-g64-asym", tie_word_embeddings=True))
    assert not reader.has("lm_head.weight")
    assert reader.describe(UP).kind == "int4-g64-asym"


def test_act_order_files_are_read_dense(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    plain = packed_checkpoint("gptq", "int4-g64-sym")
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))

    def shuffle(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.g_idx"] = tensors[f"{UP}.g_idx"][order].contiguous()

    reader = opened(with_tensors(plain, tmp_path / "act-order", shuffle))
    assert reader.describe(UP).kind == "int4-g64-sym act-order"
    weight, in_order = reader.weight(UP), opened(plain).weight(UP)
    assert isinstance(weight, DenseWeight)
    assert isinstance(in_order, QuantizedWeight)
    groups = (torch.arange(256) // 64)[order]
    expected = (in_order.codes.float() - 8) * in_order.scales.float()[:, groups]
    assert torch.equal(weight.values, expected)
    other = "model.layers.0.mlp.gate_proj"
    assert isinstance(reader.weight(other), QuantizedWeight)


def test_quantize_config_beside_config_is_read(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "old-gptq"
    shutil.copytree(packed_checkpoint("gptq", "int4-g64-sym"), folder)
    config = read_json(folder / "config.json")
    entry = config.pop("quantization_config")
    del entry["quant_method"]
    write_json(folder / "config.json", config)
    write_json(folder / "quantize_config.json", entry)
    assert opened(folder).format == "gptq"
    (folder / "quantize_config.json").unlink()
    with pytest.raises(FormatError, match="qweight is packed, and the config says the model is de"):
        opened(folder)


def test_an_unknown_method_is_refused_with_the_list_of_known_ones(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = edited(
        packed_checkpoint("gptq", "int4-g64-sym"),
        tmp_path / "hqq",
        lambda config: config.update(quant_method="hqq"),
    )
    with pytest.raises(UnsupportedModel, match="'hqq' is not read") as caught:
        opened(folder)
    assert caught.value.hint is not None
    assert "compressed-tensors, gptq, awq, qtool-marlin" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("gptq", {"group_size": 128}, r"model\.safetensors: model\.layers\..*scales has shape"),
        ("gptq", {"bits": 8}, r"model\.safetensors: model\.layers\..* has shape"),
        ("gptq", {"bits": "four"}, "config.json: weights of 'four' bits"),
        ("gptq", {"sym": "yes"}, "config.json: symmetric is 'yes'"),
        ("awq", {"group_size": 0}, "group size 0"),
        ("awq", {"quant_method": "compressed-tensors"}, "qweight is packed, and the config says"),
        ("marlin", {"layers": {}}, "its scheme is not in the config"),
        ("compressed-tensors", {"config_groups": []}, "no config_groups"),
    ],
)
def test_a_config_that_disagrees_with_the_tensors_is_refused_when_opened(
    name: str,
    edit: dict[str, Any],
    message: str,
    packed_checkpoint: PackedCheckpoint,
    tmp_path: Path,
) -> None:
    good = packed_checkpoint(name, "int4-g64-sym")
    with pytest.raises(FormatError, match=message):
        opened(edited(good, tmp_path / "bad", lambda config: config.update(edit)))


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_part_of_a_layer_is_named(
    name: str, packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    scales = f"{UP}.{FORMATS[name].suffixes[2 if name in ('gptq', 'awq') else 1]}"
    good = packed_checkpoint(name, "int4-g64-sym")
    bad = with_tensors(good, tmp_path / "bad", lambda tensors: tensors.pop(scales))
    with pytest.raises(FormatError, match=f"{scales} is missing"):
        opened(bad)


def test_weights_spread_over_shards_are_found_and_a_missing_shard_is_named(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    whole = packed_checkpoint("marlin", "int4-g64-sym")
    folder = tmp_path / "shards"
    folder.mkdir()
    shutil.copyfile(whole / "config.json", folder / "config.json")
    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(
        opened(folder).weight(UP).dequantize(), opened(whole).weight(UP).dequantize()
    )
    (folder / "b.safetensors").unlink()
    with pytest.raises(FormatError, match=r"names b\.safetensors, which is missing"):
        opened(folder)


def test_nothing_is_read_but_headers_when_a_folder_is_opened(
    packed_checkpoint: PackedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = Checkpoint.tensor

    def recorded(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return plain(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "tensor", recorded)
    opened(packed_checkpoint("gptq", "int4-g64-sym"))
    assert read == []
    opened(packed_checkpoint("compressed-tensors", "int4-g64-sym"))
    assert {name.rpartition(".")[2] for name in read} == {"weight_shape"}


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_a_config_of_packed_linears_over_plain_ones_is_refused(
    name: str,
    packed_checkpoint: PackedCheckpoint,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    plain, said = tiny_checkpoint("llama"), packed_checkpoint(name, "int4-g128-sym")
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    config = read_json(folder / "config.json")
    config["quantization_config"] = read_json(said / "config.json")["quantization_config"]
    write_json(folder / "config.json", config)
    with pytest.raises(FormatError, match="and model holds none that is") as raised:
        opened(folder)
    assert "take quantization_config out of config.json" in str(raised.value.hint)
