"""What GGUF knows of each family of qtool/arch.py: its settings, in order, and its shapes.

Keys and their order are those of llama.cpp's converter (conversion/*.py), what a key's absence or
an architecture's name means is llama.cpp's loader's (src/llama-model.cpp). What GGUF cannot say is
in `implied`: a model with another value is refused, because llama.cpp would run it wrongly.
"""

from __future__ import annotations

from typing import Any

from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.entries import (
    AttentionScale,
    Biases,
    Constant,
    Gating,
    HeadDim,
    LatentAttention,
    LayersWithoutRope,
    RopeWidth,
    Setting,
    SlidingLayers,
    VocabSize,
    YarnScale,
)
from qtool.convert.gguf.family import Family
from qtool.convert.gguf.ropes import LongRopeScale, RopeKeys, RotatedChannels, SlidingRope
from qtool.role_shapes import LATENT_SHAPES

_BLOCKS = Setting("block_count", "num_hidden_layers")
_CONTEXT = Setting("context_length", "max_position_embeddings", default=2048)
_HIDDEN = Setting("embedding_length", "hidden_size")
_INNER = Setting("feed_forward_length", "intermediate_size")
_HEADS = Setting("attention.head_count", "num_attention_heads")
_KV_HEADS = Setting("attention.head_count_kv", "num_key_value_heads", like="num_attention_heads")
_RMS = Setting("attention.layer_norm_rms_epsilon", "rms_norm_eps", "number", default=1e-6)
_EXPERTS_USED = Setting("expert_used_count", "num_experts_per_tok")
_EXPERT_INNER = Setting("expert_feed_forward_length", "moe_intermediate_size")
_BASE = (_BLOCKS, _CONTEXT, _HIDDEN, _INNER, _HEADS, _KV_HEADS)
_BIAS = Biases("attention_bias", "blk.0.attn_q.bias")
_MLP_BIAS = Biases("mlp_bias", "blk.0.ffn_up.bias")
_NO_WINDOW: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False,)}
_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
_GELU = ("gelu_pytorch_tanh", "gelu_new")

_LLAMA_ROPE = RopeKeys(("default", "linear", "yarn", "llama3"))
_LLAMA_EXTRA = (VocabSize(), RotatedChannels())
_QWEN_EXPERTS = (Setting("expert_count", ("num_experts", "num_local_experts")), _EXPERTS_USED)
_QWEN_MOE: dict[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    **_SILU,
    **_NO_WINDOW,
}


def _has_experts(file: GgufFile) -> bool:
    return bool(file.metadata.get("llama.expert_count"))


_LLAMA = Family(
    "LlamaForCausalLM",
    (*_BASE, _LLAMA_ROPE, _RMS, HeadDim()),
    (*_LLAMA_EXTRA, _BIAS, _MLP_BIAS),
    implied=_SILU,
    loses_window=True,
    matches=lambda file: not _has_experts(file),
)
_DEEPSEEK_HEAD = (
    _BLOCKS,
    _CONTEXT,
    _HIDDEN,
    _INNER,
    _HEADS,
    Constant("attention.head_count_kv", 1),
    RopeKeys(("default", "yarn")),
    _RMS,
    _EXPERTS_USED,
    Setting("expert_group_count", "n_group", optional=True),
    Setting("expert_group_used_count", "topk_group", optional=True),
)
_DEEPSEEK_EXTRA = (
    Setting("leading_dense_block_count", "first_k_dense_replace", "count", default=0),
    VocabSize(),
    LatentAttention(),
    _EXPERT_INNER,
    Setting("expert_count", "n_routed_experts"),
    Setting("expert_shared_count", "n_shared_experts", "count", default=0),
    Setting("expert_weights_scale", "routed_scaling_factor", "number", default=1.0),
    Setting("expert_weights_norm", "norm_topk_prob", "flag", default=False),
    RopeWidth(),
    YarnScale(),
    _BIAS,
)
_DEEPSEEK_IMPLIED: dict[str, tuple[Any, ...]] = {
    **_SILU,
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "rope_interleave": (True,),
}

# By model_type. Where one architecture's name has several rows, the first that fits a file is it.
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(
        "MistralForCausalLM",
        _LLAMA.settings,
        _LLAMA.extra,
        implied=_SILU,
        loses_window=True,
        matches=lambda file: not _has_experts(file),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        (
            *_BASE,
            _LLAMA_ROPE,
            _RMS,
            Setting("expert_count", "num_local_experts"),
            _EXPERTS_USED,
            HeadDim(),
        ),
        _LLAMA_EXTRA,
        implied=_SILU,
        defaults={"rms_norm_eps": 1e-5},
        loses_window=True,
        matches=_has_experts,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        (*_BASE, RopeKeys(), _RMS, HeadDim()),
        (_BIAS,),
        implied=_SILU | _NO_WINDOW,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        (*_BASE, RopeKeys(), _RMS, HeadDim()),
        (_BIAS,),
        implied=_SILU | _NO_WINDOW,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        (*_BASE, RopeKeys(), _RMS, *_QWEN_EXPERTS, HeadDim()),
        (
            _EXPERT_INNER,
            Setting("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ),
        implied=_QWEN_MOE | {"norm_topk_prob": (False,), "qkv_bias": (True,)},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        (*_BASE, RopeKeys(), _RMS, *_QWEN_EXPERTS, HeadDim(always=True)),
        (_EXPERT_INNER, _BIAS),
        implied=_QWEN_MOE | {"norm_topk_prob": (True,)},
        defaults={"norm_topk_prob": False},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        (
            *(_CONTEXT, _HIDDEN, _BLOCKS, _INNER, _HEADS, _KV_HEADS),
            *(_RMS, HeadDim(always=True), RopeKeys(("default",))),
        ),
        implied={
            "hidden_act": ("gelu_pytorch_tanh", "gelu"),
            "hidden_activation": ("gelu_pytorch_tanh",),
            "tie_word_embeddings": (True,),
        },
        defaults={"tie_word_embeddings": True, "head_dim": 256},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        (
            *(_CONTEXT, _HIDDEN, _BLOCKS, _INNER, _HEADS, _KV_HEADS),
            *(_RMS, HeadDim(always=True), RopeKeys(("default",))),
        ),
        (
            Setting("attn_logit_softcapping", "attn_logit_softcapping", "number", default=50.0),
            Setting("final_logit_softcapping", "final_logit_softcapping", "number", default=30.0),
            Setting("attention.sliding_window", "sliding_window", default=4096),
            SlidingLayers(2),
            AttentionScale(46),
        ),
        implied={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "tie_word_embeddings": (True,),
        },
        defaults={"tie_word_embeddings": True, "head_dim": 256},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        (
            *_BASE,
            RopeKeys(("default", "linear"), layers="full_attention"),
            SlidingRope(),
            _RMS,
            HeadDim(always=True),
        ),
        (
            Setting("final_logit_softcapping", "final_logit_softcapping", "number", optional=True),
            Setting("attention.sliding_window", "sliding_window", default=4096),
            SlidingLayers(6),
            AttentionScale(62),
        ),
        implied={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False,),
        },
        defaults={
            "tie_word_embeddings": True,
            "head_dim": 256,
            "rope_theta": 1e6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        (
            _CONTEXT,
            Setting(
                "rope.scaling.original_context_length",
                "original_max_position_embeddings",
                like="max_position_embeddings",
            ),
            *(_HIDDEN, _INNER, _BLOCKS, _HEADS, _KV_HEADS, _RMS),
            RopeKeys(("default", "longrope")),
            RotatedChannels(partial=True),
        ),
        (
            Setting(
                "attention.sliding_window",
                "sliding_window",
                "count",
                default=0,
                zero_is_none=True,
            ),
            LongRopeScale(),
        ),
        implied=_SILU,
        defaults={"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "phi": Family(
        "PhiForCausalLM",
        (
            *(_CONTEXT, _HIDDEN, _INNER, _BLOCKS, _HEADS, _KV_HEADS),
            Setting("attention.layer_norm_epsilon", "layer_norm_eps", "number", default=1e-5),
            RopeKeys(("default",)),
            RotatedChannels(partial=True),
        ),
        implied={"hidden_act": _GELU[::-1], "qk_layernorm": (False,)},
        defaults={"partial_rotary_factor": 0.5},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        (
            Setting("block_count", "n_layer"),
            Setting("context_length", "n_positions"),
            Setting("embedding_length", "n_embd"),
            Setting("feed_forward_length", "n_inner"),
            Setting("attention.head_count", "n_head"),
            Setting("attention.layer_norm_epsilon", "layer_norm_epsilon", "number", default=1e-5),
        ),
        implied={
            "activation_function": _GELU[::-1],
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
        defaults={"tie_word_embeddings": True},
        aliases={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "num_key_value_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        (*_BASE, _LLAMA_ROPE, _RMS, HeadDim()),
        (*_LLAMA_EXTRA, _BIAS, _MLP_BIAS, LayersWithoutRope(4)),
        implied=_SILU | _NO_WINDOW,
        defaults={"tie_word_embeddings": True},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        (*_BASE, RopeKeys(), _RMS, HeadDim()),
        (_BIAS,),
        implied=_SILU,
        shapes={"q_norm": ("queries",), "k_norm": ("keys",)},
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        (
            *_BASE,
            RopeKeys(),
            Setting("attention.layer_norm_epsilon", "norm_epsilon", "number", default=1e-5),
        ),
        (Biases("use_bias", "blk.0.attn_q.bias"),),
        implied={"hidden_act": _GELU},
        defaults={"tie_word_embeddings": True},
        loses_window=True,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        (*_BASE, _LLAMA_ROPE, _RMS),
        (
            *_LLAMA_EXTRA,
            Setting("attention.scale", "attention_multiplier", "number", default=1.0),
            Setting("embedding_scale", "embedding_multiplier", "number", default=1.0),
            Setting("residual_scale", "residual_multiplier", "number", default=1.0),
            Setting("logit_scale", "logits_scaling", "number", default=1.0),
            _BIAS,
            _MLP_BIAS,
        ),
        implied=_SILU,
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        (*_DEEPSEEK_HEAD, Gating("softmax")),
        _DEEPSEEK_EXTRA,
        implied=_DEEPSEEK_IMPLIED,
        shapes=LATENT_SHAPES,
        matches=lambda file: file.metadata.get("deepseek2.expert_gating_func", 1) == 1,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        (*_DEEPSEEK_HEAD, Gating("sigmoid")),
        _DEEPSEEK_EXTRA,
        implied=_DEEPSEEK_IMPLIED,
        defaults={"norm_topk_prob": True},
        shapes=LATENT_SHAPES,
    ),
}
