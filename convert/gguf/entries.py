"""The kinds of entries that a family's metadata is made of, each both ways.

`write` turns config.json into keys (without the architecture's name), `read` puts what keys say
into a config.json. A family (families.py) is a list of these in the order of llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from qtool.convert.gguf.reading import Reading, Scalar
from qtool.errors import FormatError, UnsupportedModel


class Entry(Protocol):
    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        """(key, value) pairs of a config.json whose defaults are filled in."""
        ...

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        """Put what the file says into `config`; entries are read in order."""
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """One key that is one entry of config.json.

    hf        its names there; the first is what reading writes
    default   what a file without the key means
    like      the same by another entry of config.json
    optional  written where config.json has it, and left out of it where a file has not
    zero_is_none  what config.json calls null is 0 in the file
    """

    key: str
    hf: str | tuple[str, ...]
    kind: Literal["whole", "count", "number", "flag"] = "whole"
    default: int | float | bool | None = None
    like: str | None = None
    optional: bool = False
    zero_is_none: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.hf,) if isinstance(self.hf, str) else self.hf

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        value = next((config[name] for name in self.names if config.get(name) is not None), None)
        if value is None and self.like is not None:
            value = config.get(self.like)
        if value is None:
            value = self.default
        if value is None and self.optional:
            return
        wanted = {"number": (int, float), "flag": (bool,)}.get(self.kind, (int,))
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.kind != "flag"):
            raise FormatError(f"config.json: {self.names[0]} is {value!r}")
        if self.kind == "flag":
            yield self.key, bool(value)
            return
        if not 0 <= value < 2.0**32 or (value == 0 and self.kind == "whole"):
            raise FormatError(f"config.json: {self.names[0]} is {value!r}, not positive")
        yield self.key, float(value) if self.kind == "number" else int(value)

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        if self.optional and not reading.has(self.key):
            return
        default: Any = self.default if self.like is None else config.get(self.like)
        reads = {
            "whole": reading.whole,
            "count": reading.count,
            "number": reading.number,
            "flag": reading.flag,
        }
        value = reads[self.kind](self.key, default)
        config[self.names[0]] = None if self.zero_is_none and value == 0 else value


@dataclass(frozen=True, slots=True)
class HeadDim:
    """attention.key_length and value_length.

    always  written even where config.json leaves the head's width to follow from the others
    """

    always: bool = False

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        if config.get("head_dim") is None and not self.always:
            return
        yield "attention.key_length", head_dim(config)
        yield "attention.value_length", head_dim(config)

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        width = reading.whole("attention.key_length", head_dim(config))
        found = reading.whole("attention.value_length", width)
        if found != width:
            raise UnsupportedModel(
                f"{reading.where}: {reading.prefix}.attention.value_length is {found}, not the "
                f"head dimension {width}"
            )
        config["head_dim"] = width


@dataclass(frozen=True, slots=True)
class VocabSize:
    """vocab_size, which a reader takes from the embedding."""

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        yield "vocab_size", int(config["vocab_size"])

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        """Nothing to learn."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A key that is the same in every file of the family."""

    key: str
    value: Scalar

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        yield self.key, self.value

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        """Nothing to learn."""


@dataclass(frozen=True, slots=True)
class Biases:
    """No key: a switch of config.json that shows in which tensors a file has."""

    hf: str
    tensor: str

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        yield from ()

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        config[self.hf] = self.tensor in reading.file.tensors


@dataclass(frozen=True, slots=True)
class SlidingLayers:
    """No key: every `period`-th layer sees the whole text, the others a window."""

    period: int

    def _types(self, layers: int) -> list[str]:
        kinds = ("sliding_attention", "full_attention")
        return [kinds[(layer + 1) % self.period == 0] for layer in range(layers)]

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        yield from ()
        types = self._types(config["num_hidden_layers"])
        pattern = config.get("sliding_window_pattern")
        if config.get("layer_types", types) != types or pattern not in (None, self.period):
            raise UnsupportedModel(
                "config.json: layer_types has other layers with a sliding window than GGUF's "
                f"{config.get('model_type')} means, all but every {self.period}th"
            )

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        config["layer_types"] = self._types(config["num_hidden_layers"])


@dataclass(frozen=True, slots=True)
class AttentionScale:
    """No key: llama.cpp scales scores by the head's width, and in the one model that has
    `largest` layers by hidden / heads.
    """

    largest: int

    def _divisor(self, config: Mapping[str, Any]) -> int:
        if config["num_hidden_layers"] == self.largest:
            return int(config["hidden_size"] // config["num_attention_heads"])
        return head_dim(config)

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        yield from ()
        found, meant = config.get("query_pre_attn_scalar", 256), self._divisor(config)
        if found != meant:
            raise UnsupportedModel(
                f"config.json: query_pre_attn_scalar is {found}, and GGUF's "
                f"{config.get('model_type')} means {meant}"
            )

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        config["query_pre_attn_scalar"] = self._divisor(config)


@dataclass(frozen=True, slots=True)
class LayersWithoutRope:
    """No key: every `interval`-th layer has no positions."""

    interval: int

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        yield from ()
        layers = range(1, config["num_hidden_layers"] + 1)
        meant = [int(layer % self.interval != 0) for layer in layers]
        if (config.get("no_rope_layers") or meant) != meant:
            raise UnsupportedModel(
                "config.json: no_rope_layers has other layers than GGUF's "
                f"{config.get('model_type')} means, every {self.interval}th"
            )

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        config["no_rope_layer_interval"] = self.interval


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The widths of latent attention. GGUF runs it as one kv head of kv_lora_rank + rope."""

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        missing = next((name for name in names if not isinstance(config.get(name), int)), None)
        if missing is not None:
            raise FormatError(f"config.json: {missing} is {config.get(missing)!r}")
        latent, rope, nope, value = (int(config[name]) for name in names)
        if config.get("q_lora_rank") is not None:
            yield "attention.q_lora_rank", int(config["q_lora_rank"])
        yield "attention.kv_lora_rank", latent
        yield "attention.key_length", latent + rope
        yield "attention.value_length", latent
        yield "attention.key_length_mla", nope + rope
        yield "attention.value_length_mla", value

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        rope = reading.whole("rope.dimension_count")
        if not reading.has("attention.key_length_mla"):
            raise UnsupportedModel(
                f"{reading.where} has no key {reading.prefix}.attention.key_length_mla",
                "it was written before llama.cpp split kv_b; convert the original model",
            )
        config["q_lora_rank"] = None
        if reading.has("attention.q_lora_rank"):
            config["q_lora_rank"] = reading.whole("attention.q_lora_rank")
        config["kv_lora_rank"] = reading.whole("attention.kv_lora_rank")
        config["qk_rope_head_dim"] = config["head_dim"] = rope
        config["qk_nope_head_dim"] = reading.whole("attention.key_length_mla") - rope
        config["v_head_dim"] = reading.whole("attention.value_length_mla")
        config["num_key_value_heads"] = config["num_attention_heads"]


@dataclass(frozen=True, slots=True)
class RopeWidth:
    """rope.dimension_count of latent attention, whose reading is `LatentAttention`'s."""

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        yield "rope.dimension_count", int(config["qk_rope_head_dim"])

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        """Nothing more to learn."""


@dataclass(frozen=True, slots=True)
class YarnScale:
    """rope.scaling.yarn_log_multiplier, a tenth of mscale_all_dim in this architecture."""

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        scale = rope.get("mscale_all_dim")
        if not isinstance(scale, int | float) or scale <= 0:
            return
        if rope.get("mscale", scale) != scale:
            raise UnsupportedModel(
                f"config.json: rope's mscale {rope['mscale']} is not its mscale_all_dim {scale}, "
                "and GGUF has one for both"
            )
        yield "rope.scaling.yarn_log_multiplier", 0.1 * scale

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        if reading.has("rope.scaling.yarn_log_multiplier"):
            scale = round(reading.number("rope.scaling.yarn_log_multiplier") / 0.1, 6)
            config["rope_parameters"] |= {"mscale": scale, "mscale_all_dim": scale}


@dataclass(frozen=True, slots=True)
class Gating:
    """expert_gating_func: how the router's scores become weights."""

    name: Literal["softmax", "sigmoid"]

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        found = config.get("scoring_func", self.name)
        if found != self.name:
            raise UnsupportedModel(f"config.json: scoring_func is {found!r}, not {self.name!r}")
        yield "expert_gating_func", {"softmax": 1, "sigmoid": 2}[self.name]

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        config["scoring_func"] = self.name


def head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
