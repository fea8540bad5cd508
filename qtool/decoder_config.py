"""One normalised view of a decoder's config.json: what the native decoder is built from.

Families spell the same figure in several ways, leave defaults out, and say what differs from layer
to layer (windows, rotary stretches, experts) by lists, intervals and flags. Here it has one
spelling, checked, and a list with an entry a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qtool.arch import Architecture, find_architecture
from qtool.errors import FormatError, UnsupportedModel
from qtool.rope import Rope, read_rope, yarn_magnitude

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
# Of any dimension; larger ones are a damaged header.
LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What differs from layer to layer.

    window  a token sees itself and the window - 1 before it; None: all of them
    rope    None: positions are not told to this layer
    sparse  experts instead of one MLP
    """

    window: int | None
    rope: Rope | None
    sparse: bool


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A router and its experts.

    scoring       how logits become scores
    normalized    the chosen experts' scores are divided by their sum
    scaling       then multiplied by this
    groups        experts are chosen within the best `used_groups` of so many groups; 1: among all
    shared_size   intermediate size of the expert that every token goes through; 0: none
    """

    count: int
    per_token: int
    intermediate_size: int
    scoring: Literal["softmax", "sigmoid"]
    normalized: bool
    scaling: float
    groups: int
    used_groups: int
    shared_size: int


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Latent attention: keys and values come from a narrow vector a token, which is what is cached.

    query_rank   width of the queries' narrow layer, or None where they have none
    rank         width of that vector
    nope, rope   channels of a head that are not turned, and that are
    value        channels of a head's value
    interleaved  pairs to turn lie side by side and not half a head apart
    """

    query_rank: int | None
    rank: int
    nope: int
    rope: int
    value: int
    interleaved: bool


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """attention_scale multiplies scores, embedding_scale what tokens are looked up as,
    residual_scale what a block adds to its input, logits_scale the logits. Softcaps bend scores and
    logits to softcap * tanh(x / softcap).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    layers: tuple[LayerConfig, ...]
    activation: Activation
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    all_biases: bool
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    attention_softcap: float | None
    logits_softcap: float | None
    experts: ExpertsConfig | None
    latent: LatentConfig | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def rope_dim(self) -> int:
        """Channels of a head among which the turned ones are."""
        return self.head_dim if self.latent is None else self.latent.rope

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read config.json; raises FormatError that names the key that is missing or out of range,
        UnsupportedModel for what the native decoder does not compute.
        """
        architecture = find_architecture(config)
        return _Reader(architecture, {**architecture.defaults, **config}).read()


@dataclass(frozen=True, slots=True)
class _Reader:
    architecture: Architecture
    config: Mapping[str, Any]

    def read(self) -> DecoderConfig:
        config = self.config
        for key in ("use_bidirectional_attention", "clip_qkv"):
            if config.get(key):
                raise UnsupportedModel(
                    f"config.json: {key} {config[key]!r} is not what the native decoder computes"
                )
        hidden = self._whole("hidden_size")
        heads = self._whole("num_attention_heads")
        kv_heads = self._whole("num_key_value_heads", heads)
        if heads % kv_heads:
            raise FormatError(
                f"config.json: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        latent = self._latent()
        head_dim = self._whole("head_dim", hidden // heads)
        experts = self._experts()
        eos = config.get("eos_token_id")
        return DecoderConfig(
            model_type=self.architecture.model_type,
            vocab_size=self._whole("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self._whole("intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=self._number("rms_norm_eps", "norm_epsilon", "layer_norm_eps", default=1e-6),
            layers=self._layers(experts, head_dim if latent is None else latent.rope),
            activation=self._activation(),
            max_position_embeddings=self._whole("max_position_embeddings", 2048),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias") or config.get("qkv_bias")),
            all_biases=bool(config.get("use_bias")),
            attention_scale=self._attention_scale(head_dim, latent),
            embedding_scale=hidden**0.5
            if self.architecture.scales_embedding
            else self._number("embedding_multiplier", default=1.0),
            residual_scale=self._number("residual_multiplier", default=1.0),
            logits_scale=1.0 / self._number("logits_scaling", default=1.0),
            attention_softcap=self._softcap("attn_logit_softcapping"),
            logits_softcap=self._softcap("final_logit_softcapping"),
            experts=experts,
            latent=latent,
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )

    def _whole(self, key: str, default: int | None = None) -> int:
        return whole(self.config, key, default)

    def _count(self, *keys: str) -> int:
        """The first of them that is there and not 0, else 0."""
        found = next((key for key in keys if self.config.get(key)), None)
        return 0 if found is None else self._whole(found)

    def _number(self, *keys: str, default: float) -> float:
        key = next((key for key in keys if self.config.get(key) is not None), keys[0])
        value = self.config.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise FormatError(f"config.json: {key} is {value!r}, a positive number is needed")
        return float(value)

    def _softcap(self, key: str) -> float | None:
        return self._number(key, default=1.0) if self.config.get(key) else None

    def _activation(self) -> Activation:
        fixed = self.architecture.activation
        name = self.config.get("hidden_activation") or fixed or self.config.get("hidden_act")
        name = "silu" if name is None else name
        if name not in _ACTIVATIONS:
            raise UnsupportedModel(
                f"config.json: hidden_act {name!r} is not one that the native decoder has",
                f"known: {', '.join(_ACTIVATIONS)}",
            )
        return _ACTIVATIONS[name]

    def _attention_scale(self, head_dim: int, latent: LatentConfig | None) -> float:
        if latent is not None:
            scale = 1.0 / math.sqrt(latent.nope + latent.rope)
            parameters = self._rope_parameters()
            all_dim = parameters.get("mscale_all_dim")
            if all_dim and (parameters.get("rope_type") or parameters.get("type")) == "yarn":
                scale *= yarn_magnitude(float(parameters["factor"]), float(all_dim)) ** 2
            return scale
        if self.config.get("query_pre_attn_scalar") is not None:
            return 1.0 / math.sqrt(self._number("query_pre_attn_scalar", default=1.0))
        return self._number("attention_multiplier", default=head_dim**-0.5)

    def _latent(self) -> LatentConfig | None:
        if "kv_a" not in self.architecture.tensors:
            return None
        return LatentConfig(
            query_rank=self._count("q_lora_rank") or None,
            rank=self._whole("kv_lora_rank"),
            nope=self._whole("qk_nope_head_dim"),
            rope=self._whole("qk_rope_head_dim"),
            value=self._whole("v_head_dim"),
            interleaved=bool(self.config.get("rope_interleave", True)),
        )

    def _experts(self) -> ExpertsConfig | None:
        count = self._count("num_experts", "num_local_experts", "n_routed_experts")
        if "router" not in self.architecture.tensors or not count:
            return None
        config = self.config
        size = self._count("moe_intermediate_size") or self._whole("intermediate_size")
        shared = self._count("shared_expert_intermediate_size")
        groups = self._count("n_group") or 1
        if config.get("topk_method") == "greedy":
            groups = 1
        used = self._count("topk_group") or groups
        per_token = self._whole("num_experts_per_tok")
        if count % groups or used > groups or per_token > count // groups * used:
            raise FormatError(
                f"config.json: {per_token} of {count} experts cannot be chosen within {used} of "
                f"{groups} groups"
            )
        return ExpertsConfig(
            count=count,
            per_token=per_token,
            intermediate_size=size,
            scoring="sigmoid" if "router_bias" in self.architecture.tensors else "softmax",
            normalized=bool(config.get("norm_topk_prob", False)),
            scaling=self._number("routed_scaling_factor", default=1.0),
            groups=groups,
            used_groups=used,
            shared_size=shared or self._count("n_shared_experts") * size,
        )

    def _layers(self, experts: ExpertsConfig | None, rope_dim: int) -> tuple[LayerConfig, ...]:
        windows = self._windows()
        ropes = self._ropes(rope_dim)
        return tuple(
            LayerConfig(
                window=window,
                rope=self._rope_of(index, window, ropes),
                sparse=experts is not None and self._is_sparse(index),
            )
            for index, window in enumerate(windows)
        )

    def _is_sparse(self, layer: int) -> bool:
        return (
            layer >= self._count("first_k_dense_replace")
            and layer not in (self.config.get("mlp_only_layers") or ())
            and (layer + 1) % (self._count("decoder_sparse_step") or 1) == 0
        )

    def _windows(self) -> tuple[int | None, ...]:
        """Of each layer: by layer_types where they are there, else by the family's rule."""
        num_layers = self._whole("num_hidden_layers")
        config, rule = self.config, self.architecture.window_rule
        types = config.get("layer_types")
        if types is not None:
            if not isinstance(types, list) or len(types) != num_layers:
                raise FormatError(f"config.json: layer_types does not list {num_layers} layers")
            unknown = set(types) - {"full_attention", "sliding_attention"}
            if unknown:
                raise UnsupportedModel(
                    f"config.json: layer_types has {sorted(unknown)[0]!r}, which the native "
                    "decoder does not compute"
                )
        asked = config.get("use_sliding_window")
        if asked is None:
            asked = rule not in ("from_layer", "opt_in")
        if rule == "none" or not config.get("sliding_window") or not asked:
            return (None,) * num_layers
        window = self._whole("sliding_window")
        if types:
            slides = [kind == "sliding_attention" for kind in types]
        elif rule == "pattern":
            pattern = self._count("sliding_window_pattern", "_sliding_window_pattern") or 1
            slides = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
        elif rule == "from_layer":
            first = self._count("max_window_layers")
            slides = [layer >= first for layer in range(num_layers)]
        else:
            slides = [True] * num_layers
        return tuple(window if slide else None for slide in slides)

    def _rope_parameters(self) -> dict[str, Any]:
        """rope_parameters (transformers 5) or rope_scaling (before)."""
        found = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(found, Mapping):
            raise FormatError(f"config.json: rope_parameters is {found!r}, not an object")
        return dict(found)

    def _ropes(self, rope_dim: int) -> dict[str, Rope]:
        """By kind of layer: one for those that see all tokens, one for those with a window."""
        parameters = self._rope_parameters()
        theta = self._number("rope_theta", default=10000.0)
        kinds = ("full_attention", "sliding_attention")
        if any(kind in parameters for kind in kinds):
            return {
                kind: read_rope(
                    self.config, parameters.get(kind) or {}, head_dim=rope_dim, theta=theta
                )
                for kind in kinds
            }
        full = read_rope(self.config, parameters, head_dim=rope_dim, theta=theta)
        if self.config.get("rope_local_base_freq") is None:
            return dict.fromkeys(kinds, full)
        local = self._number("rope_local_base_freq", default=10000.0)
        return {"full_attention": full, "sliding_attention": Rope(theta=local)}

    def _rope_of(self, layer: int, window: int | None, ropes: Mapping[str, Rope]) -> Rope | None:
        listed, interval = self.config.get("no_rope_layers"), self._count("no_rope_layer_interval")
        if isinstance(listed, list) and layer < len(listed):
            if not listed[layer]:  # the list says 1 where there is one
                return None
        elif interval and (layer + 1) % interval == 0:
            return None
        types = self.config.get("layer_types")
        default = "full_attention" if window is None else "sliding_attention"
        return ropes[types[layer] if types else default]


def whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size of config.json; raises FormatError for what cannot be one."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise FormatError(f"config.json has no {key}, which the model's shape needs")
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise FormatError(f"config.json: {key} is {value!r}, a positive whole number is needed")
    if value > LARGEST_SIZE:
        raise FormatError(
            f"config.json: {key} is {value}, larger than any model's: at most {LARGEST_SIZE} is "
            "taken",
            "the file is damaged, or is not a model's; fetch it again",
        )
    return value
