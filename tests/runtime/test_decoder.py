"""One decoder, every family: its logits are transformers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.arch import ARCHITECTURES
from qtool.runtime.loading import load_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ORIGINAL = {"original_max_position_embeddings": 64}
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}


def rope(kind: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **parameters}


def long_rope(original: int) -> dict[str, Any]:
    """A divisor for each of the 32 pairs."""
    short = [1.0 + i / 32 for i in range(32)]
    long = [1.0 + i / 4 for i in range(32)]
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": rope("longrope", short_factor=short, long_factor=long),
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
    "qwen2, window from a layer on": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "llama, dynamic rope": ("llama", {"rope_parameters": rope("dynamic", factor=4.0)}),
    "llama, dynamic rope beyond its context": (
        "llama",
        {"rope_parameters": rope("dynamic", factor=4.0), "max_position_embeddings": 64},
    ),
    "llama, yarn rope": ("llama", {"rope_parameters": rope("yarn", factor=8.0, **ORIGINAL)}),
    "llama, yarn rope, bounds as they come": (
        "llama",
        {"rope_parameters": rope("yarn", factor=8.0, truncate=False, beta_fast=16, **ORIGINAL)},
    ),
    "gemma": ("gemma", {}),
    "gemma, tied head": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {}),
    "gemma2, small caps": (
        "gemma2",
        {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5, "num_hidden_layers": 3},
    ),
    "gemma2, own scale": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", {}),
    "gemma3_text, stretched rope": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": rope("linear", factor=8.0, theta=1e6),
                "sliding_attention": rope("default"),
            }
        },
    ),
    "phi3": ("phi3", {}),
    "phi3, some channels turned": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3, longrope within the first context": ("phi3", long_rope(128)),
    "phi3, longrope beyond it": ("phi3", long_rope(64)),
    "phi3, sliding window": ("phi3", {"sliding_window": 16}),
    "smollm3, layers without positions": (
        "smollm3",
        {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    ),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "granite, multipliers": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.03,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "starcoder2": ("starcoder2", {}),
    "starcoder2, no biases": ("starcoder2", {"use_bias": False}),
    "mixtral": ("mixtral", {}),
    "mixtral, sliding window": ("mixtral", {"sliding_window": 16, "num_local_experts": 8}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, scores normalized": ("qwen2_moe", {"norm_topk_prob": True}),
    "qwen2_moe, some layers dense": (
        "qwen2_moe",
        {"num_hidden_layers": 3, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, scores normalized": ("qwen3_moe", {"norm_topk_prob": True}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2, queries direct": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v2, groups": ("deepseek_v2", {**GROUPS, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3, groups": ("deepseek_v3", GROUPS),
    "deepseek_v3, yarn": (
        "deepseek_v3",
        {
            "rope_parameters": rope("yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.8, **ORIGINAL),
            "rope_interleave": False,
        },
    ),
    "deepseek_v3, scores neither normalized nor scaled": (
        "deepseek_v3",
        {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "attention_bias": True},
    ),
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


def test_every_family_of_the_table_is_among_the_variations() -> None:
    native = {name for name, row in ARCHITECTURES.items() if row.native}
    assert {family for family, _ in VARIATIONS.values()} == native


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "starcoder2", "qwen2_moe", "deepseek_v2"]
)
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
