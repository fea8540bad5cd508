"""transformers' own GGUF loader on files written here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from qtool.runtime.loading import load_model

AsGguf = Callable[[Path, str], Path]

# Families that its loader knows. It does not read every setting that a file has: those here are
# the ones that it leaves at its classes' defaults.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128, "norm_topk_prob": True, "moe_intermediate_size": 768},
    "phi3": {},
    "gpt2": {"tie_word_embeddings": True, "max_position_embeddings": 1024, "n_positions": 1024},
    "starcoder2": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
}


def logits_of_transformers(path: Path, token_ids: Tensor, **where: str) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **where)
    with torch.inference_mode():
        logits: Tensor = model(token_ids).logits
    return logits


@pytest.mark.slow
def test_it_computes_the_logits_of_our_runtime_from_a_file_of_each_type(
    file_type: str, books_7m: Path, as_gguf: AsGguf, token_ids: Tensor
) -> None:
    """Both decode the same blocks and compute in float32: what is left is the order of sums."""
    file = as_gguf(books_7m, file_type)
    theirs = logits_of_transformers(file.parent, token_ids, gguf_file=file.name)
    ours = load_model(str(file), dtype="float32").logits(token_ids)
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_finds_every_weight_of_a_family(
    family: str, tiny_checkpoint: Callable[..., Path], as_gguf: AsGguf, token_ids: Tensor
) -> None:
    folder = tiny_checkpoint(family, **FAMILIES[family])
    file = as_gguf(folder, "F32")
    found = logits_of_transformers(file.parent, token_ids, gguf_file=file.name)
    wanted = logits_of_transformers(folder, token_ids)
    assert (found - wanted).abs().max() < 1e-4


def test_it_reads_a_file_and_its_tokenizer(
    books_7m: Path, as_gguf: AsGguf, token_ids: Tensor
) -> None:
    file = as_gguf(books_7m, "Q4_K_M")
    theirs = logits_of_transformers(file.parent, token_ids, gguf_file=file.name)
    ours = load_model(str(file), dtype="float32").logits(token_ids)
    assert (ours - theirs).abs().max() < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    own = transformers.AutoTokenizer.from_pretrained(books_7m)
    text = "It was the best of times, naïve café 123;\n\n  'twas  the worst\tof times. 日本"
    assert tokenizer(text).input_ids == own(text).input_ids
    assert tokenizer.eos_token_id == own.eos_token_id
