"""The sizes of a model as its config.json has them, by the names that `qtool.role_shapes` has.

A role whose shape has a size of zero is not there: a model without shared experts has no tensors
for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.arch import Architecture, Role
from qtool.convert.gguf.config_keys import family_of
from qtool.convert.gguf.entries import head_dim
from qtool.convert.gguf.family import Family
from qtool.decoder_config import whole
from qtool.errors import FormatError
from qtool.role_shapes import SHAPES

_DENSE: tuple[Role, ...] = ("gate", "up", "down")
_SPARSE: tuple[Role, ...] = (
    *("router", "router_bias", "experts_gate", "experts_up", "experts_down"),
    *("shared_gate", "shared_up", "shared_down", "shared_router"),
)
STACKED: tuple[Role, ...] = ("experts_gate", "experts_up", "experts_down")


@dataclass(frozen=True, slots=True)
class Sizes:
    """A config.json's numbers under one spelling, checked.

    by_name         sizes by the names that SHAPES has
    num_dense       first blocks without experts, in a model that has experts
    lost_window     a sliding window that GGUF cannot say, or None
    """

    by_name: Mapping[str, int]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_dense: int
    tie_word_embeddings: bool
    lost_window: int | None
    shapes: Mapping[Role, tuple[str, ...]]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Raises FormatError that names the key that is missing or out of range."""
        _, family = family_of(config)
        return _Reader(family, family.filled(config)).sizes()

    def shape(self, role: Role) -> tuple[int, ...]:
        return tuple(self.by_name[size] for size in self.shapes.get(role, SHAPES[role]))

    def has(self, architecture: Architecture, role: Role, block: int | None) -> bool:
        """Whether there is a tensor of a role in a block (None: outside the blocks)."""
        if role == "head" and self.tie_word_embeddings:
            return False
        if block is not None and self.num_experts and "router" in architecture.tensors:
            if role in (_DENSE if block >= self.num_dense else _SPARSE):
                return False
        return 0 not in self.shape(role)


@dataclass(frozen=True, slots=True)
class _Reader:
    family: Family
    config: Mapping[str, Any]

    def whole(self, key: str, default: int | None = None) -> int:
        return whole(self.config, self.family.aliases.get(key, key), default)

    def count(self, *keys: str) -> int:
        """The first key that is there; 0 where none is."""
        key = next((key for key in keys if self.config.get(key) not in (None, 0)), None)
        return 0 if key is None else self.whole(key)

    def sizes(self) -> Sizes:
        hidden, heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        kv_heads = self.whole("num_key_value_heads", heads)
        if heads % kv_heads:
            raise FormatError(
                f"config.json: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        width = self.whole(
            "head_dim", head_dim({"hidden_size": hidden, "num_attention_heads": heads})
        )
        inner = self.whole("intermediate_size", 4 * hidden)
        experts = self.count("num_experts", "num_local_experts", "n_routed_experts")
        expert_inner = (self.count("moe_intermediate_size") or inner) if experts else 0
        shared = self.count("shared_expert_intermediate_size")
        shared = shared or self.count("n_shared_experts") * expert_inner
        latent, rope = self.count("kv_lora_rank"), self.count("qk_rope_head_dim")
        nope, value = self.count("qk_nope_head_dim"), self.count("v_head_dim")
        q_latent = self.count("q_lora_rank")
        by_name = {
            "one": 1,
            "vocab": self.whole("vocab_size"),
            "hidden": hidden,
            "inner": inner,
            "positions": self.whole("max_position_embeddings", 2048),
            "head_dim": width,
            "queries": heads * width,
            "keys": kv_heads * width,
            "fused_qkv": (heads + 2 * kv_heads) * width,
            "fused_gate_up": 2 * inner,
            "experts": experts,
            "expert_inner": expert_inner,
            "shared_inner": shared,
            "latent": latent,
            "rope": rope,
            "nope": nope,
            "value": value,
            "values": heads * value,
            "q_latent": q_latent,
            "queries_latent": heads * (nope + rope),
            "queries_direct": 0 if q_latent else heads * (nope + rope),
            "latent_and_rope": latent + rope,
            "keys_and_values": heads * (nope + value),
        }
        window = self.config.get("sliding_window")
        used = self.family.loses_window and self.config.get("use_sliding_window") is not False
        return Sizes(
            by_name=by_name,
            num_layers=self.whole("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=1 if latent else kv_heads,  # GGUF runs latent attention as one
            head_dim=width,
            num_experts=experts,
            num_dense=self.count("first_k_dense_replace"),
            tie_word_embeddings=bool(self.config.get("tie_word_embeddings", False)),
            lost_window=window if used and window else None,
            shapes=self.family.shapes,
        )
