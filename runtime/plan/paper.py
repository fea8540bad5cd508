"""A model on paper: what its config.json alone says about bytes and arithmetic.

    weights      every matrix of every role, how often it is there, and which share of them a token
                 is multiplied by (experts: those that its router chooses)
    cache        bytes that a token leaves in the KV cache, over all layers
    activations  what the largest step holds beside weights and cache

Nothing is read but the config, so a model of any size is planned in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.arch import Architecture, Role, find_architecture
from qtool.decoder_config import DecoderConfig
from qtool.json_files import read_json
from qtool.runtime.engine.kv_pool import SCALE_BYTES
from qtool.runtime.memory import LOGITS_COPIES
from qtool.runtime.models.attention_spec import AttentionSpec
from qtool.runtime.models.decoder import attention_specs
from qtool.runtime.models.tensors import EXPERTS, has, required_biases, role_shapes

FLOAT_BYTES = 2
# Copies of a step's hidden states that exist at once: the residual, a layer's input and output.
HIDDEN_COPIES = 3
# Logits that recorded steps draw from, and as many counts of tokens.
KEPT_COPIES = 2


@dataclass(frozen=True, slots=True)
class Matrix:
    """Equal matrices of one role, over all blocks and experts.

    count   how many there are
    active  how many of them a token is multiplied by; fewer than count only for experts
    """

    role: Role
    rows: int
    columns: int
    count: int
    active: int

    @property
    def numel(self) -> int:
        """Weights of all of them."""
        return self.rows * self.columns * self.count

    @property
    def active_numel(self) -> int:
        return self.rows * self.columns * self.active

    @property
    def is_linear(self) -> bool:
        """Whether `quantize` rounds it: not what is looked up, nor the head, nor a router."""
        return self.role not in ("embed", "positions", "head", "router", "shared_router")


@dataclass(frozen=True, slots=True)
class PaperModel:
    """matrices     two-dimensional weights; a tied head is the embedding, listed once
    num_vector      weights of norms and biases
    attention       one a layer
    """

    name: str
    config: DecoderConfig
    architecture: Architecture
    matrices: tuple[Matrix, ...]
    num_vector: int
    attention: tuple[AttentionSpec, ...]
    raw_config: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, raw: Mapping[str, Any]) -> PaperModel:
        """Raises UnsupportedModel for a family that the native decoder does not run, FormatError
        for a config that is wrong.
        """
        architecture = find_architecture(raw)
        config = DecoderConfig.from_hf(raw)
        shapes = role_shapes(architecture, config)
        matrices, num_vector = [], 0
        biases = required_biases(architecture, config)
        for role in architecture.tensors:
            in_block = role in architecture.block_roles
            blocks = [
                block
                for block in (range(config.num_layers) if in_block else (None,))
                if has(config, role, block)
            ]
            shape = shapes.get(role)
            if not blocks or shape is None or 0 in shape:
                continue
            experts = config.experts if role in EXPERTS else None
            count = len(blocks) * (1 if experts is None else experts.count)
            active = len(blocks) * (1 if experts is None else experts.per_token)
            num_vector += count * shape[0] * (role in biases)
            if len(shape) == 1:
                num_vector += count * shape[0]
            else:
                matrices.append(Matrix(role, shape[0], shape[1], count, active))
        return cls(
            name=name,
            config=config,
            architecture=architecture,
            matrices=tuple(matrices),
            num_vector=num_vector,
            attention=attention_specs(config),
            raw_config=raw,
        )

    @property
    def num_weights(self) -> int:
        return sum(matrix.numel for matrix in self.matrices) + self.num_vector

    @property
    def num_active_weights(self) -> int:
        """That a token is multiplied by: the head counts, what is only looked up does not."""
        active = sum(matrix.active_numel for matrix in self.matrices if matrix.role != "embed")
        tied = self.config.tie_word_embeddings
        return active + (self.config.vocab_size * self.config.hidden_size if tied else 0)

    @property
    def num_head_weights(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    def kv_bytes_per_token(self, *, int8: bool = False) -> int:
        """Over all layers; as `kv_pool.block_bytes` lays them out."""
        channels = sum(spec.cached_channels for spec in self.attention)
        if not int8:
            return channels * FLOAT_BYTES
        heads = sum(spec.num_kv_heads * (1 if spec.value_in_key else 2) for spec in self.attention)
        return channels + heads * SCALE_BYTES

    def attended_tokens(self, context: float) -> float:
        """Cached tokens that a query at `context` reads, as a mean over the layers: windows cut
        it.
        """
        seen = sum(min(context, spec.window or context) for spec in self.attention)
        return seen / len(self.attention)

    @property
    def attention_operations(self) -> int:
        """Of one query token and one cached one: two for each multiplication, over all layers and
        heads.
        """
        return sum(2 * spec.num_heads * (spec.key_dim + spec.value_dim) for spec in self.attention)

    def activation_bytes(self, *, max_num_batched_tokens: int, max_num_seqs: int) -> int:
        """What the largest step holds: hidden states, the widest layer's output, three copies of
        the logits in float32 (as `runtime.memory` reserves them). And beside it what recorded steps
        and penalties keep on a GPU: once more the logits, and as many counts of tokens.
        """
        config = self.config
        widest = 2 * max(matrix.rows for matrix in self.matrices if matrix.is_linear)
        per_token = (HIDDEN_COPIES * config.hidden_size + widest) * FLOAT_BYTES
        logits = (LOGITS_COPIES + KEPT_COPIES) * max_num_seqs * config.vocab_size * 4
        return max_num_batched_tokens * per_token + logits


def read_config(model: str) -> tuple[str, Mapping[str, Any]]:
    """(name, config.json) of a model: a config.json itself, or whatever `resolve_config` finds."""
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".json":
        name = path.parent.name if path.name == "config.json" else path.stem
        return name or model, _text_part(read_json(path))
    if path.is_file() and path.suffix == ".gguf":
        from qtool.convert.formats import open_weights
        from qtool.source import resolve

        source = resolve(model)
        return source.short_name, dict(open_weights(source).config)
    from qtool.source import resolve

    source = resolve(model, config_only=True)
    return source.short_name, _text_part(read_json(source.path / "config.json"))


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A multimodal model's part that writes text."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config
