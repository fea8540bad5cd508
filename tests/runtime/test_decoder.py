"""One decoder, every family: its logits are transformers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.runtime.loading import load_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama, no grouped queries": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {}),
    "mistral, sliding window": ("mistral", {"sliding_window": 16}),
    "mistral, wide heads": ("mistral", {"head_dim": 96}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied head": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3, one KV head": ("qwen3", {"num_key_value_heads": 1, "head_dim": 32}),
}


def tokens(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 4096, (batch, length), generator=generator)


@pytest.mark.parametrize("variation", VARIATIONS)
def test_logits_are_transformers_own(
    variation: str,
    tiny_checkpoint: Callable[..., Path],
    transformers_logits: Callable[[Path, Tensor], Tensor],
) -> None:
    family, overrides = VARIATIONS[variation]
    folder = tiny_checkpoint(family, **overrides)
    loaded = load_model(str(folder))
    assert loaded.dtype == torch.float32
    batch = tokens(2, 80)
    expected = transformers_logits(folder, batch)
    torch.testing.assert_close(loaded.logits(batch), expected, rtol=0, atol=1e-4)


def test_a_trained_model_agrees_over_its_whole_context(
    books_7m: Path, transformers_logits: Callable[[Path, Tensor], Tensor]
) -> None:
    loaded = load_model("builtin:books-7m", dtype="float32")
    batch = tokens(1, 512)
    expected = transformers_logits(books_7m, batch)
    torch.testing.assert_close(loaded.logits(batch), expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_bfloat16_is_float32_rounded(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(family)
    batch = tokens(1, 60)
    wide = load_model(str(folder), dtype="float32").logits(batch)
    narrow = load_model(str(folder), dtype="bfloat16").logits(batch)
    assert narrow.dtype == torch.float32
    error = (narrow - wide).norm() / wide.norm()
    assert 1e-5 < float(error) < 0.05


def test_sequences_of_a_batch_do_not_see_each_other(tiny_checkpoint: Callable[..., Path]) -> None:
    loaded = load_model(str(tiny_checkpoint("qwen3")))
    batch = tokens(3, 20)
    whole = loaded.logits(batch)
    for index in range(3):
        torch.testing.assert_close(
            loaded.logits(batch[index : index + 1])[0], whole[index], rtol=0, atol=1e-5
        )
