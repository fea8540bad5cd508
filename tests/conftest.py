"""Fixtures every folder shares: the bundled model, optional shared data, tiny real checkpoints.

A tiny checkpoint is a seeded, randomly initialised two-block model of a real family, made by
transformers' own config class and saved as a Hugging Face folder with the bundled tokenizer. Tests
run the real thing on it; nothing is mocked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.builtin import builtin_model

PROJECT = Path(__file__).parent.parent

TINY: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

# What a family needs beyond TINY, or under other names. Sizes keep every row a multiple of 128.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
}


@pytest.fixture(scope="session")
def books_7m() -> Path:
    """The bundled model's folder."""
    return builtin_model("books-7m")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Larger real data beside the checkout; tests that need it say so where it is absent."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: this test needs data that the project does not ship")
    return folder


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """stories260K, a real Llama of 260,032 parameters whose down_proj rows are 172 wide."""
    return shared_data / "models" / "stories260K-hf"


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, books_7m: Path
) -> Callable[..., Path]:
    """``tiny_checkpoint("qwen2", num_hidden_layers=3)`` -> a model folder, made once a session."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(family: str, *, dtype: str = "float32", **overrides: Any) -> Path:
        key = json.dumps([family, dtype, overrides], sort_keys=True)
        folder = root / f"{family}-{abs(hash(key)):x}"
        if not folder.exists():
            settings = {**TINY, **FAMILIES.get(family, {}), **overrides}
            _save_tiny_model(family, settings, getattr(torch, dtype), folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(books_7m / name, folder / name)
        return folder

    return make


def _save_tiny_model(
    family: str, settings: dict[str, Any], dtype: torch.dtype, folder: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = AutoModelForCausalLM.from_config(config)
        # Norm gains and biases start at one and zero; spread them, so that a lost one is seen.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.to(dtype).save_pretrained(folder)
