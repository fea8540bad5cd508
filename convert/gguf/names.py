"""Hugging Face names and settings to GGUF's and back, for the families of qtool/arch.py.

Names come from the table of families. The settings ("hyperparameters") are written in the order of
llama.cpp's converter, so that files can be compared byte for byte.

llama.cpp rotates adjacent pairs of q and k in the `llama` architecture (x0 with x1) where Hugging
Face rotates halves (x0 with x[d/2]). Files therefore hold the rows of q and k in another order:

    HF    row (head, half, j)     half in 0..1, j in 0..d/2-1
    GGUF  row (head, j, half)     d = 4: rows 0 1 2 3 of a head become 0 2 1 3

It is a permutation of rows: it applies to dense values, to codes with their scales and to the bytes
of blocks alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from qtool.arch import ARCHITECTURES, Architecture, DecoderConfig, Role, Rope
from qtool.convert.gguf.container import KeyValue
from qtool.convert.gguf.types import ValueType
from qtool.errors import FormatError, UnsupportedModel

ROPE_FREQUENCIES = "rope_freqs.weight"

# Buffers that old checkpoints carry along; they follow from the config.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")


@dataclass(frozen=True, slots=True)
class NameMap:
    """Module names of one model, both ways; a tensor's name adds ".weight" or ".bias"."""

    architecture: Architecture
    config: DecoderConfig
    _hf_to_gguf: Mapping[str, str]
    _gguf_to_hf: Mapping[str, str]
    _roles: Mapping[str, Role]

    @classmethod
    def of(cls, architecture: Architecture, config: DecoderConfig) -> NameMap:
        pairs: dict[str, str] = {}
        roles: dict[str, Role] = {}
        in_blocks = set(architecture.block_roles)
        for role in architecture.tensors:
            blocks = range(config.num_layers) if role in in_blocks else (None,)
            for block in blocks:
                hf = architecture.hf_name(role, block)
                pairs[hf] = architecture.gguf_tensor(role, block)
                roles[hf] = role
        inverse = {gguf: hf for hf, gguf in pairs.items()}
        return cls(architecture, config, pairs, inverse, roles)

    def to_gguf(self, name: str) -> str | None:
        """GGUF's name of a Hugging Face tensor; None for one that is derived and not stored."""
        if name.endswith(_IGNORED_SUFFIXES):
            return None
        module, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias") or module not in self._hf_to_gguf:
            raise UnsupportedModel(
                f"tensor {name!r} has no place in GGUF's {self.architecture.gguf_name} architecture"
            )
        return f"{self._hf_to_gguf[module]}.{suffix}"

    def to_hf(self, name: str) -> str:
        module, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias") or module not in self._gguf_to_hf:
            raise UnsupportedModel(
                f"GGUF tensor {name!r} is not one of the {self.architecture.gguf_name} architecture"
            )
        return f"{self._gguf_to_hf[module]}.{suffix}"

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the config gives a Hugging Face tensor."""
        module, _, suffix = name.rpartition(".")
        config = self.config
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        shapes: dict[Role, tuple[int, ...]] = {
            "embed": (config.vocab_size, hidden),
            "norm": (hidden,),
            "head": (config.vocab_size, hidden),
            "attn_norm": (hidden,),
            "q": (queries, hidden),
            "k": (keys, hidden),
            "v": (keys, hidden),
            "o": (hidden, queries),
            "q_norm": (config.head_dim,),
            "k_norm": (config.head_dim,),
            "mlp_norm": (hidden,),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }
        shape = shapes[self._roles[module]]
        return shape[:1] if suffix == "bias" else shape

    def required(self) -> list[str]:
        """Hugging Face names of the weights that a model cannot be without."""
        tied = self.config.tie_word_embeddings
        return [
            f"{module}.weight" for module, role in self._roles.items() if role != "head" or not tied
        ]

    def row_order(self, module: str) -> Tensor | None:
        """int64 [out]: which Hugging Face row each GGUF row of a module is; None where the same."""
        if not self.architecture.rope_interleaved_in_gguf:
            return None
        heads = {"q": self.config.num_heads, "k": self.config.num_kv_heads}
        role = self._roles[module]
        return interleave_rows(heads[role], self.config.head_dim) if role in heads else None


def interleave_rows(heads: int, head_dim: int) -> Tensor:
    """gguf = hf[order]. For one head of 4: [0, 2, 1, 3]."""
    rows = torch.arange(heads * head_dim)
    return rows.view(heads, 2, head_dim // 2).transpose(1, 2).reshape(-1)


def deinterleave_rows(heads: int, head_dim: int) -> Tensor:
    """hf = gguf[order], the inverse. For one head of 6: [0, 2, 4, 1, 3, 5]."""
    rows = torch.arange(heads * head_dim)
    return rows.view(heads, head_dim // 2, 2).transpose(1, 2).reshape(-1)


def inverse_order(order: Tensor) -> Tensor:
    return torch.argsort(order)


def hparams(config: DecoderConfig, raw: Mapping[str, Any], gguf_name: str) -> list[KeyValue]:
    """The architecture's settings in the converter's order, but for general.file_type.

    raw  config.json: the converter writes key_length and value_length only where it has head_dim
    """
    entries: list[KeyValue] = []

    def put(key: str, value: int | float | str) -> None:
        kind = {int: ValueType.UINT32, float: ValueType.FLOAT32, str: ValueType.STRING}[type(value)]
        entries.append(KeyValue(f"{gguf_name}.{key}", value, kind))

    put("block_count", config.num_layers)
    put("context_length", config.max_position_embeddings)
    put("embedding_length", config.hidden_size)
    put("feed_forward_length", config.intermediate_size)
    put("attention.head_count", config.num_heads)
    put("attention.head_count_kv", config.num_kv_heads)
    if config.rope.kind == "linear":
        put("rope.scaling.type", "linear")
        put("rope.scaling.factor", float(config.rope.factor))
    put("rope.freq_base", float(config.rope.theta))
    put("attention.layer_norm_rms_epsilon", float(config.rms_norm_eps))
    if raw.get("head_dim") is not None:
        put("attention.key_length", config.head_dim)
        put("attention.value_length", config.head_dim)
    return entries


def extra_hparams(config: DecoderConfig, gguf_name: str) -> list[KeyValue]:
    """What the converter writes after general.file_type; the llama architecture alone needs it."""
    if gguf_name != "llama":
        return []
    return [
        KeyValue("llama.vocab_size", config.vocab_size, ValueType.UINT32),
        KeyValue("llama.rope.dimension_count", config.head_dim, ValueType.UINT32),
    ]


def rope_divisors(rope: Rope, head_dim: int) -> Tensor | None:
    """float32 [head_dim / 2] for `rope_freqs.weight`, or None where frequencies are plain.

    In float32 and in the converter's order of operations, so that the bytes are its own.
    """
    if rope.kind != "llama3":
        return None
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    context = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    divisors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(rope.factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(float(1 / ((1 - smooth) / rope.factor + smooth)))
    return torch.tensor(divisors, dtype=torch.float32)


def rope_from_divisors(divisors: Tensor, theta: float) -> Rope:
    """The llama3 parameters that give `rope_freqs.weight`; the inverse of `rope_divisors`.

    The tensor fixes them up to one choice: a frequency's blend is a line in 1/wavelength,
    smooth = context / (high - low) / wavelength - low / (high - low), so that two blended
    frequencies give its slope and offset, and low = 1 (as in every published model) the rest.
    """
    values = divisors.double()
    head_dim = 2 * values.numel()
    factor = float(values.max())
    if factor == 1.0:
        return Rope(theta=theta)
    published = Rope(theta, "llama3", factor, 1.0, 4.0, 8192)
    candidates = [published]
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    blended = (values > 1.0) & (values < factor)
    if int(blended.sum()) >= 2:
        smooth = (1 / values[blended] - 1 / factor) / (1 - 1 / factor)
        inverse_wavelength = frequencies[blended] / (2 * math.pi)
        slope = float((smooth[0] - smooth[-1]) / (inverse_wavelength[0] - inverse_wavelength[-1]))
        offset = slope * float(inverse_wavelength[0]) - float(smooth[0])
        if offset > 0:
            high = 1.0 + 1.0 / offset
            candidates.append(Rope(theta, "llama3", factor, 1.0, high, round(slope * (high - 1.0))))
    for rope in candidates:
        again = rope_divisors(rope, head_dim)
        if again is not None and torch.allclose(again.double(), values, rtol=1e-3):
            return rope
    raise UnsupportedModel(
        f"{ROPE_FREQUENCIES} is no Llama 3 scaling (its divisors run from 1 to {factor:g})"
    )


def find_gguf_architecture(name: object) -> Architecture:
    """The family of a file's general.architecture."""
    found = next((row for row in ARCHITECTURES.values() if row.gguf_name == name), None)
    if found is None:
        known = sorted({row.gguf_name for row in ARCHITECTURES.values()})
        raise UnsupportedModel(
            f"GGUF architecture {name!r} is not supported", f"known: {', '.join(known)}"
        )
    return found


class Settings:
    """Typed reads of a file's metadata; every refusal names the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self._where = where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`; `default` where it is missing, which None makes an error."""
        value = self._metadata.get(key)
        if value is None:
            if default is None:
                raise FormatError(f"{self._where} has no key {key}")
            return default
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not right:
            raise FormatError(f"{self._where}: {key} is {value!r}, not {kind.__name__}")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value: int = self.get(key, int, default)
        if not 0 < value < 2**31:
            raise FormatError(f"{self._where}: {key} is {value}, not a positive 31-bit number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value: float = self.get(key, float, default)
        if not math.isfinite(value) or value <= 0:
            raise FormatError(f"{self._where}: {key} is {value}, not a positive number")
        # the shortest decimal of the stored float32: 1e-05, not 9.999999747378752e-06
        return float(str(numpy.float32(value)))
