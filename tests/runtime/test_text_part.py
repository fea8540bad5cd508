"""Multimodal checkpoints are served as the language models that they have inside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qtool.runtime.loading import load_model
from qtool.runtime.models.families import TEXT_PARTS

TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TOWER = {"hidden_size": 64, "depth": 1, "num_heads": 2}
AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            **TEXT,
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 16,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "head_dim": 16},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 32},
        "tie_word_embeddings": False,
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": AXES},
        "vision_config": {**TOWER, "embed_dim": 64},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": AXES},
        "vision_config": {**TOWER, "out_hidden_size": 64, "intermediate_size": 64},
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "head_dim": 16, "rope_parameters": AXES},
        "vision_config": {
            **TOWER,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "deepstack_visual_indexes": [0],
        },
    },
}


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    def make(family: str, **changes: Any) -> tuple[Path, Any]:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
        model = AutoModelForImageTextToText.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return folder, model

    return make


def test_every_family_that_is_listed_is_tried() -> None:
    assert FAMILIES.keys() == TEXT_PARTS.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_text_are_transformers_own(
    family: str, multimodal: Callable[..., tuple[Path, Any]]
) -> None:
    folder, model = multimodal(family)
    tokens = torch.randint(1, 400, (2, 40), generator=torch.Generator().manual_seed(0))
    loaded = load_model(str(folder), dtype="float32")
    assert (loaded.code, loaded.model_type) == ("native", family)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(loaded.logits(tokens), expected, rtol=0, atol=1e-4)


def test_a_part_that_the_native_decoder_does_not_have_is_run_by_transformers(
    multimodal: Callable[..., tuple[Path, Any]],
) -> None:
    folder, model = multimodal("llava", text_config={**TEXT, "model_type": "stablelm"})
    tokens = torch.arange(1, 41)[None]
    loaded = load_model(str(folder), dtype="float32")
    assert loaded.code == "transformers"
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(loaded.logits(tokens), expected, rtol=0, atol=1e-4)
