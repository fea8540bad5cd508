"""gpt-oss as it is published: experts in MXFP4, with biases, gate and up taking turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from qtool.calibration.decoded import DecodedExperts, open_checkpoint
from qtool.checkpoint import Checkpoint
from qtool.convert.mxfp4_experts import unpack_experts
from qtool.errors import FormatError
from qtool.quantize.pipeline import quantize_model
from qtool.recipe import load_recipe
from qtool.source import resolve


@pytest.fixture
def published(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny gpt-oss whose experts are codes and scales, as OpenAI's files have them."""
    source = tiny_checkpoint("gpt_oss", dtype="bfloat16", num_hidden_layers=2)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, in_features, out_features = tensors.pop(name).shape
        shape = experts, out_features, in_features // 32
        tensors[f"{name}_blocks"] = torch.randint(
            256, (*shape, 16), generator=generator, dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(
            118, 122, shape, generator=generator, dtype=torch.uint8
        )
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in source.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_block_by_hand() -> None:
    """Byte 0x2B holds input 0 in its low half: code 11 is -1.5, and code 2 is 1; the scale 128
    doubles them."""
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[..., 0] = 0x2B
    found = unpack_experts(blocks, torch.full((1, 1, 1), 128, dtype=torch.uint8), torch.float32)
    assert found.shape == (1, 32, 1)
    assert found[0, :3, 0].tolist() == [-3.0, 2.0, 0.0]


def test_experts_are_decoded_as_transformers_decodes_them(published: Path) -> None:
    checkpoint = open_checkpoint(resolve(str(published)))
    assert isinstance(checkpoint, DecodedExperts)
    theirs = AutoModelForCausalLM.from_pretrained(
        published, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    assert set(checkpoint.tensors) == set(theirs)
    assert len(checkpoint.experts) == 4
    for name, info in checkpoint.tensors.items():
        assert info.shape == tuple(theirs[name].shape)
        assert torch.equal(checkpoint.tensor(name), theirs[name]), name


def test_the_published_model_is_quantized(published: Path, tmp_path: Path) -> None:
    """The run reloads the artifact in transformers and compares its logits."""
    manifest = quantize_model(
        str(published),
        load_recipe("int4").with_options(num_samples=4, sequence_length=32, effort="fast"),
        out=tmp_path / "out",
    )
    assert len(manifest.layers) == 2 * 4
    assert all("self_attn" in layer.module for layer in manifest.layers)
    assert any("MXFP4" in warning for warning in manifest.warnings)
    out = Checkpoint.open(tmp_path / "out")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(out.tensor(name), open_checkpoint(resolve(str(published))).tensor(name))
    assert out.config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_scales_that_do_not_fit_are_refused(published: Path) -> None:
    tensors = load_file(published / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scales"))
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, published / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="MXFP4 experts are uint8"):
        open_checkpoint(resolve(str(published)))
