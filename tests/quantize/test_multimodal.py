"""Models that read images: the text model is quantized, the towers are copied bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qtool.artifact import CARD_NAME
from qtool.calibration.auto_class import tower_parameters
from qtool.calibration.skeleton import Skeleton
from qtool.checkpoint import Checkpoint
from qtool.quantize.pipeline import quantize_model
from qtool.recipe import load_recipe

TEXT: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MODELS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 64},
        "image_token_index": 4000,
    },
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 32},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 4000,
        "boi_token_index": 4001,
        "eoi_token_index": 4002,
    },
    "qwen2_5_vl": {
        "text_config": {
            **TEXT,
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [4, 6, 6],
                "rope_theta": 10000.0,
            },
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0],
        },
        "image_token_id": 4000,
        "video_token_id": 4003,
        "vision_start_token_id": 4001,
        "vision_end_token_id": 4002,
    },
}


def saved(kind: str, folder: Path, books_7m: Path) -> Path:
    config = AutoConfig.for_model(kind, **MODELS[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(books_7m / name, folder / name)
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        "llava",
        pytest.param("gemma3", marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", marks=pytest.mark.slow),
    ],
)
def test_the_text_model_is_quantized_and_the_towers_are_copied(
    kind: str, tmp_path: Path, books_7m: Path
) -> None:
    """The run reloads the artifact in transformers and compares its logits."""
    source = saved(kind, tmp_path / "source", books_7m)
    recipe = load_recipe("int4").with_options(num_samples=4, sequence_length=32, effort="fast")
    manifest = quantize_model(str(source), recipe, out=tmp_path / "out")
    assert len(manifest.layers) == 14
    assert not any("not reloaded" in warning for warning in manifest.warnings)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    packed = {f"{layer.module}.weight" for layer in manifest.layers}
    assert packed.isdisjoint(after.tensors)
    for name in before.tensors.keys() - packed:
        assert torch.equal(before.tensor(name), after.tensor(name)), name
    card = (tmp_path / "out" / CARD_NAME).read_text(encoding="utf-8")
    assert ("AutoModelForImageTextToText" in card) == (kind != "gemma3")


def test_towers_are_not_loaded(tmp_path: Path, books_7m: Path) -> None:
    skeleton = Skeleton.build(Checkpoint.open(saved("llava", tmp_path / "source", books_7m)))
    towers = tower_parameters(skeleton.model)
    assert any("vision_tower" in name for name in towers)
    assert any("projector" in name for name in towers)
    assert towers.isdisjoint(skeleton.outside)
    skeleton.load_outside()
    parameters = dict(skeleton.model.named_parameters())
    assert all(parameters[name].is_meta for name in towers)
    assert not parameters["model.language_model.embed_tokens.weight"].is_meta
