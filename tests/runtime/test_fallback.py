"""Families that transformers' own code runs, with our paged attention in it: the engine's greedy
text is that of `generate`.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.arch import ARCHITECTURES
from qtool.errors import FormatError, UnsupportedModel
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.loading import load_model
from qtool.runtime.models.fallback import TransformersModel
from qtool.runtime.models.families import NATIVE, TRANSFORMERS, served_families
from qtool.runtime.models.model import _causal

Greedy = Callable[[Path, Sequence[int], int], list[int]]
PROMPTS = {"long": range(100, 150), "short": (5, 900, 17)}
NEW_TOKENS = 16

_HEADS: dict[str, Any] = {"head_dim": 64}
_WINDOW: dict[str, Any] = {"sliding_window": 32}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
}
_LAYER_INPUTS: dict[str, Any] = {
    **_HEADS,
    **_WINDOW,
    "vocab_size_per_layer_input": 4096,
    "hidden_size_per_layer_input": 32,
}
_GPT2: dict[str, Any] = {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512}
# What keeps a family small, and shows its own ways, beyond the tiny checkpoints' settings.
OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {**_EXPERTS, **_HEADS, **_WINDOW},
    "axk1": {**_ROUTED, **_LATENT},
    "cohere2": _WINDOW,
    "cohere2_moe": {**_EXPERTS, **_HEADS, **_WINDOW},
    "ctrl": {**_GPT2, "dff": 512},
    "cwm": {**_HEADS, **_WINDOW},
    "dbrx": {
        "d_model": 256,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
    },
    "dots1": {**_ROUTED, **_HEADS, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64},
    "exaone4": _WINDOW,
    "exaone_moe": {**_EXPERTS, **_WINDOW},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {
        **_LAYER_INPUTS,
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        "intermediate_size": [512] * 5,
        "activation_sparsity_pattern": [0.0] * 5,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
    },
    # The last two layers attend to keys and values of the first two.
    "gemma4_text": {
        **_LAYER_INPUTS,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 128,
    },
    "glm": _HEADS,
    "glm4": _HEADS,
    "glm4_moe": {**_ROUTED, **_HEADS},
    "glm4_moe_lite": {**_ROUTED, **_LATENT},
    "gpt_bigcode": {**_GPT2, "n_inner": 512},
    "granite_swa": _WINDOW,
    "granitemoe_swa": {**_LOCAL_EXPERTS, **_WINDOW},
    "granitemoeshared": _LOCAL_EXPERTS,
    "helium": _HEADS,
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": {**_HEADS, "num_experts": 4, "moe_topk": 2},
    "hy_v3": {**_EXPERTS, **_HEADS},
    "internlm3": _HEADS,
    "iquestcoder": _HEADS,
    "jetmoe": {**_LOCAL_EXPERTS, "kv_channels": 64},
    "laguna": {**_EXPERTS, **_HEADS},
    "longcat_flash": {
        **_LATENT,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "head_dim": 32,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 64,
        "ffn_hidden_size": 256,
        "num_layers": 2,
    },
    "mellum": {**_EXPERTS, **_HEADS, **_WINDOW},
    "mimo_v2_flash": {**_ROUTED, **_HEADS, "v_head_dim": 64},
    "minicpm3": _LATENT,
    "minimax_m2": {**_LOCAL_EXPERTS, **_HEADS},
    "ministral": {**_HEADS, **_WINDOW},
    "ministral3": _HEADS,
    "modernbert-decoder": {"local_attention": 32},
    "olmo3": _WINDOW,
    "phimoe": _LOCAL_EXPERTS,
    "seed_oss": _HEADS,
    "solar_open": {**_ROUTED, **_HEADS},
    "vaultgemma": {**_HEADS, **_WINDOW},
    "youtu": _LATENT,
}
# Sinks, parallel blocks with partial rotary embeddings, Conv1D and learned positions.
QUICK = ("gpt_oss", "gpt_neox", "gpt2")


def generate(model: Path) -> dict[str, list[int]]:
    loaded = load_model(str(model), dtype="float32")
    assert loaded.code == "transformers"
    settings: dict[str, Any] = {"block_size": 8, "max_num_batched_tokens": 32}
    engine = Engine(loaded, EngineConfig(str(model), **settings))
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    found: dict[str, list[int]] = {name: [] for name in PROMPTS}
    for name, prompt in PROMPTS.items():
        engine.add(GenerationRequest(name, tuple(prompt), sampling))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            found[output.request_id] += output.new_token_ids
    return found


def test_fifty_families_are_served() -> None:
    families = [family.model_type for family in served_families()]
    assert len(set(families)) == len(families) >= 50
    assert NATIVE.keys() == {name for name, row in ARCHITECTURES.items() if row.native}
    assert not NATIVE.keys() & TRANSFORMERS.keys()
    assert OVERRIDES.keys() <= TRANSFORMERS.keys()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in QUICK else pytest.mark.slow)
        for family in TRANSFORMERS
    ],
)
def test_greedy_text_of_the_engine_is_that_of_transformers(
    family: str, tiny_checkpoint: Callable[..., Path], transformers_greedy: Greedy
) -> None:
    folder = tiny_checkpoint(family, eos_token_id=None, **OVERRIDES.get(family, {}))
    found = generate(folder)
    for name, prompt in PROMPTS.items():
        assert found[name] == transformers_greedy(folder, list(prompt), NEW_TOKENS), name


def test_what_attention_is_comes_from_the_model_itself(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    model = load_model(str(tiny_checkpoint("gpt_oss"))).decoder
    assert isinstance(model, TransformersModel)
    sliding, full = model.attention
    assert (sliding.window, full.window) == (32, None)
    assert (full.num_heads, full.num_kv_heads, full.key_dim) == (4, 2, 64)
    assert full.scale == 64**-0.5
    assert full.sinks is not None
    assert len(full.sinks) == 4


def test_a_config_of_a_native_family_that_is_not_computed_natively_is_run_by_transformers(
    tiny_checkpoint: Callable[..., Path], transformers_greedy: Greedy
) -> None:
    folder = tiny_checkpoint("llama", eos_token_id=None, hidden_act="relu")
    use, *_ = load_model(str(folder)).kernels
    assert use.kernel == "transformers"
    assert "hidden_act 'relu'" in use.reason
    assert generate(folder)["short"] == transformers_greedy(folder, PROMPTS["short"], NEW_TOKENS)


@pytest.mark.parametrize("original", [32, 128])
def test_rotary_embeddings_that_depend_on_the_length_take_it_from_the_context(
    original: int,
    tiny_checkpoint: Callable[..., Path],
    transformers_logits: Callable[[Path, Tensor], Tensor],
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + i / 32 for i in range(32)],
        "long_factor": [1.0 + i / 4 for i in range(32)],
        "original_max_position_embeddings": original,
    }
    folder = tiny_checkpoint("arcee", rope_parameters=rope)
    loaded = load_model(str(folder), dtype="float32")
    tokens = torch.arange(100)[None] * 31
    expected = transformers_logits(folder, tokens)
    torch.testing.assert_close(loaded.logits(tokens), expected, rtol=0, atol=1e-4)
    few = tokens[:, :20]
    expected = transformers_logits(folder, few)
    torch.testing.assert_close(loaded.logits(few), expected, rtol=0, atol=1e-4)


PHIMOE_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 32 for i in range(32)],
    "long_factor": [1.0 + i / 4 for i in range(32)],
    "short_mscale": 1.1,
    "long_mscale": 1.4,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("context", [32, 100])
def test_magnitude_and_frequencies_of_phimoe_are_those_of_the_context(
    context: int,
    tiny_checkpoint: Callable[..., Path],
    transformers_logits: Callable[[Path, Tensor], Tensor],
    tmp_path: Path,
) -> None:
    """transformers by itself has the magnitude of each pass, and always the short frequencies."""
    folder = tiny_checkpoint("phimoe", **_LOCAL_EXPERTS, rope_parameters=PHIMOE_ROPE)
    size = "short" if context == 32 else "long"
    settled = PHIMOE_ROPE | {
        "short_factor": PHIMOE_ROPE[f"{size}_factor"],
        "short_mscale": PHIMOE_ROPE[f"{size}_mscale"],
        "long_mscale": PHIMOE_ROPE[f"{size}_mscale"],
    }
    reference = Path(shutil.copytree(folder, tmp_path / "reference"))
    config = json.loads((folder / "config.json").read_text())
    (reference / "config.json").write_text(json.dumps(config | {"rope_parameters": settled}))
    model = load_model(str(folder), dtype="float32").decoder
    tokens = torch.arange(context)[None] * 31
    shared = model.for_context(context)
    model.for_context(7)  # the same weights, for a shorter context
    for length in (context, 20):  # a pass over few tokens is turned as the longest one is
        positions = torch.arange(length)
        with torch.inference_mode():
            hidden = shared.hidden(tokens[0, :length], positions, _causal(shared, 1, length))
            logits = shared.logits(hidden)
        expected = transformers_logits(reference, tokens[:, :length])[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("doge", {}, "its logits differ from its own by"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "it has layers of conv"),
        ("llama4_text", {}, "it has layers of chunked_attention"),
        ("gpt2", {**_GPT2, "add_cross_attention": True}, "an encoder's output"),
    ],
)
def test_models_whose_text_would_differ_are_refused_with_the_reason(
    family: str, overrides: dict[str, Any], message: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedModel, match=f"{family} cannot be served: .*{message}"):
        load_model(str(tiny_checkpoint(family, **overrides)))


def test_missing_and_misshaped_tensors_are_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("gpt_neox"), tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    lost = tensors.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.bias")
    save_file(tensors, str(path), metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.dense_h_to_4h\.bias is missing"):
        load_model(str(folder))
    tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"] = lost[:-1].clone()
    save_file(tensors, str(path), metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"dense_h_to_4h\.bias has shape \[511\], not \[512\]"):
        load_model(str(folder))


def test_bfloat16_is_float32_rounded(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = str(tiny_checkpoint("gpt_neox"))
    tokens = torch.arange(60)[None] * 17
    wide = load_model(folder, dtype="float32").logits(tokens)
    narrow = load_model(folder, dtype="bfloat16").logits(tokens)
    assert 1e-5 < float((narrow - wide).norm() / wide.norm()) < 0.05


def test_a_config_that_transformers_cannot_read_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("gpt_neox"), tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "wide"}))
    with pytest.raises(FormatError, match=r"config\.json is not one of gpt_neox"):
        load_model(str(folder))
