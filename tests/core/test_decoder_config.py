"""config.json in all its spellings becomes one view, or is refused by the key that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from qtool.decoder_config import DecoderConfig
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
        ({"hidden_size": None}, "hidden_size is None"),
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
        ({"model_type": "deepseek_v2"}, "kv_lora_rank is None"),
    ],
)
def test_a_bad_config_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises((FormatError, UnsupportedModel), match=message):
        DecoderConfig.from_hf(config(**change))
