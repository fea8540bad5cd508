"""The table of model families.

A family is data: which tensors play which role and under what name (Hugging Face, GGUF), which of
them carry biases or per-head norms, which linears share an input, and where AWQ may move scale
from a layer into the one before it. GGUF naming, AWQ folding and the native decoder all read this
table; adding a family is adding a row and its tiny-checkpoint test. Rows that the native decoder
does not run are there for GGUF (convert/gguf/families.py has their settings). What a model's
config.json says is read by qtool/decoder_config.py.

How the native decoder wires a block follows from which roles there are: norms before a layer,
after it or both; q, k and v apart or in one; a gate or a plain MLP; experts; latent attention.

In names {i} is the block and {e} the expert: a checkpoint has a matrix an expert, GGUF stacks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qtool.errors import UnsupportedModel, closest

Role = Literal[
    "embed", "norm", "head",
    "attn_norm", "q", "k", "v", "o", "q_norm", "k_norm",
    "mlp_norm", "gate", "up", "down",
    # fused projections, norms after a layer, learned positions
    "qkv", "gate_up", "attn_post_norm", "mlp_post_norm", "positions",
    # experts: the router, its bias, the stacks, the expert that every token goes through
    "router", "router_bias", "experts_gate", "experts_up", "experts_down",
    "shared_gate", "shared_up", "shared_down", "shared_router",
    # latent attention: q and kv go through a narrow layer with a norm
    "q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorName:
    """A module's name in a Hugging Face checkpoint and in GGUF, without ".weight"; {i} is the
    block.
    """

    hf: str
    gguf: str


@dataclass(frozen=True, slots=True)
class Smoothing:
    """``source``'s output channels feed ``targets`` directly, so scale can move between them."""

    source: Role
    targets: tuple[Role, ...]


# A norm of q and k: one for all heads, applied to each, or one over all heads together.
QkNorm = Literal["head", "all"]
# Which layers have the config's sliding window where no layer_types says it: every one, none, all
# but each sliding_window_pattern-th, those from max_window_layers on. The last two of these only
# where use_sliding_window asks for it.
WindowRule = Literal["none", "every", "pattern", "from_layer", "opt_in"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One family.

    biases                     roles that always have a bias
    norm                       "rms", or "layer" with a mean and a bias
    rope_interleaved_in_gguf   llama.cpp rotates adjacent pairs in these families, so the rows of q
                               and k are permuted in GGUF
    fused                      linears with one input: runtimes fuse them, so they share a scheme
    native                     whether the native decoder runs it
    norm_offset                norms multiply by this plus their weight, which is what GGUF stores
    transposed                 linears that a checkpoint stores as [in, out] (Conv1D)
    scales_embedding           tokens are looked up times sqrt(hidden_size)
    activation                 what the family computes whatever hidden_act says
    defaults                   entries that published configs leave out
    """

    model_type: str
    gguf_name: str
    tensors: Mapping[Role, TensorName]
    biases: tuple[Role, ...] = ()
    qk_norm: QkNorm | None = None
    rope_interleaved_in_gguf: bool = False
    smoothing: tuple[Smoothing, ...] = ()
    fused: tuple[tuple[Role, ...], ...] = (("q", "k", "v"), ("gate", "up"))
    native: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    transposed: tuple[Role, ...] = ()
    window_rule: WindowRule = "none"
    scales_embedding: bool = False
    activation: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def hf_name(self, role: Role, block: int | None = None, expert: int | None = None) -> str:
        return _numbered(self.tensors[role].hf, block, expert)

    def gguf_tensor(self, role: Role, block: int | None = None) -> str:
        return _numbered(self.tensors[role].gguf, block)

    @property
    def block_roles(self) -> tuple[Role, ...]:
        return tuple(role for role, name in self.tensors.items() if "{i}" in name.hf)


def _numbered(template: str, block: int | None, expert: int | None = None) -> str:
    for mark, number in (("{i}", block), ("{e}", expert)):
        if (mark in template) != (number is not None):
            raise ValueError(f"{template} and {mark} {number} do not go together")
    return template.format(i=block, e=expert)


_LLAMA_TENSORS: dict[Role, TensorName] = {
    "embed": TensorName("model.embed_tokens", "token_embd"),
    "norm": TensorName("model.norm", "output_norm"),
    "head": TensorName("lm_head", "output"),
    "attn_norm": TensorName("model.layers.{i}.input_layernorm", "blk.{i}.attn_norm"),
    "q": TensorName("model.layers.{i}.self_attn.q_proj", "blk.{i}.attn_q"),
    "k": TensorName("model.layers.{i}.self_attn.k_proj", "blk.{i}.attn_k"),
    "v": TensorName("model.layers.{i}.self_attn.v_proj", "blk.{i}.attn_v"),
    "o": TensorName("model.layers.{i}.self_attn.o_proj", "blk.{i}.attn_output"),
    "mlp_norm": TensorName("model.layers.{i}.post_attention_layernorm", "blk.{i}.ffn_norm"),
    "gate": TensorName("model.layers.{i}.mlp.gate_proj", "blk.{i}.ffn_gate"),
    "up": TensorName("model.layers.{i}.mlp.up_proj", "blk.{i}.ffn_up"),
    "down": TensorName("model.layers.{i}.mlp.down_proj", "blk.{i}.ffn_down"),
}
_QK_NORMS: dict[Role, TensorName] = {
    "q_norm": TensorName("model.layers.{i}.self_attn.q_norm", "blk.{i}.attn_q_norm"),
    "k_norm": TensorName("model.layers.{i}.self_attn.k_norm", "blk.{i}.attn_k_norm"),
}
_LLAMA_SMOOTHING = (
    Smoothing("attn_norm", ("q", "k", "v")),
    Smoothing("v", ("o",)),
    Smoothing("mlp_norm", ("gate", "up")),
    Smoothing("up", ("down",)),
)


def _in_blocks(names: Mapping[Role, tuple[str, str]]) -> dict[Role, TensorName]:
    return {
        role: TensorName(f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}")
        for role, (hf, gguf) in names.items()
    }


def _without(tensors: Mapping[Role, TensorName], *roles: Role) -> dict[Role, TensorName]:
    return {role: name for role, name in tensors.items() if role not in roles}


_NORMS_AFTER = _in_blocks(
    {
        "attn_post_norm": ("post_attention_layernorm", "post_attention_norm"),
        "mlp_post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
    }
)
_GEMMA2_TENSORS = (
    _LLAMA_TENSORS
    | _NORMS_AFTER
    | _in_blocks({"mlp_norm": ("pre_feedforward_layernorm", "ffn_norm")})
)
_PHI3_TENSORS = _without(_LLAMA_TENSORS, "q", "k", "v", "gate", "up") | _in_blocks(
    {
        "qkv": ("self_attn.qkv_proj", "attn_qkv"),
        "gate_up": ("mlp.gate_up_proj", "ffn_up"),
    }
)
_PHI2_TENSORS = (
    _without(_LLAMA_TENSORS, "mlp_norm", "gate")
    | {"norm": TensorName("model.final_layernorm", "output_norm")}
    | _in_blocks(
        {
            "o": ("self_attn.dense", "attn_output"),
            "up": ("mlp.fc1", "ffn_up"),
            "down": ("mlp.fc2", "ffn_down"),
        }
    )
)
_STARCODER2_TENSORS = _without(_LLAMA_TENSORS, "gate") | _in_blocks(
    {"up": ("mlp.c_fc", "ffn_up"), "down": ("mlp.c_proj", "ffn_down")}
)
_GPT2_TENSORS: dict[Role, TensorName] = {
    "embed": TensorName("transformer.wte", "token_embd"),
    "positions": TensorName("transformer.wpe", "position_embd"),
    "norm": TensorName("transformer.ln_f", "output_norm"),
    "head": TensorName("lm_head", "output"),
    "attn_norm": TensorName("transformer.h.{i}.ln_1", "blk.{i}.attn_norm"),
    "qkv": TensorName("transformer.h.{i}.attn.c_attn", "blk.{i}.attn_qkv"),
    "o": TensorName("transformer.h.{i}.attn.c_proj", "blk.{i}.attn_output"),
    "mlp_norm": TensorName("transformer.h.{i}.ln_2", "blk.{i}.ffn_norm"),
    "up": TensorName("transformer.h.{i}.mlp.c_fc", "blk.{i}.ffn_up"),
    "down": TensorName("transformer.h.{i}.mlp.c_proj", "blk.{i}.ffn_down"),
}
_MIXTRAL_TENSORS = _without(_LLAMA_TENSORS, "gate", "up", "down") | _in_blocks(
    {
        "router": ("block_sparse_moe.gate", "ffn_gate_inp"),
        "experts_gate": ("block_sparse_moe.experts.{e}.w1", "ffn_gate_exps"),
        "experts_up": ("block_sparse_moe.experts.{e}.w3", "ffn_up_exps"),
        "experts_down": ("block_sparse_moe.experts.{e}.w2", "ffn_down_exps"),
    }
)
_EXPERTS = _in_blocks(
    {
        "router": ("mlp.gate", "ffn_gate_inp"),
        "experts_gate": ("mlp.experts.{e}.gate_proj", "ffn_gate_exps"),
        "experts_up": ("mlp.experts.{e}.up_proj", "ffn_up_exps"),
        "experts_down": ("mlp.experts.{e}.down_proj", "ffn_down_exps"),
    }
)
# Blocks have gate, up and down or experts, as the config says (GGUF: experts in every block).
_QWEN3_MOE_TENSORS = _LLAMA_TENSORS | _QK_NORMS | _EXPERTS
_QWEN2_MOE_TENSORS = (
    _LLAMA_TENSORS
    | _EXPERTS
    | _in_blocks(
        {
            "shared_gate": ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
            "shared_up": ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
            "shared_down": ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
            "shared_router": ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
        }
    )
)
# The first blocks have gate, up and down, the others experts; q is there without q_a and q_b. GGUF
# has kv_b as two stacks by head, attn_k_b (transposed) and attn_v_b.
_DEEPSEEK_TENSORS = (
    _without(_LLAMA_TENSORS, "k", "v")
    | _EXPERTS
    | _in_blocks(
        {
            "router_bias": ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
            "shared_gate": ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
            "shared_up": ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
            "shared_down": ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
            "q_a": ("self_attn.q_a_proj", "attn_q_a"),
            "q_a_norm": ("self_attn.q_a_layernorm", "attn_q_a_norm"),
            "q_b": ("self_attn.q_b_proj", "attn_q_b"),
            "kv_a": ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
            "kv_a_norm": ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
            "kv_b": ("self_attn.kv_b_proj", "attn_kv_b"),
        }
    )
)


_QKV: tuple[Role, ...] = ("q", "k", "v")
_GEMMA: dict[str, Any] = {"tie_word_embeddings": True, "head_dim": 256}

ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture(
            "llama",
            "llama",
            _LLAMA_TENSORS,
            rope_interleaved_in_gguf=True,
            smoothing=_LLAMA_SMOOTHING,
        ),
        Architecture(
            "mistral",
            "llama",
            _LLAMA_TENSORS,
            rope_interleaved_in_gguf=True,
            smoothing=_LLAMA_SMOOTHING,
            window_rule="every",
        ),
        Architecture(
            "qwen2",
            "qwen2",
            _LLAMA_TENSORS,
            biases=_QKV,
            smoothing=_LLAMA_SMOOTHING,
            window_rule="from_layer",
        ),
        Architecture(
            "qwen3",
            "qwen3",
            _LLAMA_TENSORS | _QK_NORMS,
            qk_norm="head",
            smoothing=_LLAMA_SMOOTHING,
            window_rule="from_layer",
        ),
        Architecture(
            "gemma",
            "gemma",
            _LLAMA_TENSORS,
            norm_offset=1.0,
            scales_embedding=True,
            # The first configs say "gelu" and mean this.
            activation="gelu_pytorch_tanh",
            defaults=_GEMMA,
        ),
        Architecture(
            "gemma2",
            "gemma2",
            _GEMMA2_TENSORS,
            norm_offset=1.0,
            scales_embedding=True,
            activation="gelu_pytorch_tanh",
            window_rule="pattern",
            defaults={
                **_GEMMA,
                "sliding_window": 4096,
                "sliding_window_pattern": 2,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "query_pre_attn_scalar": 256,
            },
        ),
        Architecture(
            "gemma3_text",
            "gemma3",
            _GEMMA2_TENSORS | _QK_NORMS,
            qk_norm="head",
            norm_offset=1.0,
            scales_embedding=True,
            activation="gelu_pytorch_tanh",
            window_rule="pattern",
            defaults={
                **_GEMMA,
                "vocab_size": 262208,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "sliding_window": 4096,
                "sliding_window_pattern": 6,
                "query_pre_attn_scalar": 256,
                "rope_theta": 1e6,
                "rope_local_base_freq": 10000.0,
                "max_position_embeddings": 131072,
            },
        ),
        Architecture(
            "phi3",
            "phi3",
            _PHI3_TENSORS,
            window_rule="every",
            defaults={"rms_norm_eps": 1e-5},
        ),
        Architecture("phi", "phi2", _PHI2_TENSORS, native=False),
        Architecture(
            "gpt2", "gpt2", _GPT2_TENSORS, native=False, transposed=("qkv", "o", "up", "down")
        ),
        Architecture(
            "smollm3",
            "smollm3",
            _LLAMA_TENSORS,
            rope_interleaved_in_gguf=True,
            window_rule="opt_in",
            defaults={"no_rope_layer_interval": 4, "tie_word_embeddings": True},
        ),
        Architecture(
            "olmo2",
            "olmo2",
            _without(_LLAMA_TENSORS, "attn_norm", "mlp_norm") | _QK_NORMS | _NORMS_AFTER,
            qk_norm="all",
            defaults={"rms_norm_eps": 1e-5},
        ),
        Architecture(
            "starcoder2",
            "starcoder2",
            _STARCODER2_TENSORS,
            norm="layer",
            window_rule="every",
            defaults={
                "use_bias": True,
                "hidden_act": "gelu_pytorch_tanh",
                "norm_epsilon": 1e-5,
                "tie_word_embeddings": True,
            },
        ),
        Architecture("granite", "granite", _LLAMA_TENSORS, rope_interleaved_in_gguf=True),
        Architecture(
            "mixtral",
            "llama",
            _MIXTRAL_TENSORS,
            rope_interleaved_in_gguf=True,
            window_rule="every",
            defaults={"norm_topk_prob": True, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        ),
        Architecture(
            "qwen2_moe",
            "qwen2moe",
            _QWEN2_MOE_TENSORS,
            window_rule="opt_in",
            defaults={"qkv_bias": True},
        ),
        Architecture(
            "qwen3_moe", "qwen3moe", _QWEN3_MOE_TENSORS, qk_norm="head", window_rule="opt_in"
        ),
        Architecture(
            "deepseek_v2",
            "deepseek2",
            _without(_DEEPSEEK_TENSORS, "router_bias"),
            defaults={"topk_method": "greedy"},
        ),
        Architecture(
            "deepseek_v3", "deepseek2", _DEEPSEEK_TENSORS, defaults={"norm_topk_prob": True}
        ),
    )
}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The row of a family that the native decoder runs; raises UnsupportedModel with the list of
    them.
    """
    native = {name: row for name, row in ARCHITECTURES.items() if row.native}
    return _find(config, native, "is not one that the native decoder runs")


def find_family(config: Mapping[str, Any]) -> Architecture:
    """The table's row for a config.json, native or not; raises UnsupportedModel with the list."""
    return _find(config, ARCHITECTURES, "is not in the table of families")


def _find(
    config: Mapping[str, Any], rows: Mapping[str, Architecture], problem: str
) -> Architecture:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in rows:
        return rows[model_type]
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        problem += f" (it is multimodal: its text part is {inner.get('model_type')!r})"
    guess = closest(str(model_type), rows)
    families = ", ".join(sorted(rows))
    raise UnsupportedModel(
        f"model family {model_type!r} {problem}",
        f"known: {families}" + (f"; did you mean {guess}?" if guess else ""),
    )
