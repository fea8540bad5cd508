"""config.json in all its spellings becomes one view, or is refused by the key that is wrong."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qtool.decoder_config import DecoderConfig, whole
from qtool.errors import FormatError, UnsupportedModel
from qtool.rope import Rope


def config(**overrides: Any) -> dict[str, Any]:
    base = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    return {**base, **overrides}


def windows(**overrides: Any) -> list[int | None]:
    return [layer.window for layer in DecoderConfig.from_hf(config(**overrides)).layers]


def test_the_bundled_model_is_read(books_7m: Path) -> None:
    decoder = DecoderConfig.from_hf(json.loads((books_7m / "config.json").read_text()))
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (4, 2, 64)
    assert decoder.tie_word_embeddings
    assert decoder.eos_token_ids == (0,)


def test_defaults_follow_transformers() -> None:
    decoder = DecoderConfig.from_hf(config())
    assert decoder.num_kv_heads == 8
    assert decoder.head_dim == 8
    assert decoder.num_layers == 4
    assert decoder.attention_scale == 8**-0.5
    assert all(layer.rope == Rope() for layer in decoder.layers)
    assert windows() == [None] * 4


def test_old_and_new_spellings_of_rope_agree() -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
    old = DecoderConfig.from_hf(config(rope_theta=5e5, rope_scaling=scaling))
    new = DecoderConfig.from_hf(config(rope_parameters={**scaling, "rope_theta": 5e5}))
    assert old.layers == new.layers
    assert old.layers[0].rope is not None
    assert old.layers[0].rope.theta == 5e5


def test_old_and_new_spellings_of_gemma_3_agree() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = config(
        model_type="gemma3_text",
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling=scaling,
        sliding_window=32,
        sliding_window_pattern=3,
    )
    new = config(
        model_type="gemma3_text",
        rope_parameters={
            "full_attention": {**scaling, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        sliding_window=32,
        layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
    )
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(new)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "llama", "sliding_window": 7}, [None] * 4),
        ({"model_type": "mistral", "sliding_window": 7}, [7] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 4),
        ({"model_type": "gemma2", "sliding_window": 7}, [7, None, 7, None]),
        ({"model_type": "gemma2"}, [4096, None, 4096, None]),
        ({"model_type": "qwen2", "sliding_window": 7}, [None] * 4),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 7,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            [None, None, None, 7],
        ),
        ({"model_type": "qwen3_moe", "sliding_window": 7, "use_sliding_window": True}, [7] * 4),
        (
            {
                "model_type": "smollm3",
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
            },
            [None, None, None, 7],
        ),
    ],
)
def test_windows_apply_where_the_config_says_so(
    settings: dict[str, Any], expected: list[int | None]
) -> None:
    assert windows(**settings) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"no_rope_layers": [1, 0, 0, 1]}, [True, False, False, True]),
        ({"no_rope_layer_interval": 2}, [True, False, True, False]),
        ({}, [True, True, True, False]),
    ],
)
def test_layers_without_positions(settings: dict[str, Any], expected: list[bool]) -> None:
    found = DecoderConfig.from_hf(config(model_type="smollm3", **settings))
    assert [layer.rope is not None for layer in found.layers] == expected


def test_a_null_is_no_value_even_where_the_family_has_a_default() -> None:
    found = DecoderConfig.from_hf(config(model_type="gemma2", attn_logit_softcapping=None))
    assert found.attention_softcap is None
    assert found.logits_softcap == 30.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "has no hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"layer_types": ["full_attention"]}, "layer_types does not list 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types has 'linear_attention'"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope type 'mrope'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is None"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
            "short_factor is 1 numbers, 4 are needed",
        ),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5},
            "5 of 4 experts",
        ),
        ({"model_type": "deepseek_v2"}, "has no kv_lora_rank"),
    ],
)
def test_a_bad_config_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises((FormatError, UnsupportedModel), match=message):
        DecoderConfig.from_hf(config(**change))


# What matters of config.json files as they are published, in their own spelling.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 3.1 8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "Gemma 2 9B": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "vocab_size": 256000,
    },
    "Gemma 3 4B, its text": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "Phi-4 mini": {
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "long_factor": [2.0] * 48,
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "Qwen3 30B-A3B": {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "DeepSeek V3": {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
}


def read(name: str) -> DecoderConfig:
    return DecoderConfig.from_hf(PUBLISHED[name])


def test_llama_31_as_it_is_published() -> None:
    found = read("Llama 3.1 8B")
    assert (found.head_dim, found.num_layers, found.dtype) == (128, 32, "bfloat16")
    assert found.layers[0].rope == Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)


def test_gemma_2_and_3_as_they_are_published() -> None:
    gemma2, gemma3 = read("Gemma 2 9B"), read("Gemma 3 4B, its text")
    assert [layer.window for layer in gemma2.layers[:3]] == [4096, None, 4096]
    assert (gemma2.attention_softcap, gemma2.logits_softcap) == (50.0, 30.0)
    assert (gemma2.attention_scale, gemma2.embedding_scale) == (1 / 16, 3584**0.5)
    assert gemma2.tie_word_embeddings
    assert (gemma3.num_heads, gemma3.num_kv_heads, gemma3.head_dim) == (8, 4, 256)
    assert (gemma3.vocab_size, gemma3.max_position_embeddings) == (262208, 131072)
    assert [layer.window for layer in gemma3.layers[4:7]] == [1024, None, 1024]
    local, full = gemma3.layers[4].rope, gemma3.layers[5].rope
    assert local == Rope(10000.0)
    assert full == Rope(1e6, "linear", 8.0)


def test_phi_4_mini_as_it_is_published() -> None:
    found = read("Phi-4 mini")
    rope = found.layers[0].rope
    assert rope is not None
    assert rope.rotated_channels(found.head_dim) == 96
    assert rope.attention_factor == pytest.approx((1 + math.log(32) / math.log(4096)) ** 0.5)
    short, long = (rope.inverse_frequencies(128, context) for context in (4096, 4097))
    assert [a / b for a, b in zip(short, long, strict=True)] == pytest.approx([2.0] * 48)


def test_qwen3_and_deepseek_experts_as_they_are_published() -> None:
    qwen, deepseek = read("Qwen3 30B-A3B"), read("DeepSeek V3")
    assert qwen.experts is not None
    assert (qwen.experts.count, qwen.experts.per_token, qwen.experts.shared_size) == (128, 8, 0)
    assert all(layer.sparse for layer in qwen.layers)
    experts = deepseek.experts
    assert experts is not None
    assert (experts.groups, experts.used_groups, experts.shared_size) == (8, 4, 2048)
    assert (experts.scoring, experts.normalized, experts.scaling) == ("sigmoid", True, 2.5)
    assert [layer.sparse for layer in deepseek.layers[:4]] == [False, False, False, True]
    # 192 channels, and yarn's magnitude twice.
    magnitude = 0.1 * math.log(40) + 1
    assert deepseek.attention_scale == pytest.approx(192**-0.5 * magnitude**2)
    assert deepseek.layers[0].rope is not None
    assert deepseek.layers[0].rope.attention_factor == 1.0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (10**20, "hidden_size is 100000000000000000000, larger than any model's"),
        (2**31, "larger than any model's: at most 2147483647"),
        (0, "hidden_size is 0, a positive whole number is needed"),
        (-5, "hidden_size is -5, a positive whole number"),
        (True, "hidden_size is True, a positive whole number"),
        ("64", "hidden_size is '64', a positive whole number"),
        (None, "has no hidden_size"),
    ],
)
def test_a_size_that_cannot_be_one_is_refused_for_what_it_is(value: object, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        whole({"hidden_size": value}, "hidden_size")
    assert whole({"hidden_size": 2**31 - 1}, "hidden_size") == 2**31 - 1
