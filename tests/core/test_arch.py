import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.arch import ARCHITECTURES, DecoderConfig, Rope, find_architecture, find_family
from qtool.errors import FormatError, UnsupportedModel


def config(**overrides: Any) -> dict[str, Any]:
    base = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
    }
    return {**base, **overrides}


def test_the_bundled_model_is_read(books_7m: Path) -> None:
    decoder = DecoderConfig.from_hf(json.loads((books_7m / "config.json").read_text()))
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (4, 2, 64)
    assert decoder.tie_word_embeddings
    assert decoder.eos_token_ids == (0,)


def test_defaults_follow_transformers() -> None:
    decoder = DecoderConfig.from_hf(config())
    assert decoder.num_kv_heads == 8
    assert decoder.head_dim == 8
    assert decoder.rope == Rope()
    assert decoder.sliding_window is None


def test_old_and_new_spellings_of_rope_agree() -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
    old = DecoderConfig.from_hf(config(rope_theta=5e5, rope_scaling=scaling))
    new = DecoderConfig.from_hf(config(rope_parameters={**scaling, "rope_theta": 5e5}))
    assert old.rope == new.rope
    assert old.rope.theta == 5e5


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rope_frequencies_equal_transformers_own(kind: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 5e5}
    if kind != "default":
        parameters["factor"] = 8.0
    if kind == "llama3":
        parameters |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    settings = config(hidden_size=512, rope_parameters=parameters, max_position_embeddings=131072)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**settings)).inv_freq
    ours = DecoderConfig.from_hf(settings)
    torch.testing.assert_close(
        torch.tensor(ours.rope.inverse_frequencies(ours.head_dim)), theirs, rtol=1e-6, atol=0
    )


def test_windows_apply_where_the_config_says_so() -> None:
    assert DecoderConfig.from_hf(config(model_type="mistral", sliding_window=7)).sliding_window == 7
    off = config(model_type="qwen2", sliding_window=4096, use_sliding_window=False)
    assert DecoderConfig.from_hf(off).sliding_window is None
    with pytest.raises(UnsupportedModel, match="some layers"):
        DecoderConfig.from_hf({**off, "use_sliding_window": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
    ],
)
def test_a_bad_config_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises((FormatError, UnsupportedModel), match=message):
        DecoderConfig.from_hf(config(**change))


def test_an_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match="'qwen4'") as error:
        find_architecture({"model_type": "qwen4"})
    assert error.value.hint is not None
    assert "llama, mistral, qwen2, qwen3" in error.value.hint


def test_a_family_that_is_only_converted_is_not_run() -> None:
    gemma = {"model_type": "gemma2"}
    assert find_family(gemma).gguf_name == "gemma2"
    with pytest.raises(UnsupportedModel, match="'gemma2' is not one that the native decoder runs"):
        find_architecture(gemma)
    with pytest.raises(UnsupportedModel, match="not one that the native decoder runs"):
        DecoderConfig.from_hf(config(model_type="phi3"))


def test_a_multimodal_model_is_said_to_be_one() -> None:
    with pytest.raises(
        UnsupportedModel, match="multimodal: its text part is 'gemma3_text'"
    ) as error:
        find_family({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    assert "gemma3_text" in str(error.value.hint)


def test_every_row_names_its_roles() -> None:
    for architecture in ARCHITECTURES.values():
        assert architecture.gguf_tensor("embed") == "token_embd"
        assert architecture.gguf_tensor("o", 3) == "blk.3.attn_output"
        assert len(set(architecture.tensors.values())) == len(architecture.tensors)
        used = {role for s in architecture.smoothing for role in (s.source, *s.targets)}
        used |= {*architecture.transposed}
        assert used <= set(architecture.tensors)
