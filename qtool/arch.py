"""The table of model families, and one normalised view of a decoder's config.json.

A family is data: which tensors play which role and under what name (Hugging Face, GGUF), which of
them carry biases or per-head norms, which linears share an input, and where AWQ may move scale
from a layer into the one before it. GGUF naming, AWQ folding and the native decoder all read this
table; adding a family is adding a row and its tiny-checkpoint test. Rows that the native decoder
does not run are there for GGUF (convert/gguf/families.py has their settings).

In names {i} is the block and {e} the expert: a checkpoint has a matrix an expert, GGUF stacks them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qtool.errors import FormatError, UnsupportedModel, closest

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


@dataclass(frozen=True, slots=True)
class Architecture:
    model_type: str
    gguf_name: str
    tensors: Mapping[Role, TensorName]
    qkv_bias: bool
    qk_norm: bool
    # llama.cpp rotates adjacent pairs in these families, so the rows of q and k are permuted in
    # GGUF.
    rope_interleaved_in_gguf: bool
    smoothing: tuple[Smoothing, ...]
    # Linears with one input: runtimes fuse them, so they share a scheme.
    fused: tuple[tuple[Role, ...], ...] = (("q", "k", "v"), ("gate", "up"))
    # Whether the native decoder runs it.
    native: bool = True
    # Norms multiply by this plus their weight, which is what GGUF stores.
    norm_offset: float = 0.0
    # Linears that a checkpoint stores as [in, out] (Conv1D).
    transposed: tuple[Role, ...] = ()

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
_QWEN3_MOE_TENSORS = _without(_LLAMA_TENSORS, "gate", "up", "down") | _QK_NORMS | _EXPERTS
_QWEN2_MOE_TENSORS = (
    _without(_LLAMA_TENSORS, "gate", "up", "down")
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


def _for_gguf(
    model_type: str,
    gguf_name: str,
    tensors: Mapping[Role, TensorName],
    *,
    interleaved: bool = False,
    norm_offset: float = 0.0,
    transposed: tuple[Role, ...] = (),
) -> Architecture:
    """A row that the native decoder does not run."""
    return Architecture(
        model_type=model_type,
        gguf_name=gguf_name,
        tensors=tensors,
        qkv_bias=False,
        qk_norm="q_norm" in tensors,
        rope_interleaved_in_gguf=interleaved,
        smoothing=(),
        native=False,
        norm_offset=norm_offset,
        transposed=transposed,
    )


ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama", "llama", _LLAMA_TENSORS, False, False, True, _LLAMA_SMOOTHING),
        Architecture("mistral", "llama", _LLAMA_TENSORS, False, False, True, _LLAMA_SMOOTHING),
        Architecture("qwen2", "qwen2", _LLAMA_TENSORS, True, False, False, _LLAMA_SMOOTHING),
        Architecture(
            "qwen3", "qwen3", _LLAMA_TENSORS | _QK_NORMS, False, True, False, _LLAMA_SMOOTHING
        ),
        _for_gguf("gemma", "gemma", _LLAMA_TENSORS, norm_offset=1.0),
        _for_gguf("gemma2", "gemma2", _GEMMA2_TENSORS, norm_offset=1.0),
        _for_gguf("gemma3_text", "gemma3", _GEMMA2_TENSORS | _QK_NORMS, norm_offset=1.0),
        _for_gguf("phi3", "phi3", _PHI3_TENSORS),
        _for_gguf("phi", "phi2", _PHI2_TENSORS),
        _for_gguf("gpt2", "gpt2", _GPT2_TENSORS, transposed=("qkv", "o", "up", "down")),
        _for_gguf("smollm3", "smollm3", _LLAMA_TENSORS, interleaved=True),
        _for_gguf(
            "olmo2",
            "olmo2",
            _without(_LLAMA_TENSORS, "attn_norm", "mlp_norm") | _QK_NORMS | _NORMS_AFTER,
        ),
        _for_gguf("starcoder2", "starcoder2", _STARCODER2_TENSORS),
        _for_gguf("granite", "granite", _LLAMA_TENSORS, interleaved=True),
        _for_gguf("mixtral", "llama", _MIXTRAL_TENSORS, interleaved=True),
        _for_gguf("qwen2_moe", "qwen2moe", _QWEN2_MOE_TENSORS),
        _for_gguf("qwen3_moe", "qwen3moe", _QWEN3_MOE_TENSORS),
        _for_gguf("deepseek_v2", "deepseek2", _without(_DEEPSEEK_TENSORS, "router_bias")),
        _for_gguf("deepseek_v3", "deepseek2", _DEEPSEEK_TENSORS),
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


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding. ``kind`` says how frequencies are stretched (config.json's
    rope_type).
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inverse_frequencies(self, head_dim: int) -> list[float]:
        """Radians a position for each rotated pair, [head_dim / 2].

        ``llama3`` keeps short wavelengths, divides long ones by ``factor`` and blends between
        (Llama 3.1's rule).
        """
        frequencies = [self.theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
        return [f / d for f, d in zip(frequencies, self.divisors(head_dim), strict=True)]

    def divisors(self, head_dim: int) -> list[float]:
        """What each frequency is divided by; GGUF stores this as rope_freqs.weight."""
        frequencies = [self.theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "default":
            return [1.0] * len(frequencies)
        if self.kind == "linear":
            return [self.factor] * len(frequencies)
        return [self._llama3_divisor(2.0 * math.pi / f) for f in frequencies]

    def _llama3_divisor(self, wavelength: float) -> float:
        context = self.original_max_position_embeddings
        if wavelength < context / self.high_freq_factor:
            return 1.0
        if wavelength > context / self.low_freq_factor:
            return self.factor
        span = self.high_freq_factor - self.low_freq_factor
        smooth = (context / wavelength - self.low_freq_factor) / span
        return 1.0 / ((1.0 - smooth) / self.factor + smooth)


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """What the native decoder and the GGUF exporter need of config.json, one spelling for all its
    versions.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read config.json; raises FormatError that names the key that is missing or out of
        range.
        """
        architecture = find_architecture(config)
        hidden = _whole(config, "hidden_size")
        heads = _whole(config, "num_attention_heads")
        kv_heads = _whole(config, "num_key_value_heads", heads)
        head_dim = _whole(config, "head_dim", hidden // heads)
        if heads % kv_heads:
            raise FormatError(
                f"config.json: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise UnsupportedModel(
                f"config.json: hidden_act {activation!r} is not silu, the one this decoder has"
            )
        eos = config.get("eos_token_id")
        return cls(
            model_type=architecture.model_type,
            vocab_size=_whole(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_whole(config, "intermediate_size"),
            num_layers=_whole(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(config),
            max_position_embeddings=_whole(config, "max_position_embeddings", 2048),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=architecture.qkv_bias or bool(config.get("attention_bias", False)),
            sliding_window=_sliding_window(config),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )


def _whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise FormatError(f"config.json: {key} is {value!r}, a positive whole number is needed")
    return value


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    """Mistral's window applies to every layer; Qwen's only where use_sliding_window says so."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return None
    if config.get("model_type") in ("qwen2", "qwen3"):
        layer_types = config.get("layer_types") or []
        if layer_types and all(kind == "full_attention" for kind in layer_types):
            return None
        if not config.get("use_sliding_window", False):
            return None
        raise UnsupportedModel(
            "config.json: sliding windows on some layers only are not supported for "
            f"{config.get('model_type')}",
            "set use_sliding_window to false in config.json to attend to the full context",
        )
    return _whole(config, "sliding_window")


def _rope(config: Mapping[str, Any]) -> Rope:
    """rope_parameters (transformers 5) or rope_theta with rope_scaling (before)."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=float(parameters["factor"]))
    if kind == "llama3":
        return Rope(
            theta=theta,
            kind="llama3",
            factor=float(parameters.get("factor", 8.0)),
            low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
            high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
            original_max_position_embeddings=int(
                parameters.get("original_max_position_embeddings", 8192)
            ),
        )
    raise UnsupportedModel(
        f"config.json: rope type {kind!r} is not supported", "known: default, linear, llama3"
    )
