"""The table of model families, and one normalised view of a decoder's config.json.

A family is data: which tensors play which role and under what name (Hugging Face, GGUF), which of
them carry biases or per-head norms, which linears share an input, and where AWQ may move scale
from a layer into the one before it. GGUF naming, AWQ folding and the native decoder all read this
table; adding a family is adding a row and its tiny-checkpoint test.
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

    def hf_name(self, role: Role, block: int | None = None) -> str:
        return _numbered(self.tensors[role].hf, block)

    def gguf_tensor(self, role: Role, block: int | None = None) -> str:
        return _numbered(self.tensors[role].gguf, block)

    @property
    def block_roles(self) -> tuple[Role, ...]:
        return tuple(role for role, name in self.tensors.items() if "{i}" in name.hf)


def _numbered(template: str, block: int | None) -> str:
    if ("{i}" in template) != (block is not None):
        raise ValueError(f"{template} and block {block} do not go together")
    return template.format(i=block)


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


ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama", "llama", _LLAMA_TENSORS, False, False, True, _LLAMA_SMOOTHING),
        Architecture("mistral", "llama", _LLAMA_TENSORS, False, False, True, _LLAMA_SMOOTHING),
        Architecture("qwen2", "qwen2", _LLAMA_TENSORS, True, False, False, _LLAMA_SMOOTHING),
        Architecture(
            "qwen3", "qwen3", _LLAMA_TENSORS | _QK_NORMS, False, True, False, _LLAMA_SMOOTHING
        ),
    )
}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The table's row for a config.json; raises UnsupportedModel with the list where there is
    none.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    guess = closest(str(model_type), ARCHITECTURES)
    families = ", ".join(sorted(ARCHITECTURES))
    raise UnsupportedModel(
        f"model family {model_type!r} is not in the table of families",
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
