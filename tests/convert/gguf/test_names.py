"""Names, row order and settings between Hugging Face and GGUF."""

from __future__ import annotations

import re
from typing import Any

import gguf
import pytest
import torch

from qtool.arch import ARCHITECTURES
from qtool.convert.gguf.config_keys import settings_entries
from qtool.convert.gguf.names import (
    NameMap,
    deinterleave_rows,
    interleave_rows,
    inverse_order,
)
from qtool.convert.gguf.reading import Settings
from qtool.convert.gguf.ropes import rope_divisors, rope_from_divisors
from qtool.convert.gguf.sizes import Sizes
from qtool.errors import FormatError, UnsupportedModel
from qtool.rope import Rope

RAW = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


def names(model_type: str) -> NameMap:
    raw = RAW | {"model_type": model_type}
    return NameMap.of(ARCHITECTURES[model_type], Sizes.of(raw))


SPARSE = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
LATENT = {
    "n_routed_experts": 3,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
MORE: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": SPARSE,
    "qwen3_moe": SPARSE,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(model_type: str) -> None:
    raw = RAW | {"model_type": model_type} | MORE.get(model_type, {})
    found = NameMap.of(ARCHITECTURES[model_type], Sizes.of(raw))
    number = next(
        key
        for key, value in gguf.MODEL_ARCH_NAMES.items()
        if value == ARCHITECTURES[model_type].gguf_name
    )
    reference = gguf.get_tensor_name_map(number, 2)
    assert len(found.required()) > 10
    for name in found.required():
        stacked = re.sub(r"experts\.\d+\.", "experts.", name)  # as the converter merges them
        stacked = stacked.replace("e_score_correction_bias", "e_score_correction.bias")
        gguf_name = found.to_gguf(name) or ""
        assert gguf_name == reference.get_name(stacked, (".weight", ".bias")), name
        assert name in found.all_hf(gguf_name)


def test_biases_have_their_modules_names() -> None:
    found = names("llama")
    assert found.to_gguf("model.layers.1.self_attn.q_proj.bias") == "blk.1.attn_q.bias"


def test_experts_are_in_the_order_of_their_numbers() -> None:
    raw = RAW | {"model_type": "qwen3_moe"} | SPARSE | {"num_experts": 12}
    found = NameMap.of(ARCHITECTURES["qwen3_moe"], Sizes.of(raw))
    names = found.all_hf("blk.1.ffn_up_exps.weight")
    assert names == [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(12)]


def test_a_tensor_without_a_place_is_named_and_derived_ones_are_left_out() -> None:
    found = names("llama")
    assert found.to_gguf("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.router\.weight"):
        found.to_gguf("model.layers.0.router.weight")
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.2\.mlp"):
        found.to_gguf("model.layers.2.mlp.up_proj.weight")
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ssm_in"):
        found.to_hf("blk.0.ssm_in.weight")


def test_rows_of_a_head_of_six_interleave_as_drawn() -> None:
    assert interleave_rows(1, 6).tolist() == [0, 3, 1, 4, 2, 5]
    assert deinterleave_rows(1, 6).tolist() == [0, 2, 4, 1, 3, 5]
    assert interleave_rows(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (4, 16), (3, 10)])
def test_the_row_order_is_the_converters_and_has_an_inverse(heads: int, head_dim: int) -> None:
    w = torch.randn(heads * head_dim, 5)
    converted = w.reshape(heads, 2, head_dim // 2, 5).swapaxes(1, 2).reshape(w.shape)
    order = interleave_rows(heads, head_dim)
    assert w[order].equal(converted)
    assert converted[inverse_order(order)].equal(w)
    assert inverse_order(order).equal(deinterleave_rows(heads, head_dim))


def test_only_q_and_k_of_the_llama_architecture_are_reordered() -> None:
    attention = "model.layers.0.self_attn"
    for model_type, reordered in (("llama", True), ("mistral", True), ("qwen2", False)):
        found = names(model_type)
        for part in ("q_proj", "k_proj"):
            assert (found.row_order(f"{attention}.{part}") is not None) is reordered
        assert found.row_order(f"{attention}.v_proj") is None
        assert found.row_order("model.embed_tokens") is None


def test_settings_are_in_the_converters_order() -> None:
    raw = RAW | {"head_dim": 16, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    before, after = settings_entries(raw)
    assert [(entry.key.removeprefix("llama."), entry.value) for entry in before] == [
        ("block_count", 2),
        ("context_length", 128),
        ("embedding_length", 64),
        ("feed_forward_length", 96),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("rope.scaling.type", "linear"),
        ("rope.scaling.factor", 2.0),
        ("rope.freq_base", 500000.0),
        ("attention.layer_norm_rms_epsilon", 1e-5),
        ("attention.key_length", 16),
        ("attention.value_length", 16),
    ]
    assert [(entry.key.removeprefix("llama."), entry.value) for entry in after] == [
        ("vocab_size", 512),
        ("rope.dimension_count", 16),
    ]
    before, after = settings_entries(RAW | {"model_type": "qwen2"})
    assert not [entry for entry in before if "key_length" in entry.key]
    assert after == []


LLAMA_31 = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)


def test_llama_3_divisors_are_one_then_blend_then_the_factor() -> None:
    divisors = rope_divisors(LLAMA_31, 128)
    assert divisors is not None
    assert divisors.dtype == torch.float32
    assert divisors[0] == 1.0
    assert divisors[-1] == 8.0
    assert bool((divisors.diff() >= 0).all())
    assert torch.allclose(divisors, torch.tensor(LLAMA_31.divisors(128)), rtol=1e-5)
    assert rope_divisors(Rope(10000.0), 128) is None


@pytest.mark.parametrize(
    "rope",
    [
        LLAMA_31,
        Rope(500000.0, "llama3", 32.0, 1.0, 4.0, 8192),
        Rope(500000.0, "llama3", 16.0, 1.0, 8.0, 4096),
        Rope(10000.0, "llama3", 4.0, 2.0, 4.0, 4096),  # low 2 is another spelling of low 1
    ],
)
def test_llama_3_parameters_are_found_from_the_divisors(rope: Rope) -> None:
    divisors = rope_divisors(rope, 128)
    assert divisors is not None
    found = rope_from_divisors(divisors, rope.theta)
    again = rope_divisors(found, 128)
    assert again is not None
    assert torch.allclose(again, divisors, rtol=2e-3)


def test_divisors_of_another_scheme_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no Llama 3 scaling"):
        rope_from_divisors(torch.linspace(1, 8, 64).flip(0), 10000.0)
    assert rope_from_divisors(torch.ones(64), 10000.0) == Rope(10000.0)


def test_settings_that_lie_are_named() -> None:
    settings = Settings({"a": -1, "b": "x", "c": True, "d": 1e-5, "e": float("nan")}, "f.gguf")
    for key, kind, message in (
        ("a", settings.whole, "a is -1"),
        ("b", settings.whole, "b is 'x'"),
        ("c", settings.whole, "c is True"),
        ("z", settings.whole, "no key z"),
        ("a", settings.number, "a is -1"),
        ("e", settings.number, "e is nan"),
    ):
        with pytest.raises(FormatError, match=message) as caught:
            kind(key)
        assert "f.gguf" in caught.value.message
    assert settings.whole("z", 5) == 5
    assert settings.number("d") == 1e-5
