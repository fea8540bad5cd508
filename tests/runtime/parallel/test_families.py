"""Every family of the native decoder, shared out among ranks, computes what it does in one process.

The tiny checkpoints have 4 query and 2 KV heads: two ranks share the KV heads, of four each two
keep one of them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.arch import ARCHITECTURES

# What shows a family's own way best, where the tiny checkpoint's defaults do not.
OVERRIDES: dict[str, dict[str, Any]] = {
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
}
NATIVE = [name for name, row in ARCHITECTURES.items() if row.native]
# One for each way of sharing: biases and a tied head, a norm over all heads, experts, latent
# attention.
QUICK = ("qwen2", "olmo2", "qwen2_moe", "deepseek_v3")


@pytest.mark.parametrize(
    ("family", "size"),
    [
        pytest.param(family, size, marks=() if family in QUICK and size == 2 else pytest.mark.slow)
        for family in NATIVE
        for size in (2, 4)
    ],
)
def test_ranks_of_a_family_compute_what_one_process_does(
    family: str,
    size: int,
    tiny_checkpoint: Callable[..., Path],
    same_in_ranks: Callable[..., None],
) -> None:
    same_in_ranks(tiny_checkpoint(family, **OVERRIDES.get(family, {})), size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        # 4,096 tokens and 16 groups of 32 channels for 3 ranks; 3 groups for 2.
        (3, {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3}),
        (2, {"intermediate_size": 96}),
        (4, {"num_attention_heads": 4, "num_key_value_heads": 1}),
    ],
)
def test_shares_may_be_uneven(
    size: int,
    overrides: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    same_in_ranks: Callable[..., None],
) -> None:
    same_in_ranks(tiny_checkpoint("llama", **overrides), size)
